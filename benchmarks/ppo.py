"""How many environment steps a second does PPO learn from, against rejax (JAX) and Stable-Baselines3 (torch)?

CartPole, the same work on every side: environments, steps of a rollout, epochs, minibatches, two separate tanh networks
of 64 x 64, no evaluation on the way. One run is a whole training of `seeds` seeds in one program (the torch peer: one
rollout and what is learned from it, of one seed). Our seeds are spread over the cores by `sweep(mesh=...)` and run one
after another on each; rejax's run side by side as it documents (`vmap`), and also one after another in `details`.
Compilation is apart. Quality is the return of the last policies,
actions drawn, at most 500; with these settings it is still on its way up.
"""

import math
import os
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Measurement, measure
from jaxalign import sweep, train
from jaxalign.environments import cartpole
from jaxalign.rl import act_with, actor_critic, evaluate, ppo, ppo_optimizer

LEARNING_RATE = 1e-3


def cases(quick: bool) -> list[dict[str, Any]]:
    """One and sixteen seeds against rejax, one against Stable-Baselines3; few and many environments."""
    shared = {"num_steps": 128, "num_epochs": 4, "num_minibatches": 4, "learning_rate": LEARNING_RATE, "seed": 0}
    sizes = (8,) if quick else (8, 64)
    found = []
    for num_envs in sizes:
        steps = 8_192 if quick else 131_072
        for peer, seeds in (("rejax", 1), ("rejax", 2 if quick else 16), ("stable-baselines3", 1)):
            name = f"{peer}, {num_envs} environments, {seeds} seed{'s' if seeds > 1 else ''}"
            found.append({"name": name, "peer": peer, "num_envs": num_envs, "seeds": seeds, "steps": steps, **shared})
    return found


def run(case: dict[str, Any]) -> Measurement:
    """Environment steps per second of whole trainings."""
    # Small arrays keep one core busy at most: seeds are spread over a device for each core.
    cores = math.gcd(os.cpu_count() or 1, case["seeds"])
    jax.config.update("jax_num_cpu_devices", cores)
    mesh = jax.make_mesh((jax.device_count(),), ("sweep",), axis_types=(jax.sharding.AxisType.Auto,))
    world = cartpole()
    model = actor_critic(world)
    sizes = {name: case[name] for name in ("num_envs", "num_steps", "num_epochs", "num_minibatches")}
    algorithm = ppo(world, model, ppo_optimizer(case["learning_rate"]), entropy_coefficient=0.01, **sizes)
    rollouts = case["steps"] // (case["num_envs"] * case["num_steps"])

    def one(_: None, key: jax.Array) -> Any:
        state, _ = train(algorithm, key, None, length=rollouts)
        return state.params

    def score(params: Any) -> dict[str, Any]:
        def returns(lane: Any) -> jax.Array:
            return evaluate(jax.random.key(1), world, act_with(model, lane), episodes=32, max_steps=500).returns.mean()

        scores = jax.jit(lambda lanes: jax.lax.map(returns, lanes))(params)
        return {"return": float(jnp.mean(scores)), "median return": statistics.median(scores.tolist())}

    return measure(
        lambda keys: sweep(one, None, keys, mesh=mesh),
        jax.random.split(jax.random.key(case["seed"]), case["seeds"]),
        unit="environment steps",
        amount=case["seeds"] * rollouts * case["num_envs"] * case["num_steps"],
        warmup=0,
        repeats=3,
        quality=score,
    )
