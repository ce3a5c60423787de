"""Losses, encoders and decoders of every activation against NumPy float64; gradients; what can be folded."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.jump_relu import jump_relu, step_above
from jaxalign.interpretability.sae_config import ACTIVATIONS
from jaxalign.interpretability.sae_loss import batch_loss
from jaxalign.interpretability.sae_parameters import fold_decoder_norm, fold_input_scale, geometric_median
from jaxalign.interpretability.sparse_autoencoder import (
    SAEConfig,
    SAEState,
    sae_decode,
    sae_encode,
    sae_init,
    sae_loss,
)

LOSS_MODULE = sys.modules[sae_loss.__module__]  # the package has the function by this name
D, F, B, K = 5, 12, 8, 3
SHAPES = {"autoencoder": {}, "transcoder": {"d_out": 4}, "crosscoder": {"layers": 2}}


def config_of(activation, **fields):
    widths = {"widths": (5, F)} if activation == "matryoshka" else {}
    common = {"k": K, "sparsity": 0.3, "dead_after": 10, "k_aux": 2, "aux_coefficient": 0.7, "bandwidth": 0.4}
    return SAEConfig(D, F, activation, **{**common, **widths, **fields})


def problem(config, rows=B):
    """Parameters that are not at their start, a batch, and counters by which features 0, 3, 6 and 9 are dead."""
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.3 * random.standard_normal(x.shape), sae_init(jax.random.key(0), config))
    if "threshold" in params:
        params["threshold"] = abs(params["threshold"])
    x = random.standard_normal((rows, *config.input_shape))
    x = (x, random.standard_normal((rows, *config.output_shape))) if config.d_out else x
    return params, x, jnp.where(jnp.arange(config.d_sae) % 3 == 0, 99, 0)


def state_of(params, since_fired):
    return SAEState(jnp.zeros((), jnp.int32), params, None, jax.random.key(0), since_fired=since_fired)


def reference(params, x, since_fired, config):
    """(loss, features) by NumPy in float64; a plain autoencoder, transcoder or crosscoder laid flat."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    x_in, x_out = x if config.d_out else (x, x)
    x_in, x_out = x_in.reshape(len(x_in), -1), x_out.reshape(len(x_out), -1)
    w_enc, w_dec, b_dec = p["W_enc"].reshape(-1, F), p["W_dec"].reshape(F, -1), p["b_dec"].reshape(-1)
    norms = np.linalg.norm(p["W_dec"], axis=-1)
    norms = norms if norms.ndim == 1 else norms.sum(axis=1)
    if config.decoder_norm == "unit":
        w_dec, norms = w_dec / norms[:, None], np.ones(F)
    centred = x_in - b_dec if config.apply_b_dec_to_input else x_in
    z = centred @ w_enc
    penalty = extra = 0.0
    if config.activation == "gated":
        opened = np.maximum(z + p["b_gate"], 0)
        f = (opened > 0) * np.maximum(np.exp(p["r_mag"]) * z + p["b_mag"], 0)
        penalty = (opened @ norms).mean()
        extra = ((opened @ w_dec + b_dec - x_out) ** 2).sum(axis=1).mean()
        return ((f @ w_dec + b_dec - x_out) ** 2).sum(axis=1).mean() + extra + config.sparsity * penalty, f
    z = z + p["b_enc"]
    if config.activation in ("relu", "jumprelu"):
        f = np.maximum(z, 0) if config.activation == "relu" else z * (z > p["threshold"])
        penalty = (f @ norms).mean() if config.activation == "relu" else (f > 0).sum(axis=1).mean()
        return ((f @ w_dec + b_dec - x_out) ** 2).sum(axis=1).mean() + config.sparsity * penalty, f
    scaled = z * norms
    if config.activation == "topk":
        kept = scaled >= np.sort(scaled, axis=1)[:, -K][:, None]
    else:
        kept = np.maximum(scaled, 0) >= np.sort(np.maximum(scaled, 0).reshape(-1))[-int(K * len(z))]
    f = np.maximum(scaled, 0) * kept
    errors = [f[:, :width] / norms[:width] @ w_dec[:width] + b_dec - x_out for width in config.widths or (F,)]
    dead = np.flatnonzero(np.asarray(since_fired) > config.dead_after)
    last = np.argsort(scaled[:, dead], axis=1)[:, -config.k_aux :]
    amounts = np.zeros_like(z)
    np.put_along_axis(amounts, dead[last], np.take_along_axis(z, dead[last], axis=1), axis=1)
    aux = ((amounts @ w_dec + errors[-1]) ** 2).sum(axis=1).mean()
    return sum((e**2).sum(axis=1).mean() for e in errors) + config.aux_coefficient * aux, f


