"""How fast is generalised advantage estimation over T steps of N environments, against rlax and TorchRL?

Float32 arrays [T, N] for the JAX sides, [N, T, 1] for TorchRL, its own layout; each gives advantages and targets. A run
is several rollouts one after another, inside one program where there is one, as when training. rlax takes one discount
a step and no successors' values, so to it every end of an episode is terminal: "max_error" is against a float64 loop on
what is timed, where half of the ends are truncations, "max_error_terminal" where none is. TorchRL is the faster of its
two forms, `details` has both.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gae_problem import DISCOUNT, GAE_LAMBDA, Steps, make_steps, max_error
from benchmarks.measure import Measurement, measure
from jaxalign.rl.advantages import generalized_advantage_estimation

SIZES = ((128, 64, 64), (1024, 256, 8), (2048, 1024, 1))  # T, N, rollouts in a run


def cases(quick: bool) -> list[dict[str, Any]]:
    """Each size by scan and by associative scan against rlax, and by scan against TorchRL."""
    return [
        {
            "name": f"{steps} x {environments}, {method}, against {peer}",
            "steps": steps,
            "environments": environments,
            "rollouts": rollouts,
            "method": method,
            "peer": peer,
            "seed": 0,
            "repeats": 30 if quick else 100,
        }
        for steps, environments, rollouts in (SIZES[:1] if quick else SIZES)
        for method, peer in (("scan", "rlax"), ("associative", "rlax"), ("scan", "torchrl"))
    ]


def run(case: dict[str, Any]) -> Measurement:
    """Steps per second, all environments together."""

    gae = functools.partial(
        generalized_advantage_estimation, discount=DISCOUNT, gae_lambda=GAE_LAMBDA, method=case["method"]
    )

    def estimate(*steps: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda rollout: gae(*rollout), steps)

    def arrays(steps: Steps) -> list[jax.Array]:
        return [jnp.asarray(x) for x in steps[:5]]

    steps, terminal = make_steps(case), make_steps(case, truncation=False)
    return measure(
        estimate,
        *arrays(steps),
        unit="steps",
        amount=case["steps"] * case["environments"] * case["rollouts"],
        repeats=case["repeats"],
        quality=lambda out: {
            "max_error": max_error(out[0], steps),
            "max_error_terminal": max_error(jax.jit(estimate)(*arrays(terminal))[0], terminal),
        },
    )
