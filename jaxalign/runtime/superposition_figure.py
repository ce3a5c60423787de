"""The picture of superposition: directions of features in a plane, and the share of a dimension each feature has."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.interpretability.toy_superposition import POLYTOPES, feature_dimensionality
from jaxalign.runtime.figures import COLOURS, empty_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UPPER = ("pentagon",)  # labels set above their line, the next one below being near


def superposition_figure(
    density: Sequence[float] | np.ndarray, w: np.ndarray, *, planes: Sequence[tuple[str, np.ndarray]] = ()
) -> "Figure":
    """A Matplotlib Figure of toy models over the sparsity of their features (after Elhage et al. 2022).

    Above, for each (title, W [n, 2]) of `planes`, the n directions in the plane. Below, over 1 / (1 - S): each
    feature's `feature_dimensionality` as a point, dimensions per feature M / ||W||_F^2 as a line, and the
    dimensionalities of the known solids across.

    Args:
        density: [K], 1 - S, the probability that a feature is not 0.
        w: [K, N, M], the directions W learned at each.

    Raises ValueError naming what is of another shape, or a density outside (0, 1]; ImportError without Matplotlib.
    """
    density, w = np.asarray(density, np.float64), np.asarray(w)
    if w.ndim != 3 or density.shape != w.shape[:1]:
        raise ValueError(f"superposition_figure: needs density [K] and w [K, N, M], got {density.shape}, {w.shape}")
    if not ((density > 0) & (density <= 1)).all():
        raise ValueError(f"superposition_figure: density must lie in (0, 1], got {density.tolist()}")
    for title, plane in planes:
        if np.ndim(plane) != 2 or np.shape(plane)[1] != 2:
            raise ValueError(f"superposition_figure: the plane {title!r} must be [n, 2], got {np.shape(plane)}")
    figure = empty_figure(8.0, 6.2 if planes else 4.2)
    if not planes:
        _draw_dimensionality(figure.add_subplot(), density, w)
        return figure
    grid = figure.add_gridspec(2, len(planes), height_ratios=(1, 2))
    largest = max(float(np.abs(plane).max()) for _, plane in planes)
    for column, (title, plane) in enumerate(planes):
        _draw_plane(figure.add_subplot(grid[0, column]), title, np.asarray(plane), 1.15 * largest or 1.0)
    _draw_dimensionality(figure.add_subplot(grid[1, :]), density, w)
    return figure


def _draw_plane(axes: Any, title: str, plane: np.ndarray, limit: float) -> None:
    for i, (x, y) in enumerate(plane):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot([0, x], [0, y], color=colour, linewidth=1.6)
        axes.plot(x, y, "o", color=colour, markersize=5)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("0.85")
    axes.set_title(title, fontsize=9)


def _draw_dimensionality(axes: Any, density: np.ndarray, w: np.ndarray) -> None:
    order = np.argsort(-density)
    x, w = 1 / density[order], w[order]
    dimensionality = np.stack([np.asarray(feature_dimensionality(each)) for each in w])
    represented = np.square(w).sum(axis=(1, 2))
    per_feature = np.where(represented > 0, w.shape[2] / np.where(represented > 0, represented, 1.0), np.nan)
    for name, share in POLYTOPES.items():
        axes.axhline(share, color="0.8", linewidth=0.8, zorder=0)
        place = {"xycoords": ("axes fraction", "data"), "va": "bottom" if name in UPPER else "center"}
        axes.annotate(f"{name}, {share:.3g}", (1.01, share), **place, fontsize=7.5, color="0.35")
    style = {"color": COLOURS[0], "alpha": 0.45, "markersize": 5, "label": "a feature"}
    axes.plot(np.repeat(x, w.shape[1]), dimensionality.ravel(), ".", **style)
    axes.plot(x, per_feature, color=COLOURS[1], linewidth=1.8, label="dimensions per feature")
    axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.08)
    axes.set_xlabel("1 / (1 - sparsity)", fontsize=9)
    axes.set_ylabel("share of a dimension", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