@pytest.mark.parametrize(
    ("activation", "shape"),
    [
        *((a, "autoencoder") for a in ACTIVATIONS),
        ("topk", "transcoder"),
        ("relu", "crosscoder"),
        ("gated", "transcoder"),
    ],
)
def test_matches_numpy_in_float64(activation, shape):
    with jax.enable_x64(True):
        config = config_of(activation, **SHAPES[shape])
        params, x, since = problem(config)
        expected, features = reference(params, x, since, config)
        value, metrics = jax.jit(lambda p: sae_loss(p, state_of(p, since), x, config))(params)
        np.testing.assert_allclose(value, expected, rtol=1e-10)
        np.testing.assert_allclose(metrics["l0"], (features > 0).sum(axis=1).mean(), rtol=1e-6)
        if activation in ("batchtopk", "matryoshka"):
            # At a threshold just below what the batch kept, each row by itself keeps the same.
            params["threshold"] = jnp.asarray(features[features > 0].min() - 1e-9)
        x_in = x[0] if config.d_out else x
        encode = functools.partial(sae_encode, config=config)
        np.testing.assert_allclose(encode(params, x_in), features, rtol=1e-10, atol=1e-12)


def test_crosscoder_of_one_layer_is_an_autoencoder():
    single, cross = config_of("matryoshka"), config_of("matryoshka", layers=1)
    params, x, since = problem(single)
    lifted = params | {
        "W_enc": params["W_enc"][None],
        "W_dec": params["W_dec"][:, None],
        "b_dec": params["b_dec"][None],
    }
    loss = jax.jit(lambda p, x, config: sae_loss(p, state_of(p, since), x, config)[0], static_argnums=2)
    value, other = loss(params, x, single), loss(lifted, x[:, None], cross)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    f = sae_encode(lifted, x[:, None], cross)
    assert sae_decode(lifted, f, cross).shape == (B, 1, D)
    np.testing.assert_allclose(sae_decode(lifted, f, cross)[:, 0], sae_decode(params, f, single), rtol=1e-5)


def test_by_hand():
    # Two features in one dimension: x = 2 gives z = (2, -2), f = (2, 0), x_hat = 1; (1 - 2)^2 + 0.5 * 2 * |0.5|.
    config = SAEConfig(1, 2, "relu", sparsity=0.5)
    params = {
        "W_enc": jnp.array([[1.0, -1.0]]),
        "W_dec": jnp.array([[0.5], [3.0]]),
        "b_enc": jnp.zeros(2),
        "b_dec": jnp.zeros(1),
    }
    value, metrics = sae_loss(params, state_of(params, jnp.zeros(2, jnp.int32)), jnp.array([[2.0]]), config)
    np.testing.assert_allclose(value, 1.5)
    np.testing.assert_allclose([metrics["mse"], metrics["l0"], metrics["sparsity_loss"]], [1.0, 1.0, 0.5])


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": 2, "rescale_by_decoder_norm": False},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"d_out": 70}, marks=pytest.mark.slow),
    ],
)
def test_products_by_entries_have_the_gradients_of_whole_products(fields, monkeypatch):
    with jax.enable_x64(True):
        fields = {"d_in": 66, "d_sae": 80, "widths": (), **fields}
        config = dataclasses.replace(config_of("topk"), apply_b_dec_to_input=None, **fields)
        params, x, since = problem(config, rows=64)

        def gradients(params):
            def scalar(params):
                value, metrics, out = batch_loss(params, x, since, 0, config)
                return value, (metrics, out.fired, out.smallest)

            return jax.value_and_grad(scalar, has_aux=True)(params)

        assert LOSS_MODULE.uses_entries(config, 64)
        assert not LOSS_MODULE.uses_entries(dataclasses.replace(config, k=jnp.array(K)), 64)
        assert LOSS_MODULE.uses_entries(dataclasses.replace(config, k=jnp.array(K), k_max=K), 64)
        sparse = jax.jit(gradients)(params)
        monkeypatch.setattr(LOSS_MODULE, "MIN_ROWS", 1000)
        dense = jax.jit(lambda params: gradients(params))(params)
        assert dense[0][1][0]["aux_loss"] > 0.01
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), sparse, dense)


