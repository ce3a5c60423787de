"""How many effective posterior samples of a reward per second, against PolicyWalk in NumPy on the same posterior?

Rewards of a 5 x 5 grid, uniform on [-1, 1] a priori, given 20 demonstrations of 10 steps by a Boltzmann demonstrator.
The unit is the least bulk effective sample size over the 25 entries, by the same NumPy code for both sides, and the
time includes burn-in or adaptation but no compilation. "policy walk" makes the peer's own moves in many chains at once,
"hmc" uses gradients; both take exact values from policy iteration and share the chains among the processor cores, each
a device of its own. The posterior means should agree to about 1 / sqrt(effective samples) of a standard deviation,
which is 0.58 at most. The peer runs once.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Measurement, measure_host
from benchmarks.peer.bayesian_irl import make_problem, summarise
from jaxalign.irl.bayesian import direct_boltzmann_policy, log_posterior, policy_walk_chain, uniform_prior
from jaxalign.irl.bayesian_sampling import hmc
from jaxalign.irl.trajectories import Trajectories
from jaxalign.mdp import dense_transition, gridworld
from jaxalign.types import Array, Key


def cases(quick: bool) -> list[dict[str, Any]]:
    """The two samplers, one posterior."""
    problem = {
        "height": 5, "width": 5, "slip": 0.1, "discount": 0.9, "beta": 3.0, "demonstrations": 20, "length": 10,
        "seed": 0, "peer_steps": 2_000 if quick else 400_000, "peer_burn_in": 1_000 if quick else 10_000,
        "peer_thinning": 10, "peer_step_size": 0.4, "repeats": 1 if quick else 2,
    }  # fmt: skip
    walk = {"chains": 64, "burn_in": 3000, "samples": 600, "thinning": 20, "step_size": 0.4}
    chains = {"chains": 64, "warmup": 100, "samples": 600, "integration_steps": 20}
    if quick:
        walk |= {"burn_in": 200, "samples": 50}
        chains |= {"warmup": 50, "samples": 40, "integration_steps": 5}
    return [{"name": "policy walk", **problem, **walk}, {"name": "hmc", **problem, **chains}]


def one_entry(key: Key, reward: Array, *, step_size: float, bounds: tuple[float, float]) -> Array:
    """The peer's move: one entry of reward [S] by U(-step_size, step_size), or none if that leaves the box."""
    entry_key, size_key = jax.random.split(key)
    entry = jax.nn.one_hot(jax.random.randint(entry_key, (), 0, reward.size), reward.size)
    moved = reward + step_size * entry * jax.random.uniform(size_key, minval=-1.0, maxval=1.0)
    return jnp.where((moved < bounds[0]) | (moved > bounds[1]), reward, moved)


def run(case: dict[str, Any]) -> Measurement:
    """Effective samples per second of many chains."""
    # Small arrays keep one core busy at most: without a device and a thread for each, the others would idle.
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    chains = -(-case["chains"] // jax.device_count())
    mdp = gridworld(case["height"], case["width"], slip=case["slip"], discount=case["discount"])
    transition, _, states, actions = make_problem(case)
    np.testing.assert_allclose(dense_transition(mdp.transition), transition, atol=1e-6)
    trajectories = Trajectories(jnp.asarray(states), jnp.asarray(actions), jnp.ones(states.shape, bool))
    prior = uniform_prior(len(transition))
    posterior = log_posterior(mdp, trajectories, prior, beta=case["beta"], policy=direct_boltzmann_policy)

    def walk(key: Key) -> Array:
        start_key, walk_key = jax.random.split(key)
        return policy_walk_chain(
            walk_key, posterior, prior.sample(start_key), num_samples=case["samples"], burn_in=case["burn_in"],
            thinning=case["thinning"], step_size=case["step_size"], bounds=(-1.0, 1.0), move=one_entry,
        ).samples  # fmt: skip

    def sample(key: Key) -> Array:
        if case["name"] == "policy walk":
            return jax.vmap(walk)(jax.random.split(key, chains))
        return hmc(
            key, posterior, prior, num_chains=chains, num_samples=case["samples"], num_warmup=case["warmup"],
            num_integration_steps=case["integration_steps"], target_acceptance=0.7,
        ).samples  # fmt: skip

    compiled = jax.jit(sample)
    keys = [jax.device_put(jax.random.key(i), device) for i, device in enumerate(jax.devices())]
    with ThreadPoolExecutor(len(keys)) as threads:
        measured = measure_host(
            lambda: list(threads.map(lambda key: jax.block_until_ready(compiled(key)), keys)),
            unit="effective samples", amount=1.0, warmup=0, repeats=case["repeats"],
            quality=lambda parts: summarise(np.concatenate(parts)),
        )  # fmt: skip
    return dataclasses.replace(measured, amount=measured.quality["min_ess"])
