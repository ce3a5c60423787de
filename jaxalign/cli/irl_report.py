"""The tables, pictures and files in which `jaxalign irl` says what it found."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.cli.irl import Irl
from jaxalign.cli.irl_data import Prepared, policy_of
from jaxalign.irl import bulk_ess, epic_distance, expected_value_difference, policy_divergence, split_rhat
from jaxalign.mdp import value_iteration
from jaxalign.runtime.figures import curves, maps
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval

MOST_DRAWS = 200  # posterior draws whose policies are averaged
LABELS = {
    "held_out_nll": "held-out demonstrations, nats per action",
    "value_difference": "expected value difference",
    "value_difference_share": "the same, as a share of a random policy's",
    "policy_divergence": "divergence from the demonstrator's policy, nats per step",
    "epic": "EPIC distance to the true reward",
    "rhat": "worst R-hat of the chains (below 1.01 is well mixed)",
    "ess": "least effective samples of a state's reward",
}


def measure(options: Irl, data: Prepared, rewards: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure of each seed [seeds] for rewards [seeds, draws, S]; those of the truth only where it is known.

    The policy of a posterior is the mean of its draws' policies; its value difference is that of the mean reward.
    """
    mdp, truth = data.world.mdp, data.world.reward
    chosen = np.linspace(0, rewards.shape[1] - 1, min(MOST_DRAWS, rewards.shape[1])).round().astype(int)

    @jax.jit
    def one(mdp: Any, draws: Any, held_out: Any, truth: Any) -> dict[str, Any]:
        policies = jax.lax.map(lambda reward: jnp.exp(policy_of(options, mdp, reward)), draws[chosen], batch_size=32)
        log_policy = jnp.log(jnp.mean(policies, axis=0))
        found = {"held_out_nll": -jnp.sum(held_out * log_policy) / jnp.sum(held_out)}
        if truth is None:
            return found
        mean = jnp.mean(draws, axis=0)
        greedy = jnp.log(value_iteration(mdp, mean).policy)
        uniform = jnp.full_like(greedy, -jnp.log(mdp.num_actions))
        difference = expected_value_difference(mdp, truth, greedy)
        at_random = expected_value_difference(mdp, truth, uniform)
        # Where every policy earns the same there is no share to lose.
        some = at_random > 1e-4 * jnp.max(jnp.abs(truth))
        return found | {
            "value_difference": difference,
            "value_difference_share": jnp.where(some, difference / at_random, jnp.nan),
            "policy_divergence": policy_divergence(mdp, policy_of(options, mdp, truth), log_policy),
            "epic": epic_distance(mean, truth, mdp),
        }

    known = None if truth is None else jnp.asarray(truth)
    def mixing(draws: np.ndarray) -> dict[str, Any]:
        if options.method != "bayesian":
            return {}
        chains = jnp.asarray(draws).reshape(options.chains, -1, draws.shape[-1])
        return {"rhat": jnp.max(split_rhat(chains)), "ess": jnp.min(bulk_ess(chains))}

    each = [mixing(draws) | one(mdp, jnp.asarray(draws), jnp.asarray(data.held_out), known) for draws in rewards]
    return {name: np.array([float(found[name]) for found in each]) for name in LABELS if name in each[0]}


def write_report(
    options: Irl, data: Prepared, metrics: dict[str, np.ndarray], rewards: np.ndarray
) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html and PNG pictures; return the Report, to be printed, and what was measured."""
    found = measure(options, data, rewards)
    intervals = _intervals(jax.random.key(options.seed), np.stack(list(found.values())))
    results: dict[str, Any] = {
        name: {"mean": interval, "seeds": [None if np.isnan(x) else float(x) for x in values]}
        for (name, values), interval in zip(found.items(), intervals, strict=True)
    }
    report = Report("A reward learned from demonstrations")
    what = "Maximum causal entropy" if options.method == "maxent" else "Bayesian"
    report.text(f"{what} IRL, temperature {options.temperature:g}, {options.seeds} seeds.")
    for note in data.notes:
        report.text(note)
    report.table(
        ["measure", "mean over seeds", "range"],
        [
            [LABELS[name], estimate(*results[name]["mean"]), _range(values)]
            for name, values in found.items()
        ],
        caption=f"95% bootstrap intervals over seeds. Choosing at random costs {np.log(data.held_out.shape[1]):.3f} "
        "nats per action. The value difference is what planning with the learned reward loses under the true one.",
    )
    pictures = {"learning.png": (curves(metrics, _drawn(metrics), title="Learning"), "Learning, all seeds")}
    if data.world.shape is not None:
        pictures["reward.png"] = (_maps(options, data, rewards), _map_caption(options))
    for file, (figure, caption) in pictures.items():
        figure.savefig(options.out / file)
        report.figure(figure, caption=caption)
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return report, results


def _range(values: np.ndarray) -> str:
    return "not measured" if np.isnan(values).any() else f"{values.min():.4g} to {values.max():.4g}"


def _drawn(metrics: dict[str, np.ndarray]) -> list[str]:
    return [name for name in ("loss", "gradient_norm", "acceptance", "step_size") if name in metrics]


def _maps(options: Irl, data: Prepared, rewards: np.ndarray) -> Any:
    """The true reward beside the learned one and its spread, all less their mean: constants are not identified."""
    shape = data.world.shape
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    draws = centred[:, 0] if options.method == "maxent" else centred[0]
    images = {"learned": draws.mean(axis=0), "spread": draws.std(axis=0)}
    if data.world.reward is not None and data.world.reward.ndim == 1:
        images = {"true": data.world.reward - data.world.reward.mean(), **images}
    return maps({name: image.reshape(shape) for name, image in images.items()}, title="Reward of each state")


def _map_caption(options: Irl) -> str:
    if options.method == "maxent":
        return "Rewards less their mean; learned: the mean over seeds, spread: the standard deviation over seeds."
    return "Rewards less their mean; learned: the posterior mean, spread: its standard deviation, of the first seed."


def _intervals(key: Any, values: np.ndarray) -> list[tuple[float | None, ...]]:
    """(mean, low, high) of each row of values [measures, seeds]; one seed has no interval, NaN is None."""
    rows = np.full((len(values), 3), np.nan)
    rows[:, 0] = values.mean(axis=1)
    if values.shape[1] > 1:
        rows[:, 1:] = np.stack(bootstrap_interval(key, values.T), axis=1)
    return [tuple(None if np.isnan(x) else float(x) for x in row) for row in rows]