@pytest.mark.parametrize("activation", ["topk", "matryoshka"])
def test_dead_features_get_a_gradient_into_the_encoder(activation):
    config = config_of(activation, k_aux=4)
    params, x, since = problem(config)
    params["b_enc"] = params["b_enc"] - 50.0 * (since > 0)  # so far below zero that they cannot fire

    def scalar(params, coefficient):
        here = dataclasses.replace(config, aux_coefficient=coefficient)
        return sae_loss(params, state_of(params, since), x, here)[0]

    gradients = jax.jit(jax.grad(scalar))
    without, with_aux = gradients(params, 0.0), gradients(params, 1.0)
    dead = np.asarray(since > 0)
    for name, axis in (("W_enc", 0), ("b_enc", ()), ("W_dec", 1)):
        assert not np.abs(without[name]).sum(axis=axis)[dead].any()
        assert (np.abs(with_aux[name]).sum(axis=axis)[dead] > 1e-3).all(), name
    np.testing.assert_allclose(with_aux["b_dec"], without["b_dec"], rtol=1e-3, atol=1e2)


def test_jump_gradients_are_the_kernel_by_hand():
    z, theta, width = jnp.array([[0.5, 0.55, 0.9], [0.45, 0.7, 0.52]]), jnp.array([0.5, 0.5, 0.5]), 0.2
    g = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    value, pull = jax.vjp(lambda z, t: jump_relu(z, t, width), z, theta)
    np.testing.assert_allclose(value, [[0, 0.55, 0.9], [0, 0.7, 0.52]])
    to_z, to_theta = pull(g)
    np.testing.assert_allclose(to_z, [[0, 2, 3], [0, 5, 6]])
    np.testing.assert_allclose(to_theta, -0.5 / 0.2 * np.array([1 + 4, 2, 6]), rtol=1e-6)
    to_z, to_theta = jax.vjp(lambda z, t: step_above(z, t, width), z, theta)[1](g)
    assert not to_z.any()
    np.testing.assert_allclose(to_theta, -1 / 0.2 * np.array([1 + 4, 2, 6]), rtol=1e-6)


def test_other_l0_penalties():
    config = config_of("jumprelu")
    params, x, since = problem(config)
    f = sae_encode(params, x, config)
    norms = np.linalg.norm(params["W_dec"], axis=1)
    counts = (np.asarray(f) > 0).sum(axis=1)
    wanted = {
        "tanh": np.tanh(4.0 * f * norms[None]).sum(axis=1).mean(),
        "quadratic": (2 / 3 * (counts - 3) ** 2).mean(),
    }
    for penalty, expected in wanted.items():
        here = dataclasses.replace(config, l0_penalty=penalty, target_l0=3, sparsity=1.0)
        _, metrics = sae_loss(params, state_of(params, since), x, here)
        np.testing.assert_allclose(metrics["sparsity_loss"], expected, rtol=1e-5)
    warming = dataclasses.replace(config, sparsity_warm_up=4)
    ratio = [sae_loss(params, state_of(params, since), x, c)[1]["sparsity_loss"] for c in (warming, config)]
    np.testing.assert_allclose(ratio[0] / ratio[1], 0.25, rtol=1e-6)


def test_gate_is_trained_without_moving_the_decoder():
    config = config_of("gated", decoder_norm="free", sparsity=0.0)
    params, x, since = problem(config)
    closed = params | {"b_mag": params["b_mag"] - 100.0}  # features are zero, and the gate's own error is left

    gradient = jax.jit(jax.grad(lambda p: sae_loss(p, state_of(p, since), x, config)[0]))(closed)
    assert not gradient["W_dec"].any()
    assert np.abs(gradient["b_gate"]).max() > 1e-3


