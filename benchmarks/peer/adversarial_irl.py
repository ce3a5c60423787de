"""The peer of the adversarial_irl benchmark: imitation's GAIL and AIRL with Stable-Baselines3's PPO on one JSON case.

The environment is a batch of `num` gridworlds stepped together in NumPy (SB3's own wrapper steps them one by one in
Python, which is slower), episodes of `length` steps cut off by time. One sample is one round: `num * length` steps,
the epochs of PPO on them, and the updates of the discriminator. Needs imitation and stable-baselines3.
"""

import contextlib
import json
import resource
import sys
import time

import gymnasium
import imitation
import numpy as np
import stable_baselines3
import torch
from imitation.algorithms.adversarial.airl import AIRL
from imitation.algorithms.adversarial.gail import GAIL
from imitation.data.types import TrajectoryWithRew
from imitation.rewards.reward_nets import BasicRewardNet, BasicShapedRewardNet
from imitation.util import logger
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv


class Grids(VecEnv):
    """Gridworlds side by side; an observation is the state's number, one-hot."""

    def __init__(self, case):
        self.next_state, self.length = np.asarray(case["next_state"]), case["length"]
        states, actions = self.next_state.shape
        self.one_hot, self.rng = np.eye(states, dtype=np.float32), np.random.default_rng(case["seed"])
        self.render_mode = None
        space = gymnasium.spaces.Box(0.0, 1.0, (states,), np.float32)
        super().__init__(case["num"], space, gymnasium.spaces.Discrete(actions))

    def reset(self):
        self.time, self.states = 0, self.rng.integers(0, len(self.next_state), self.num_envs)
        return self.one_hot[self.states]

    def step_async(self, actions):
        self.actions = actions

    def step_wait(self):
        self.states = self.next_state[self.states, self.actions]
        self.time += 1
        infos = [{} for _ in range(self.num_envs)]
        done = self.time == self.length
        if done:
            for info, state in zip(infos, self.states, strict=True):
                info.update({"terminal_observation": self.one_hot[state], "TimeLimit.truncated": True})
        observations = self.reset() if done else self.one_hot[self.states]
        return observations, np.zeros(self.num_envs, np.float32), np.full(self.num_envs, done), infos

    def close(self):
        pass

    def get_attr(self, attr_name, indices=None):
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        setattr(self, attr_name, value)

    def env_method(self, method_name, *args, indices=None, **kwargs):
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class, indices=None):
        return [False] * self.num_envs


def build(case):
    """The trainer with imitation's own reward networks, all else as the case says."""
    torch.set_num_threads(1)  # quicker than two on arrays this small
    torch.manual_seed(case["seed"])
    venv, steps = Grids(case), case["num"] * case["length"]
    eye = venv.one_hot
    demonstrations = [
        TrajectoryWithRew(obs=eye[s], acts=np.asarray(a), infos=None, terminal=False, rews=np.zeros(len(a), np.float32))
        for s, a in zip(case["states"], case["actions"], strict=True)
    ]
    learner = PPO(
        "MlpPolicy", venv, n_steps=case["length"], batch_size=min(256, steps), n_epochs=4, gamma=case["discount"],
        ent_coef=0.0, learning_rate=1e-3, seed=case["seed"], device="cpu",
    )  # fmt: skip
    spaces = (venv.observation_space, venv.action_space)
    if case["method"] == "gail":
        network = BasicRewardNet(*spaces)
    else:
        network = BasicShapedRewardNet(*spaces, use_action=False, discount_factor=case["discount"])
    trainer = {"gail": GAIL, "airl": AIRL}[case["method"]]
    return trainer(
        demonstrations=demonstrations, demo_batch_size=min(1024, steps), venv=venv, gen_algo=learner,
        reward_net=network, n_disc_updates_per_round=case["discriminator_steps"], gen_train_timesteps=steps,
        gen_replay_buffer_capacity=steps, custom_logger=logger.configure(None, ("log",)), disc_opt_kwargs={"lr": 1e-3},
    )  # fmt: skip


def score(case, learner):
    """The policy's exact discounted return, 0 for a random policy and 1 for the expert's."""
    next_state, reward = np.asarray(case["next_state"]), np.asarray(case["reward"])
    states = len(reward)
    with torch.no_grad():
        distribution = learner.policy.get_distribution(torch.eye(states)).distribution
        policy = distribution.probs.numpy().astype(np.float64)
    between = np.zeros((states, states))
    np.add.at(between, (np.arange(states)[:, None], next_state), policy)
    found = np.linalg.solve(np.eye(states) - case["discount"] * between, reward).mean()
    return float((found - case["random_return"]) / (case["expert_return"] - case["random_return"]))


def run(case):
    """One round first, then rounds * (1 + repeats) timed ones, the first `rounds` of them left out of the samples."""
    trainer = build(case)
    amount = case["num"] * case["length"]
    marks = [(time.perf_counter(), time.process_time())]
    rounds = 1 + case["rounds"] * (1 + case["repeats"])
    trainer.train(rounds * amount, callback=lambda _: marks.append((time.perf_counter(), time.process_time())))
    wall, cpu = np.diff(np.array(marks), axis=0).T.tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "side": f"imitation {imitation.__version__}",
        "unit": "environment steps",
        "amount": float(amount),
        "first": wall[0],
        "samples": wall[1 + case["rounds"] :],
        "cpu_samples": cpu[1 + case["rounds"] :],
        "arithmetic": "float32",
        "process_peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "quality": {"score": score(case, trainer.gen_algo), "rounds": float(rounds)},
        "details": {"threads": torch.get_num_threads()},
        "environment": {
            "device_kind": "cpu",
            "python": sys.version.split()[0],
            **{module.__name__: module.__version__ for module in (torch, stable_baselines3, imitation)},
        },
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        record = run(json.load(sys.stdin))
    print(json.dumps(record))
