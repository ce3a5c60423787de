"""What `jaxalign irl` does: load or draw, learn under `fit`, evaluate, report."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxalign import Algorithm, Network, replicate
from jaxalign.cli.irl import Irl
from jaxalign.cli.irl_data import Prepared, check_options, prepare, step_count
from jaxalign.cli.irl_report import write_report
from jaxalign.irl import (
    boltzmann_policy,
    chain_samples,
    evaluate_reward,
    gaussian_prior,
    linear_reward,
    max_causal_entropy_irl,
    posterior_chains,
)
from jaxalign.networks import MLP
from jaxalign.runtime import fit


def run(options: Irl, console: Console) -> dict[str, Any]:
    """The whole job; returns what was measured."""
    if not options.resume and (options.out / "checkpoints").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    check_options(options)
    data = prepare(options)
    for note in data.notes:
        console.print(note)
    learner = _maxent if options.method == "maxent" else _bayesian
    algorithm, rewards_of = learner(options, data)
    lanes = replicate(algorithm, options.seeds)
    counts = jnp.asarray(data.counts)
    state, metrics = fit(
        Algorithm(lanes.init, lambda state, _: lanes.step(state, counts)),
        jax.random.key(options.seed),
        None,
        steps=step_count(options),
        directory=options.out,
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        fingerprint=_fingerprint(options, data),
        progress=console,
    )
    rewards = np.asarray(jax.jit(jax.vmap(rewards_of))(state))
    np.savez_compressed(options.out / "reward.npz", reward=rewards)
    report, results = write_report(options, data, metrics, rewards)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def _maxent(options: Irl, data: Prepared) -> tuple[Algorithm, Any]:
    """The Algorithm, and what reads the one reward [1, S] from a seed's state."""
    mdp, features = data.world.mdp, data.world.features
    if options.reward == "states":
        features = np.eye(mdp.num_states, dtype=np.float32)
    elif features is None:
        raise ValueError(f"--reward {options.reward} needs `features` [S, F] in {options.world}")
    inputs = jnp.asarray(features)
    network = linear_reward(features.shape[1])
    if options.reward == "mlp":
        network = Network.from_linen(MLP((32, 32, 1)), inputs[:1])
    algorithm = max_causal_entropy_irl(
        mdp, network, optax.adam(options.learning_rate), None, features=inputs, temperature=options.temperature
    )
    return algorithm, lambda state: evaluate_reward(network, state.params, inputs)[None]


def _bayesian(options: Irl, data: Prepared) -> tuple[Algorithm, Any]:
    """The Algorithm, and what reads the draws [chains * samples, S] from a seed's state."""
    mdp, samples = data.world.mdp, step_count(options) // 2
    prior = gaussian_prior(mdp.num_states, scale=options.prior_scale)

    def log_posterior(reward: Any, counts: Any) -> Any:
        # Values to 1e-4 are far finer than the posterior, and halve the iterations.
        log_policy = boltzmann_policy(mdp, reward, beta=1.0 / options.temperature, tolerance=1e-4)
        return prior.log_prob(reward) + jnp.sum(counts * log_policy)

    algorithm = posterior_chains(
        log_posterior, prior, num_chains=options.chains, num_samples=samples, num_warmup=samples,
        num_integration_steps=20, target_acceptance=0.65,  # the hard maximum of Q* makes the posterior rough
    )  # fmt: skip
    return algorithm, lambda state: chain_samples(state, prior).reshape(-1, mdp.num_states)


def _fingerprint(options: Irl, data: Prepared) -> dict[str, Any]:
    """What must be the same when a run is resumed."""
    free = {"out", "resume", "checkpoint_every", "world", "demonstrations"}
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    return {**fixed, "data": data.digest}
