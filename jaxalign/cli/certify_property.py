"""What `jaxalign certify --onnx net.onnx --property p.vnnlib` does: one question about one network, answered."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxalign.certification.branch_and_bound import Verdict, verify_property
from jaxalign.certification.interpreter import UnsupportedPrimitive
from jaxalign.certification.properties import Property
from jaxalign.interop.extras import from_extra
from jaxalign.interop.onnx_network import OnnxNetwork, load_onnx
from jaxalign.interop.vnnlib import read_vnnlib
from jaxalign.runtime.report import Report

SECONDS_BETWEEN_LINES = 5.0
MOST_SHOWN = 20  # numbers of a counterexample on the terminal
POINTS = 3  # at which the network as it was read is held against onnx's own evaluation
AGREEMENT = 1e-3  # between the two, relative to the largest output

ANSWERS = {
    "verified": "Verified: no input in the property's boxes makes the output unsafe.",
    "falsified": "Falsified: there is an input whose output is unsafe.",
    "unknown": "Unknown: neither a proof nor a counterexample was found.",
}


def certify_property(
    onnx_path: str | os.PathLike[str],
    property_path: str | os.PathLike[str],
    *,
    time_limit: float = 60.0,
    batch_size: int = 128,
    seed: int = 0,
    out: Path | None = None,
    console: Console | None = None,
) -> Verdict:
    """Read a network and a property [...], search for a proof or a counterexample, print the answer, and keep it.

    Bounds are computed in float64. A counterexample counts only if onnx's own evaluator, in float32 and without JAX,
    agrees that its output is unsafe. `out` gets verdict.json, and counterexample.npz (x, y in the network's shapes) if
    there is one. Every answer, unknown too, is a success: the job's exit code is 0; it is 2 where a file cannot be
    read.

    Raises what `load_onnx` and `read_vnnlib` raise, and ValueError if the two do not fit each other, the network gives
    other outputs here than in onnx, or has a step that cannot be bounded.
    """
    network, unsafe = load_onnx(onnx_path), read_vnnlib(Path(property_path))
    sizes = math.prod(network.input_shape), math.prod(network.output_shape)
    if sizes != (unsafe.num_inputs, unsafe.num_outputs):
        raise ValueError(
            f"{property_path} is about {unsafe.num_inputs} inputs and {unsafe.num_outputs} outputs; "
            f"{onnx_path} has {sizes[0]} and {sizes[1]}"
        )
    run = _onnx_run(network)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), network.params)

        def fn(x: jax.Array) -> jax.Array:
            return network.apply_one(params, x.reshape(network.input_shape)).reshape(-1)

        _check_reading(onnx_path, fn, run, unsafe, seed)
        limits: dict[str, Any] = {"time_limit": time_limit, "batch_size": batch_size, "seed": seed}
        try:
            verdict = verify_property(fn, unsafe, run=run, progress=_progress(console), **limits)
        except UnsupportedPrimitive as error:
            raise ValueError(f"{onnx_path}: {error}") from error
    results = verdict_results(verdict)
    if out is not None:
        _keep(out, network, verdict, {"onnx": str(onnx_path), "property": str(property_path), **results})
    if console is not None:
        verdict_report(f"{Path(property_path).name} of {Path(onnx_path).name}", verdict).print(console)
        if out is not None:
            console.print(f"Results: {out / 'verdict.json'}", highlight=False)
    return verdict


def verdict_results(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it: arrays [...] as lists, a bound that is not known as None."""
    results = verdict._asdict()
    for name in ("counterexample", "output"):
        results[name] = None if results[name] is None else np.asarray(results[name], np.float64).tolist()
    if not math.isfinite(verdict.lower_bound):
        results["lower_bound"] = None
    return results


def verdict_report(title: str, verdict: Verdict) -> Report:
    """The answer, what it took, and the counterexample [N] with its output [K] if there is one."""
    report = Report(title).text(f"{ANSWERS[verdict.status]} ({verdict.reason[:1].upper()}{verdict.reason[1:]}.)")
    report.text(f"{verdict.boxes:,} boxes bounded, {verdict.boxes_left:,} left, {verdict.seconds:.1f} s.")
    if verdict.status == "unknown" and math.isfinite(verdict.lower_bound):
        report.text(f"What is proven: no output is more than {-verdict.lower_bound:.4g} inside the unsafe set.")
    if verdict.counterexample is not None and verdict.output is not None:
        for name, values in (("input", verdict.counterexample), ("output", verdict.output)):
            shown = [[i, f"{value:.9g}"] for i, value in enumerate(values[:MOST_SHOWN])]
            rest = len(values) - len(shown)
            report.table([name, "value"], shown, caption=f"and {rest:,} more" if rest else "")
    return report


def _onnx_run(network: OnnxNetwork) -> Callable[[np.ndarray], np.ndarray]:
    """The network as onnx's reference evaluator runs it: x [N] to y [K] in float32."""
    evaluator = from_extra("onnx.reference", "onnx").ReferenceEvaluator(network.model)
    (value,) = (entry for entry in network.model.graph.input if entry.name == network.input_name)
    batch = len(value.type.tensor_type.shape.dim) - len(network.input_shape)

    def run(x: np.ndarray) -> np.ndarray:
        given = np.asarray(x, np.float32).reshape((1,) * batch + network.input_shape)
        return np.asarray(evaluator.run(None, {network.input_name: given})[0]).reshape(-1)

    return run


def _check_reading(
    onnx_path: Any, fn: Callable[..., Any], run: Callable[[np.ndarray], np.ndarray], unsafe: Property, seed: int
) -> None:
    """Raises ValueError where the network read here and onnx's evaluation of the file part."""
    numbers, compiled = np.random.default_rng(seed), jax.jit(fn)
    for _ in range(POINTS):
        case = unsafe.cases[numbers.integers(len(unsafe.cases))]
        x = numbers.uniform(case.lower, case.upper).astype(np.float32)
        ours, theirs = np.asarray(compiled(x.astype(np.float64))), run(x)
        if not np.abs(ours - theirs).max() <= AGREEMENT * max(1.0, np.abs(theirs).max()):
            raise ValueError(
                f"{onnx_path}: gives {ours} here and {theirs} in onnx at the input {x}: it is not read right"
            )


def _progress(console: Console | None) -> Callable[[int, int, float], None] | None:
    """A line now and then."""
    if console is None:
        return None
    spoke = time.monotonic()

    def tell(boxes: int, left: int, bound: float) -> None:
        nonlocal spoke
        if time.monotonic() - spoke >= SECONDS_BETWEEN_LINES:
            spoke = time.monotonic()
            console.print(f"{boxes:,} boxes bounded, {left:,} left, least excess {bound:.4g}", highlight=False)

    return tell


def _keep(out: Path, network: OnnxNetwork, verdict: Verdict, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "counterexample.npz").unlink(missing_ok=True)
    (out / "verdict.json").write_text(json.dumps(results, indent=2) + "\n")
    if verdict.counterexample is not None and verdict.output is not None:
        x, y = verdict.counterexample.reshape(network.input_shape), verdict.output.reshape(network.output_shape)
        np.savez(out / "counterexample.npz", x=x, y=y)
