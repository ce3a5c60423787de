"""`jaxalign tour`: its stops at their smallest, and what it says when the language model cannot be had."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.cli import (
    main,
    tour_certification,
    tour_interpretability,
    tour_irl,
    tour_preferences,
    tour_rl,
    tour_rlhf,
    tour_robustness,
)
from jaxalign.interop import PretrainedUnavailable
from jaxalign.runtime import curves, estimate


class Curved(NamedTuple):
    best_proxy: jax.Array
    best_gold: jax.Array


def test_the_tour_ends_with_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour_preferences, "SEEDS", 2)
    monkeypatch.setattr(tour_preferences, "STEPS", 2)
    for name, small in (("SIZE", 3), ("DEMONSTRATIONS", 4), ("STEPS", 3), ("SEEDS", 2)):
        monkeypatch.setattr(tour_irl, name, small)

    for name, small in (("LABELS", {"fgsm": "FGSM"}), ("STEPS", 2), ("EXAMPLES", 8)):
        monkeypatch.setattr(tour_robustness, name, small)
    for name, small in (("METHODS", {"ibp": "bounds"}), ("STEPS", 2), ("EXAMPLES", 8), ("EPSILONS", (0.1,))):
        monkeypatch.setattr(tour_certification, name, small)

    for name, small in (("KS", (2,)), ("STEPS", 2), ("SEEDS", 2), ("SAMPLES", 2048)):
        monkeypatch.setattr(tour_interpretability, name, small)

    def unavailable(job, console):
        raise PretrainedUnavailable("no wheel today")

    def trained(job, console):  # tests/cli/test_ppo_job.py trains in earnest
        job.out.mkdir(parents=True)
        curves({"return": np.ones(3)}).savefig(job.out / "learning.png")
        return {"settings": [{"iqm": [487.0, 455.0, 500.0], "mean": [480.0, 450.0, 500.0]}]}

    def compared(job, console):  # tests/cli/test_rlhf_job.py asks in earnest
        found = [0.5, 0.25, 0.75]
        return {"returns": {"before": [-6.0, -6.5, -5.5], "after": found}, "ordering": {"accuracy": found}}

    def studied(setting, key, *, ns, **options):  # tests/rlhf/test_overoptimization.py does
        return Curved(jnp.ones((1, len(ns))), jnp.ones((1, len(ns))))

    def opened(job, console):  # tests/cli/test_circuits_job.py does
        found = {"edges": 14, "of_edges": 416, "nodes": ["input 3", "neuron 0.1"], "faithfulness": [0.97, 0.96, 0.98]}
        return {"circuit": {**found, "rest": [0.01, 0.0, 0.02]}, "acdc": found}

    monkeypatch.setattr(tour_interpretability, "run_circuits", opened)
    monkeypatch.setattr(tour_rlhf, "run_rlhf", compared)
    monkeypatch.setattr(tour_rlhf, "over_optimization", studied)
    monkeypatch.setattr(tour_preferences, "run_dpo", unavailable)
    monkeypatch.setattr(tour_rl, "run_ppo", trained)
    main(["tour", "--out", str(tmp_path / "tour")])
    page = (tmp_path / "tour" / "report.html").read_text()
    assert "290 " in capsys.readouterr().out
    assert "expected value difference" in page
    assert "0.3989" in page
    assert "487 [455, 500]" in page.replace("&nbsp;", " ")
    assert "hidden performance" in page
    assert estimate(0.5, 0.25, 0.75) in page.replace("&nbsp;", " ")
    assert "4,096" in page
    assert "trained on attacked images" in page
    assert "untrained" in page
    assert estimate(0.97, 0.96, 0.98) in page.replace("&nbsp;", " ")
    assert "DPO of a small transformer from scratch" in page
    assert "Not measured: no wheel today" in page


@pytest.mark.slow
def test_the_whole_tour(tmp_path):
    """Downloads SmolLM2 if it is not in the cache; needs the network for that."""
    main(["tour", "--out", str(tmp_path / "tour")])
    assert "SmolLM2" in (tmp_path / "tour" / "report.html").read_text()
