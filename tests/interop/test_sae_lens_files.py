"""SAE files without their makers: SAELens' layout round trip, sparsify and Gemma Scope as written here, errors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop.sae_files import load_gemma_scope, load_sae, load_sparsify
from jaxalign.interop.sae_lens import CONFIG, WEIGHTS, load_sae_lens, sae_lens_metadata, save_sae_lens
from jaxalign.interpretability.sae_config import SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode

safetensors = pytest.importorskip("safetensors.numpy")
D, F = 6, 10
RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, D)).astype(np.float32)


def arrays(config, seed=0):
    rng = np.random.default_rng(seed)
    out = config.d_out or D
    shapes = {"W_enc": (D, F), "W_dec": (F, out), "b_dec": (out,)}
    names = ("b_gate", "b_mag", "r_mag") if config.activation == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(names, (F,))
    if config.activation in ("jumprelu", "batchtopk", "matryoshka"):
        shapes["threshold"] = (F,) if config.activation == "jumprelu" else ()
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return params | ({"threshold": jnp.abs(params["threshold"])} if "threshold" in params else {})


def numpy_features(params, x, config):
    """The encoders of SAELens in float64."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    x = x - p["b_dec"] if config.apply_b_dec_to_input else x
    if config.activation == "gated":
        pi = x @ p["W_enc"] + p["b_gate"]
        return (pi > 0) * np.maximum(x @ (p["W_enc"] * np.exp(p["r_mag"])) + p["b_mag"], 0)
    z = x @ p["W_enc"] + p["b_enc"]
    z = z * np.linalg.norm(p["W_dec"], axis=1) if config.rescale_by_decoder_norm else z
    if config.activation == "topk":
        return np.maximum(z, 0) * (z >= np.sort(z, axis=1)[:, -config.k][:, None])
    return np.maximum(z, 0) * (z > p.get("threshold", -np.inf))


CONFIGS = {
    "relu": SAEConfig(D, F, "relu"),
    "topk": SAEConfig(D, F, "topk", k=3),
    "batchtopk": SAEConfig(D, F, "batchtopk", k=3),
    "matryoshka": SAEConfig(D, F, "matryoshka", k=3, widths=(4, F)),
    "jumprelu": SAEConfig(D, F, "jumprelu"),
    "gated": SAEConfig(D, F, "gated"),
    "transcoder": SAEConfig(D, F, "jumprelu", d_out=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_features_survive_the_round_trip(tmp_path, name):
    config = CONFIGS[name]
    params = arrays(config)
    expected = numpy_features(params, X, config)
    save_sae_lens(tmp_path / "new", params, config, hook_name="blocks.3.hook_resid_post")
    loaded, again = load_sae(tmp_path / "new")
    features = sae_encode(loaded, X, again)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
    assert 0 < float((features > 0).mean()) < 1
    np.testing.assert_allclose(
        sae_decode(loaded, features, again), sae_decode(params, jnp.asarray(expected, jnp.float32), config), atol=1e-4
    )
    assert sae_lens_metadata(tmp_path / "new")["hook_name"] == "blocks.3.hook_resid_post"
    cfg = json.loads((tmp_path / "new" / CONFIG).read_text())
    assert cfg["metadata"]["sae_lens_version"] >= "6"
    assert cfg["normalize_activations"] == "none"
    selects = {
        "batchtopk": "jumprelu",
        "matryoshka": "jumprelu",
        "relu": "standard",
        "transcoder": "jumprelu_transcoder",
    }
    assert cfg["architecture"] == selects.get(name, name)


def test_a_transposed_array_is_written_as_it_looks(tmp_path):
    config = CONFIGS["relu"]
    params = arrays(config) | {"W_enc": np.asarray(RNG.standard_normal((F, D)), np.float32).T}
    save_sae_lens(tmp_path, params, config)
    np.testing.assert_array_equal(load_sae_lens(tmp_path)[0]["W_enc"], params["W_enc"])


def test_files_before_version_six(tmp_path):
    """An untyped k in activation_fn_kwargs, a threshold as its logarithm, bfloat16, inputs scaled by a constant."""
    import ml_dtypes

    params = arrays(CONFIGS["topk"])
    safetensors.save_file({n: np.asarray(a).astype(ml_dtypes.bfloat16) for n, a in params.items()}, tmp_path / WEIGHTS)
    old = {"d_in": D, "d_sae": F, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "hook_point": "x"}
    (tmp_path / CONFIG).write_text(json.dumps(old))
    loaded, config = load_sae_lens(tmp_path)
    assert (config.activation, config.k, config.rescale_by_decoder_norm) == ("topk", 3, False)
    np.testing.assert_allclose(loaded["W_enc"], params["W_enc"], rtol=1e-2)

    params = arrays(CONFIGS["jumprelu"])
    written = {name: np.asarray(a) for name, a in params.items() if name != "threshold"}
    safetensors.save_file({**written, "log_threshold": np.log(params["threshold"])}, tmp_path / WEIGHTS)
    old = {"d_in": D, "d_sae": F, "architecture": "jumprelu", "normalize_activations": "expected_average_only_in"}
    (tmp_path / CONFIG).write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match=r"cfg\.json: normalize_activations 'expected.* is not supported; give input_scale"
    ):
        load_sae_lens(tmp_path)
    loaded, config = load_sae_lens(tmp_path, input_scale=2.0)
    expected = numpy_features(params, 2.0 * X, config)
    np.testing.assert_allclose(sae_encode(loaded, X, config), expected, rtol=1e-4, atol=1e-5)


def sparsify_folder(path, tensors=None, **cfg):
    params = arrays(CONFIGS["topk"], seed=3)
    named = {
        "encoder.weight": np.ascontiguousarray(params["W_enc"].T), "encoder.bias": np.asarray(params["b_enc"]),
        "W_dec": np.asarray(params["W_dec"]), "b_dec": np.asarray(params["b_dec"]), **(tensors or {}),
    }  # fmt: skip
    path.mkdir(exist_ok=True)
    safetensors.save_file(named, path / "sae.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": 3, **cfg}))
    return params


