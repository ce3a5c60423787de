"""Information gain of every pair of trajectories: all at once, or a pair at a time as NumPy libraries score queries?

One run scores all M (M - 1) / 2 comparisons of M trajectories under N reward hypotheses. The "pair by pair" side is
vectorised over hypotheses. The batch cases pick 6 questions from all pairs by their joint information; their quality
is the joint information in nats, beside that of the 6 best questions taken singly.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Measurement, measure, measure_host
from jaxalign.irl.active import (
    comparison_information_gain,
    expected_information_gain,
    joint_information_gain,
    select_queries,
)
from jaxalign.irl.queries import all_pairs, choice_log_likelihood

FEATURES, BETA, BATCH = 8, 2.0, 6


def cases(quick: bool) -> list[dict[str, Any]]:
    """Sizes of pool and belief; the sides next to each other."""
    sizes = ((32, 128),) if quick else ((32, 128), (128, 512), (512, 1024))
    return [
        {
            "name": f"{trajectories} trajectories, {hypotheses} hypotheses, {side}",
            "trajectories": trajectories,
            "hypotheses": hypotheses,
            "side": side,
            "repeats": 3 if quick else 10,
        }
        for trajectories, hypotheses in sizes
        for side in ("all at once", "pair by pair", "batch")
        if trajectories <= 128 or side == "all at once"  # the other two take minutes or gigabytes
    ]


def run(case: dict[str, Any]) -> Measurement:
    """Comparisons scored per second; the largest gain must not depend on the side."""
    keys = jax.random.split(jax.random.key(0))
    theta = jax.random.normal(keys[0], (case["hypotheses"], FEATURES))
    features = jax.random.normal(keys[1], (case["trajectories"], FEATURES)) / FEATURES**0.5
    returns, log_weights = theta @ features.T, jnp.zeros(case["hypotheses"])
    pairs = all_pairs(case["trajectories"])
    about = {"unit": "comparisons", "amount": float(len(pairs)), "repeats": case["repeats"], "budget": 10.0}
    if case["side"] == "all at once":
        about["quality"] = lambda gains: {"max_gain": float(jnp.max(gains))}
        return measure(lambda r, w: comparison_information_gain(r, w, beta=BETA), returns, log_weights, **about)
    if case["side"] == "pair by pair":
        about["quality"] = lambda gains: {"max_gain": float(max(gains))}
        return measure_host(_pair_by_pair, np.asarray(returns), np.asarray(pairs), **about)
    table = choice_log_likelihood(returns, pairs, beta=BETA)
    singles = jnp.argsort(-expected_information_gain(table, log_weights))[:BATCH]
    about["quality"] = lambda batch: {
        "joint_information": float(joint_information_gain(table, log_weights, batch)),
        "of_the_best_singly": float(joint_information_gain(table, log_weights, singles)),
    }
    about.update(unit="batches", amount=1.0)
    return measure(lambda t, w: select_queries(t, w, BATCH), table, log_weights, **about)


def _pair_by_pair(returns: np.ndarray, pairs: np.ndarray) -> list[float]:
    gains = []
    for i, j in pairs:
        p = 1.0 / (1.0 + np.exp(-BETA * (returns[:, i] - returns[:, j])))
        answers = np.stack([p, 1.0 - p], axis=1)
        terms = answers * np.log(np.maximum(answers, 1e-38) / answers.mean(axis=0))
        gains.append(float(np.sum(terms) / len(returns)))
    return gains
