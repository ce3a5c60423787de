"""Lanes per second of a sweep: side by side (vmap), one after another (map), or a Python loop over a jitted run?

One lane trains a two-layer MLP regression for 20 steps of Adam by `train` and `gradient_algorithm`; lanes differ in
learning rate. `largest` in the case is the element count of the largest value of one lane, which is what the "auto"
mode of `sweep` compares with CPU_VMAP_MAX_ELEMENTS: where "map" overtakes "vmap" is where that number should stand.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxalign
from benchmarks.measure import Measurement, measure, measure_host

STEPS = 20
FEATURES = 8
MODES = ("vmap", "map", "loop")


def cases(quick: bool) -> list[dict[str, Any]]:
    """Every width with every number of lanes, the three modes next to each other."""
    sizes = ((16, 32),) if quick else ((16, 32), (64, 64), (128, 128), (256, 128))
    return [
        {
            "name": f"width {width}, batch {batch}, {lanes} lanes, {mode}",
            "width": width,
            "batch": batch,
            "lanes": lanes,
            "mode": mode,
            "largest": width * max(width, batch),
            "repeats": 5 if quick else 20,
        }
        for width, batch in sizes
        for lanes in ((1, 8) if quick else (1, 8, 64))
        for mode in MODES
    ]


def run(case: dict[str, Any]) -> Measurement:
    """Lanes per second of one mode, and the mean final loss, which must not depend on it."""
    width, batch, lanes = case["width"], case["batch"], case["lanes"]
    module = nn.Sequential([nn.Dense(width), nn.tanh, nn.Dense(width), nn.tanh, nn.Dense(1)])
    network = jaxalign.Network.from_linen(module, jnp.zeros((1, FEATURES)))
    x = jax.random.normal(jax.random.key(0), (batch, FEATURES))
    y = jnp.sin(jnp.sum(x, axis=1))

    def objective(params: Any, _: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        return jnp.mean((network.apply(params, x)[:, 0] - y) ** 2), {}

    def lane(learning_rate: Any, key: Any) -> Any:
        algorithm = jaxalign.gradient_algorithm(network, objective, optax.adam(learning_rate))
        return jaxalign.train(algorithm, key, None, length=STEPS)[1]["loss"][-1]

    rates = jnp.geomspace(1e-4, 1e-2, lanes)
    keys = jax.random.split(jax.random.key(1), 1)
    about = {
        "unit": "lanes",
        "amount": lanes,
        # 2 operations per multiply-add, forward once and backward twice
        "flops": float(lanes * STEPS * 6 * batch * (FEATURES * width + width * width + width)),
        "quality": lambda losses: {"mean_final_loss": float(jnp.mean(jnp.stack(losses)))},
        "repeats": case["repeats"],
        "budget": 5.0,
    }
    if case["mode"] == "loop":
        jitted = jax.jit(lane)
        return measure_host(lambda rates: [jitted(rate, keys[0]) for rate in rates], list(rates), **about)
    sweep = lambda rates: list(jaxalign.sweep(lane, rates, keys, mode=case["mode"])[:, 0])  # noqa: E731
    return measure(sweep, rates, **about)
