"""How many samples a second does a TopK sparse autoencoder train on, against SAELens training its own?

"step" is the bare training step in float32 at batch 1024: forward, backward, gradients clipped to norm 1, Adam; ours
many to a scan, SAELens' in its loop. "trainer" is what a user runs, on batches already in memory: `runtime.fit` against
SAELens' SAETrainer.fit with an iterator over the same batches. `details` has the seconds of the encoder's matrix
product in the same process and the share of its rate that the step reaches, counted as if all five products of a step
were dense: above 1 where ours does not multiply the zeros. Both sides see the same batches in the same order; the
`loss` that each reaches is the mean squared error, summed over d, of the last step (of SAELens' trainer, which hands no
loss out, of the last batch after that step). Our trainer compiles anew in each run, and that is in its seconds.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Measurement, measure, measure_host
from benchmarks.sae_problem import BATCH, CLIP, LEARNING_RATE, STORED, batches, matmul_shapes, step_flops
from jaxalign import Algorithm
from jaxalign.interpretability.sparse_autoencoder import SAEConfig, sparse_autoencoder
from jaxalign.runtime import fit

SIZES = ({"d_in": 64, "d_sae": 128, "k": 16}, {"d_in": 576, "d_sae": 4608, "k": 32})


def cases(quick: bool) -> list[dict[str, Any]]:
    """The step at both sizes, and the trainer at the small one."""
    repeats = 3 if quick else 7
    steps = [
        {"name": f"step, d={s['d_in']}, F={s['d_sae']}, k={s['k']}", "kind": "step", "repeats": repeats, **s}
        for s in SIZES
    ]
    for case, count in zip(steps, (10, 2) if quick else (64, 4), strict=True):
        case["steps"] = count
    small = SIZES[0]
    name = f"trainer, d={small['d_in']}, F={small['d_sae']}, k={small['k']}"
    return [*steps, {"name": name, "kind": "trainer", "repeats": 3, "steps": 100 if quick else 1000, **small}]


def algorithm(case: dict[str, Any]) -> Algorithm:
    """The autoencoder and the optimiser, as SAELens' trainer has them."""
    config = SAEConfig(case["d_in"], case["d_sae"], "topk", k=case["k"], aux_coefficient=1.0, dead_after=1000 * BATCH)
    return sparse_autoencoder(config, optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(LEARNING_RATE)))


def run(case: dict[str, Any]) -> Measurement:
    """Samples per second."""
    data = batches(case)
    order = np.arange(case["steps"]) % STORED
    found = (_trainer if case["kind"] == "trainer" else _steps)(case, data, order)
    seconds = _matmul_seconds(case)
    per_step = float(np.median(found.samples)) / case["steps"]
    details = {"encoder product, seconds": seconds, "share of its rate": 5 * seconds / per_step}
    return dataclasses.replace(found, details=details)


def _steps(case: dict[str, Any], data: np.ndarray, order: np.ndarray) -> Measurement:
    sae = algorithm(case)
    state = jax.jit(sae.init)(jax.random.key(0))

    def scan(state: Any, data: Any) -> Any:
        return jax.lax.scan(lambda state, i: sae.step(state, data[i]), state, jnp.asarray(order))

    return measure(
        scan, state, jnp.asarray(data), unit="samples", amount=case["steps"] * BATCH, repeats=case["repeats"],
        flops=case["steps"] * step_flops(case), donate=(0,), advance=lambda args, out: (out[0], args[1]),
        quality=lambda out: {"loss": float(out[1]["mse"][-1])},
    )  # fmt: skip


def _trainer(case: dict[str, Any], data: np.ndarray, order: np.ndarray) -> Measurement:
    sae = algorithm(case)
    stream = data[order]

    def train() -> Any:
        return fit(sae, jax.random.key(0), stream, steps=case["steps"], progress=False)

    return measure_host(
        train, unit="samples", amount=case["steps"] * BATCH, repeats=case["repeats"],
        flops=case["steps"] * step_flops(case), quality=lambda out: {"loss": float(out[1]["mse"][-1])},
    )  # fmt: skip


def _matmul_seconds(case: dict[str, Any]) -> float:
    left, right = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(matmul_shapes(case)))
    product = jax.jit(jnp.matmul).lower(left, right).compile()
    samples = []
    for _ in range(20):
        began = time.perf_counter()
        jax.block_until_ready(product(left, right))
        samples.append(time.perf_counter() - began)
    return float(np.median(samples[3:]))
