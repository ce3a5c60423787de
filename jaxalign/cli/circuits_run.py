"""What `jaxalign circuits` does: stages whose arrays are kept, from patching to the circuit's evaluation."""

import dataclasses
import functools
import json
import os
import time
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxalign.cli.circuit_problems import Problem, problem_of
from jaxalign.cli.circuits import Circuits
from jaxalign.cli.circuits_report import Found, write_report
from jaxalign.interpretability.acdc import acdc
from jaxalign.interpretability.circuit_evaluation import completeness_circuits, node_minimality
from jaxalign.interpretability.circuit_graph import circuit_values, circuits_by_score, kept_edges, prune
from jaxalign.interpretability.edge_attribution import (
    edge_attribution_patching,
    exact_edge_patching,
    integrated_edge_attribution_patching,
)
from jaxalign.interpretability.patching import activation_patching, attribution_patching
from jaxalign.runtime.report import Report
from jaxalign.types import Params

SMALLEST = 10  # edges, of the default sizes
VALUES = "values"
SUBSETS = 6  # that completeness cuts from the circuit
SITES = {"heads": ("attention_z", (2,)), "positions": ("resid_post", (1,))}

Arrays = dict[str, Any]  # name -> [B, ...]


def run(options: Circuits, console: Console) -> dict[str, Any]:
    """The whole job; returns what results.json holds."""
    check(options)
    _claim(options)
    problem = problem_of(options, console)
    job = Stages(options, problem, console)
    report, results = write_report(options, problem, find(job))
    _shown(report, options, console)
    return results


def _shown(report: Report, options: Circuits, console: Console) -> None:
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")


