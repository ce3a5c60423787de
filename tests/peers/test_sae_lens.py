"""SAEs saved here and loaded by SAELens, and saved by SAELens and loaded here: the same features, the same outputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop.sae_files import load_sae, load_sparsify
from jaxalign.interop.sae_lens import load_sae_lens, sae_lens_metadata, save_sae_lens
from jaxalign.interpretability.feature_recovery import (
    absolute_cosines,
    count_detections,
    detection_scores,
    mean_correlation_coefficient,
)
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.interpretability.sae_parameters import sae_init

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch")
sae_lens = pytest.importorskip("sae_lens")

D, F, BATCH = 12, 40, 64
CONFIGS = {
    "relu": SAEConfig(D, F, "relu"),
    "topk": SAEConfig(D, F, "topk", k=5),
    "topk without norms": SAEConfig(D, F, "topk", k=5, rescale_by_decoder_norm=False),
    "batchtopk": SAEConfig(D, F, "batchtopk", k=5),
    "matryoshka": SAEConfig(D, F, "matryoshka", k=5, widths=(10, 20, F)),
    "jumprelu": SAEConfig(D, F, "jumprelu"),
    "gated": SAEConfig(D, F, "gated"),
    "transcoder": SAEConfig(D, F, "relu", d_out=7),
    "jumprelu transcoder": SAEConfig(D, F, "jumprelu", d_out=7),
    "uncentred": SAEConfig(D, F, "relu", apply_b_dec_to_input=False),
}
TRAINED = {
    "standard": {},
    "topk": {"k": 5},
    "jumprelu": {"jumprelu_init_threshold": 0.3},
    "gated": {},
    "batchtopk": {"k": 5},
    "matryoshka_batchtopk": {"k": 5, "matryoshka_widths": [10, 20, F]},
}


def disturbed(key, params):
    """Every parameter away from its first value; thresholds among the pre-activations."""
    keys = jax.random.split(key, len(params))
    noise = {name: jax.random.normal(k, leaf.shape) for k, (name, leaf) in zip(keys, params.items(), strict=True)}
    return {name: jnp.abs(noise[name]) * 0.3 if name == "threshold" else leaf + 0.3 * noise[name]
            for name, leaf in params.items()}  # fmt: skip


def inputs():
    return np.asarray(jax.random.normal(jax.random.key(9), (BATCH, D)))


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_saelens_computes_what_we_saved(tmp_path, name):
    config = CONFIGS[name]
    params = disturbed(jax.random.key(1), sae_init(jax.random.key(0), config))
    x = inputs()
    features = sae_encode(params, x, config)
    assert 0.02 < float((features > 0).mean()) < 0.9
    save_sae_lens(tmp_path, params, config, model_name="gpt2", hook_name="blocks.1.hook_resid_pre")
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        their_features = theirs.encode(torch.tensor(x))
        their_output = theirs.decode(their_features)
    close(their_features, features)
    close(their_output, sae_decode(params, features, config))
    assert theirs.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"
    assert sae_lens_metadata(tmp_path)["model_name"] == "gpt2"
    again, loaded = load_sae_lens(tmp_path)
    close(sae_encode(again, x, loaded), features)
    close(sae_decode(again, features, loaded), their_output)


@pytest.mark.parametrize("name", TRAINED)
def test_we_compute_what_saelens_saved(tmp_path, name):
    sae_class, config_class = sae_lens.registry.get_sae_training_class(name)
    torch.manual_seed(0)
    theirs = sae_class(config_class(d_in=D, d_sae=F, **TRAINED[name]))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    if hasattr(theirs, "topk_threshold"):
        theirs.topk_threshold = torch.tensor(0.37, dtype=torch.double)
    theirs.save_inference_model(str(tmp_path))
    inference = sae_lens.SAE.load_from_disk(str(tmp_path))
    x = inputs()
    with torch.no_grad():
        features = inference.encode(torch.tensor(x))
        output = inference.decode(features)
    params, config = load_sae(tmp_path)
    close(sae_encode(params, x, config), features)
    close(sae_decode(params, jnp.asarray(features.numpy()), config), output)
    assert 0.02 < float((features > 0).float().mean()) < 0.9


def test_recovery_is_measured_as_saelens_measures_it():
    evals = pytest.importorskip("sae_lens.synthetic.evals")
    rng = np.random.default_rng(0)
    decoder, dictionary = (rng.standard_normal((rows, D)).astype(np.float32) for rows in (F, 60))
    latents, features = (np.maximum(rng.standard_normal((BATCH, n)) - 1, 0).astype(np.float32) for n in (F, 60))
    latents[:, 3] = 0
    mcc = evals.mean_correlation_coefficient(torch.tensor(decoder), torch.tensor(dictionary))
    assert mean_correlation_coefficient(decoder, dictionary) == pytest.approx(mcc, rel=1e-5)
    closest = absolute_cosines(decoder, dictionary).argmax(axis=1)
    precision, recall, f1 = detection_scores(count_detections(latents, features, closest))
    theirs = evals.compute_classification_metrics(*map(torch.tensor, (latents, features, decoder, dictionary)))
    close([s.mean() for s in (precision, recall, f1)], [theirs.precision, theirs.recall, theirs.f1_score])


def test_half_precision_is_read(tmp_path):
    theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D, d_sae=F, dtype="bfloat16"))
    theirs.save_model(str(tmp_path))
    params, config = load_sae_lens(tmp_path)
    np.testing.assert_array_equal(params["W_enc"], theirs.W_enc.detach().float().numpy())
    assert dataclasses.replace(config, dtype="float32") == config


def test_saelens_reads_the_same_from_a_sparsify_folder(tmp_path):
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
    from safetensors.numpy import save_file

    folder = tmp_path / "layers.3"
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "b_dec": (D,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()}
    (folder / "cfg.json").write_text(f'{{"d_in": {D}, "num_latents": {F}, "k": 4}}')
    save_file(arrays, folder / "sae.safetensors")
    _, theirs = sparsify_disk_loader(folder, cfg_overrides={"dtype": "float32"})
    arrays["W_dec"] = np.ascontiguousarray(arrays.pop("decoder.weight").T)
    save_file(arrays, folder / "sae.safetensors")
    ours, _ = load_sparsify(folder)
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        np.testing.assert_array_equal(ours[name], theirs[name])
