"""Attributions over images, how faithful they are, and what ablating neurons costs."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.interpretability.attribution_faithfulness import AttributionFaithfulness, FaithfulnessCurve
from jaxalign.interpretability.neuron_ablation import AblationEffect
from jaxalign.runtime.figures import COLOURS, empty_figure
from jaxalign.runtime.image_grid import image_grid
from jaxalign.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":", "-.")


def attribution_grid(
    images: ArrayLike, attributions: Mapping[str, ArrayLike], *, titles: Sequence[str] = (), title: str = ""
) -> "Figure":
    """A Matplotlib Figure of N images and, a row for each method, their attributions: blue for, red against.

    Args:
        images: [N, H, W] or [N, H, W, C] in [0, 1].
        attributions: by method [N, H, W] or [N, H, W, C], summed over channels; each picture has its own scale.
        titles: N texts above the images.

    Raises ValueError naming a row of another shape or with NaN, and ImportError without Matplotlib.
    """
    rows = {}
    for name, values in attributions.items():
        picture = np.asarray(values, np.float64)
        picture = picture.sum(axis=-1) if picture.ndim == 4 else picture
        reach = np.abs(picture).max(axis=(-2, -1), keepdims=True)
        rows[textwrap.fill(name, 14)] = picture / np.where(reach > 0, reach, 1)
    shown = {"image": images} | rows
    return image_grid(shown, titles=titles, signed=tuple(rows), title=title, unit="share of the largest")


def faithfulness_figure(
    checks: Mapping[str, AttributionFaithfulness], *, unit: str = "fn", title: str = ""
) -> "Figure":
    """A Matplotlib Figure of deletion and insertion curves by method, and of both gains over random orders.

    Curves are means over examples with a band of 1.96 standard errors; gains have their bootstrap intervals. `unit` is
    that of the explained function. Raises ValueError if there is no method, and ImportError without Matplotlib.
    """
    if not checks:
        raise ValueError("faithfulness_figure: no method to draw")
    figure = empty_figure(10.5, 3.4)
    deletion, insertion, gains = figure.subplots(1, 3)
    for i, (name, check) in enumerate(checks.items()):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        _curve(deletion, check.deletion, name, colour, style)
        _curve(insertion, check.insertion, name, colour, style)
        for place, gain, marker in ((i - 0.12, check.deletion_gain, "o"), (i + 0.12, check.insertion_gain, "s")):
            middle, low, high = (float(value) for value in gain)
            gains.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt=marker, color=colour, capsize=3)
    deletion.set(xlabel="fraction deleted", ylabel=unit, title="deletion: lower is better")
    insertion.set(xlabel="fraction inserted", ylabel=unit, title="insertion: higher is better")
    gains.set(xlabel=f"gain over random orders ({unit})", title="deletion ●, insertion ■")
    gains.set_yticks(range(len(checks)), list(checks))
    gains.invert_yaxis()
    gains.axvline(0.0, color="0.45", linewidth=1.0, linestyle="--")
    deletion.legend(frameon=False, fontsize=7)
    for axes in (deletion, insertion, gains):
        _tidy(axes)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def ablation_figure(effects: Mapping[str, AblationEffect], *, title: str = "") -> "Figure":
    """A Matplotlib Figure of accuracy without the top n neurons and without n random ones, a panel for each site.

    The band is the accuracy without random ones less the interval of the excess: where it lies below the dashed line,
    the ranking found neurons that matter. Raises ValueError if there is no site, and ImportError without Matplotlib.
    """
    if not effects:
        raise ValueError("ablation_figure: no site to draw")
    figure = empty_figure(0.8 + 3.2 * len(effects), 3.0)
    for axes, (name, effect) in zip(figure.subplots(1, len(effects), squeeze=False)[0], effects.items(), strict=True):
        counts, by_chance = np.asarray(effect.counts), np.asarray(effect.random_accuracy)
        _, low, high = np.asarray(effect.accuracy_excess).T
        axes.fill_between(counts, by_chance - high, by_chance - low, color=COLOURS[1], alpha=0.2, linewidth=0)
        axes.plot(counts, effect.accuracy, color=COLOURS[1], marker="o", markersize=3, label="without the top n")
        axes.plot(counts, by_chance, "--", color="0.35", marker="o", markersize=3, label="without n random ones")
        axes.set(xlabel="neurons ablated", ylabel="accuracy", ylim=(-0.02, 1.02))
        axes.set_title(name, fontsize=9)
        axes.legend(frameon=False, fontsize=7)
        _tidy(axes)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _curve(axes: "Axes", curve: FaithfulnessCurve, name: str, colour: str, style: str) -> None:
    fraction, values = np.asarray(curve.fraction), np.asarray(curve.value, np.float64)
    middle, error = values.mean(axis=0), 1.96 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    axes.fill_between(fraction, middle - error, middle + error, color=colour, alpha=0.15, linewidth=0)
    axes.plot(fraction, middle, style, color=colour, linewidth=1.4, label=name)


def _tidy(axes: "Axes") -> None:
    axes.title.set_fontsize(9)
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
