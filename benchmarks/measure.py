"""Timing one function: compilation, the first run and the steady runs apart, each waited for to its end."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.environment import matmul_arithmetic


@dataclasses.dataclass
class Measurement:
    """What one side of one case took, in seconds and bytes. What was not measured is None, never 0.

    unit, amount: what one run works through ("tokens", 1024.0); the rate is amount / median seconds
    samples: seconds of each steady run
    first: seconds of the first run, compilation excluded if `compile` has it
    compile: seconds to trace, lower and compile, or None where that cannot be told from the first run
    cpu_samples: processor seconds of each steady run, all threads together; less shaken by other processes
    flops: floating-point operations of one run by the benchmark's own formula (XLA counts a loop's body once)
    arithmetic: what the matrix units work in, the column of the peak table that MFU refers to
    temp_bytes: memory XLA plans for intermediate values of the compiled program
    quality: what the run reached ({"loss": 0.31}), so that speed is never read alone
    details: anything else worth keeping
    """

    unit: str
    amount: float
    samples: list[float]
    first: float | None
    compile: float | None = None
    cpu_samples: list[float] = dataclasses.field(default_factory=list)
    flops: float | None = None
    arithmetic: str | None = None
    temp_bytes: int | None = None
    quality: dict[str, Any] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


def measure(
    fn: Callable[..., Any],
    *args: Any,
    unit: str,
    amount: float,
    warmup: int = 1,
    repeats: int = 10,
    budget: float = 20.0,
    flops: float | None = None,
    dtype: str = "float32",
    donate: tuple[int, ...] = (),
    advance: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] | None = None,
    quality: Callable[[Any], dict[str, Any]] | None = None,
) -> Measurement:
    """Compile `fn(*args)` ahead of time, run it `1 + warmup` times, then time `repeats` runs.

    Args:
        fn: pure and not jitted.
        unit, amount: what one run works through.
        budget: seconds after which no further repeat is begun once three are done.
        flops, dtype: operations of one run, and the dtype its matrix products are in.
        donate: positions of arguments whose buffers the program may reuse, as a training state's.
        advance: `(args, output) -> args` of the next run, outside the clock: a training step moves on by
            `lambda args, out: (out[0], *args[1:])`.
        quality: `output of the last run -> {name: number}`.
    """
    began = time.perf_counter()
    compiled = jax.jit(fn, donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - began
    plan = compiled.memory_analysis()
    return dataclasses.replace(
        _timed(compiled, args, unit, amount, warmup, repeats, budget, advance, quality),
        compile=seconds,
        flops=flops,
        arithmetic=matmul_arithmetic(dtype),
        temp_bytes=None if plan is None else int(plan.temp_size_in_bytes),
    )


def measure_host(
    fn: Callable[..., Any],
    *args: Any,
    unit: str,
    amount: float,
    warmup: int = 1,
    repeats: int = 10,
    budget: float = 20.0,
    flops: float | None = None,
    dtype: str = "float32",
    advance: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] | None = None,
    quality: Callable[[Any], dict[str, Any]] | None = None,
) -> Measurement:
    """As `measure` for a function of the host (a Python loop over jitted calls): `first` includes its compilation."""
    timed = _timed(fn, args, unit, amount, warmup, repeats, budget, advance, quality)
    return dataclasses.replace(timed, flops=flops, arithmetic=matmul_arithmetic(dtype))


def _timed(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    unit: str,
    amount: float,
    warmup: int,
    repeats: int,
    budget: float,
    advance: Callable[[tuple[Any, ...], Any], tuple[Any, ...]] | None,
    quality: Callable[[Any], dict[str, Any]] | None,
) -> Measurement:
    if warmup < 0 or repeats < 1:
        raise ValueError(f"measure: needs warmup >= 0 and repeats >= 1, got {warmup} and {repeats}")
    wall: list[float] = []
    cpu: list[float] = []
    output = None
    for _ in range(1 + warmup + repeats):
        steady = wall[1 + warmup :]
        if len(steady) >= 3 and sum(steady) > budget:
            break
        if output is not None and advance is not None:
            args = advance(args, output)
        output = None  # so that the last output and the next are never alive together
        jax.block_until_ready(args)
        cpu_began, began = time.process_time(), time.perf_counter()
        output = jax.block_until_ready(fn(*args))
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    return Measurement(
        unit=unit,
        amount=float(amount),
        first=wall[0],
        samples=wall[1 + warmup :],
        cpu_samples=cpu[1 + warmup :],
        quality={} if quality is None else quality(output),
    )


def pool(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One record from the same measurement taken in several processes: times pooled, peaks the highest of all.

    Adds median, p10, p90 (seconds), rate (units per second) and flops_per_second. `quality` is the last round's, and
    "differs between rounds" is noted in `details` where a number of it moved.
    """
    last = rounds[-1]
    samples = [second for one in rounds for second in one["samples"]]
    cpu = [second for one in rounds for second in one.get("cpu_samples") or []]
    low, median, high = np.quantile(samples, [0.1, 0.5, 0.9]).tolist()
    flops = last.get("flops")
    details = dict(last.get("details") or {})
    reached = [one["quality"] for one in rounds]
    moved = [name for name in reached[-1] if any(one.get(name) != reached[-1][name] for one in reached)]
    if moved:
        details["differs between rounds"] = moved
    return {
        **last,
        **{name: _over(rounds, name, np.median) for name in ("compile", "first")},
        **{name: _over(rounds, name, max) for name in ("temp_bytes", "process_peak_bytes", "device_peak_bytes")},
        "samples": samples,
        "cpu_samples": cpu,
        "cpu_median": float(np.median(cpu)) if cpu else None,
        "rounds": len(rounds),
        "median": median,
        "p10": low,
        "p90": high,
        "rate": last["amount"] / median,
        "flops_per_second": None if flops is None else flops / median,
        "details": details,
    }


def _over(rounds: list[dict[str, Any]], name: str, reduce: Callable[[list[Any]], Any]) -> Any:
    values = [one[name] for one in rounds if one.get(name) is not None]
    if not values:
        return None
    value = float(reduce(values))
    return int(value) if name.endswith("_bytes") and math.isfinite(value) else value
