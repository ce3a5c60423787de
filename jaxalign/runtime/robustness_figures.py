"""How accuracy falls as an attacker may change more."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.runtime.figures import COLOURS, empty_figure
from jaxalign.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = {"linf": "L∞, input units", "l2": "L2, input units", "l1": "L1, input units"}
STYLES = ("-", "--", ":", "-.")


def robustness_curves(
    epsilons: ArrayLike,
    accuracies: Mapping[str, ArrayLike],
    *,
    clean: float | None = None,
    chance: float | None = None,
    worst: str | None = None,
    norm: str = "linf",
    title: str = "",
) -> "Figure":
    """A Matplotlib Figure of robust accuracy against epsilon, a curve with its band for each attack.

    Args:
        epsilons: [E], rising; the axis begins at 0.
        accuracies: by attack [E, 3]: the share of all examples still right, and its interval's low and high end. NaN is
            not measured and leaves a gap.
        clean: accuracy without an attack, a line at that height.
        chance: accuracy of guessing, another.
        worst: which of the curves is the worst case over attacks; it is drawn black and bold.
        norm: "linf", "l2" or "l1", for the axis.

    Raises ValueError naming a curve of another shape, a value outside [0, 1], or epsilons that do not rise; ImportError
    without Matplotlib.
    """
    x = np.asarray(epsilons, np.float64)
    if x.ndim != 1 or not x.size or not (np.diff(x) > 0).all():
        raise ValueError(f"robustness_curves: epsilons must be [E] and rise, got {x.tolist()}")
    if not accuracies:
        raise ValueError("robustness_curves: no curve to draw")
    figure = empty_figure(5.6, 3.6)
    axes = figure.add_subplot()
    others = [name for name in accuracies if name != worst]
    for name, values in accuracies.items():
        y = np.asarray(values, np.float64)
        if y.shape != (x.size, 3):
            raise ValueError(f"robustness_curves: {name} is {y.shape}, needs [{x.size}, 3]: value, low, high")
        if ((y < 0) | (y > 1)).any():
            raise ValueError(f"robustness_curves: {name} has {y[(y < 0) | (y > 1)][0]:g}, an accuracy is in [0, 1]")
        place = -1 if name == worst else others.index(name)
        colour, style = ("black", "-") if name == worst else (COLOURS[place % 6], STYLES[place // 6 % 4])
        width = 2.4 if name == worst else 1.2
        axes.fill_between(x, y[:, 1], y[:, 2], color=colour, alpha=0.15, linewidth=0)
        axes.plot(x, y[:, 0], style, color=colour, linewidth=width, marker="o", markersize=3, label=name)
    for level, name, style in ((clean, "clean", "--"), (chance, "chance", ":")):
        if level is not None:
            axes.axhline(level, linestyle=style, color="0.45", linewidth=1.0, label=name)
    axes.set_xlabel(f"epsilon ({UNITS.get(norm, norm)})")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(left=min(0.0, x[0]))
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        axes.set_title(title, fontsize=10)
    return figure
