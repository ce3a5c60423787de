"""`jaxalign robust-train`: trains, measures, keeps its network, goes on when cut, refuses what makes no sense."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxalign.cli import robust_train_report, robust_train_run, tour_robustness
from jaxalign.cli.classifiers import Classifier, load_classifier, network_of
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.cli.robust_train_report import Measured, certified_shares, headline, over_seeds
from jaxalign.cli.robust_train_run import algorithm_of, certified, drawn_for_test, epsilons_of, run, train
from jaxalign.interop.images import batches, load_images
from jaxalign.robustness.evaluation import RobustnessEvaluation
from jaxalign.robustness.gradient_masking import GradientMaskingReport, MaskingSigns
from jaxalign.runtime import fit, read_metrics
from jaxalign.runtime.report import Report

SMALL = {
    "network": "mlp", "hidden": (8,), "steps": 6, "batch_size": 32, "attack_steps": 2, "evaluate": 16, "auto_attack": 0,
    "evaluation_steps": 3, "epsilons": (0.1,), "checkpoint_every": 2, "seeds": 2, "learning_rate": 0.02,
}  # fmt: skip
QUIET = Console(quiet=True)
SIGNS = MaskingSigns(**dict.fromkeys(MaskingSigns._fields, np.asarray(False)))
UNSUSPICIOUS = GradientMaskingReport(**dict.fromkeys(GradientMaskingReport._fields, 0.0) | {"suspicious": SIGNS})


def bars(count=60, classes=3):
    """Images [N, 4, 4] in which a bright row says the class."""
    labels = np.arange(count) % classes
    x = np.random.default_rng(0).integers(0, 60, (count, 4, 4)).astype(np.uint8)
    x[np.arange(count), labels] += 180
    return {"x": x, "y": labels}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "bars.npz"
    np.savez(path, **bars())
    return str(path)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("robust-train") / "run"
    with pytest.MonkeyPatch.context() as few:
        few.setattr(robust_train_report, "PICTURES", 2)
        few.setattr(robust_train_run, "_masking", lambda *arguments: UNSUSPICIOUS)  # tests/cli/test_attack_job.py looks
        run(RobustTrain(data=data, out=out, **SMALL), QUIET)
    return out


def test_it_measures_what_it_trained(finished, data):
    results = json.loads((finished / "results.json").read_text())
    assert len(results["seeds"]) == 2
    for seed in results["seeds"]:
        assert seed["certified"] is None  # nor was this measured
        clean, fgsm, pgd = (seed[name][0] for name in ("clean", "fgsm", "pgd"))
        assert clean >= max(fgsm, pgd)
        assert seed["auto_attack"] is None  # left out, not 0
        assert seed["curve"]["epsilons"] == [0.1, 0.15]
    assert results["clean"] == [pytest.approx(np.mean([seed["clean"][0] for seed in results["seeds"]])), None, None]
    assert read_metrics(finished)["epsilon"].shape == (6, 2)
    page = (finished / "report.html").read_text()
    assert "not measured" in page
    assert "Signs of masked gradients" in page
    description, params = load_classifier(finished)
    x, y = drawn_for_test(load_images(data), 16, 0)
    lane = jax.tree.map(lambda leaf: leaf[1], params)
    accuracy = (Classifier(network_of(description), lane).classes(x) == y).mean()
    np.testing.assert_allclose(accuracy, results["seeds"][1]["clean"][0], atol=1e-6)


def test_a_run_is_not_taken_for_another(finished, data):
    again = RobustTrain(data=data, out=finished, **SMALL)
    with pytest.raises(FileExistsError, match="add --resume"):
        run(again, QUIET)
    with pytest.raises(ValueError, match="epsilon"):
        run(dataclasses.replace(again, resume=True, epsilon=0.2), QUIET)


@pytest.mark.slow
def test_a_cut_run_goes_on_to_the_same_network(finished, data, tmp_path, monkeypatch):
    options = RobustTrain(data=data, out=tmp_path / "run", **SMALL)
    images = load_images(data)

    def stop(step, state, metrics):
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(robust_train_run, "fit", lambda *args, **kw: fit(*args, **kw, callbacks=[stop], chunk=2))
        with pytest.raises(KeyboardInterrupt):
            train(options, images, QUIET)
    _, resumed, _ = train(dataclasses.replace(options, resume=True), images, QUIET)
    _, whole = load_classifier(finished)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        # With the fusions tests are compiled with on jaxlib 0.10, chunks of other lengths differ in the last bit.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 if "fusion_emitters" in os.environ["XLA_FLAGS"] else 0)


CERTIFIED = SMALL | {"method": "ibp", "seeds": 1, "steps": 40, "epsilon": 0.05, "epsilons": (0.02,)}


def test_bounds_are_trained_on_and_certify(data, tmp_path):
    options, images = RobustTrain(data=data, out=tmp_path, **CERTIFIED), load_images(data)
    description, params, metrics = train(options, images, QUIET)
    np.testing.assert_allclose(metrics["epsilon"][[0, 1, 39], 0], [0.0, 0.0, 0.055], atol=1e-7)
    np.testing.assert_allclose(metrics["kappa"][[0, 1, 39], 0], [1.0, 1.0, 0.5], atol=1e-7)
    classifier = Classifier(network_of(description), jax.tree.map(lambda leaf: leaf[0], params))
    found = certified(options, classifier, images.x_test, images.y_test)
    shares = certified_shares(found)[:, 0]
    assert 0 < shares[1] <= shares[0] <= (classifier.classes(images.x_test) == images.y_test).mean()


@pytest.mark.slow
def test_a_cut_run_on_bounds_goes_on_and_reports(data, tmp_path, monkeypatch):
    """One seed, which has no loop over seeds; the masking signs are left to tests/cli/test_attack_job.py."""
    monkeypatch.setattr(robust_train_report, "PICTURES", 2)
    monkeypatch.setattr(robust_train_run, "_masking", lambda *arguments: UNSUSPICIOUS)
    options = RobustTrain(data=data, out=tmp_path / "run", **CERTIFIED)
    _, whole, _ = train(dataclasses.replace(options, out=tmp_path / "whole"), load_images(data), QUIET)

    def stop(step, state, metrics):
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(robust_train_run, "fit", lambda *args, **kw: fit(*args, **kw, callbacks=[stop], chunk=2))
        with pytest.raises(KeyboardInterrupt):
            run(options, QUIET)
    results = run(dataclasses.replace(options, resume=True), QUIET)
    jax.tree.map(np.testing.assert_array_equal, load_classifier(tmp_path / "run")[1], whole)
    (seed,) = results["seeds"]
    assert 0 < seed["certified"][0] <= seed["pgd"][0]
    assert seed["curve"]["certified"][0][0] >= seed["certified"][0]
    assert "proved right" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("method", "network"),
    [
        *((method, "mlp") for method in ("trades", "fast", "free", "plain", "crown-ibp", "sabr")),
        ("pgd", "conv"),
        ("ibp", "conv"),
    ],
)
def test_every_method_takes_a_step(data, method, network):
    options = RobustTrain(data=data, method=method, network=network, hidden=(4,), channels=(2,), batch_size=6)
    images = load_images(data)
    description = robust_train_run.described(options, images)
    algorithm = algorithm_of(options, network_of(description), images)
    batch = batches(images, batch_size=6, seed=0)(0)
    before = jax.eval_shape(algorithm.init, jax.random.key(0))
    after, metrics = jax.eval_shape(algorithm.step, before, batch)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert "loss" in metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": "nowhere.npz"}, "no file nowhere.npz; give 'digits' or"),
        ({"epsilon": -0.1}, "--epsilon must be positive, got -0.1"),
        ({"epsilon": float("nan")}, "--epsilon must be positive, got nan"),
        ({"norm": "l1"}, "AutoAttack has no L1 version"),
        ({"steps": 0}, "--steps must be positive, got 0"),
        ({"clean_weight": 1.5}, r"--clean-weight must lie in \[0, 1\]"),
        ({"epsilons": (0.1, -0.2)}, "--epsilons must be positive"),
        ({"batch_size": 5000}, r"batch_size must be in 1\.\.48"),
        ({"kappa": 1.5}, r"--kappa must lie in \[0, 1\]"),
        ({"train_epsilon": 0.0}, "--train-epsilon must be positive"),
        ({"method": "ibp", "norm": "l2"}, "--method ibp bounds changes of each pixel: it needs --norm linf"),
        ({"method": "free", "steps": 2}, "--steps 2 is less than --replays 4"),
    ],
)
def test_what_makes_no_sense_is_refused(data, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(RobustTrain(**({"data": data, "out": tmp_path / "run"} | arguments)), QUIET)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_file_that_is_no_classifier_is_named(tmp_path):
    np.savez(tmp_path / "classifier.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match=r"classifier\.npz is not a classifier"):
        load_classifier(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no classifier\.npz at .*nowhere"):
        load_classifier(Path("nowhere"))


def test_the_headline_is_at_epsilon_and_over_seeds_is_their_mean():
    def evaluation(attacks, epsilons, accuracy):
        values = np.full((len(attacks), len(epsilons)), accuracy) - np.asarray(epsilons)[None]
        around = np.array([-0.1, 0.1])
        return RobustnessEvaluation(
            attacks, np.asarray(epsilons), np.asarray(accuracy), accuracy + around, values, values[..., None] + around,
            values[0], values[0][:, None] + around, *[np.zeros(())] * 3, np.zeros((len(attacks), len(epsilons), 5)),
        )  # fmt: skip

    options = RobustTrain(epsilon=0.2)
    assert epsilons_of(options) == pytest.approx((0.2 / 3, 0.4 / 3, 0.2, 0.8 / 3))
    numbers = []
    for accuracy in (0.8, 0.9):
        attacked = type("Attacked", (), {"evaluation": evaluation(("fgsm", "pgd"), [0.1, 0.2, 0.3], accuracy)})
        numbers.append(headline(options, Measured(attacked, evaluation(("auto_attack",), [0.2], accuracy - 0.1))))
    assert numbers[0]["clean"] == pytest.approx([0.8, 0.7, 0.9])
    assert numbers[0]["pgd"] == pytest.approx([0.6, 0.5, 0.7])
    assert numbers[0]["auto_attack"] == pytest.approx([0.5, 0.4, 0.6])
    assert over_seeds(numbers[:1], 0) == numbers[0]
    two = over_seeds(numbers, 0)
    assert two["pgd"] == [pytest.approx(0.65), None, None]  # two say nothing of how far seeds differ
    mean = over_seeds(2 * numbers, 0)
    assert mean["pgd"] == pytest.approx([0.65, 0.6, 0.7])
    assert list(mean) == ["clean", "fgsm", "pgd", "auto_attack", "certified"]


def test_the_share_certified_has_its_interval():
    value, low, high = certified_shares(np.array([[True, True, True, False]]))[0]
    assert value == 0.75
    np.testing.assert_allclose([low, high], [0.30064, 0.95442], atol=1e-5)  # Wilson's, of 3 out of 4


@pytest.mark.slow
def test_the_tours_stop_shows_a_plain_network_fall_and_a_trained_one_stand(tmp_path):
    pytest.importorskip("sklearn")
    report = Report("tour")
    tour_robustness.adversarial_training(report, QUIET, tmp_path)
    (row,) = re.findall(r"<td>AutoAttack</td><td>([\d.]+).*?</td><td>([\d.]+)", report.html())
    plain, trained = map(float, row)
    assert plain < 0.25
    assert trained > 0.4
