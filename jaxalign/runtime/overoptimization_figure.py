"""The picture of over-optimisation: gold and proxy reward against the distance from the reference policy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxalign.runtime.figures import COLOURS, empty_figure
from jaxalign.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3


class Line(NamedTuple):
    """One way of optimising in S seeds: distance, gold, proxy [S, K]; proxy may be None."""

    label: str
    distance: np.ndarray
    gold: np.ndarray
    proxy: np.ndarray | None = None


class Panel(NamedTuple):
    """Lines under one title; `limits` are the (least, largest) reward drawn, None for all."""

    title: str
    lines: Sequence[Line]
    limits: tuple[float, float] | None = None


class Outcomes(NamedTuple):
    """What several ways came to: a name and [mean, low, high] (of one seed [mean]) each; `limits` as in Panel."""

    title: str
    rows: Sequence[tuple[str, Sequence[float]]]
    limits: tuple[float, float] | None = None


def overoptimization_figure(panels: Sequence[Panel | Outcomes], *, unit: str = "reward") -> "Figure":
    """A Matplotlib Figure of panels, three in a row: gold (solid) and proxy (dashed) over sqrt(KL), or outcomes.

    Each point is the mean over seeds of both axes at one n, or at one check of the training; bands are 95% bootstrap
    intervals of the gold reward's mean. A dot marks where that is highest.
    Raises ValueError naming a line whose arrays are not [S, K] alike, and ImportError without Matplotlib.
    """
    if not panels:
        raise ValueError("overoptimization_figure: no panel to draw")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = empty_figure(0.5 + 3.9 * columns, 0.5 + 3.2 * rows)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        if isinstance(panel, Outcomes):
            _draw_outcomes(axes, panel, unit)
        else:
            _check(panel)
            _draw(axes, panel)
            axes.set_xlabel(r"$\sqrt{\mathrm{KL}}$ from the reference policy ($\sqrt{\mathrm{nats}}$)", fontsize=9)
            if i % columns == 0:
                axes.set_ylabel(unit, fontsize=9)
        axes.set_title(panel.title, fontsize=10)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    handles = [_sample("-", "gold"), _sample("--", "proxy"), _sample("", "gold's peak", "o")]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return figure


def _check(panel: Panel) -> None:
    for line in panel.lines:
        shapes = {np.shape(x) for x in line[1:] if x is not None}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ValueError(f"overoptimization_figure: {line.label} needs arrays [S, K] alike, got {sorted(shapes)}")


def _draw_outcomes(axes: Any, panel: Outcomes, unit: str) -> None:
    """Names down the side, the first at the top, and an interval for each."""
    left = panel.limits[0] if panel.limits else min(min(numbers) for _, numbers in panel.rows)
    for y, (name, numbers) in enumerate(panel.rows):
        colour = "0.35" if y == 0 else COLOURS[0]
        if len(numbers) == 3:
            axes.plot(numbers[1:], [y, y], color=colour, linewidth=1.8)
        beyond = numbers[0] < left
        axes.plot(max(numbers[0], left), y, "<" if beyond else "o", color=colour, markersize=5, clip_on=False)
        axes.annotate(name, (left, y), (4, 4), textcoords="offset points", fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(len(panel.rows) - 0.5, -0.8)
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    axes.grid(axis="x", color="0.88", linewidth=0.6)
    axes.set_xlabel(unit, fontsize=9)
    if panel.limits is not None:
        axes.set_xlim(*panel.limits)


def _draw(axes: Any, panel: Panel) -> None:
    furthest = 0.0
    for line, colour in zip(panel.lines, COLOURS * (len(panel.lines) // len(COLOURS) + 1), strict=False):
        distance, gold = (np.asarray(x, np.float32).mean(axis=0) for x in (line.distance, line.gold))
        axes.fill_between(distance, *_interval(line.gold), color=colour, alpha=0.18, linewidth=0)
        axes.plot(distance, gold, color=colour, linewidth=1.8, label=line.label)
        if line.proxy is not None:
            axes.plot(distance, np.asarray(line.proxy).mean(axis=0), "--", color=colour, linewidth=1.1)
        peak = int(np.argmax(gold))
        axes.plot(distance[peak], gold[peak], "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
        furthest = max(furthest, float(distance[-1]))
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.set_xlim(0.0, furthest * 1.02 or 1.0)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.legend(frameon=False, fontsize=8, loc="upper left" if panel.limits is None else "lower left")
    axes.grid(color="0.88", linewidth=0.6)


@jax.jit  # once for all lines of one shape
def _bootstrap(values: Any) -> Any:
    return bootstrap_interval(jax.random.key(0), values, resamples=1000)


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% bootstrap interval of the mean over seeds of values [S, K]: (low [K], high [K])."""
    low, high = _bootstrap(np.asarray(values, np.float32))
    return np.asarray(low), np.asarray(high)


def _sample(style: Any, label: str, marker: str = "") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle=style or "none", marker=marker, color="0.25", label=label)
