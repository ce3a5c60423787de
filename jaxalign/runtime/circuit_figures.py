"""Pictures of circuits: patching heatmaps, faithfulness by size, scores against exact effects, the graph itself."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.interpretability.circuit_graph import CircuitGraph, kept_edges
from jaxalign.runtime.figures import COLOURS, empty_figure
from jaxalign.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {"q": COLOURS[0], "k": COLOURS[2], "v": COLOURS[1]}  # what of a head an edge goes into
OTHER = "0.35"


def patching_heatmap(
    effect: ArrayLike, columns: Sequence[str], *, horizontal: str = "head", unit: str = "nats", title: str = ""
) -> "Figure":
    """A Matplotlib Figure of effects [L, X], layers upwards, on a scale centred on 0.

    Raises ValueError unless `columns` names each of the X columns; ImportError without Matplotlib.
    """
    values = np.asarray(effect, np.float64)
    if values.ndim != 2 or values.shape[1] != len(columns):
        raise ValueError(f"patching_heatmap: needs effect [L, {len(columns)}], got {values.shape}")
    most = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
    figure = empty_figure(1.8 + 0.36 * len(columns), 1.4 + 0.16 * len(values))
    axes = figure.add_subplot()
    drawn = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", origin="lower")
    crowded = max(map(len, columns)) > 2
    axes.set_xticks(range(len(columns)), columns, rotation=60 if crowded else 0, ha="right" if crowded else "center")
    axes.tick_params(labelsize=7)
    axes.set_xlabel(horizontal)
    axes.set_ylabel("layer")
    figure.colorbar(drawn, ax=axes, shrink=0.8).set_label(unit, fontsize=8)
    if title:
        axes.set_title(title, fontsize=10)
    return figure


def faithfulness_curve(
    sizes: ArrayLike, curves: Mapping[str, ArrayLike], *, chosen: float | None = None, title: str = ""
) -> "Figure":
    """A Matplotlib Figure of faithfulness against number of edges: by name curves [S, 3] of value, low, high.

    chosen: a size to mark. Raises ValueError for another shape; ImportError without Matplotlib.
    """
    x = np.asarray(sizes, np.float64)
    figure = empty_figure(6.0, 3.8)
    axes = figure.add_subplot()
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        y = np.asarray(curve, np.float64)
        if y.shape != (x.size, 3):
            raise ValueError(f"faithfulness_curve: {name} is {y.shape}, needs [{x.size}, 3]: value, low, high")
        axes.fill_between(x, y[:, 1], y[:, 2], color=colour, alpha=0.2, linewidth=0)
        axes.plot(x, y[:, 0], color=colour, linewidth=1.4, marker="o", markersize=3, label=name)
    for height in (0.0, 1.0):
        axes.axhline(height, color="0.6", linewidth=0.8, linestyle=":")
    if chosen is not None:
        axes.axvline(chosen, color="0.4", linewidth=1.0, linestyle="--", label="chosen")
    axes.set_xscale("log")
    axes.set_xlabel("edges")
    axes.set_ylabel("faithfulness")
    return _finished(figure, axes, title)


def score_comparison(exact: ArrayLike, estimates: Mapping[str, ArrayLike], *, unit: str = "nats") -> "Figure":
    """A Matplotlib Figure of estimated against exact effects [E], one panel for each method."""
    figure = empty_figure(0.6 + 3.2 * len(estimates), 3.2)
    x = np.asarray(exact, np.float64)
    for i, (name, estimate) in enumerate(estimates.items()):
        axes = figure.add_subplot(1, len(estimates), i + 1)
        y = np.asarray(estimate, np.float64)
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axes.plot(ends, ends, color="0.6", linewidth=0.8, linestyle=":", label="equal")
        axes.scatter(x, y, s=9, color=COLOURS[i], alpha=0.7, linewidth=0, label=name)
        axes.set_xlabel(f"exact effect ({unit})")
        axes.set_ylabel("estimate")
        for set_scale in (axes.set_xscale, axes.set_yscale):
            set_scale("symlog", linthresh=10.0 ** np.floor(np.log10(max(1e-6, 0.1 * float(np.abs(x).max())))))
        axes.tick_params(labelsize=6, rotation=30)
        _finished(figure, axes, "")
    return figure


def circuit_drawing(graph: CircuitGraph, keep: ArrayLike, scores: ArrayLike, *, title: str = "") -> "Figure":
    """A Matplotlib Figure of the circuit keep[U, V], inputs below; an edge's width is its |score| of scores[U, V].

    Solid edges raise the metric, dashed ones lower it; colours tell queries, keys and values. A reader that feeds
    several nodes (a shared key) is drawn into each of them that is there. Best below about 60 edges.
    Raises ValueError for a circuit without edges; ImportError without Matplotlib.
    """
    edges = kept_edges(graph, np.asarray(keep))
    if not len(edges):
        raise ValueError("circuit_drawing: the circuit has no edges")
    drawn = _between_nodes(graph, edges, np.asarray(scores, np.float64))
    places = _places([(a, b) for a, b, _, _ in drawn], _depths(graph))
    widest = max(sum(1 for _, y in places.values() if y == level) for _, level in places.values())
    figure = empty_figure(max(5.0, 1.0 * widest), max(3.0, 0.75 * (1 + max(y for _, y in places.values()))))
    axes = figure.add_subplot()
    box = {"boxstyle": "round,pad=0.3", "facecolor": "#f3f4f6", "edgecolor": "0.5"}
    boxes = {
        name: axes.text(x, y, name, ha="center", va="center", fontsize=7, bbox=box, zorder=3).get_bbox_patch()
        for name, (x, y) in places.items()
    }
    most = max(abs(score) for *_, score in drawn) or 1.0
    for a, b, part, score in drawn:
        bend = "arc3,rad=0.15" if places[b][1] - places[a][1] > 1 else "arc3"
        arrow = {
            "arrowstyle": "-|>", "connectionstyle": bend, "color": PARTS.get(part, OTHER), "patchA": boxes[a],
            "patchB": boxes[b], "alpha": 0.75, "linewidth": 0.5 + 3.0 * abs(score) / most,
            "linestyle": "-" if score >= 0 else "--",
        }  # fmt: skip
        axes.annotate("", xy=places[b], xytext=places[a], arrowprops=arrow)
    for part, colour in PARTS.items():
        if any(p == part for _, _, p, _ in drawn):
            axes.plot([], [], color=colour, label=part)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=7, title="into", title_fontsize=7, loc="upper right")
    xs, ys = zip(*places.values(), strict=True)
    axes.set_xlim(min(xs) - 0.6, max(xs) + 0.6)
    axes.set_ylim(-0.5, max(ys) + 0.5)
    axes.axis("off")
    if title:
        axes.set_title(title, fontsize=10)
    return figure


def _between_nodes(graph: CircuitGraph, edges: np.ndarray, scores: np.ndarray) -> list[tuple[str, str, str, float]]:
    """(from node, to node, "q" / "k" / "v" / "", score) of each edge; nodes are sources in use, and outputs."""
    used = set(edges[:, 0].tolist())
    found = []
    for u, v in edges.tolist():
        reader = graph.readers[v]
        fed = np.flatnonzero(graph.feeds[v]).tolist()
        targets = [graph.sources[w] for w in fed if w in used] if fed else [reader]
        part = reader.rsplit(" ", 1)[-1]
        found += [(graph.sources[u], target, part if part in PARTS else "", float(scores[u, v])) for target in targets]
    return found


def _depths(graph: CircuitGraph) -> dict[str, int]:
    """How many nodes, at most, stand before each source and output in the whole graph: a layer is a row."""
    depth = np.zeros(len(graph.sources), int)
    heard = np.zeros(len(graph.readers), int)
    for v, fed in enumerate(graph.feeds):
        heard[v] = 1 + depth[graph.allowed[:, v]].max(initial=-1)
        depth[fed] = np.maximum(depth[fed], heard[v])
    return dict(zip((*graph.sources, *graph.readers), (*depth.tolist(), *heard.tolist()), strict=True))


def _places(edges: list[tuple[str, str]], depth: Mapping[str, int]) -> dict[str, tuple[float, int]]:
    """(x, row) of each node: rows by depth, in each near the middle of what is heard."""
    names = list(dict.fromkeys(name for edge in edges for name in edge))
    rows = {d: row for row, d in enumerate(sorted({depth[name] for name in names}))}
    x: dict[str, float] = {}
    for d, row in rows.items():
        here = [name for name in names if depth[name] == d]
        heard = {name: [x[a] for a, b in edges if b == name and a in x] for name in here}
        here.sort(key=lambda name: float(np.mean(heard[name])) if heard[name] else 0.0)
        # Every other row is shifted, so that edges over several rows do not run through the boxes between.
        for i, name in enumerate(here):
            x[name] = i - (len(here) - 1) / 2 + (0.25 if row % 2 else -0.25)
    return {name: (x[name], rows[depth[name]]) for name in names}


def _finished(figure: "Figure", axes: Any, title: str) -> "Figure":
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7)
    if title:
        axes.set_title(title, fontsize=10)
    return figure