@pytest.mark.parametrize("activation", ["gated", "batchtopk", "jumprelu"])
def test_folding_changes_parameters_and_not_reconstructions(activation):
    config = config_of(activation)
    params, x, _ = problem(config)
    if activation == "batchtopk":
        params["threshold"] = jnp.asarray(0.2)
    f = sae_encode(params, 2.5 * x, config)
    x_hat = sae_decode(params, f, config) / 2.5
    scaled = fold_input_scale(params, 2.5, config)
    np.testing.assert_allclose(sae_decode(scaled, sae_encode(scaled, x, config), config), x_hat, rtol=1e-4, atol=1e-5)
    assert float((f > 0).mean()) > 0.1
    folded = fold_decoder_norm(scaled, config)
    np.testing.assert_allclose(jnp.linalg.norm(folded["W_dec"], axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(sae_decode(folded, sae_encode(folded, x, config), config), x_hat, rtol=1e-4, atol=1e-5)


def test_initial_values():
    config = config_of("jumprelu", layers=2)
    params = sae_init(jax.random.key(1), config, b_dec=jnp.ones((2, D)))
    np.testing.assert_allclose(jnp.linalg.norm(params["W_dec"], axis=-1), 0.1, rtol=1e-6)
    np.testing.assert_array_equal(params["W_enc"], jnp.moveaxis(params["W_dec"], 0, -1))
    assert {name: x.shape for name, x in params.items() if name not in ("W_enc", "W_dec")} == {
        "b_dec": (2, D), "b_enc": (F,), "threshold": (F,),
    }  # fmt: skip
    points = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0], [1000.0, 2.0]])
    median = geometric_median(points, steps=200)
    around = [np.linalg.norm(points - (np.asarray(median) + d), axis=1).sum() for d in ([0, 0], [0.1, 0], [-0.1, 0])]
    assert min(around) == around[0]


def test_half_precision_products_keep_float32_sums():
    config = config_of("topk", dtype="bfloat16")
    params, x, since = problem(config)
    exact = dataclasses.replace(config, dtype="float32")
    values = {}
    for name, here in (("half", config), ("exact", exact)):
        scalar = lambda p, here=here: sae_loss(p, state_of(p, since), x, here)[0]  # noqa: E731
        values[name] = jax.jit(jax.value_and_grad(scalar))(params)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(values["half"]))
    np.testing.assert_allclose(values["half"][0], values["exact"][0], rtol=0.05)
    assert values["half"][0] != values["exact"][0]
    hlo = str(jax.make_jaxpr(lambda p: sae_encode(p, x, config))(params))
    assert "preferred_element_type=float32" in hlo
    assert "bf16" in hlo


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "swish"}, "swish"),
        ({"k": F + 1}, f"d_sae = {F}"),
        ({"k": 0}, "got 0"),
        ({"d_in": 0}, "d_in"),
        ({"activation": "matryoshka"}, "widths"),
        ({"activation": "matryoshka", "widths": (6, 5, F)}, "widths"),
        ({"widths": (F,)}, "matryoshka"),
        ({"d_out": 3, "layers": 2}, "crosscoder"),
        ({"d_out": 3, "apply_b_dec_to_input": True}, "b_dec"),
        ({"activation": "jumprelu", "l0_penalty": "quadratic"}, "target_l0"),
        ({"activation": "relu", "rescale_by_decoder_norm": True}, "rescale"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_bad_configurations_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**{"d_in": D, "d_sae": F, "k": 3, **fields})


def test_bad_batches_are_named():
    config, pair = config_of("topk"), config_of("topk", d_out=4)
    params, x, since = problem(config)
    state = state_of(params, since)
    for batch, message in ((x[:, :4], r"d_in.*\(5,\).*\(8, 4\)"), ((x, x), "one array"), (x[None], "one batch")):
        with pytest.raises(ValueError, match=message):
            sae_loss(params, state, batch, config)
    with pytest.raises(ValueError, match="x_in, x_out"):
        sae_loss(params, state, x, pair)
    with pytest.raises(ValueError, match=r"x_out.*d_out.*\(4,\)"):
        sae_loss(params, state, (x, x), pair)
    with pytest.raises(ValueError, match="d_in"):
        sae_encode(params, x.T, config)
    with pytest.raises(ValueError, match="d_sae = 12"):
        sae_decode(params, x, config)
    with pytest.raises(ValueError, match="b_dec"):
        sae_init(jax.random.key(0), config, b_dec=jnp.zeros(3))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_reaches_the_loss(activation):
    config = config_of(activation, d_out=4)  # so that the input's NaN is not in the target
    params, (x_in, x_out), since = problem(config)
    x_in[3, 2] = np.nan
    # Jitted, because XLA may make of a product with a mask a choice that drops the NaN.
    assert np.isnan(jax.jit(lambda x: sae_loss(params, state_of(params, since), x, config)[0])((x_in, x_out)))
    assert np.isnan(jax.jit(lambda x: sae_encode(params, x, config))(x_in)[3]).any()
