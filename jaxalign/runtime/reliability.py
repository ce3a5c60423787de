"""The reliability diagram: what happened against what was said."""

from typing import TYPE_CHECKING

import numpy as np

from jaxalign.preferences.calibration import ReliabilityCurve
from jaxalign.runtime.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Z = 1.959963984540054  # the normal quantile of a 95% interval


def reliability_diagram(curve: ReliabilityCurve, *, title: str = "") -> "Figure":
    """A Matplotlib Figure: frequency against confidence per bin with Wilson's 95% intervals, above the bins' counts.

    A calibrated forecaster lies on the diagonal; points below it are too sure. Empty bins are left out.
    Raises ImportError without Matplotlib.
    """
    from matplotlib.figure import Figure

    confidence, frequency, count = (np.asarray(x, np.float64) for x in curve)
    filled = count > 0
    x, y, n = confidence[filled], frequency[filled], count[filled]
    low, high = wilson_interval(y, n)
    figure = Figure(figsize=(5.0, 5.6), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="calibrated")
    errors = np.maximum([y - low, high - y], 0.0)
    axes.errorbar(x, y, yerr=errors, fmt="o-", color=COLOURS[0], markersize=4, linewidth=1, capsize=2, label="measured")
    axes.set_ylabel("frequency")
    axes.legend(frameon=False)
    below.bar(x, n, width=0.8 / len(count), color=COLOURS[0])
    below.set_ylabel("events")
    below.set_xlabel("confidence")
    # A reward model's confidence in its choice is never below one half.
    start = 0.5 if x.size and x.min() >= 0.5 else 0.0
    axes.set_xlim(start - 0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    if title:
        figure.suptitle(title)
    return figure


def wilson_interval(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of a probability of which `share` [...] of `count` [...] > 0 trials were successes.

    Wilson, Journal of the American Statistical Association 22 (1927). Unlike the normal interval it keeps a width where
    all or none succeeded.
    """
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return centre - half, centre + half
