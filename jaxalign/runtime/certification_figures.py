"""What is proven, what is broken, and the gap between; and how far certificates reach."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.runtime.figures import COLOURS, empty_figure
from jaxalign.runtime.robustness_figures import UNITS
from jaxalign.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def certified_and_attacked(
    epsilons: ArrayLike, certified: ArrayLike, attacked: ArrayLike, *, norm: str = "linf", title: str = ""
) -> "Figure":
    """A Matplotlib Figure of both accuracies against epsilon, the gap shaded: the images nobody knows about.

    Args:
        epsilons: [E], rising; 0 is accuracy without an attack.
        certified: [E, 3], the share of images proven right in the whole ball, with its interval's ends: the truth is
            no lower.
        attacked: [E, 3], the share that no attack broke: the truth is no higher.
        norm: "linf", "l2" or "l1", for the axis.

    Raises ValueError for another shape, a value outside [0, 1], epsilons that do not rise, or more certified than
    attacks left; ImportError without Matplotlib.
    """
    x = np.asarray(epsilons, np.float64)
    sides = {"certified": np.asarray(certified, np.float64), "attacked": np.asarray(attacked, np.float64)}
    if x.ndim != 1 or not x.size or not (np.diff(x) > 0).all():
        raise ValueError(f"certified_and_attacked: epsilons must be [E] and rise, got {x.tolist()}")
    for name, y in sides.items():
        if y.shape != (x.size, 3):
            raise ValueError(f"certified_and_attacked: {name} is {y.shape}, needs [{x.size}, 3]: value, low, high")
        if not ((y >= 0) & (y <= 1)).all():
            raise ValueError(f"certified_and_attacked: {name} must lie in [0, 1], got {y[~((y >= 0) & (y <= 1))][0]:g}")
    if (crossed := sides["certified"][:, 0] > sides["attacked"][:, 0]).any():
        place = x[np.argmax(crossed)]
        raise ValueError(f"certified_and_attacked: at epsilon {place:g} more is certified than the attacks left")
    figure = empty_figure(5.6, 3.6)
    axes = figure.add_subplot()
    low, high = sides["certified"][:, 0], sides["attacked"][:, 0]
    axes.fill_between(x, low, high, color="0.5", alpha=0.22, linewidth=0, label="gap: neither")
    labels = {"certified": "certified: proven right", "attacked": "attacked: not broken"}
    for (name, y), colour in zip(sides.items(), (COLOURS[2], COLOURS[1]), strict=True):
        axes.fill_between(x, y[:, 1], y[:, 2], color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, y[:, 0], color=colour, linewidth=1.6, marker="o", markersize=3, label=labels[name])
    axes.set_xlabel(f"epsilon ({UNITS.get(norm, norm)})")
    axes.set_ylim(-0.02, 1.02)
    return _finished(figure, axes, "accuracy", title)


def radius_histogram(radius: ArrayLike, *, maximum: float, norm: str = "linf", title: str = "") -> "Figure":
    """A Matplotlib Figure: of how many images the certificate reaches how far.

    Args:
        radius: [B], the certified radius of each image; 0 where there is no certificate, which has a bar of its own.
        maximum: as far as was looked; images that reach it stand in the last bar.

    Raises ValueError for another shape, no image, NaN or a radius outside [0, maximum]; ImportError without Matplotlib.
    """
    radius = np.asarray(radius, np.float64)
    if radius.ndim != 1 or not radius.size or not ((radius >= 0) & (radius <= maximum)).all():
        raise ValueError(
            f"radius_histogram: radius must be [B] in [0, {maximum:g}], got {radius.shape}"
            + (f" from {radius.min():g} to {radius.max():g}" if radius.size else "")
        )
    figure = empty_figure(5.6, 3.0)
    axes = figure.add_subplot()
    held = radius[radius > 0]
    edges = np.linspace(0.0, maximum, 21)
    axes.hist(held, edges.tolist(), color=COLOURS[2], alpha=0.8, label=f"certified ({len(held)})")
    width = edges[1]
    axes.bar(-width, len(radius) - len(held), width=0.8 * width, color="0.6", label=f"none ({len(radius) - len(held)})")
    if held.size:
        axes.axvline(np.median(held), color="black", linestyle="--", linewidth=1.0, label="median of the certified")
    axes.set_xlabel(f"certified radius ({UNITS.get(norm, norm)})")
    return _finished(figure, axes, "images", title)


def radius_curve(radius: ArrayLike, accuracy: ArrayLike, *, norm: str = "l2", title: str = "") -> "Figure":
    """A Matplotlib Figure of certified accuracy against radius.

    radius: [R], rising; accuracy: [R, 3], the share of images right and certified that far, and its interval's ends.
    Raises ValueError for another shape or radii that do not rise; ImportError without Matplotlib.
    """
    x, y = np.asarray(radius, np.float64), np.asarray(accuracy, np.float64)
    if x.ndim != 1 or not (np.diff(x) > 0).all() or y.shape != (x.size, 3):
        raise ValueError(f"radius_curve: needs radius [R], rising, and accuracy [R, 3], got {x.shape}, {y.shape}")
    figure = empty_figure(5.6, 3.6)
    axes = figure.add_subplot()
    axes.fill_between(x, y[:, 1], y[:, 2], color=COLOURS[2], alpha=0.15, linewidth=0)
    axes.plot(x, y[:, 0], color=COLOURS[2], linewidth=1.6, label="certified: proven right")
    axes.set_xlabel(f"radius ({UNITS.get(norm, norm)})")
    axes.set_ylim(-0.02, 1.02)
    return _finished(figure, axes, "accuracy", title)


def _finished(figure: "Figure", axes: Any, vertical: str, title: str) -> "Figure":
    axes.set_ylabel(vertical)
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7)
    if title:
        axes.set_title(title, fontsize=10)
    return figure
