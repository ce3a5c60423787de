"""`jaxalign certify`: certificates beside attacks, kept in chunks, and an error where the two contradict each other."""

import json
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jaxalign.certification.smoothing import smoothed_certify
from jaxalign.cli import certify_run, certify_smoothing, image_certificates
from jaxalign.cli.certify import Certify
from jaxalign.cli.certify_report import results_of
from jaxalign.cli.certify_run import run
from jaxalign.cli.classifiers import Description, network_of, save_classifier
from jaxalign.runtime.certificate_check import BrokenCertificateError
from jaxalign.runtime.metrics import read_metrics
from jaxalign.runtime.report import Report

QUIET = Console(quiet=True)
SMALL = {"epsilons": (0.3, 0.1), "images": 16, "batch_size": 8, "steps": 10, "pictures": 2, "method": "interval"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A linear classifier of images [3, 3] by their brightest row, and its data: its margins are known exactly."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    y = np.arange(60) % 3
    x = rng.uniform(0, 0.3, (60, 3, 3))
    x[np.arange(60), y] += rng.uniform(0.02, 0.7, (60, 1))
    np.savez(folder / "rows.npz", x=x, y=y)
    kernel = np.repeat(np.eye(3), 3, axis=0)[None].astype(np.float32)
    description = Description("mlp", (), 3, (), (3, 3, 1), 3, str(folder / "rows.npz"), 0.5, 7)
    names = jax.eval_shape(network_of(description).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape)) if leaf.ndim == 1 else jnp.asarray(kernel), names)
    save_classifier(folder, description, params)
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("certify") / "run"
    run(Certify(model=model, out=out, **SMALL), QUIET)
    return out


def worst_margin(x, y, epsilon):
    """The least margin in the ball: the own row as dark, another as bright as epsilon and the box allow."""
    dark, bright = np.clip(x - epsilon, 0, 1).sum(axis=2), np.clip(x + epsilon, 0, 1).sum(axis=2)
    bright[np.arange(len(y)), y] = -np.inf
    return dark[np.arange(len(y)), y] - bright.max(axis=1)


def test_it_certifies_what_holds_and_no_more(finished):
    results = json.loads((finished / "results.json").read_text())
    with np.load(finished / "certificates.npz") as file:
        x, y, radius, certified = (file[name] for name in ("x", "y", "radius", "certified"))
    pixels = x[..., 0].astype(np.float64)
    for epsilon, held in zip((0.1, 0.3), certified, strict=True):
        np.testing.assert_array_equal(held, worst_margin(pixels, y, epsilon) > 0)
        share = results["certified"][f"{epsilon:g}"]
        assert share[1] <= share[0] == held.mean() <= share[2]
        assert results["attacked"][f"{epsilon:g}"][0] == held.mean()  # of a linear classifier bounds are exact
    assert (worst_margin(pixels, y, (radius - 1e-6)[:, None, None]) > 0)[radius > 0].all()
    beyond = (radius + 0.2 / 2**image_certificates.HALVINGS)[:, None, None]
    assert (worst_margin(pixels, y, beyond)[radius < 0.3] < 0).all()
    assert results["self_check"] == {"attacked": int((radius > 0).sum()), "contradictions": 0}
    assert results["median_radius"] == pytest.approx(np.median(radius[radius > 0]))
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png") == 4
    metrics = read_metrics(finished)
    assert metrics["images"].tolist() == [8, 16]
    np.testing.assert_allclose(metrics["certified"][-1], certified.mean(axis=1), rtol=1e-6)
    assert list((finished / "tensorboard").iterdir())


def test_what_is_done_is_kept(finished, model, monkeypatch):
    with pytest.raises(FileExistsError, match="add --resume"):
        run(Certify(model=model, out=finished, **SMALL), QUIET)
    before = json.loads((finished / "results.json").read_text())
    asked = []
    undrawn = lambda options, about, checked: (Report(""), results_of(options, checked))  # noqa: E731
    monkeypatch.setattr(certify_run, "write_report", undrawn)

    def counted(worst_margin, x, y, epsilons):
        asked.append(len(x))
        return {"certified": np.zeros((2, len(x)), bool), "radius": np.zeros(len(x), np.float32)}

    monkeypatch.setattr(image_certificates, "_chunk", counted)
    again = run(Certify(model=model, out=finished, resume=True, **SMALL), QUIET)
    assert again == before
    assert asked == []
    more = run(Certify(model=model, out=finished, resume=True, **SMALL | {"images": 24}), QUIET)
    assert asked == [8]
    assert more["images"] == 24
    for damaged in (finished / "certificates").iterdir():
        damaged.write_bytes(b"")
    run(Certify(model=model, out=finished, resume=True, **SMALL), QUIET)
    assert asked == [8, 8, 8]


