"""The peers of the ppo benchmark: rejax or Stable-Baselines3, as the case says; one JSON case in, one JSON object out.

rejax's own `train` evaluates as it goes; here its `train_iteration` is scanned by itself, which is the same training.
"""

import contextlib
import importlib.metadata
import json
import resource
import statistics
import sys
import time


def timed(function, *args):
    """(seconds, processor seconds, what it gave)."""
    import jax

    cpu_began, began = time.process_time(), time.perf_counter()
    out = jax.block_until_ready(function(*args))
    return time.perf_counter() - began, time.process_time() - cpu_began, out


def rejax_side(case):
    """Trainings of all seeds at once, and in `details` one after another."""
    import jax
    from rejax import PPO
    from rejax.evaluate import evaluate

    jax.config.update("jax_enable_compilation_cache", False)
    algorithm = PPO.create(
        env="CartPole-v1", num_envs=case["num_envs"], num_steps=case["num_steps"], num_epochs=case["num_epochs"],
        num_minibatches=case["num_minibatches"], learning_rate=case["learning_rate"], max_grad_norm=0.5, gamma=0.99,
        gae_lambda=0.95, clip_eps=0.2, ent_coef=0.01, vf_coef=0.5, agent_kwargs={"activation": "tanh"},
    )  # fmt: skip
    rollouts = case["steps"] // (case["num_envs"] * case["num_steps"])

    def one(key):
        return jax.lax.scan(
            lambda state, _: (algorithm.train_iteration(state), None), algorithm.init_state(key), None, rollouts
        )[0]

    ways = {"vmap": jax.vmap(one), "map": lambda keys: jax.lax.map(one, keys)}
    keys = jax.random.split(jax.random.PRNGKey(case["seed"]), case["seeds"])
    samples, compiles = {}, {}
    for name, way in ways.items():
        if name == "map" and case["seeds"] == 1:
            continue
        began = time.perf_counter()
        program = jax.jit(way).lower(keys).compile()
        compiles[name] = time.perf_counter() - began
        samples[name] = [timed(program, keys) for _ in range(4)]
    state = samples["vmap"][-1][2]

    def returns(lane):
        act = algorithm.make_act(lane)
        return evaluate(act, jax.random.PRNGKey(1), algorithm.env, algorithm.env_params, 32, 500)[1].mean()

    scores = jax.jit(lambda lanes: jax.lax.map(returns, lanes))(state).tolist()
    amount = case["seeds"] * rollouts * case["num_envs"] * case["num_steps"]
    rates = {name: amount / statistics.median(s[0] for s in found[1:]) for name, found in samples.items()}
    return {
        "side": f"rejax {importlib.metadata.version('rejax')}",
        "amount": float(amount),
        "compile": compiles["vmap"],
        "first": samples["vmap"][0][0],
        "samples": [s[0] for s in samples["vmap"][1:]],
        "cpu_samples": [s[1] for s in samples["vmap"][1:]],
        "quality": {"return": sum(scores) / len(scores), "median return": statistics.median(scores)},
        "details": {"steps per second": rates, "compile seconds": compiles},
        "environment": versions("jax", "jaxlib", "rejax", "gymnax"),
    }


def stable_baselines_side(case):
    """Rollouts, each with what is learned from it; one seed."""
    import numpy as np
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    class Clock(BaseCallback):
        def __init__(self):
            super().__init__()
            self.marks = []

        def _on_rollout_start(self):
            self.marks.append((time.perf_counter(), time.process_time()))

        def _on_training_end(self):
            self._on_rollout_start()

        def _on_step(self):
            return True

    torch.set_num_threads(1)  # quicker than two on networks this small
    amount = case["num_envs"] * case["num_steps"]
    model = PPO(
        "MlpPolicy", make_vec_env("CartPole-v1", case["num_envs"], seed=case["seed"]), n_steps=case["num_steps"],
        batch_size=amount // case["num_minibatches"], n_epochs=case["num_epochs"], learning_rate=case["learning_rate"],
        ent_coef=0.01, seed=case["seed"], device="cpu",
    )  # fmt: skip
    clock = Clock()
    model.learn(case["steps"], callback=clock)
    wall, cpu = np.diff(np.array(clock.marks), axis=0).T.tolist()
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 8, seed=99), n_eval_episodes=32, deterministic=False)
    return {
        "side": f"stable-baselines3 {importlib.metadata.version('stable-baselines3')}",
        "amount": float(amount),
        "first": wall[0],
        "samples": wall[1:],
        "cpu_samples": cpu[1:],
        "quality": {"return": float(mean), "median return": float(mean)},
        "details": {"threads": torch.get_num_threads()},
        "environment": versions("torch", "stable-baselines3", "gymnasium"),
    }


def versions(*packages):
    """The device and what is installed."""
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"device_kind": "cpu", "python": sys.version.split()[0], **found}


def run(case):
    """The peer the case names."""
    record = {"rejax": rejax_side, "stable-baselines3": stable_baselines_side}[case["peer"]](case)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"unit": "environment steps", "arithmetic": "float32", "process_peak_bytes": peak, **record}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = run(json.load(sys.stdin))
    print(json.dumps(answer))
