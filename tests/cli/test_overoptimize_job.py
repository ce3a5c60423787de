"""`jaxalign overoptimize`: a run in miniature that reports and goes on, what it refuses, and its picture."""

import json

import numpy as np
import pytest
from rich.console import Console

from jaxalign.cli import overoptimize_run
from jaxalign.cli.overoptimize import Overoptimize
from jaxalign.rlhf.overoptimization_study import Curves
from jaxalign.runtime.overoptimization_figure import Line, Outcomes, Panel, overoptimization_figure

TINY = {
    "seeds": 2, "widths": (2, 4), "preferences": (10, 20, 40), "members": 2, "caution": (1.0,),
    "kl_coefficient": (0.1,), "most": 16, "samples": 64, "reward_steps": 20, "checks": 2, "rollouts": 1,
}  # fmt: skip


def job(out, **changes):
    return Overoptimize(out=out, **{**TINY, **changes})


def fake_sweep(run, hypers, keys, **options):
    """Curves with a peak, in the shapes of the real sweep; the work itself is tested where it is defined."""
    settings, ways = hypers.caution.shape
    shape = (settings, len(keys), ways)
    noise = np.random.default_rng(0).normal(scale=0.01, size=(*shape, 3))
    rise = np.arange(1.0, 4.0) + noise
    gold = np.array([0.0, 1.0, -1.0]) + 2 * np.asarray(hypers.kl_coefficient)[:, None, :, None] + noise
    best = np.arange(5.0) + np.zeros((*shape, 5))
    return Curves(np.full(shape[:2], 0.75), best, best * (3 - best), rise, gold, gold, rise**2)


def test_what_was_measured_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(overoptimize_run, "resumable_sweep", fake_sweep)
    tmp_path = tmp_path / "run"
    tmp_path.mkdir()
    results = overoptimize_run.run(job(tmp_path), Console(quiet=True))
    assert results == json.loads((tmp_path / "results.json").read_text())
    best, *_, ppo = results["curves"]
    assert (best["method"], ppo["method"]) == ("best of n", "PPO")
    assert len(results["curves"]) == 2 * 4  # three counts at width 4, and width 2
    np.testing.assert_allclose(best["peak_distance"], 0.43949, rtol=1e-4)  # n = 2 and 4 are alike: the first
    np.testing.assert_allclose(ppo["peak_gold"][0], 1.0, atol=0.05)
    np.testing.assert_allclose(ppo["fall"], -2.0, atol=0.1)
    remedies = {x["remedy"]: x for x in results["remedies"]}
    assert list(remedies)[:3] == ["none", "KL penalty 0.1", "ensemble mean"]
    np.testing.assert_allclose(remedies["KL penalty 0.1"]["gain"], 0.2, atol=0.05)
    np.testing.assert_allclose(remedies["stop at sqrt(KL) 2"]["distance"], 1.5, atol=0.6)
    page = (tmp_path / "report.html").read_text()
    assert "Better than none: KL penalty 0.1" in page
    assert page.count("data:image/png") == 1


@pytest.mark.slow
def test_a_run_is_reported_and_goes_on(tmp_path):
    first = overoptimize_run.run(job(tmp_path / "run"), Console(quiet=True))
    assert (tmp_path / "run" / "report.html").exists()
    with pytest.raises(FileExistsError, match="--resume"):
        overoptimize_run.run(job(tmp_path / "run"), Console(quiet=True))
    next((tmp_path / "run" / "single").glob("lanes-*.npz")).unlink()
    assert overoptimize_run.run(job(tmp_path / "run", resume=True), Console(quiet=True)) == first
    with pytest.raises(ValueError, match="another sweep"):
        overoptimize_run.run(job(tmp_path / "run", resume=True, reward_steps=40), Console(quiet=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1, got 0"),
        ({"most": 128}, r"--most must be in 1..64 \(--samples\), got 128"),
        ({"widths": ()}, "--widths"),
        ({"preferences": (64, 5)}, "--preferences must be 10 or more"),
        ({"samples": 63}, "--samples must be even"),
        ({"reward_steps": 19}, "--reward-steps must be at least 20, got 19"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        overoptimize_run.run(job(tmp_path / "run", **changes), Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_the_picture_has_every_line_and_outcome():
    distance = np.tile(np.linspace(0, 2, 5), (3, 1))
    lines = [Line("few", distance, distance - distance**2, distance), Line("many", distance, distance)]
    outcomes = Outcomes("ends", [("none", [-9.0, -10.0, -8.0]), ("penalty", [1.0])], limits=(-4.0, 2.0))
    figure = overoptimization_figure([Panel("one", lines), outcomes])
    drawn, ends = figure.axes
    assert [text.get_text() for text in drawn.get_legend().get_texts()] == ["few", "many"]
    peaks = [line.get_xydata()[0] for line in drawn.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(peaks, [[0.5, 0.25], [2, 2]])
    assert [text.get_text() for text in ends.texts] == ["none", "penalty"]
    with pytest.raises(ValueError, match="few needs arrays"):
        overoptimization_figure([Panel("one", [lines[0]._replace(gold=distance[0])])])
    with pytest.raises(ValueError, match="no panel"):
        overoptimization_figure([])
