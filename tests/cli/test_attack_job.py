"""`jaxalign attack`: attacks what robust-train left, keeps what is done, reports what becomes of images."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxalign.cli import attack_run, named_attacks, robust_train_run
from jaxalign.cli.attack import Attack
from jaxalign.cli.attack_report import accuracies
from jaxalign.cli.attack_run import run
from jaxalign.cli.classifiers import Classifier, Description, load_classifier, network_of, save_classifier
from jaxalign.cli.named_attacks import KeptAttacks
from jaxalign.robustness.attack_result import AttackResult
from jaxalign.runtime.report import Report

QUIET = Console(quiet=True)
SMALL = {"attacks": ("fgsm", "pgd"), "epsilons": (0.1, 0.4), "examples": 16, "steps": 4, "pictures": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A linear classifier of images [3, 3] by their brightest row, and its data."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.uniform(0, 0.3, (60, 3, 3))
    x[np.arange(60), y] += rng.uniform(0.05, 0.7, (60, 1))
    np.savez(folder / "rows.npz", x=x, y=y)
    kernel = np.repeat(np.eye(3), 3, axis=0)[None].astype(np.float32)
    description = Description("mlp", (), 3, (), (3, 3, 1), 3, str(folder / "rows.npz"), 0.5, 7)
    names = jax.eval_shape(network_of(description).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)) if leaf.ndim == 1 else jnp.asarray(kernel), names)
    save_classifier(folder, description, params)
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("attack") / "run"
    run(Attack(model=model, out=out, **SMALL), QUIET)
    return out


def test_it_reports_attacks_at_every_epsilon(finished, model):
    results = json.loads((finished / "results.json").read_text())
    assert results["examples"] == 16
    for name in ("fgsm", "pgd", "worst case"):
        small, large = (results["accuracy"][name][e] for e in ("0.1", "0.4"))
        assert small[1] <= small[0] <= small[2]
        assert results["clean"][0] >= small[0] >= large[0]
    with np.load(finished / "adversarial.npz") as file:
        x, y, x_adv, epsilon, predicted = (file[name] for name in ("x", "y", "x_adv", "epsilon", "predicted"))
    fallen = np.isfinite(epsilon)
    description, params = load_classifier(model)
    classifier = Classifier(network_of(description), jax.tree.map(lambda leaf: leaf[0], params))
    np.testing.assert_array_equal(classifier.classes(x_adv), predicted)
    right = classifier.classes(x) == y
    assert ((predicted != y) == (fallen | ~right)).all()
    # Moving every pixel of the two rows concerned by epsilon closes a gap of two epsilon between their means.
    rows = np.sort(x[..., 0].mean(axis=2), axis=1)
    gap = rows[:, -1] - rows[:, -2]
    inside = np.where(gap < 0.2, 0.1, np.where(gap < 0.8, 0.4, np.nan))
    np.testing.assert_allclose(epsilon[right], inside[right], rtol=1e-6)
    assert (np.abs(x_adv - x).max(axis=(1, 2, 3))[fallen] <= epsilon[fallen] + 1e-6).all()
    assert 1 - results["accuracy"]["fgsm"]["0.4"][0] == pytest.approx(np.mean(fallen | ~right))
    assert sum(map(sum, results["confusion"])) == fallen.sum()
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 3  # the curve, the worst and the median
    assert "Signs of masked gradients" in page


def unharmed(x, y):
    return AttackResult(x, jnp.zeros(y.shape, bool), jnp.ones(y.shape))


def test_what_is_done_is_kept_and_more_may_be_added(finished, model, monkeypatch):
    with pytest.raises(FileExistsError, match="add --resume"):
        run(Attack(model=model, out=finished, **SMALL), QUIET)
    before = json.loads((finished / "results.json").read_text())["accuracy"]
    monkeypatch.setattr(named_attacks, "pgd", None)  # which would be called if pgd were run again
    monkeypatch.setattr(named_attacks, "_fgsm", None)
    monkeypatch.setattr(attack_run, "write_report", lambda options, about, record: (Report(""), record))
    monkeypatch.setattr(robust_train_run, "_masking", lambda *arguments: None)
    monkeypatch.setattr(named_attacks, "square", lambda key, apply, x, y, epsilon, **_: unharmed(x, y))
    added = SMALL | {"attacks": ("fgsm", "pgd", "square")}
    evaluation = run(Attack(model=model, out=finished, resume=True, **added), QUIET).evaluation
    assert accuracies(evaluation)["pgd"].tolist() == list(before["pgd"].values())
    assert evaluation.attacks == ("fgsm", "pgd", "square")
    assert evaluation.robust_accuracy[2].tolist() == [evaluation.clean_accuracy] * 2
    with pytest.raises(TypeError):  # other steps are another attack
        run(Attack(model=model, out=finished, resume=True, **SMALL | {"steps": 5}), QUIET)


def test_an_attack_for_the_nearest_image_runs_once_for_all_epsilons(model, tmp_path):
    description, params = load_classifier(model)
    classifier = Classifier(network_of(description), jax.tree.map(lambda leaf: leaf[0], params))
    x = np.zeros((2, 3, 3, 1), np.float32)
    x[:, 0] = [[[0.3]], [[0.9]]]
    y, moved = jnp.zeros(2, int), jnp.asarray(x).at[:, 1].set(1.0)
    calls = []

    def attack(key, apply, x, y, epsilon):
        calls.append(epsilon)
        return AttackResult(moved, jnp.ones(2, bool), jnp.zeros(2))

    kept = KeptAttacks(tmp_path)
    kept_attack = kept.keep("cw", named_attacks.NamedAttack(attack, {"norm": "linf"}, nearest=True))
    broken = [
        kept_attack(jax.random.key(0), classifier, jnp.asarray(x), y, epsilon).success.tolist()
        for epsilon in (0.5, 1.0)
    ]
    assert broken == [[False, False], [True, True]]
    assert calls == [None]
    assert kept.found(x).epsilon.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "nowhere"}, r"no classifier\.npz at nowhere"),
        ({"data": "nowhere.npz"}, "no file nowhere.npz"),
        ({"attacks": ("cw",)}, "cw is an attack in l2, not in --norm linf"),
        ({"attacks": ("square",), "norm": "l1"}, "square is an attack in linf or l2, not in --norm l1"),
        ({"epsilons": (0.1, 0.1)}, "--epsilons must be positive and differ"),
        ({"epsilons": (-0.1,)}, "--epsilons must be positive"),
        ({"attacks": ()}, "need at least one each"),
        ({"examples": 0}, "--examples must be positive, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused(model, tmp_path, arguments, message):
    given = {"model": model, "out": tmp_path / "run"} | SMALL | arguments
    with pytest.raises((ValueError, OSError), match=message):
        run(Attack(**given | {"model": Path(given["model"])}), QUIET)


def test_a_model_for_other_images_is_refused(model, tmp_path):
    np.savez(tmp_path / "wide.npz", x=np.zeros((9, 4, 4), np.uint8), y=np.arange(9) % 3)
    with pytest.raises(ValueError, match=r"takes images \(3, 3, 1\) of 3 classes; .*wide\.npz has \(4, 4, 1\) of 3"):
        run(Attack(model=model, data=str(tmp_path / "wide.npz"), out=tmp_path / "run"), QUIET)


@pytest.mark.slow
def test_without_a_model_a_plain_one_is_trained_on_digits(tmp_path):
    pytest.importorskip("sklearn")
    options = Attack(out=tmp_path / "run", attacks=("pgd", "auto_attack"), epsilons=(0.1, 0.2), examples=50)
    results = run(options, QUIET)
    accuracy = results["accuracy"]
    assert results["clean"][0] > 0.9
    assert accuracy["auto_attack"]["0.2"][0] <= accuracy["pgd"]["0.2"][0] < 0.3
