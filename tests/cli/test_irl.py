"""`jaxalign irl` from files or nothing to report, both methods, resumed and refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxalign.cli import irl_run, main
from jaxalign.cli.irl import Irl
from jaxalign.interop import save_world, write_demonstrations
from jaxalign.irl import sample_trajectories
from jaxalign.mdp import arrival_reward, gridworld, soft_value_iteration
from jaxalign.runtime import fit, read_metrics

SMALL = ["--size", "5", "--seed", "3", "--num-demonstrations", "40", "--length", "12", "--seeds", "2"]
MAXENT = ["--steps", "60", "--learning-rate", "0.3"]


def run(out, *more):
    main(["irl", "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run on a drawn Objectworld."""
    out = tmp_path_factory.mktemp("irl") / "run"
    run(out, *SMALL, *MAXENT)
    return out


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A corridor with a goal that pays 1, without its reward, and demonstrations of walking there."""
    root = tmp_path_factory.mktemp("material")
    mdp = gridworld(2, 3, slip=0.1, goal=5, start=0)
    pays = arrival_reward(mdp, jnp.zeros(6).at[5].set(1.0))
    log_policy = soft_value_iteration(mdp, pays, temperature=0.2).log_policy
    drawn = sample_trajectories(jax.random.key(0), mdp, log_policy, num=40, length=12)
    save_world(root / "world.npz", mdp, features=np.eye(6)[:, :4])
    write_demonstrations(root / "demos.jsonl", drawn)
    return ["--world", str(root / "world.npz"), "--demonstrations", str(root / "demos.jsonl")]


def test_a_reward_is_learned_and_reported(finished):
    results = json.loads((finished / "results.json").read_text())
    mean, low, high = results["value_difference_share"]["mean"]
    assert 0.0 <= low <= mean <= high < 0.5  # of what acting at random loses
    assert results["held_out_nll"]["mean"][0] < np.log(5.0)
    assert len(results["epic"]["seeds"]) == 2
    assert np.load(finished / "reward.npz")["reward"].shape == (2, 1, 25)
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "expected value difference" in page
    assert read_metrics(finished)["loss"].shape == (60, 2)


@pytest.mark.slow
def test_a_cut_run_goes_on_to_the_same_reward(finished, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    options = Irl(
        out=cut, size=5, seed=3, num_demonstrations=40, length=12, seeds=2, steps=60, learning_rate=0.3
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(irl_run, "fit", lambda *args, steps, **more: fit(*args, steps=25, **more))
        irl_run.run(options, Console(quiet=True))
    run(cut, *SMALL, *MAXENT, "--resume")
    assert (cut / "results.json").read_text() == (finished / "results.json").read_text()


@pytest.mark.slow
def test_files_without_the_truth_give_a_reward_and_its_held_out_score(material, tmp_path):
    out = tmp_path / "run"
    run(out, *material, "--seeds", "3", *MAXENT)
    results = json.loads((out / "results.json").read_text())
    assert results.keys() == {"held_out_nll"}
    assert results["held_out_nll"]["mean"][0] < np.log(5.0)


@pytest.mark.slow
def test_a_network_of_the_features(material, tmp_path):
    out = tmp_path / "run"
    run(out, *material, "--reward", "mlp", "--seeds", "1", "--steps", "30", "--learning-rate", "0.01")
    mean, low, high = json.loads((out / "results.json").read_text())["held_out_nll"]["mean"]
    assert mean < np.log(5.0)
    assert low is None  # one seed has no interval
    assert high is None


@pytest.mark.slow
def test_the_posterior(tmp_path):
    pytest.importorskip("blackjax")
    out = tmp_path / "run"
    run(out, *SMALL[:-2], "--method", "bayesian", "--seeds", "1", "--chains", "2", "--steps", "30")
    results = json.loads((out / "results.json").read_text())
    assert results["held_out_nll"]["mean"][0] < np.log(5.0)
    draws = np.load(out / "reward.npz")["reward"]
    assert draws.shape == (1, 60, 25)
    assert draws.std(axis=1).min() > 0.0
    assert results["rhat"]["seeds"][0] > 1.0
    assert 1.0 < results["ess"]["seeds"][0] < 60.0
    assert "posterior mean" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--temperature", "0"], "--temperature must be positive"),
        (["--held-out", "1"], "--held-out must be in"),
        (["--method", "bayesian", "--reward", "mlp"], "--reward is for"),
        (["--demonstrations", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--world", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *arguments)
    assert stop.value.code == 2
    assert reason in capsys.readouterr().err


def test_a_finished_run_is_not_overwritten_nor_resumed_as_another(finished, capsys):
    for more, reason in (([], "--resume"), (["--resume", "--temperature", "0.7"], "temperature")):
        with pytest.raises(SystemExit):
            run(finished, *SMALL, *MAXENT, *more)
        assert reason in capsys.readouterr().err


def test_a_world_without_reward_needs_demonstrations(material, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *material[:2])
    assert "--demonstrations" in capsys.readouterr().err


@pytest.mark.slow
def test_a_world_in_which_nothing_can_be_lost_has_no_share(tmp_path, capsys):
    run(tmp_path / "run", "--size", "4", "--seeds", "2", "--steps", "2", "--num-demonstrations", "4", "--length", "4")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["value_difference_share"] == {"mean": [None, None, None], "seeds": [None, None]}
    assert "not measured" in capsys.readouterr().out
