"""How many states a second does soft value iteration sweep on a grid of 10^6 cells, beside what the memory can carry?

A 1000 x 1000 gridworld with five actions in float32, discount 0.9, moves as shifted arrays. A sweep must at least read
a value and a reward and write a value (4 bytes each) and read whether the cell is terminal and open (1 byte each): 14
bytes a state, were every shift served from the cache. `share_of_bandwidth` is that traffic over the sweep's time and
the best bandwidth measured in the same process: JAX adding two arrays in place, or (on a CPU) NumPy copying one, the
arrays far larger than any cache. Five exponentials and a logarithm for every state bound a CPU earlier than its memory.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Measurement, measure
from jaxalign.mdp import TabularMDP, gridworld, soft_value_iteration

BYTES_PER_STATE = 3 * 4 + 2


def cases(quick: bool) -> list[dict[str, Any]]:
    """A fixed number of sweeps and a solve to tolerance, with and without slipping."""
    shared = {"side": 50 if quick else 1000, "discount": 0.9, "floats": 10**6 if quick else 64 * 10**6, "repeats": 5}
    return [
        {"name": f"{name}, slip {slip}", "slip": slip, "tolerance": tolerance, "max_iterations": most, **shared}
        for name, tolerance, most in (("20 sweeps", 0.0, 20), ("to tolerance 1e-4", 1e-4, 1000))
        for slip in (0.0, 0.1)
    ]


def run(case: dict[str, Any]) -> Measurement:
    """States per second over all sweeps of a run; bandwidth, and the largest change at the last sweep, as quality."""
    side = case["side"]
    mdp = gridworld(side, side, slip=case["slip"], discount=case["discount"])
    reward = jax.random.normal(jax.random.key(0), (side * side,))

    def solve(mdp: TabularMDP, reward: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        plan = soft_value_iteration(mdp, reward, tolerance=case["tolerance"], max_iterations=case["max_iterations"])
        return plan.value, plan.residual, plan.iterations

    measurement = measure(
        solve,
        mdp,
        reward,
        unit="states",
        amount=side * side,
        repeats=case["repeats"],
        quality=lambda out: {"residual": float(out[1]), "sweeps": int(out[2])},
    )
    sweeps = measurement.quality["sweeps"]
    measurement.amount *= sweeps
    seconds = statistics.median(measurement.samples) / sweeps
    rates = {"triad_gb_per_second": triad(case["floats"]), "numpy_copy_gb_per_second": numpy_copy(case["floats"])}
    on_cpu = jax.default_backend() == "cpu"
    best = max(rates.values()) if on_cpu else rates["triad_gb_per_second"]
    share = BYTES_PER_STATE * side * side / seconds / (best * 1e9)
    measurement.quality |= {"ms_per_sweep": 1e3 * seconds, "share_of_bandwidth": share, **rates}
    return measurement


def triad(size: int, rounds: int = 5) -> float:
    """GB/s of x <- x + 0.5 y by JAX on its default device, two arrays read and one written in place."""
    add = jax.jit(lambda x, y: x + 0.5 * y, donate_argnums=0)
    x, y = jnp.ones(size, jnp.float32), jnp.ones(size, jnp.float32)
    x = jax.block_until_ready(add(x, y))
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        x = jax.block_until_ready(add(x, y))
        seconds.append(time.perf_counter() - began)
    return 3 * x.nbytes / min(seconds) / 1e9


def numpy_copy(size: int, rounds: int = 5) -> float:
    """GB/s of a NumPy copy on one core of the host, one array read and one written."""
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(seconds) / 1e9
