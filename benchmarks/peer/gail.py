"""The peer of the gail benchmark: imitation's GAIL or AIRL with Stable-Baselines3's PPO, on one JSON case.

One sample is one round: num_envs * num_steps steps, the epochs of PPO on them, and the updates of the discriminator.
Needs imitation, which brings stable-baselines3 and gymnasium.
"""

import contextlib
import importlib.metadata
import json
import resource
import sys
import time

import numpy as np
import torch
from imitation.algorithms.adversarial.airl import AIRL
from imitation.algorithms.adversarial.gail import GAIL
from imitation.data.types import TrajectoryWithRew
from imitation.rewards.reward_nets import BasicRewardNet, BasicShapedRewardNet
from imitation.util import logger
from imitation.util.networks import RunningNorm
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env


def build(case):
    """The trainer, its sizes as the case says."""
    torch.set_num_threads(1)  # quicker than two on networks this small
    torch.manual_seed(case["seed"])
    amount = case["num_envs"] * case["num_steps"]
    worlds = make_vec_env("CartPole-v1", case["num_envs"], seed=case["seed"])
    learner = PPO(
        "MlpPolicy", worlds, n_steps=case["num_steps"], batch_size=case["batch_size"], n_epochs=case["num_epochs"],
         gamma=case["discount"], ent_coef=0.0, learning_rate=case["learning_rate"], seed=case["seed"], device="cpu",
    )  # fmt: skip
    demonstrations = [
        TrajectoryWithRew(
            obs=np.asarray(seen, np.float32), acts=np.asarray(taken), infos=None, terminal=False,
            rews=np.zeros(len(taken), np.float32),
        )
        for seen, taken in zip(case["observations"], case["actions"], strict=True)
    ]  # fmt: skip
    spaces, norm = (worlds.observation_space, worlds.action_space), {"normalize_input_layer": RunningNorm}
    if case["method"] == "gail":
        trainer, network = GAIL, BasicRewardNet(*spaces, **norm)
    else:
        trainer, network = AIRL, BasicShapedRewardNet(*spaces, discount_factor=case["discount"], **norm)
    return trainer(
        demonstrations=demonstrations, demo_batch_size=case["discriminator_batch"], venv=worlds, gen_algo=learner,
        reward_net=network, n_disc_updates_per_round=case["discriminator_steps"], gen_train_timesteps=amount,
        gen_replay_buffer_capacity=amount, allow_variable_horizon=True,
        disc_opt_kwargs={"lr": case["discriminator_learning_rate"]}, custom_logger=logger.configure(None, ("log",)),
    )  # fmt: skip


def score(case, learner):
    """How long 32 episodes of the policy last, and their mean distance from the mark."""
    worlds = make_vec_env("CartPole-v1", 32, seed=99)
    seen, alive, steps, away = worlds.reset(), np.ones(32, bool), 0, 0.0
    while alive.any():
        seen, _, done, infos = worlds.step(learner.predict(seen, deterministic=False)[0])
        true = np.stack([i["terminal_observation"] if d else s for s, d, i in zip(seen, done, infos, strict=True)])
        steps += alive.sum()
        away += np.abs(true[alive, 0] - case["mark"]).sum()
        alive &= ~done
    return {"steps balanced": float(steps / 32), "metres from mark": float(away / steps)}


def run(case):
    """`rounds` rounds, the first of them apart."""
    trainer = build(case)
    amount = case["num_envs"] * case["num_steps"]
    marks = [(time.perf_counter(), time.process_time())]
    trainer.train(case["rounds"] * amount, callback=lambda _: marks.append((time.perf_counter(), time.process_time())))
    wall, cpu = np.diff(np.array(marks), axis=0).T.tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    versions = {name: importlib.metadata.version(name) for name in ("torch", "stable-baselines3", "imitation")}
    return {
        "side": f"imitation {versions['imitation']}",
        "unit": "environment steps",
        "amount": float(amount),
        "first": wall[0],
        "samples": wall[1:],
        "cpu_samples": cpu[1:],
        "arithmetic": "float32",
        "process_peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "quality": score(case, trainer.gen_algo),
        "details": {"threads": torch.get_num_threads(), "seeds": 1},
        "environment": {"device_kind": "cpu", "python": sys.version.split()[0], **versions},
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        record = run(json.load(sys.stdin))
    print(json.dumps(record))