def test_a_broken_certifier_ends_the_run_and_the_image_is_kept(model, tmp_path, monkeypatch):
    monkeypatch.setattr(image_certificates, "_worst_margin", lambda *_: lambda x, y, epsilon: np.ones(len(y)))
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="certified and yet broken by an attack"):
        Certify(model=model, out=out, **SMALL).run()
    with np.load(out / "broken-certificates.npz") as file:
        x_adv, y = file["x_adv"][..., 0], file["y"]
        assert (np.abs(x_adv - file["x"][..., 0]) <= 0.3 + 1e-6).all()
    assert (x_adv.sum(axis=2).argmax(axis=1) != y).all()
    assert json.loads((out / "results.json").read_text())["self_check"]["contradictions"] == len(y) > 0
    assert "certified and yet broken" in (out / "report.html").read_text()


def test_smoothing_certifies_radii_that_the_vote_keeps(model, tmp_path, monkeypatch):
    options = {"model": model, "smoothing": 0.2, "samples": 300, "images": 6, "batch_size": 6}
    results = run(Certify(out=tmp_path / "run", **options), QUIET)
    shares = [triple[0] for triple in results["certified"].values()]
    assert list(results["certified"]) == ["0", "0.1", "0.2", "0.4", "0.6"]
    assert shares[0] > 0.5
    assert shares == sorted(shares, reverse=True)
    assert results["self_check"]["attacked"] == round(6 * shares[0])
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png") == 2

    def boastful(key, apply, x, **options):
        found = smoothed_certify(key, apply, x, **options)
        return found._replace(radius=found.radius + 1.0)

    monkeypatch.setattr(certify_smoothing, "smoothed_certify", boastful)
    with pytest.raises(BrokenCertificateError, match="certified and yet broken"):
        run(Certify(out=tmp_path / "other", **options), QUIET)


def test_a_property_is_handed_over(monkeypatch):
    asked = {}

    def certify_property(onnx, unsafe, **options):
        asked.update(onnx=onnx, property=unsafe, **options)
        return "verified"

    module = types.SimpleNamespace(certify_property=certify_property)
    monkeypatch.setitem(sys.modules, "jaxalign.cli.certify_property", module)
    options = Certify(onnx=Path("net.onnx"), property=Path("p.vnnlib"), time_limit=5.0, out=Path("there"))
    assert run(options, QUIET) == "verified"
    expected = {"onnx": Path("net.onnx"), "property": Path("p.vnnlib"), "time_limit": 5.0, "out": Path("there")}
    assert expected.items() <= asked.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": Path("nowhere")}, r"no classifier\.npz at nowhere"),
        ({"data": "nowhere.npz"}, "no file nowhere.npz"),
        ({"epsilons": (0.1, 0.1)}, "--epsilons must be positive, finite and differ"),
        ({"epsilons": (-0.1,)}, "--epsilons must be positive"),
        ({"epsilons": (float("inf"),)}, "--epsilons must be positive, finite"),
        ({"attacks": ()}, "--attacks needs at least one"),
        ({"images": 0}, "--images must be positive, got 0"),
        ({"smoothing": -0.5}, "--smoothing must be positive, got -0.5"),
        ({"failure": 1.5}, r"--failure is a probability in \(0, 1\), got 1\.5"),
        ({"onnx": Path("net.onnx")}, "--onnx and --property go together"),
        ({"property": Path("p.vnnlib")}, "--onnx and --property go together"),
        ({"time_limit": 0.0}, "--time-limit must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(model, tmp_path, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(Certify(**{"model": model, "out": tmp_path / "run"} | SMALL | arguments), QUIET)


@pytest.mark.slow
def test_without_a_model_one_is_trained_on_digits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(certify_run, "TRAINING", certify_run.TRAINING | {"steps": 500})
    results = run(Certify(out=tmp_path / "run", images=60), QUIET)
    assert results["clean"][0] > 0.8
    assert results["certified"]["0.05"][0] > 0.6
    assert results["certified"]["0.05"][0] <= results["attacked"]["0.05"][0]
