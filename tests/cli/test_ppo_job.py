"""`jaxalign ppo`: a sweep that reports, goes on when it was cut, and refuses what it cannot do."""

import json
import re

import jax
import numpy as np
import pytest

from jaxalign.cli import main, ppo_run
from jaxalign.cli.ppo import Ppo
from jaxalign.cli.ppo_presets import KNOWN, known, settings_of
from jaxalign.environments import check_environment
from jaxalign.runtime import fit, read_metrics

SMALL = [
    "--env", "bandit", "--steps", "1024", "--num-envs", "8", "--num-steps", "8", "--evaluations", "4", "--seeds", "2",
    "--episodes", "8", "--hidden", "8", "--learning-rate", "0.03", "1e-9", "--epochs", "2", "--minibatches", "2",
]  # fmt: skip


def run(out, *more):
    main(["ppo", "--out", str(out), *SMALL, *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("ppo") / "run"
    run(out)
    return out


def test_a_sweep_learns_and_is_reported(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["steps"] == 1024
    fast, slow = results["settings"]
    assert (fast["learning_rate"], slow["learning_rate"]) == (0.03, 1e-9)
    assert fast["mean"][0] > slow["mean"][0]  # the optimum earns 0.75, an untrained policy about 0.42
    assert len(fast["seeds"]) == 2
    value, low, high = fast["iqm"]
    assert low <= value <= high
    assert read_metrics(finished)["evaluation/return"].shape == (4, 4)
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 3  # two learning curves and the tail
    assert "environment steps" in page
    with np.load(finished / "policy.npz") as policies:
        assert all(x.shape[0] == 4 for x in policies.values())


@pytest.mark.slow
def test_a_cut_run_goes_on_to_the_same_policies(finished, tmp_path, monkeypatch):
    def cut(*arguments, **options):
        return fit(*arguments, **{**options, "callbacks": [stop]})

    def stop(step, state, metrics):
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ppo_run, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run(tmp_path / "run")  # refused without --resume
    run(tmp_path / "run", "--resume")
    with np.load(finished / "policy.npz") as whole, np.load(tmp_path / "run" / "policy.npz") as resumed:
        assert whole.files == resumed.files
        for name in whole.files:
            np.testing.assert_array_equal(whole[name], resumed[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env", "nowhere"], "--env nowhere: there are cartpole"),
        (["--discount", "1.5"], r"--discount must be in \[0, 1\], got 1.5"),
        (["--num-envs", "0"], "--num-envs must be at least 1, got 0"),
        (["--minibatches", "7"], "do not split into 7 minibatches"),
        (["--steps", "100"], "fewer than 4 evaluations x 64 steps"),
        (["--learning-rate", "-1"], "--learning-rate and --clip must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *arguments)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_every_environment_it_names_is_one():
    for name in KNOWN:
        check_environment(known(name).make())
        assert settings_of(Ppo(env=name)).steps >= 20_000


@pytest.mark.parametrize("bonus", ["rnd", "icm", "counts"])
def test_bonuses_fit_every_kind_of_observation(bonus):
    options = Ppo(env="deep-sea", intrinsic=bonus, hidden=(4,), evaluations=1, seeds=1, episodes=1)
    settings = settings_of(options)
    world = known(options.env).make()
    lanes = ppo_run._lanes(options, settings, world, ppo_run.actor_critic(world, hidden=(4,)), [(0.1, 0.0, 0)], 1)
    state, metrics = jax.eval_shape(lambda key: lanes.step(lanes.init(key), None), jax.random.key(0))
    assert any(name.startswith("intrinsic/") for name in metrics)
    assert state.incentive is not None
