"""How fast is generalised advantage estimation over T steps of N environments, against rlax and TorchRL?

Float32 arrays [T, N] for the JAX sides, [N, T, 1] for TorchRL, its own layout; each gives advantages and targets. rlax
takes one discount a step and no successors' values, so to it every end of an episode is terminal: "max_error" is
against a float64 loop on what is timed, where half of the ends are truncations, "max_error_terminal" where none is.
TorchRL is the faster of its two forms, `details` has both.
"""

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gae_problem import DISCOUNT, GAE_LAMBDA, Steps, make_steps, max_error
from benchmarks.measure import Measurement, measure
from jaxalign.rl.advantages import generalized_advantage_estimation

SIZES = ((128, 64), (1024, 256), (2048, 1024))


def cases(quick: bool) -> list[dict[str, Any]]:
    """Each size by scan and by associative scan against rlax, and by scan against TorchRL."""
    return [
        {
            "name": f"{steps} x {environments}, {method}, against {peer}",
            "steps": steps,
            "environments": environments,
            "method": method,
            "peer": peer,
            "seed": 0,
            "repeats": 30 if quick else 300,
        }
        for steps, environments in (SIZES[:1] if quick else SIZES)
        for method, peer in (("scan", "rlax"), ("associative", "rlax"), ("scan", "torchrl"))
    ]


def run(case: dict[str, Any]) -> Measurement:
    """Steps per second, all environments together."""

    def estimate(*steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        return generalized_advantage_estimation(
            *steps, discount=DISCOUNT, gae_lambda=GAE_LAMBDA, method=case["method"]
        )

    def arrays(steps: Steps) -> list[jax.Array]:
        return [jnp.asarray(x) for x in steps[:5]]

    steps, terminal = make_steps(case), make_steps(case, truncation=False)
    return measure(
        estimate,
        *arrays(steps),
        unit="steps",
        amount=case["steps"] * case["environments"],
        repeats=case["repeats"],
        quality=lambda out: {
            "max_error": max_error(out[0], steps),
            "max_error_terminal": max_error(jax.jit(estimate)(*arrays(terminal))[0], terminal),
        },
    )
