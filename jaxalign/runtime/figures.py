"""Curves of metrics over training steps, and maps of values over a grid."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.statistics import bootstrap_interval, interquartile_mean
from jaxalign.types import Array, ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito's palette, told apart with every common colour vision: blue, vermilion, green, purple, orange, sky blue.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BANDS = ("bootstrap", "range")
MOST_POINTS = 500


def lane_band(values: ArrayLike, *, band: str = "bootstrap") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The middle of L lanes at each step and a band around it: (middle [T], low [T], high [T]) for values [T, L].

    middle: the interquartile mean over lanes (below four lanes the mean).
    band: "bootstrap" is the 95% bootstrap interval of the middle, over lanes; "range" is the least and largest lane.
    A step where a lane is NaN is NaN. Raises ValueError for another `band` or shape.
    """
    values = np.asarray(values, np.float32)
    if band not in BANDS:
        raise ValueError(f"lane_band: band must be one of {BANDS}, got {band!r}")
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"lane_band: needs values [T, L], got {values.shape}")
    middle = np.asarray(interquartile_mean(values))
    if band == "range":
        return middle, values.min(axis=1), values.max(axis=1)

    low, high = _bootstrap_band(values)
    return middle, np.asarray(low), np.asarray(high)


@jax.jit  # once for all panels of a figure
def _bootstrap_band(values: ArrayLike) -> tuple[Array, Array]:
    """All steps of values [T, L] with the same resamples of lanes, so that the band is as smooth as the curves are."""

    def over_lanes(scores: Array) -> Array:
        return interquartile_mean(jnp.moveaxis(scores, 0, -1))

    return bootstrap_interval(jax.random.key(0), jnp.asarray(values).T, statistic=over_lanes, resamples=1000)


def curves(
    metrics: Mapping[str, ArrayLike],
    names: Sequence[str] | None = None,
    *,
    title: str = "",
    units: Mapping[str, str] | None = None,
    band: str = "bootstrap",
    horizontal: str = "step",
) -> "Figure":
    """A Matplotlib Figure with one panel per metric over steps.

    Args:
        metrics: arrays [T] or, with lanes, [T, L] by name, as `fit` and `read_metrics` give them; "step" [T], if there,
            is the horizontal axis.
        names: which to draw; None draws all of rank 1 or 2.
        units: by metric, shown on the axis: {"loss": "nats"}.
        band: around the middle of the lanes, "bootstrap" or "range" (see `lane_band`).
        horizontal: what the steps are called.

    Long runs are drawn at 500 evenly spaced steps. Values that are not finite leave a gap.
    Raises KeyError naming a metric that is not there, ValueError for one whose rank is not 1 or 2, and ImportError
    without Matplotlib.
    """
    arrays = {name: np.asarray(value) for name, value in metrics.items()}
    if names is None:
        names = [name for name, value in arrays.items() if name != "step" and value.ndim in (1, 2)]
    for name in names:
        if name not in arrays:
            raise KeyError(f"curves: no metric {name!r}; there are {', '.join(sorted(arrays))}")
        if arrays[name].ndim not in (1, 2):
            raise ValueError(f"curves: {name} is {arrays[name].shape}, needs [T] or [T, lanes]")
    if not names:
        raise ValueError("curves: no metric to draw")

    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = empty_figure(1.2 + 3.6 * columns, 0.6 + 2.6 * rows)
    for i, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, i + 1)
        _panel(axes, arrays[name], arrays.get("step"), colour=COLOURS[i % len(COLOURS)], band=band)
        unit = (units or {}).get(name)
        axes.set_xlabel(horizontal)
        axes.set_ylabel(f"{name} ({unit})" if unit else name)
    if title:
        figure.suptitle(title)
    return figure


def maps(images: Mapping[str, ArrayLike], *, title: str = "", units: Mapping[str, str] | None = None) -> "Figure":
    """A Matplotlib Figure with one picture per image [H, W], each with a colour scale of its own.

    Values that are not finite are left blank. Raises ValueError naming an image that is not of rank 2, and ImportError
    without Matplotlib.
    """
    arrays = {name: np.asarray(image, np.float64) for name, image in images.items()}
    for name, image in arrays.items():
        if image.ndim != 2:
            raise ValueError(f"maps: {name} is {image.shape}, needs [H, W]")
    if not arrays:
        raise ValueError("maps: no image to draw")
    figure = empty_figure(3.2 * len(arrays), 3.0)
    for i, (name, image) in enumerate(arrays.items()):
        axes = figure.add_subplot(1, len(arrays), i + 1)
        drawn = axes.imshow(np.where(np.isfinite(image), image, np.nan), cmap="cividis")
        axes.set_title(name, fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
        bar.ax.tick_params(labelsize=7)
        if unit := (units or {}).get(name):
            bar.set_label(unit, fontsize=8)
    if title:
        figure.suptitle(title)
    return figure


def empty_figure(width: float, height: float) -> "Figure":
    """A Figure of this size in inches, drawn without a display. Raises ImportError without Matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need Matplotlib: pip install "jaxalign[viz]"') from error

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _panel(axes, values: np.ndarray, steps: np.ndarray | None, *, colour: str, band: str) -> None:
    steps = np.arange(len(values)) if steps is None else steps
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(int))
    steps, values = steps[kept], np.asarray(values[kept], np.float64)
    marker = "o" if len(kept) == 1 else None
    if values.ndim == 1:
        axes.plot(steps, np.where(np.isfinite(values), values, np.nan), color=colour, linewidth=1.4, marker=marker)
    else:
        middle, low, high = lane_band(values, band=band)
        what = "95% bootstrap interval" if band == "bootstrap" else "range"
        axes.fill_between(steps, low, high, color=colour, alpha=0.3, linewidth=0)
        label = "interquartile mean" if values.shape[1] >= 4 else "mean"
        axes.plot(steps, middle, color=colour, linewidth=1.4, marker=marker, label=f"{label}, {values.shape[1]} lanes")
        axes.fill_between([], [], [], color=colour, alpha=0.3, linewidth=0, label=what)
        axes.legend(frameon=False, fontsize=7)
    if len(kept) > 1:  # the whole run, also where the last values are not finite
        axes.set_xlim(steps[0], steps[-1])
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
