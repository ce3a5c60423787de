"""Capture, patch and site gradients: on a transformer, an MLP, loops, and functions of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Network, networks
from jaxalign.interpretability.activations import (
    capture,
    capture_function,
    patch,
    patch_function,
    per_layer,
    site_gradients,
    sites,
)
from jaxalign.networks import site

CONFIG = networks.TransformerConfig(
    vocab_size=17, hidden_size=8, intermediate_size=12, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=4
)
TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
PER_LAYER = ("resid_pre", "resid_mid", "resid_post", "attention_out", "mlp_out")


@pytest.fixture(scope="module")
def model():
    network = networks.transformer(CONFIG)
    params = jax.jit(network.init)(jax.random.key(0))
    return network, jax.tree.map(lambda x: 8 * x, params)


@pytest.fixture(scope="module")
def every(model):
    network, params = model
    names = tuple(sites(network.apply, params, TOKENS))
    return jax.jit(capture(network, (*names, "resid_post[2]", "resid_pre[-1]")).apply)(params, TOKENS)


def loop(x, w):
    """x -> tanh(w_l x) for each row of w[L], named "h"."""

    def body(x, w_l):
        x = site(jnp.tanh(w_l * x), "h")
        return x, 2 * x

    return jax.lax.scan(body, x, w)


def test_sites_lists_names_and_shapes(model):
    network, params = model
    found = sites(network.apply, params, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert found["resid_post"] == (4, 2, 5, 8)
    assert found["attention_q"] == found["attention_z"] == (4, 2, 5, 4, 4)
    assert found["attention_k"] == found["attention_v"] == (4, 2, 5, 2, 4)
    assert found["attention_pattern"] == (4, 2, 4, 5, 5)
    assert found["mlp_pre"] == found["mlp_post"] == (4, 2, 5, 12)
    assert found["embedding"] == found["final_norm"] == (2, 5, 8)
    assert len(found) == 16


def test_captured_values_are_the_residual_stream(model, every):
    network, params = model
    output, values = every
    np.testing.assert_allclose(output, network.apply(params, TOKENS), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(values["embedding"], params["embedding"][TOKENS])
    np.testing.assert_allclose(values["resid_pre"][0], values["embedding"])
    np.testing.assert_allclose(values["resid_pre"][1:], values["resid_post"][:-1])
    np.testing.assert_allclose(values["resid_mid"], values["resid_pre"] + values["attention_out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(values["resid_post"], values["resid_mid"] + values["mlp_out"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(values["resid_post[2]"], values["resid_post"][2])
    np.testing.assert_array_equal(values["resid_pre[-1]"], values["resid_pre"][3])
    np.testing.assert_allclose(values["final_norm"], network.hidden(params, TOKENS), rtol=2e-5, atol=2e-5)


def test_pattern_is_causal_attention_of_queries_to_keys(every):
    pattern, q, k, z, v = (every[1][f"attention_{name}"] for name in ("pattern", "q", "k", "z", "v"))
    np.testing.assert_allclose(pattern.sum(-1), 1.0, rtol=1e-5)
    assert float(jnp.abs(jnp.triu(pattern, 1)).max()) == 0.0
    frequency = np.asarray(networks.rope_frequencies(4, CONFIG.rope_theta), np.float64)

    def rotate(x):  # as complex numbers: coordinate i with i + E/2
        x = np.asarray(x, np.float64)
        turned = (x[..., :2] + 1j * x[..., 2:]) * np.exp(1j * np.arange(5)[:, None, None] * frequency)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    q, k = rotate(q), np.repeat(rotate(k), 2, axis=3)
    scores = np.einsum("lbthe,lbshe->lbhts", q, k) / 2.0 + np.where(np.tri(5), 0.0, -np.inf)
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(pattern, expected / expected.sum(-1, keepdims=True), rtol=1e-3, atol=1e-5)
    mixed = np.einsum("lbhts,lbshe->lbthe", pattern, np.repeat(v, 2, axis=3))
    np.testing.assert_allclose(z, mixed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["attention_z[1]", "resid_mid[0]", "mlp_post[3]", "embedding"])
def test_patching_in_what_was_there_changes_nothing(model, every, name):
    network, params = model
    layer = name.split("[")
    value = every[1][layer[0]] if len(layer) == 1 else every[1][layer[0]][int(layer[1][:-1])]
    out = jax.jit(patch(network, {name: lambda x: value}).apply)(params, TOKENS)
    np.testing.assert_allclose(out, every[0], rtol=2e-4, atol=2e-4)


def test_one_layer_and_per_layer_patches_agree_and_reach_decoding(model, every):
    network, params = model
    shift = jnp.zeros((4, 1, 1, 8)).at[2].set(jnp.arange(8.0))
    one = patch(network, {"resid_pre[2]": lambda x: x + jnp.arange(8.0)[None, None]})
    all_layers = patch(network, {"resid_pre": per_layer(lambda x, s: x + s, shift)})
    expected = jax.jit(one.apply)(params, TOKENS)
    assert float(jnp.abs(expected - every[0]).max()) > 0.1
    np.testing.assert_allclose(jax.jit(all_layers.apply)(params, TOKENS), expected, rtol=1e-4, atol=1e-4)
    decoded, _ = jax.jit(one.decode)(params, TOKENS, network.init_cache(2, 5))
    np.testing.assert_allclose(decoded, expected, rtol=1e-3, atol=1e-3)


def test_an_edit_without_layer_acts_in_every_layer(model):
    network, params = model
    names = {"attention_out": jnp.zeros_like, "mlp_out": jnp.zeros_like}
    _, values = jax.jit(capture(patch(network, names), ("resid_post", "embedding")).apply)(params, TOKENS)
    np.testing.assert_array_equal(values["resid_post"], jnp.broadcast_to(values["embedding"], (4, 2, 5, 8)))


def test_gradients_at_every_site_are_finite_differences(model):
    network, params = model

    def metric(params, tokens):
        return jnp.sum(jnp.sin(network.apply(params, tokens)[:, -1]))

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        wide = networks.transformer(networks.TransformerConfig(**{**vars(CONFIG), "dtype": "float64"}))
        metric = lambda p, t: jnp.sum(jnp.sin(wide.apply(p, t)[:, -1]))  # noqa: E731
        names = ("attention_z", "resid_mid[1]", "mlp_post", "embedding")
        value, activations, gradients = jax.jit(site_gradients(metric, names))(params, TOKENS)
        assert {n: g.shape for n, g in gradients.items()} == {n: a.shape for n, a in activations.items()}
        np.testing.assert_allclose(value, metric(params, TOKENS))

        def shifted(shift):
            patches = {
                "attention_z": per_layer(jnp.add, shift * jnp.cos(activations["attention_z"])),
                "resid_mid[1]": lambda x: x + shift * jnp.cos(activations["resid_mid[1]"]),
            }
            return patch_function(metric, patches)(params, TOKENS)

        slope = (jax.jit(shifted)(1e-5) - jax.jit(shifted)(-1e-5)) / 2e-5
        expected = sum(jnp.vdot(gradients[n], jnp.cos(activations[n])) for n in ("attention_z", "resid_mid[1]"))
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_scan_by_hand():
    w = jnp.array([0.5, 2.0, -1.0])
    (x, ys), values = capture_function(loop, ("h", "h[1]"))(jnp.array([1.0]), w)
    h = [np.tanh(0.5)]
    h += [np.tanh(2 * h[0])]
    h += [np.tanh(-h[1])]
    np.testing.assert_allclose(values["h"][:, 0], h, rtol=1e-6)
    np.testing.assert_allclose(values["h[1]"], [h[1]], rtol=1e-6)
    np.testing.assert_allclose(ys[:, 0], 2 * np.array(h), rtol=1e-6)
    np.testing.assert_allclose(x, [h[2]], rtol=1e-6)
    (_, ys), _ = capture_function(patch_function(loop, {"h[1]": lambda x: x * 0 + 3.0}), ("h",))(jnp.array([1.0]), w)
    np.testing.assert_allclose(ys[:, 0], [2 * h[0], 6.0, 2 * np.tanh(-3.0)], rtol=1e-6)


def test_reverse_nested_rematerialised_and_repeated_loops_number_their_occurrences():
    def reverse(x, w):
        def body(x, w_l):
            return site(w_l + x, "h"), x

        return jax.lax.scan(body, x, w, reverse=True)

    w = jnp.array([1.0, 10.0, 100.0])
    (total, _), values = capture_function(reverse, ("h", "h[0]", "h[2]"))(jnp.zeros(()), w)
    np.testing.assert_allclose(values["h"], [111.0, 110.0, 100.0])
    assert (float(values["h[0]"]), float(values["h[2]"]), float(total)) == (111.0, 100.0, 111.0)

    def nested(x):
        inner = jax.checkpoint(lambda x: site(x + 1.0, "h"))
        for _ in range(2):
            x = jax.lax.fori_loop(0, 2, lambda _, x: jax.jit(inner)(inner(x)), x)
        return x

    out, values = capture_function(nested, ("h", "h[5]"))(jnp.zeros(()))
    np.testing.assert_allclose(values["h"], np.arange(1.0, 9.0))
    assert (float(out), float(values["h[5]"])) == (8.0, 6.0)
    changed = patch_function(nested, {"h[5]": lambda x: x + 10.0, "h": per_layer(jnp.add, jnp.arange(8.0))})
    assert float(changed(jnp.zeros(()))) == 8.0 + 28.0 + 10.0
    slopes = jax.grad(lambda v: patch_function(nested, {"h": per_layer(jnp.multiply, v)})(jnp.ones(())))(jnp.ones(8))
    np.testing.assert_allclose(slopes, np.arange(2.0, 10.0))


def test_mlp_and_conv_net_name_their_layers():
    network = Network.from_linen(networks.MLP((4, 3)), jnp.zeros((1, 2)))
    params = jax.jit(network.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 2))
    output, values = jax.jit(capture(network, ("pre_0", "post_0", "pre_1")).apply)(params, x)
    np.testing.assert_array_equal(values["post_0"], jax.nn.relu(values["pre_0"]))
    np.testing.assert_array_equal(values["pre_1"], output)
    off = patch(network, {"post_0": jnp.zeros_like})
    np.testing.assert_allclose(off.apply(params, x), jnp.broadcast_to(params["Dense_1"]["bias"], (5, 3)))
    conv = Network.from_linen(networks.ConvNet(3, channels=(2,), hidden_sizes=(4,)), jnp.zeros((1, 4, 4)))
    shapes = jax.eval_shape(conv.init, jax.random.key(0))
    found = sites(conv.apply, shapes, jnp.zeros((2, 4, 4)))
    assert found["conv_0"] == found["conv_post_0"] == (2, 2, 2, 2)


def test_composes_with_vmap_and_compiles_once(model):
    network, params = model
    traces = []

    @jax.jit
    def effect(scale):
        traces.append(scale)
        return patch(network, {"resid_mid[1]": lambda x: scale * x}).apply(params, TOKENS)

    scales = jnp.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(jax.vmap(effect)(scales)[1], effect(1.0), rtol=1e-4, atol=1e-4)
    effect(0.3)
    assert len(traces) == 2  # once under vmap, once alone


def test_bad_sites_and_patches_are_named(model):
    network, params = model
    with pytest.raises(ValueError, match=r"no site 'resid'; .*attention_k \(4\).*embedding,.*resid_post \(4\)"):
        capture(network, ("resid",)).apply(params, TOKENS)
    with pytest.raises(ValueError, match=r"'resid_post\[4\]': resid_post occurs 4 times"):
        capture(network, ("resid_post[4]",)).apply(params, TOKENS)
    with pytest.raises(ValueError, match=r"at 'mlp_out' returned shape \(8,\) for \(2, 5, 8\)"):
        patch(network, {"mlp_out[0]": lambda x: x[0, 0]}).apply(params, TOKENS)
    with pytest.raises(ValueError, match=r"'resid_pre' occurs 4 times; a leaf of `values` is \(3, 1\)"):
        patch(network, {"resid_pre": per_layer(jnp.add, jnp.zeros((3, 1)))}).apply(params, TOKENS)
    with pytest.raises(ValueError, match="is one occurrence"):
        patch(network, {"resid_pre[1]": per_layer(jnp.add, jnp.zeros((4, 1)))}).apply(params, TOKENS)
    with pytest.raises(ValueError, match="got the string 'resid_post'"):
        capture(network, "resid_post")
    with pytest.raises(ValueError, match="'h' stands inside a `while`"):
        stuck = lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: site(x + 1, "h"), x)  # noqa: E731
        capture_function(stuck, ("h",))(0.0)
