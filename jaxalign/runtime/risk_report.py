"""The part of a report that says how bad the worst returns are."""

from typing import TYPE_CHECKING

import numpy as np

from jaxalign.rl.tail_risk import Interval, TailRisk
from jaxalign.runtime.report import Report, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWEST_IN_TAIL = 5  # below this many returns in a tail its bootstrap interval is said to be unsure


def tail_risk_section(report: Report, risk: TailRisk, *, unit: str = "") -> Report:
    """Add a table of a TailRisk (returns [N] or [seeds, N]) and a histogram of its returns, and give the report back.

    unit: of the returns, for the table. Raises ImportError without Matplotlib.
    """
    count, level = int(np.size(risk.returns)), f"{100 * float(risk.confidence):g}%"
    seeds = f" of {len(risk.returns)} seeds, resampled whole" if np.ndim(risk.returns) == 2 else ""
    rows = [["mean return", _text(risk.mean, unit), ""]]
    for i, alpha in enumerate(np.asarray(risk.alphas, np.float64)):
        inside = alpha * count
        doubt = f"only {inside:.3g} returns in this tail: unsure" if inside < FEWEST_IN_TAIL else ""
        share = f"{100 * alpha:g}%"
        rows.append([f"value at risk, {share}", _text(_at(risk.value_at_risk, i), unit), doubt])
        rows.append([f"mean of the worst {share} (CVaR)", _text(_at(risk.cvar, i), unit), doubt])
    rows.append([f"share of returns below {float(risk.threshold):g}", _text(risk.below), ""])
    rows.append(["worst return seen", estimate(risk.worst, unit=unit), "no interval: what was never seen may be worse"])
    caption = f"{count} returns{seeds}; {level} bootstrap intervals, of the share widened to Wilson's."
    report.table(("measure", f"estimate and {level} interval", "note"), rows, caption)
    return report.figure(tail_histogram(risk), "Returns, with their mean and the mean of each tail (CVaR).")


def tail_histogram(risk: TailRisk) -> "Figure":
    """A Matplotlib Figure of the returns ([N] or [seeds, N], pooled), their mean and the CVaR of each alpha.

    Returns that are not finite are left out. Raises ImportError without Matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need Matplotlib: pip install "jaxalign[viz]"') from error
    returns = np.asarray(risk.returns, np.float64).reshape(-1)
    figure = Figure(figsize=(6.0, 3.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.hist(returns[np.isfinite(returns)], bins=min(60, max(10, int(np.sqrt(returns.size)))), color="0.75")
    lines = [("mean", risk.mean.value, "#0072B2")]
    lines += [
        (f"CVaR {100 * float(alpha):g}%", value, "#D55E00")
        for alpha, value in zip(np.asarray(risk.alphas), np.asarray(risk.cvar.value), strict=True)
    ]
    for name, value, colour in lines:
        if np.isfinite(value):
            axes.axvline(float(value), color=colour, linewidth=1.2)
            axes.annotate(name, (float(value), 0.97), xycoords=("data", "axes fraction"), rotation=90, va="top",
                          ha="right", fontsize=7, color=colour)  # fmt: skip
    axes.set_xlabel("return")
    axes.set_ylabel("episodes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure


def _at(interval: Interval, index: int) -> Interval:
    return Interval(*(end[index] for end in interval))


def _text(interval: Interval, unit: str = "") -> str:
    value, low, high = (float(x) for x in interval)
    return "not measured" if np.isnan([value, low, high]).any() else estimate(value, low, high, unit=unit)
