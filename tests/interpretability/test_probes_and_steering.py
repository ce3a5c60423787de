"""Logit lens, linear probes and steering vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Network, networks
from jaxalign.interpretability.activations import capture
from jaxalign.interpretability.logit_lens import layer_log_probs, logit_lens
from jaxalign.interpretability.probing import fit_linear_probe, linear_probe
from jaxalign.interpretability.steering import project_out, steer, steering_vector

CONFIG = networks.TransformerConfig(
    vocab_size=13, hidden_size=6, intermediate_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4
)
TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SITE = "resid_post[1]"


@pytest.fixture(scope="module")
def model():
    network = networks.transformer(CONFIG)
    return network, jax.tree.map(lambda x: 8 * x, jax.jit(network.init)(jax.random.key(0)))


def capture_at(network, params, tokens):
    return jax.jit(lambda: capture(network, (SITE,)).apply(params, tokens)[1][SITE])()


def test_the_lens_of_the_last_layer_is_the_model_and_the_others_are_norm_and_unembedding(model):
    network, params = model
    logits, values = jax.jit(capture(network, ("resid_post",)).apply)(params, TOKENS)
    lens = jax.jit(lambda: logit_lens(network, params, TOKENS))()
    np.testing.assert_allclose(lens[-1], logits, rtol=1e-4, atol=1e-4)
    x = np.asarray(values["resid_post"], np.float64)
    normal = x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_epsilon)
    normal = normal * np.asarray(params["final_norm"]["scale"])
    np.testing.assert_allclose(lens, normal @ np.asarray(params["embedding"]).T, rtol=1e-3, atol=1e-3)
    found = jax.jit(lambda: layer_log_probs(network, params, TOKENS, TOKENS))()
    expected = jnp.take_along_axis(jax.nn.log_softmax(lens), TOKENS[None, ..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_steering_adds_the_mean_difference(model):
    network, params = model
    positive, negative = TOKENS, TOKENS[:1, :4]
    values = {"p": capture_at(network, params, positive), "n": capture_at(network, params, negative)}
    vector = jax.jit(lambda: steering_vector(network, params, positive, negative, site=SITE))()
    np.testing.assert_allclose(vector, values["p"][:, -1].mean(0) - values["n"][:, -1].mean(0), rtol=1e-4, atol=1e-5)
    mask = jnp.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    masked = jax.jit(lambda: steering_vector(network, params, positive, negative, site=SITE, positive_mask=mask))()
    chosen = np.asarray(values["p"])[np.asarray(mask, bool)].mean(0)
    np.testing.assert_allclose(masked, chosen - values["n"][:, -1].mean(0), rtol=1e-4, atol=1e-5)

    @jax.jit
    def steered(scale):
        return capture(steer(network, SITE, vector, scale, keep_first=2), (SITE,)).apply(params, TOKENS)

    logits, none = steered(0.0)
    np.testing.assert_allclose(none[SITE], values["p"], rtol=1e-4, atol=1e-5)
    moved = steered(2.0)[1][SITE]
    np.testing.assert_allclose(moved[:, :2], values["p"][:, :2], rtol=1e-4, atol=1e-5)
    added = moved[:, 2:] - values["p"][:, 2:]
    np.testing.assert_allclose(added, jnp.broadcast_to(2 * vector, (2, 3, 6)), rtol=1e-3, atol=1e-4)
    # Toward the direction in which one token's logit grows, that logit grows.
    logit = jax.jit(jax.value_and_grad(lambda v: steer(network, SITE, v).apply(params, TOKENS)[0, -1, 3]))
    at_rest, toward = logit(jnp.zeros(6))
    np.testing.assert_allclose(at_rest, logits[0, -1, 3], rtol=1e-4, atol=1e-4)
    assert float(logit(0.05 * toward)[0]) > float(at_rest) > float(logit(-0.05 * toward)[0])


def test_projecting_out_leaves_nothing_along_the_direction(model):
    network, params = model
    direction = jnp.arange(1.0, 7.0)
    out = project_out(network, "resid_pre", direction)
    values = jax.jit(capture(out, ("resid_pre",)).apply)(params, TOKENS)[1]["resid_pre"]
    np.testing.assert_allclose(values @ direction, 0.0, atol=1e-3)
    one = project_out(Network(lambda key: None, lambda _, x: networks.site(x, "x")), "x", jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(one.apply(None, jnp.array([[[1.0, 0.0]]])), [[[1 - 9 / 25, -12 / 25]]], rtol=1e-6)


def test_probe_minimises_its_loss_against_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(40, 3)) * [1.0, 5.0, 0.2] + 1.0
        labels = (x[:, 0] + 0.3 * np.sin(9 * x[:, 1]) > 1.0).astype(int) + (x[:, 2] > 1.1)

        def loss(flat):
            logits = (x - x.mean(0)) / x.std(0) @ flat[:9].reshape(3, 3) + flat[9:]
            picked = logits[np.arange(40), labels] - np.log(np.exp(logits).sum(1))
            return -picked.mean() + 0.5 * 0.01 * (flat[:9] ** 2).sum()

        best = optimize.minimize(loss, np.zeros(12), method="BFGS", options={"gtol": 1e-9})
        weights, bias = jax.jit(lambda: fit_linear_probe(x, labels, num_classes=3, l2=0.01))()
        np.testing.assert_allclose(weights * x.std(0)[:, None], best.x[:9].reshape(3, 3), atol=2e-4)
        centre = bias + x.mean(0) @ weights
        np.testing.assert_allclose(centre - centre.mean(), best.x[9:] - best.x[9:].mean(), atol=2e-4)


def test_probe_reads_what_is_there_and_the_control_does_not():
    x = jax.random.normal(jax.random.key(0), (2, 300, 4))
    labels = (x[0, :, 1] > 0).astype(jnp.int32)
    x = x.at[0, :, 3].set(7.0)  # a constant column
    probes = jax.jit(jax.vmap(lambda x: linear_probe(jax.random.key(1), x, labels, num_classes=2)))(x)
    assert float(probes.accuracy[0]) > 0.95
    assert bool(jnp.all((probes.low <= probes.accuracy) & (probes.accuracy <= probes.high)))
    assert float(probes.high[1]) < 0.75
    assert float(jnp.abs(probes.control - 0.5).max()) < 0.2
    np.testing.assert_array_equal(probes.weights[0, 3], 0.0)


def test_bad_input_is_named(model):
    network, params = model
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.1, got 0\.\.2"):
        linear_probe(jax.random.key(0), jnp.ones((3, 2)), jnp.arange(3), num_classes=2)
    with pytest.raises(ValueError, match=r"held_out=0\.1 of 3 rows leaves a part empty"):
        linear_probe(jax.random.key(0), jnp.ones((3, 2)), jnp.zeros(3, int), num_classes=2, held_out=0.1)
    with pytest.raises(ValueError, match=r"positive_mask is \(2, 4\), positive is \(2, 5\)"):
        steering_vector(network, params, TOKENS, TOKENS, site=SITE, positive_mask=jnp.ones((2, 4)))
    with pytest.raises(ValueError, match=r"no site 'residual'.*resid_post"):
        logit_lens(network, params, TOKENS, site="residual")
