"""The tail-risk section of a report."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxalign.rl.tail_risk import tail_risk
from jaxalign.runtime.report import Report, estimate
from jaxalign.runtime.risk_report import tail_histogram, tail_risk_section


@pytest.fixture(scope="module")
def measured():
    """A TailRisk of 200 returns, and of the same with one missing."""
    run = jax.jit(lambda x: tail_risk(jax.random.key(1), x, alphas=(0.01, 0.1), threshold=-1.0, resamples=100))
    returns = jax.random.normal(jax.random.key(0), (4, 50))
    return run(returns), run(returns.at[1, 2].set(jnp.nan))


def printed(report):
    stream = io.StringIO()
    report.print(Console(file=stream, width=200))
    return stream.getvalue()


def test_every_number_is_there_with_its_interval(measured):
    risk, _ = measured
    report = Report("Risk")
    assert tail_risk_section(report, risk, unit="points") is report
    text = printed(report)
    for interval in (risk.mean, [x[0] for x in risk.cvar], [x[1] for x in risk.value_at_risk]):
        assert estimate(*interval, unit="points") in text
    assert estimate(*risk.below) in text
    assert estimate(risk.worst, unit="points") in text
    assert "mean of the worst 10% (CVaR)" in text
    assert "share of returns below -1" in text
    assert "200 returns of 4 seeds, resampled whole; 95% bootstrap intervals" in text
    assert text.count("only 2 returns in this tail: unsure") == 2  # of 1%, not of 10%
    assert "data:image/png;base64" in report.html()


def test_a_missing_return_is_not_measured(measured):
    report = tail_risk_section(Report("Risk"), measured[1])
    assert printed(report).count("not measured") == 7  # every number there is


def test_the_histogram_marks_the_mean_and_the_tails(measured):
    axes = tail_histogram(measured[0]).axes[0]
    at = sorted(line.get_xdata()[0] for line in axes.lines)
    wanted = [*np.asarray(measured[0].cvar.value), float(measured[0].mean.value)]
    np.testing.assert_allclose(at, sorted(wanted), atol=1e-6)
    assert sum(patch.get_height() for patch in axes.patches) == 200