def test_sparsify_folders(tmp_path):
    params = sparsify_folder(tmp_path)
    loaded, config = load_sae(tmp_path)
    assert config == SAEConfig(D, F, "topk", k=3, rescale_by_decoder_norm=False)
    np.testing.assert_allclose(sae_encode(loaded, X, config), numpy_features(params, X, config), rtol=1e-4, atol=1e-5)
    sparsify_folder(tmp_path, num_latents=0, d_in=5, expansion_factor=2)
    with pytest.raises(ValueError, match=r"sae\.safetensors: W_enc is \(6, 10\), the configuration says \(5, 10\)"):
        load_sparsify(tmp_path)
    wide = np.zeros((F, 4), np.float32)
    sparsify_folder(tmp_path, {"W_dec": wide, "b_dec": np.zeros(4, np.float32)}, transcode=True)
    assert load_sparsify(tmp_path)[1].d_out == 4
    sparsify_folder(tmp_path, {"W_skip": wide})
    with pytest.raises(ValueError, match="array 'W_skip' is not supported"):
        load_sparsify(tmp_path)
    sparsify_folder(tmp_path, activation="groupmax")
    with pytest.raises(ValueError, match=r"cfg\.json: activation 'groupmax' is not supported"):
        load_sparsify(tmp_path)


def test_gemma_scope_files(tmp_path):
    params = {name: np.asarray(a) for name, a in arrays(CONFIGS["jumprelu"]).items()}
    np.savez(tmp_path / "params.npz", **params)
    loaded, config = load_sae(tmp_path)
    assert (config.activation, config.apply_b_dec_to_input, config.d_out) == ("jumprelu", False, None)
    np.testing.assert_allclose(sae_encode(loaded, X, config), numpy_features(params, X, config), rtol=1e-4, atol=1e-5)
    assert load_sae(tmp_path / "params.npz")[1] == config
    np.savez(tmp_path / "params.npz", **{name: a for name, a in params.items() if name != "threshold"})
    with pytest.raises(ValueError, match=r"params\.npz: no array 'threshold'"):
        load_gemma_scope(tmp_path)
    (tmp_path / "params.npz").write_text("nothing")
    with pytest.raises(ValueError, match=r"params\.npz: not an \.npz file"):
        load_gemma_scope(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architecture": "temporal"},
            r"cfg\.json: architecture 'temporal' is not supported; there are standard, topk",
        ),
        ({"normalize_activations": "layer_norm"}, r"cfg\.json: normalize_activations 'layer_norm' is not supported$"),
        ({"d_in": "6"}, r"cfg\.json: d_in must be int, got '6'"),
        ({"d_sae": 11}, r"sae_weights\.safetensors: W_enc is \(6, 10\), the configuration says \(6, 11\)"),
        ({"finetuning_scaling_factor": True}, r"cfg\.json: finetuning_scaling_factor is not supported"),
        ({"activation_fn": "tanh-relu"}, r"cfg\.json: activation_fn 'tanh-relu' is not supported"),
        ({"architecture": "gated"}, r"sae_weights\.safetensors: no array 'b_gate'; a gated SAE has W_enc"),
        ({"architecture": "topk"}, r"cfg\.json: no entry 'k'"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, change, message):
    save_sae_lens(tmp_path, arrays(CONFIGS["relu"]), CONFIGS["relu"])
    cfg = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(cfg | change))
    with pytest.raises(ValueError, match=message):
        load_sae_lens(tmp_path)


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no SAE here; looked for sae_weights\.safetensors \(SAELens\)"):
        load_sae(tmp_path)
    save_sae_lens(tmp_path, arrays(CONFIGS["relu"]), CONFIGS["relu"])
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors: not a safetensors file, or cut short"):
        load_sae_lens(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"cfg\.json: not JSON"):
        load_sae_lens(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*cfg\.json"):
        load_sae_lens(tmp_path)


def test_what_saelens_has_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no crosscoders"):
        save_sae_lens(tmp_path, {}, SAEConfig(D, F, "relu", layers=2))
    with pytest.raises(ValueError, match="no 'gated' transcoders"):
        save_sae_lens(tmp_path, {}, SAEConfig(D, F, "gated", d_out=4))
    with pytest.raises(ValueError, match="W_dec has entries that are not finite"):
        nan = arrays(CONFIGS["relu"]) | {"W_dec": jnp.full((F, D), jnp.nan)}
        save_sae_lens(tmp_path, nan, CONFIGS["relu"])
    with pytest.raises(ValueError, match=r"array 'extra' is not of a relu SAE"):
        save_sae_lens(tmp_path, arrays(CONFIGS["relu"]) | {"extra": jnp.zeros(1)}, CONFIGS["relu"])
    assert jax.tree.leaves(list(tmp_path.iterdir())) == []
