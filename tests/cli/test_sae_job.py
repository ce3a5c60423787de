"""`jaxalign sae` and `jaxalign features` from text to pages, on a tiny model written to disk."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxalign.cli.features import Features
from jaxalign.cli.features_run import run as run_features
from jaxalign.cli.sae import Sae
from jaxalign.cli.sae_report import Evaluated, measure
from jaxalign.cli.sae_run import hook_name, lanes_of, run
from jaxalign.interop import Tokenizer, save_pretrained
from jaxalign.interop.activation_store import ActivationStore
from jaxalign.interop.sae_lens import load_sae_lens, sae_lens_metadata
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.interpretability.sae_metrics import sae_metrics, sae_moments
from jaxalign.interpretability.splice import LossRecovered
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.runtime import Preempted, Report, read_metrics

CONFIG = TransformerConfig(
    vocab_size=257, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A small job over a model with random weights and a text of few words."""
    root = tmp_path_factory.mktemp("sae")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(backend, eos_token="<end>", pad_token="<end>")
    params = jax.jit(transformer(CONFIG).init)(jax.random.key(0))
    save_pretrained(root / "model", (params, CONFIG, tokenizer))
    text = root / "text.jsonl"
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog"]
    rows = np.random.default_rng(0).choice(words, (40, 8))
    text.write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in rows))
    return Sae(
        model=str(root / "model"), text=text, out=root / "run", tokens=1024, length=32, skip=1, held_out=0.4, d_sae=24,
        k=(2, 4), steps=8, batch_size=32, dead_after=500, evaluated_rows=4, checkpoint_every=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(job):
    job.run()
    return json.loads((job.out / "results.json").read_text())


def test_every_k_is_trained_measured_and_saved(job, results):
    assert list(results["saes"]) == ["k=2", "k=4"]
    assert results["site"] == "resid_post[1]"
    assert read_metrics(job.out)["explained_variance"].shape == (8, 2)
    store = ActivationStore(job.out / "activations")
    x = store.read(np.flatnonzero(store.place >= 19 * 32))  # the last 13 of 32 rows, in blocks of 128
    x = x[: len(x) // 128 * 128]
    for name, found in results["saes"].items():
        params, config = load_sae_lens(job.out / "saes" / name)
        features = sae_encode(params, x, config)
        expected = sae_metrics(x, sae_decode(params, features, config), features)
        np.testing.assert_allclose(found["explained_variance"][0], expected["explained_variance"], rtol=1e-3)
        np.testing.assert_allclose(found["l0"][0], expected["l0"], rtol=1e-3)
        for interval in (found[m] for m in ("l0", "explained_variance", "loss_recovered", "kl")):
            assert interval[1] <= interval[0] <= interval[2]
    assert sae_lens_metadata(job.out / "saes" / "k=2")["hook_name"] == "blocks.1.hook_resid_post"
    page = (job.out / "report.html").read_text()
    assert page.count("data:image/png") == 4
    assert "loss recovered" in page


def test_a_stopped_run_resumes_to_the_same_autoencoders(job, results, monkeypatch, tmp_path):
    cut = dataclasses.replace(job, out=tmp_path / "cut", resume=True)
    batches = ActivationStore.batches

    def cut_short(store, **options):
        def batch(step):
            if step == 6:
                raise Preempted("stopped")
            return batches(store, **options)(step)

        return batch

    # What is measured afterwards is no part of this test.
    monkeypatch.setattr("jaxalign.cli.sae_run.evaluator", lambda *_: lambda *_: None)
    monkeypatch.setattr("jaxalign.cli.sae_run.write_report", lambda *_: (Report("nothing"), {}))
    with monkeypatch.context() as patched:
        patched.setattr(ActivationStore, "batches", cut_short)
        with pytest.raises(Preempted):
            cut.run()
    assert max(int(path.name) for path in (cut.out / "checkpoints").iterdir()) == 4
    cut.run()
    for name in results["saes"]:
        expected, found = (load_sae_lens(out / "saes" / name)[0] for out in (job.out, cut.out))
        jax.tree.map(np.testing.assert_array_equal, expected, found)
    with pytest.raises(FileExistsError, match="add --resume"):
        job.run()


def test_the_dashboard_shows_the_firings_of_the_text(job, results):
    from rich.console import Console

    page = run_features(Features(job.out, sae="k=4", top=3, per_quarter=1, logits=2), Console(quiet=True))
    params, config = load_sae_lens(job.out / "saes" / "k=4")
    store = ActivationStore(job.out / "activations")
    features = np.asarray(sae_encode(params, store.read(np.arange(len(store))), config))
    np.testing.assert_allclose(page.density, (features > 0).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(page.maximum, features.max(axis=0), rtol=1e-5)
    assert page.histogram.sum() == (features > 0).sum()
    some = int(features.max(axis=0).argmax())
    strongest = store.place[features[:, some].argmax()]
    assert page.places[some, 0] == strongest
    np.testing.assert_allclose(page.activations[some, 0, page.before], features[:, some].max(), rtol=1e-5)
    shown = page.places[some][page.places[some] >= 0]
    by_place = dict(zip(store.place, features[:, some], strict=True))
    peaks = page.activations[some, page.places[some] >= 0, page.before]
    np.testing.assert_allclose(peaks, [by_place[p] for p in shown], rtol=1e-4)
    # The neighbour to the right, where the row goes on.
    if strongest + 1 in by_place and (strongest + 1) % 32:
        np.testing.assert_allclose(page.activations[some, 0, page.before + 1], by_place[strongest + 1], rtol=1e-4)
    assert (job.out / "features-k=4.html").stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"--sae 'k=9' is not in .* there are k=2, k=4"):
        Features(job.out, sae="k=9").run()
    with pytest.raises(FileNotFoundError, match="no finished run"):
        Features(job.out / "saes").run()


def test_bad_options_are_named(job):
    fresh = job.out.parent / "bad"
    for changes, match in (
        ({"layer": 2}, r"--layer must lie in 0\.\.1.* got 2"),
        ({"k": (25,)}, r"--k must lie in 1\.\.d_sae = 24"),
        ({"sparsity": (1.0,)}, "--sparsity has no meaning for batchtopk"),
        ({"site": "residual"}, r"no site 'residual\[1\]'; the sites .*resid_post"),
        ({"held_out": 1.0}, "--held-out is a share"),
        ({"length": 2000}, "too few for one row of 2000"),
        ({"batch_size": 5000}, "too few for --batch-size 5000"),
        ({"steps": 0}, "--steps must be positive"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(job, out=fresh / next(iter(changes)), **changes).run()


def test_lanes_are_the_product_of_sparsities_and_seeds():
    assert [lane.name for lane in lanes_of(Sae(k=(8, 16), seeds=2))] == [
        "k=8-seed=0", "k=8-seed=1", "k=16-seed=0", "k=16-seed=1"
    ]  # fmt: skip
    lanes = lanes_of(Sae(activation="jumprelu", sparsity=(0.5,), seed=3))
    assert [(lane.name, lane.sparsity, lane.seed) for lane in lanes] == [("lambda=0.5", 0.5, 3)]
    assert hook_name("attention_z[3]") == "blocks.3.attn.hook_z"


def test_blocks_measured_apart_are_measured_together():
    rng = np.random.default_rng(0)
    x, x_hat = rng.normal(size=(2, 384, 16)).astype(np.float32) + np.arange(16, dtype=np.float32)
    features = np.maximum(rng.normal(size=(384, 24)), 0).astype(np.float32)
    moments = jax.jit(jax.vmap(sae_moments))(*(a.reshape(3, 128, -1) for a in (x, x_hat, features)))
    losses = LossRecovered(*(np.full(4, value, np.float32) for value in (3.0, 3.5, 8.0, 0.4, 5.0)))
    found = measure(Evaluated(jax.tree.map(np.asarray, moments), losses), seed=0)
    flat = jax.jit(sae_metrics)(x, x_hat, features)
    np.testing.assert_allclose(found["explained_variance"][0], flat["explained_variance"], rtol=1e-5)
    np.testing.assert_allclose(found["l0"][0], flat["l0"], rtol=1e-6)
    assert found["explained_variance"][1] < found["explained_variance"][0] < found["explained_variance"][2]
    np.testing.assert_allclose(found["loss_recovered"], 0.9, rtol=1e-5)
    np.testing.assert_allclose(found["kl"], 0.4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "gated", "matryoshka"])
def test_the_other_activations_run(job, activation, tmp_path):
    from rich.console import Console

    results = run(dataclasses.replace(job, out=tmp_path / "run", activation=activation), Console(quiet=True))
    assert len(results["saes"]) == (2 if activation in ("topk", "matryoshka") else 3)