class Stages:
    """Arrays computed in batches of examples, each stage once: its file is read if it is there."""

    def __init__(self, options: Circuits, problem: Problem, console: Console) -> None:
        self.options, self.problem, self.console = options, problem, console
        half = options.prompts // 2
        self.first, self.second = np.arange(half), np.arange(half, 2 * half)
        self.few = self.first[: options.exact_prompts]
        self.key = jax.random.key(options.seed)

    def batched(self, name: str, rows: np.ndarray, function: Callable[..., Any]) -> Arrays:
        """`function(params, clean, corrupted, target)` of examples, in batches: arrays [B, ...], or one as VALUES."""
        return self.once(name, lambda: self._in_batches(name, rows, function))

    def once(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        path = self.options.out / "stages" / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.parent.mkdir(parents=True, exist_ok=True)  # not there, or cut off in the writing
        begin = time.perf_counter()
        arrays = compute()
        with path.with_suffix(".part").open("wb") as file:
            np.savez(file, **arrays)
        os.replace(path.with_suffix(".part"), path)
        self.console.print(f"{name}: {time.perf_counter() - begin:.1f} s")
        return arrays

    def _in_batches(self, name: str, rows: np.ndarray, function: Callable[..., Any]) -> Arrays:
        compiled = jax.jit(function)
        size = min(self.options.batch_size, len(rows))
        parts = []
        for start in track(range(0, len(rows), size), name, console=self.console, transient=True):
            index = np.resize(rows[start : start + size], size)
            part = compiled(self.problem.params, *self.problem.rows(index))
            parts.append(jax.tree.map(np.asarray, part if isinstance(part, dict) else {VALUES: part}))
        return {key: np.concatenate([part[key] for part in parts])[: len(rows)] for key in parts[0]}


def find(job: Stages) -> Found:
    """All stages, in order."""
    options, problem = job.options, job.problem
    graph, metric = problem.graph, problem.metric
    every = np.concatenate([job.first, job.second])

    def values(name: str, rows: np.ndarray, keeps: np.ndarray) -> np.ndarray:
        return job.batched(name, rows, functools.partial(circuit_values, graph, metric, keeps=keeps))[VALUES]

    task = job.batched("task", every, functools.partial(_task, problem))
    patching = {name: _patched(job, name) for name in (SITES if problem.slots else ())}
    scores = job.batched("scores", job.first, functools.partial(_scores, problem, options.steps))
    mean = scores["integrated"].mean(axis=0)
    # An edge that helps some examples and hurts others matters too: in a mean of signed scores it would cancel.
    strength = np.abs(scores["integrated"]).mean(axis=0)
    edges = _some_edges(job, mean)
    exact = job.batched("exact", job.few, functools.partial(exact_edge_patching, graph, metric, edges=edges))[VALUES]

    sizes = np.array(options.sizes or _doubling(int(graph.allowed.sum())))
    random = np.random.default_rng(options.seed).random((options.random_circuits, *mean.shape))
    families = [strength, *random]
    circuits = np.stack([circuits_by_score(graph, scores, sizes.tolist()) for scores in families])  # [1 + R, S, U, V]
    curve = values("curve", every, circuits.reshape(-1, *mean.shape)).reshape(-1, *circuits.shape[:2])
    chosen = _smallest_faithful(options, curve[job.first, 0], task, job.first)
    circuit = circuits[0, chosen]

    pruned = _acdc(job, strength, task) if options.acdc_edges else None
    alone = [circuit, graph.allowed & ~circuit, *([] if pruned is None else [pruned])]
    judged = values("judged", job.second, np.stack(alone))
    subsets = np.concatenate(completeness_circuits(job.key, graph, circuit, subsets=SUBSETS))
    complete = values("completeness", job.second, subsets).reshape(-1, 2, SUBSETS)
    few = job.second[: options.exact_prompts]
    minimal = job.batched("minimality", few, functools.partial(node_minimality, graph, metric, keep=circuit))[VALUES]
    return Found(
        task, patching, scores, edges, exact, sizes, circuits, curve, chosen, pruned, judged, complete, minimal
    )


def _task(problem: Problem, params: Params, clean: Any, corrupted: Any, target: Any) -> dict[str, Any]:
    runs = {"clean": clean, "corrupted": corrupted}
    return {name: problem.metric(problem.network.apply(params, x), target) for name, x in runs.items()}


def _patched(job: Stages, name: str) -> Arrays:
    """Noising, [B, L, heads or positions]: exactly on a few examples, to first order on all of the first half."""
    given = job.problem.network, job.problem.metric
    site, axes = SITES[name]
    exact = functools.partial(activation_patching, *given, site=site, axes=axes)
    estimate = functools.partial(attribution_patching, *given, site=site, axes=axes)
    return {
        "exact": job.batched(name, job.few, exact)[VALUES],
        "estimate": job.batched(f"{name}_estimate", job.first, estimate)[VALUES],
    }


def _scores(problem: Problem, steps: int, params: Params, clean: Any, corrupted: Any, target: Any) -> dict[str, Any]:
    given = problem.graph, problem.metric, params, clean, corrupted, target
    return {
        "plain": edge_attribution_patching(*given),
        "integrated": integrated_edge_attribution_patching(*given, steps=steps),
    }


def _some_edges(job: Stages, scores: np.ndarray) -> np.ndarray:
    """[E, 2]: half the strongest, half drawn at random from the others."""
    edges = kept_edges(job.problem.graph)
    count = min(job.options.exact_edges, len(edges))
    order = edges[np.argsort(-np.abs(scores[edges[:, 0], edges[:, 1]]), kind="stable")]
    strong = (count + 1) // 2
    drawn = np.random.default_rng(job.options.seed).choice(len(edges) - strong, count - strong, replace=False)
    return np.concatenate([order[:strong], order[strong:][drawn]])


def _doubling(most: int) -> list[int]:
    sizes = [SMALLEST * 2**i for i in range(40) if SMALLEST * 2**i < most]
    return [*sizes, most]


def _smallest_faithful(options: Circuits, values: np.ndarray, task: Arrays, rows: np.ndarray) -> int:
    """The first size whose faithfulness is near enough to 1; the nearest, if none is."""
    whole, corrupted = (task[name][rows].mean() for name in ("clean", "corrupted"))
    missing = np.abs(values.mean(axis=0) - whole)
    near = np.flatnonzero(missing <= (1 - options.faithful) * abs(whole - corrupted))
    return int(near[0]) if len(near) else int(np.argmin(missing))


def _acdc(job: Stages, scores: np.ndarray, task: Arrays) -> np.ndarray:
    """ACDC [U, V] on a few examples, from the strongest edges."""
    problem, options = job.problem, job.options
    most = int(problem.graph.allowed.sum())
    (start,) = circuits_by_score(problem.graph, scores, [min(options.acdc_edges, most)])
    tau = options.threshold * float((task["clean"] - task["corrupted"])[job.few].mean())
    search = jax.jit(functools.partial(acdc, problem.graph, problem.metric, start=start, threshold=tau))

    def compute() -> Arrays:
        with job.console.status(f"acdc: {int(start.sum())} edges, one after another"):
            return {"keep": np.asarray(search(problem.params, *problem.rows(job.few)).keep)}

    return prune(problem.graph, job.once("acdc", compute)["keep"])


def _claim(options: Circuits) -> None:
    """Note down what the run in --out is. Raises where it holds another, or one not asked to go on."""
    path = options.out / "options.json"
    identity = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("out", "resume")}
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(identity, indent=2) + "\n")
        return
    if not options.resume:
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    old = json.loads(path.read_text())
    if differs := sorted(name for name in old.keys() | identity.keys() if old.get(name) != identity.get(name)):
        raise ValueError(f"{options.out} holds another run: {', '.join(differs)} differ")


def check(options: Circuits) -> None:
    """Raises ValueError naming the option that makes no sense."""
    for name in ("exact_prompts", "steps", "batch_size", "exact_edges", "random_circuits"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.prompts < 4 or options.prompts % 2:
        raise ValueError(f"--prompts must be even and at least 4, got {options.prompts}")
    if options.acdc_edges < 0 or options.threshold <= 0 or not 0 < options.faithful < 1:
        raise ValueError("--acdc-edges must not be negative, --threshold above 0, --faithful in (0, 1)")
    if list(options.sizes) != sorted(set(options.sizes)) or not all(size > 0 for size in options.sizes):
        raise ValueError(f"--sizes must be positive and rise, got {options.sizes}")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
