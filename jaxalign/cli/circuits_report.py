"""The tables, pictures and files in which `jaxalign circuits` says what it found."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign.cli.attack_report import draw
from jaxalign.cli.circuit_problems import Problem
from jaxalign.cli.circuits import Circuits
from jaxalign.interpretability.circuit_evaluation import circuit_faithfulness, circuit_nodes
from jaxalign.interpretability.circuit_graph import circuits_by_score, edge_names
from jaxalign.runtime.circuit_figures import circuit_drawing, faithfulness_curve, patching_heatmap, score_comparison
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval, rank_correlation, wilson_interval

DRAWN = 60  # edges, at most, in the drawing
LISTED = 12
ENOUGH = 10  # examples: of fewer, a bootstrap interval is too narrow
INTERVAL = "95% bootstrap intervals over examples"
Shares = dict[str, np.ndarray]
PIECES = {"heads": "head", "positions": "position"}


class Found(NamedTuple):
    """What the stages found, of N examples (first half: finding, second half: judging).

    task: "clean" and "corrupted" metrics [N]
    patching: by "heads" and "positions", "exact" [P, L, X] and "estimate" [N/2, L, X] effects of noising
    scores: "plain" (EAP) and "integrated" (EAP-IG) [N/2, U, V]
    edges: [E, 2], those cut one by one; exact: [P, E], their effects
    sizes: [S]; circuits: [1 + R, S, U, V], the first by score, the others random; values: [N, 1 + R, S]
    chosen: index into sizes
    acdc: [U, V] or None
    judged: [N/2, 2 or 3], of the circuit, of the network without it, of ACDC's
    completeness: [N/2, 2, subsets], of the circuit and of the network without a subset
    minimality: [P, nodes]
    """

    task: dict[str, np.ndarray]
    patching: dict[str, dict[str, np.ndarray]]
    scores: dict[str, np.ndarray]
    edges: np.ndarray
    exact: np.ndarray
    sizes: np.ndarray
    circuits: np.ndarray
    values: np.ndarray
    chosen: int
    acdc: np.ndarray | None
    judged: np.ndarray
    completeness: np.ndarray
    minimality: np.ndarray

    @property
    def circuit(self) -> np.ndarray:
        """[U, V] bool."""
        return self.circuits[0, self.chosen]


def write_report(options: Circuits, problem: Problem, found: Found) -> tuple[Report, dict[str, Any]]:
    """Write results.json, report.html, circuit.npz and PNGs; return the Report, to be printed, and the results."""
    report = Report(f"The circuit of {options.model}")
    results: dict[str, Any] = {}
    shares = _all_shares(options.seed, found)
    for paragraph in problem.about:
        report.text(paragraph)
    for section in (_task_section, _patching_section, _score_section, _size_section, _circuit_section, _node_section):
        results |= section(report, options, problem, found, shares)
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    np.savez_compressed(
        options.out / "circuit.npz", keep=found.circuit, scores=found.scores["integrated"].mean(axis=0),
        sources=np.array(problem.graph.sources), readers=np.array(problem.graph.readers),
    )  # fmt: skip
    return report, results


def _means(seed: int, values: np.ndarray) -> list[list[float]]:
    """Of each column of values [B, n]: mean over examples, low, high."""
    low, high = bootstrap_interval(jax.random.key(seed), values)
    return np.stack([values.mean(axis=0), np.asarray(low), np.asarray(high)], axis=1).astype(float).tolist()


def _all_shares(seed: int, found: Found) -> Shares:
    """Faithfulness on the second half, as value, low, high: "by_score" and "random" [S, 3], "judged" [2 or 3, 3],
    "completeness" [2, subsets, 3]."""
    half = len(found.judged)
    values = {
        "by_score": found.values[half:, 0], "random": found.values[half:, 1:].mean(axis=1), "judged": found.judged,
        "completeness": found.completeness,
    }  # fmt: skip
    flat = np.concatenate([x.reshape(half, -1) for x in values.values()], axis=1)
    ends = found.task["clean"][half:], found.task["corrupted"][half:]
    shares = np.stack([np.asarray(x) for x in circuit_faithfulness(jax.random.key(seed), flat, *ends)], axis=-1)
    parts = np.split(shares, np.cumsum([x[0].size for x in values.values()])[:-1])
    return {name: part.reshape(*x.shape[1:], 3) for (name, x), part in zip(values.items(), parts, strict=True)}


def _task_section(report: Report, options: Circuits, problem: Problem, found: Found, shares: Shares) -> dict[str, Any]:
    both = _means(options.seed, np.stack([found.task["clean"], found.task["corrupted"]], axis=1))
    metric = dict(zip(("clean", "corrupted"), both, strict=True))
    right = int((found.task["clean"] > 0).sum())
    low, high = wilson_interval(right, options.prompts)
    accuracy = [right / options.prompts, float(low), float(high)]
    report.text(
        f"## The task\n\nOn {options.prompts} clean examples the metric is {estimate(*metric['clean'])}, on their "
        f"corrupted twins {estimate(*metric['corrupted'])} ({INTERVAL}); the network is right (above 0) for "
        f"{estimate(*accuracy)} of the clean ones (Wilson). The circuit is found on the first half and judged on the "
        "second."
    )
    if metric["clean"][0] <= metric["corrupted"][0]:
        report.text("**The network does not do this task: there is no circuit to find.**")
    return {"examples": options.prompts, **metric, "accuracy": accuracy}


def _patching_section(
    report: Report, options: Circuits, problem: Problem, found: Found, shares: Shares
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    if not found.patching:
        return results
    report.text(
        "## Heads and positions\n\nEach square: how much the metric changes if, in the clean run, this piece alone is "
        "as in the corrupted run. Red: the task needs it. The first-order estimates need one backward pass for all."
    )
    for name, effects in found.patching.items():
        exact, guess = effects["exact"].mean(axis=0), effects["estimate"][: len(effects["exact"])].mean(axis=0)
        columns = list(problem.slots) if name == "positions" else [str(i) for i in range(exact.shape[1])]
        correlation = float(rank_correlation(exact.ravel(), guess.ravel()))
        caption = (
            f"Effect of each {PIECES[name]}, mean over {len(effects['exact'])} examples, each by a run of its own."
        )
        figure = patching_heatmap(exact, columns, horizontal=PIECES[name])
        draw(report, figure, options.out / f"{name}.png", caption)
        report.text(f"The first-order estimates of the {name} have a rank correlation of {correlation:.2f} with these.")
        results[f"{name}_rank_correlation"] = correlation
    effect = found.patching["heads"]["exact"]
    layers, heads = np.unravel_index(np.argsort(-np.abs(effect.mean(axis=0)), axis=None)[:LISTED], effect.shape[1:])
    names = [f"{layer}.{head}" for layer, head in zip(layers, heads, strict=True)]
    strongest = dict(zip(names, _means(options.seed, effect[:, layers, heads]), strict=True))
    rows = [[name, estimate(*worth)] for name, worth in strongest.items()]
    report.table(["head", "effect"], rows, caption=f"The strongest heads, {INTERVAL}.")
    return results | {"heads": strongest}


def _score_section(report: Report, options: Circuits, problem: Problem, found: Found, shares: Shares) -> dict[str, Any]:
    sources, readers = found.edges.T
    exact = found.exact.mean(axis=0)
    names = {"EAP": "plain", "EAP-IG": "integrated"}
    scores = {
        name: found.scores[kind][: len(found.exact)].mean(axis=0)[sources, readers] for name, kind in names.items()
    }
    table = np.stack([exact, *scores.values()], axis=1)
    low, high = bootstrap_interval(jax.random.key(options.seed), table, statistic=_correlations, resamples=500)
    found_ends = zip(_correlations(table), low, high, strict=True)
    correlations = {name: [float(x) for x in ends] for name, ends in zip(scores, found_ends, strict=True)}
    said = " and ".join(f"{estimate(*c)} for {name}" for name, c in correlations.items())
    report.text(
        f"## Edges\n\n{len(exact)} of the {int(problem.graph.allowed.sum()):,} edges, half of them the strongest, were "
        f"cut one by one. The rank correlation of scores and exact effects is {said} (95% bootstrap intervals over "
        "edges)."
    )
    draw(report, score_comparison(exact, scores), options.out / "scores.png", "Scores against exact effects.")
    listed = found.edges[:LISTED]
    rows = [
        [name, *(f"{values[i]:.3g}" for values in (exact, *scores.values()))]
        for i, name in enumerate(edge_names(problem.graph, listed))
    ]
    report.table(["edge", "exact", *scores], rows, caption="What the metric gains by the strongest edges.")
    return {"rank_correlation": correlations, "edges_cut": len(exact)}


@jax.jit
def _correlations(table: Any) -> Any:
    """Rank correlation of the first column of [E, 1 + n] with each other."""
    return jax.vmap(rank_correlation, (None, 1))(table[:, 0], table[:, 1:])


def _size_section(report: Report, options: Circuits, problem: Problem, found: Found, shares: Shares) -> dict[str, Any]:
    by_score, random = shares["by_score"], shares["random"]
    kept = found.circuits[0].sum(axis=(1, 2))
    report.text(
        "## How large\n\nFaithfulness: 1 if a circuit does as well as the network, 0 if no better than the corrupted "
        "run. Circuits grow from the output by the mean |EAP-IG|; random ones grow alike, by random scores, so they "
        f"hang together too. On the second half of the examples ({INTERVAL})."
    )
    curves = {"by score": by_score, f"random (mean of {options.random_circuits})": random}
    figure = faithfulness_curve(found.sizes, curves, chosen=float(found.sizes[found.chosen]))
    draw(report, figure, options.out / "faithfulness.png", "Faithfulness against the number of edges.")
    rows = [
        [int(size), int(k), estimate(*a), estimate(*b)]
        for size, k, a, b in zip(found.sizes, kept, by_score, random, strict=True)
    ]
    report.table(["edges", "on a path", "by score", "random"], rows, caption="Faithfulness by size.")
    return {
        "sizes": found.sizes.tolist(), "edges_on_a_path": kept.tolist(), "faithfulness_by_score": by_score.tolist(),
        "faithfulness_random": random.tolist(),
    }  # fmt: skip


def _circuit_section(
    report: Report, options: Circuits, problem: Problem, found: Found, shares: Shares
) -> dict[str, Any]:
    graph, circuit = problem.graph, found.circuit
    judged, complete, random = shares["judged"], shares["completeness"], shares["random"][found.chosen]
    gap = np.abs(complete[0, 1:, 0] - complete[1, 1:, 0])
    nodes = circuit_nodes(graph, circuit)
    edges, everything = int(circuit.sum()), int(graph.allowed.sum())
    report.text(
        f"## The circuit\n\nThe smallest that is faithful on the first half: {edges:,} of {everything:,} edges "
        f"({edges / everything:.2%}) between {len(nodes)} of {len(graph.sources)} nodes and the output.\n\n"
        f"- Faithfulness on the second half: {estimate(*judged[0])}; of random circuits of this size "
        f"{estimate(*random)}.\n"
        f"- Completeness: without the circuit the network keeps {estimate(*judged[1])}. With random halves of the "
        f"circuit cut, circuit and network differ by {gap.mean():.3f} on average (at most {gap.max():.3f})."
    )
    results: dict[str, Any] = {
        "circuit": {
            "edges": edges, "of_edges": everything, "nodes": [graph.sources[u] for u in nodes],
            "faithfulness": judged[0].tolist(), "rest": judged[1].tolist(), "completeness_gap": gap.tolist(),
        }
    }  # fmt: skip
    if found.acdc is not None:
        count = int(found.acdc.sum())
        left = [graph.sources[u] for u in circuit_nodes(graph, found.acdc)]
        results["acdc"] = {"edges": count, "nodes": left, "faithfulness": judged[2].tolist()}
        report.text(
            f"ACDC, from the {min(options.acdc_edges, everything):,} strongest edges at a threshold of "
            f"{options.threshold:g} of what the network gains, leaves {count:,} with a faithfulness of "
            f"{estimate(*judged[2])}."
        )
    if problem.truth:
        heard = [
            ", ".join(name for name in results[which]["nodes"] if name.startswith("input"))
            for which in ("circuit", "acdc")
            if which in results
        ]
        report.text(
            f"The task depends on {' and '.join(problem.truth)} alone; heard are {'; after ACDC '.join(heard)}."
        )
    _drawing(report, options, problem, found)
    return results


def _drawing(report: Report, options: Circuits, problem: Problem, found: Found) -> None:
    """The circuit, or as many of its strongest edges as can be seen."""
    graph, scores = problem.graph, found.scores["integrated"].mean(axis=0)
    inside = np.where(found.circuit, scores, 0.0)
    seen = found.circuit
    if seen.sum() > DRAWN:
        sizes = list(range(DRAWN, min(10 * DRAWN, int(found.circuit.sum())) + 1, DRAWN))
        grown = circuits_by_score(graph, inside, sizes)
        fitting = [keep for keep in grown if 0 < keep.sum() <= DRAWN]
        if not fitting:
            return
        seen = fitting[-1]
    if seen.any():
        caption = f"{int(seen.sum())} of the circuit's {int(found.circuit.sum()):,} edges, the strongest by EAP-IG."
        draw(report, circuit_drawing(graph, seen, scores), options.out / "circuit.png", caption)


def _node_section(report: Report, options: Circuits, problem: Problem, found: Found, shares: Shares) -> dict[str, Any]:
    nodes = [problem.graph.sources[u] for u in circuit_nodes(problem.graph, found.circuit)]
    if not nodes:
        return {"minimality": None}
    low, high = (np.asarray(x) for x in bootstrap_interval(jax.random.key(options.seed), found.minimality))
    mean = found.minimality.mean(axis=0)
    needed = int(((low > 0) | (high < 0)).sum())
    report.text(
        f"## Node by node\n\nMinimality: {needed} of the circuit's {len(nodes)} nodes change the metric if they alone "
        f"leave it, told from nothing at 95% on {len(found.minimality)} examples"
        f"{', fewer than a bootstrap is good for' if len(found.minimality) < ENOUGH else ''}."
    )
    order = np.argsort(-np.abs(mean))
    rows = [[nodes[i], estimate(mean[i], low[i], high[i])] for i in order[:LISTED]]
    report.table(["node", "what it is worth"], rows, caption=f"The metric's fall without the node, {INTERVAL}.")
    worth = {nodes[i]: [float(mean[i]), float(low[i]), float(high[i])] for i in order}
    return {"minimality": {"needed": needed, "nodes": len(nodes), "worth": worth}}
