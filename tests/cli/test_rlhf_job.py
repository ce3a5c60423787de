"""`jaxalign rlhf`: a sweep that writes its answers down, reports, goes on when it was cut, and refuses nonsense."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from jaxalign import Network
from jaxalign.cli import rlhf, rlhf_run
from jaxalign.cli.rlhf import SETTINGS, Rlhf, Settings, settings_of
from jaxalign.cli.rlhf_report import ordering, pairwise_accuracy, returns_found
from jaxalign.environments import bernoulli_bandit, check_environment
from jaxalign.interop.feedback_log import FeedbackLog
from jaxalign.preferences.reward_networks import trajectory_reward
from jaxalign.rl import ActorCritic
from jaxalign.rl.policies import categorical
from jaxalign.rlhf.human_feedback import pairwise_agreement
from jaxalign.runtime import fit, read_metrics

TINY = Settings(
    rounds=3, queries=2, segment=4, rollouts=1, num_envs=4, num_steps=8, epochs=1, minibatches=2, reward_steps=2,
    reward_hidden=(4,), max_steps=8,
)  # fmt: skip


def run(out, *more):
    arguments = ["--env", "gridworld", "--out", str(out), "--seeds", "2", "--episodes", "4", *more]
    tyro.cli(Rlhf, args=arguments).run()


@pytest.fixture(scope="module")
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SETTINGS, "gridworld", TINY)
        patch.setattr(rlhf_run, "use_all_cores", lambda: None)
        yield


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("rlhf") / "run"
    run(out, "--no-baseline")
    return out


def test_a_run_is_reported(finished):
    results = json.loads((finished / "results.json").read_text())
    assert results["answers"] == 6
    assert results["steps"] == 3 * 32
    for name in ("before", "after", "after - before"):
        value, low, high = results["returns"][name]
        assert low <= value <= high
    assert results["ordering"]["measured"] == 2
    assert 0.0 <= results["ordering"]["accuracy"][0] <= 1.0
    metrics = read_metrics(finished)
    assert metrics["episode/agreement"].shape == (3, 2)
    np.testing.assert_array_equal(metrics["labels"][:, 0], [2, 4, 6])
    assert (finished / "report.html").read_text().count("data:image/png") == 3
    with pytest.raises(FileExistsError, match="add --resume"):
        run(finished)


def test_every_answer_is_written_down_once_with_what_it_is_about(finished):
    found = FeedbackLog(finished / "feedback.jsonl").arrays()
    assert sorted(found.first) == sorted(f"seed-{s}/answer-{i}/first" for s in range(2) for i in range(6))
    with np.load(finished / "segments.npz") as segments:
        for name, outcome in zip(found.first, found.outcomes, strict=True):
            seed, number = (int(part.split("-")[1]) for part in name.split("/")[:2])
            assert segments["outcome"][seed, number] == outcome
        assert segments["chosen"].shape == (2, 6, 4, 25 + 4 + 1)
    with np.load(finished / "learned.npz") as learned:
        assert all(x.shape[0] == 2 for x in learned.values())
        assert any(name.startswith("reward/") for name in learned)


@pytest.mark.slow
def test_a_cut_run_goes_on_to_the_same_answers_and_policies(finished, tmp_path):
    """Cut after its first round, between the checkpoint and the writing of the answers."""

    def cut(*arguments, callbacks, **options):
        def stop(*_):
            raise KeyboardInterrupt

        return fit(*arguments, **options, callbacks=[stop])

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf_run, "fit", cut)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert FeedbackLog(out / "feedback.jsonl").records() == []
    run(out, "--resume")
    with np.load(finished / "learned.npz") as a, np.load(out / "learned.npz") as b:
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])
    first, second = (
        {row["first"]: row["outcome"] for row in FeedbackLog(x / "feedback.jsonl").records()} for x in (finished, out)
    )
    assert first == second
    results = json.loads((out / "results.json").read_text())
    for name in ("true reward", "after - true reward"):
        value, low, high = results["returns"][name]
        assert low <= value <= high
    assert read_metrics(out / "true-reward")["episode/return"].shape == (3, 2)
    assert (out / "report.html").read_text().count("data:image/png") == 4


@pytest.mark.slow
def test_scores(tiny, tmp_path):
    run(tmp_path / "run", "--annotator", "scores", "--no-baseline", "--aggregate", "lcb")
    found = FeedbackLog(tmp_path / "run" / "feedback.jsonl").arrays()
    assert found.scores.shape == (12,)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert "true reward" not in results["returns"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "--queries must be at least 1, got 0"),
        ({"segment": 1000}, "--segment 1000 is longer than a rollout of 128 steps"),
        ({"flip": 1.5}, r"--flip must be in \[0, 1\], got 1.5"),
        ({"beta": -1.0}, "--beta must not be below 0, got -1.0"),
        ({"period": 0.0}, "--learning-rate and --period must be above 0"),
        ({"annotator": "scores", "select": "information"}, "--select information is for comparisons"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        settings_of(Rlhf(**options))


def test_every_environment_and_annotator_it_names_is_one():
    rewards = jnp.array([[1.0, 2.0]])
    for name, make in rlhf_run.ENVIRONMENTS.items():
        check_environment(make())
        assert settings_of(Rlhf(env=name)).segment <= SETTINGS[name].num_steps
    names = rlhf.Rlhf.__annotations__["annotator"].__args__
    for name in set(names) - {"scores"}:
        options = dataclasses.replace(Rlhf(), annotator=name, flip=0.0)
        annotator = rlhf_run.annotator_of(options, settings_of(options))
        mask = jnp.ones((1, 2), bool)
        assert annotator(jax.random.key(0), rewards, mask, rewards - 100.0, mask) == 0


def test_each_policy_is_measured_under_its_own_name():
    """Three arms that pay 1, 2 and 3, and three policies that each know one; the reward network sees the arm."""
    bandit = bernoulli_bandit(np.ones((1, 3)))

    def step(key, state, action):
        return bandit.step(key, state, action)._replace(reward=1.0 + action)

    def arm(number):
        return {"logits": jnp.stack([jnp.eye(3)[number] * 100.0] * 2)}  # two seeds

    model = ActorCritic(
        lambda key: arm(0),
        lambda params, seen: categorical(jnp.broadcast_to(params["logits"], (*seen.shape[:-1], 3))),
        lambda params, seen: jnp.zeros(seen.shape[:-1]),
    )
    rewards = trajectory_reward(Network(lambda key: jnp.zeros(5), lambda params, x: x @ params))
    policies = {"before": arm(0), "after": arm(1), "baseline": arm(2)}
    weights = jnp.array([0.0, 10.0, 20.0, 30.0, 0.0])  # of observation, action (one-hot), end
    outcome = rlhf_run._measure(
        Rlhf(seeds=2, episodes=8), dataclasses.replace(TINY, max_steps=1), bandit.replace(step=step), model, rewards,
        policies, jnp.broadcast_to(weights, (2, 3, 5)),
    )  # fmt: skip
    for found, paid in ((outcome.before, 1.0), (outcome.after, 2.0), (outcome.baseline, 3.0)):
        np.testing.assert_array_equal(found, np.full((2, 8), paid))
    np.testing.assert_array_equal(outcome.predicted, 10.0 * outcome.true)
    np.testing.assert_array_equal(outcome.true[:, 0], 2.0)  # the first of the graded episodes is the last policy's


def test_what_the_tables_say():
    same = np.zeros((1, 3))
    outcome = rlhf_run.Outcome(
        before=np.array([[1.0, 3.0], [2.0, 2.0]]), after=np.array([[5.0, 5.0], [5.0, 5.0]]), baseline=None,
        true=np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]), predicted=np.array([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0]]),
    )  # fmt: skip
    assert returns_found(outcome) == {
        "before": [2.0, 2.0, 2.0], "after": [5.0, 5.0, 5.0], "after - before": [3.0, 3.0, 3.0], "seeds": [5.0, 5.0]
    }  # fmt: skip
    found = ordering(outcome)
    assert found["measured"] == 1  # the second seed's episodes are all equal: not measured, not 0
    np.testing.assert_allclose([found["kendall"][0], found["spearman"][0], found["accuracy"][0]], [1 / 3, 0.5, 2 / 3])
    assert ordering(outcome._replace(true=same, predicted=same))["kendall"] is None
    a, b = np.random.default_rng(0).integers(0, 4, (2, 20))
    np.testing.assert_allclose(pairwise_accuracy(a, b), pairwise_agreement(jnp.array(a), jnp.array(b)), rtol=1e-6)
