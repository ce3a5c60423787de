"""Pictures of sparse autoencoders: how much they explain with how many features, and how often features fire."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.runtime.figures import COLOURS, empty_figure
from jaxalign.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def l0_frontier(
    names: Sequence[str], l0: ArrayLike, quality: ArrayLike, *, label: str = "explained variance", title: str = ""
) -> "Figure":
    """A Matplotlib Figure of quality against L0, a point with its interval for each autoencoder, joined by rising L0.

    Args:
        names: N, written beside the points.
        l0: [N], mean features a token.
        quality: [N, 3]: value, low, high. NaN is not measured, and not drawn.

    Raises ValueError if the shapes differ or there is no autoencoder, ImportError without Matplotlib.
    """
    x, y = np.asarray(l0, np.float64), np.asarray(quality, np.float64)
    if x.shape != (len(names),) or y.shape != (len(names), 3) or not len(names):
        raise ValueError(f"l0_frontier: {len(names)} names, l0 {x.shape}, quality {y.shape}; needs [N] and [N, 3]")
    figure = empty_figure(5.6, 3.6)
    axes = figure.add_subplot()
    order = np.argsort(x, kind="stable")
    axes.plot(x[order], y[order, 0], color=COLOURS[0], linewidth=1.0, alpha=0.5)
    axes.errorbar(x, y[:, 0], yerr=np.abs(y[:, 1:] - y[:, :1]).T, fmt="o", color=COLOURS[0], capsize=3, markersize=4)
    for name, at, value in zip(names, x, y[:, 0], strict=True):
        axes.annotate(name, (at, value), textcoords="offset points", xytext=(6, -10), fontsize=7)
    axes.margins(x=0.12)  # room for the last name
    axes.set_xlabel("L0 (features a token)")
    axes.set_ylabel(label)
    _finish(axes, title)
    return figure


def density_histogram(densities: Mapping[str, ArrayLike], *, title: str = "") -> "Figure":
    """A Matplotlib Figure of log10 of the share of tokens on which features fire, a line for each autoencoder.

    Args:
        densities: by name [F]; features that never fired are counted in the legend, as they have no logarithm.

    Raises ValueError for a value outside [0, 1], ImportError without Matplotlib.
    """
    arrays = {name: np.asarray(x, np.float64) for name, x in densities.items()}
    for name, x in arrays.items():
        if not ((x >= 0) & (x <= 1)).all():
            raise ValueError(f"density_histogram: {name} has values outside [0, 1]")
    figure = empty_figure(5.6, 3.2)
    axes = figure.add_subplot()
    least = min((np.log10(x[x > 0].min()) for x in arrays.values() if (x > 0).any()), default=-1.0)
    bins = np.linspace(np.floor(least), 0.0, 41).tolist()
    for i, (name, x) in enumerate(arrays.items()):
        dead = int((x == 0).sum())
        shown = f"{name} ({dead:,} of {len(x):,} never fired)" if dead else name
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        axes.hist(np.log10(x[x > 0]), bins, histtype="step", color=colour, linestyle=style, label=shown)
    axes.set_xlabel("log10 of the share of tokens on which a feature fires")
    axes.set_ylabel("features")
    axes.margins(y=0.35)  # room for the legend
    axes.legend(frameon=False, fontsize=7, loc="upper left")
    _finish(axes, title)
    return figure


def _finish(axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
