"""An autoencoder or transcoder inside the model, and what the model loses by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import networks
from jaxalign.interpretability.activations import capture, patch, site_gradients
from jaxalign.interpretability.sparse_autoencoder import SAEConfig, sae_init
from jaxalign.interpretability.splice import LossRecovered, loss_recovered, splice_sae, splice_transcoder

CONFIG = networks.TransformerConfig(
    vocab_size=13, hidden_size=6, intermediate_size=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4
)
TOKENS = jnp.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SITE = "resid_post[1]"


def both_signs(size):
    """An autoencoder that reconstructs exactly: x = relu(x) - relu(-x)."""
    config = SAEConfig(size, 2 * size, "relu", apply_b_dec_to_input=False)
    eye = jnp.eye(size)
    params = {
        "W_enc": jnp.concatenate([eye, -eye], axis=1),
        "b_enc": jnp.zeros(2 * size),
        "W_dec": jnp.concatenate([eye, -eye]),
        "b_dec": jnp.zeros(size),
    }
    return params, config


@pytest.fixture(scope="module")
def model():
    network = networks.transformer(CONFIG)
    params = jax.tree.map(lambda x: 8 * x, jax.jit(network.init)(jax.random.key(0)))
    return network, params, jax.jit(network.apply)(params, TOKENS)


def test_a_perfect_autoencoder_changes_nothing_and_shows_its_features(model):
    network, params, logits = model
    sae, config = both_signs(6)
    spliced = splice_sae(network, SITE, sae, config)
    out, values = jax.jit(capture(spliced, ("sae_features", "resid_pre[2]")).apply)(params, TOKENS)
    np.testing.assert_allclose(out, logits, rtol=1e-4, atol=1e-4)
    x = np.asarray(values["resid_pre[2]"])
    parts = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)], -1)
    np.testing.assert_allclose(values["sae_features"], parts, rtol=1e-5, atol=1e-6)
    heads, config = both_signs(8)  # attention_z is [B, T, 2, 4]
    out = jax.jit(splice_sae(network, "attention_z[0]", heads, config).apply)(params, TOKENS)
    np.testing.assert_allclose(out, logits, rtol=1e-4, atol=1e-4)


def test_keep_first_leaves_the_first_positions(model):
    network, params, logits = model
    config = SAEConfig(6, 4, "topk", k=1)
    sae = sae_init(jax.random.key(1), config)
    spliced = jax.jit(splice_sae(network, SITE, sae, config, keep_first=2).apply)(params, TOKENS)
    np.testing.assert_allclose(spliced[:, :2], logits[:, :2], rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(spliced[:, 2:] - logits[:, 2:]).max()) > 1e-2


def test_with_its_error_term_the_output_is_the_models_and_gradients_pass_through_features(model):
    network, params, logits = model
    config = SAEConfig(6, 10, "relu")
    sae = sae_init(jax.random.key(1), config)
    spliced = splice_sae(network, SITE, sae, config, error_term=True)

    def metric(params, tokens):
        return spliced.apply(params, tokens)[0, -1, 3]

    value, _, gradients = jax.jit(site_gradients(metric, ("sae_features", SITE)))(params, TOKENS)
    np.testing.assert_allclose(value, logits[0, -1, 3], rtol=1e-4, atol=1e-4)
    # Before and after the change are one name: the gradient is of what flows on, and features reach it by W_dec.
    np.testing.assert_allclose(gradients["sae_features"], gradients[SITE] @ sae["W_dec"].T, rtol=1e-4, atol=1e-5)
    off = jax.jit(patch(spliced, {"sae_features": lambda f: f.at[0, -1, 2].add(1e-2)}).apply)(params, TOKENS)
    slope = (off[0, -1, 3] - value) / 1e-2
    np.testing.assert_allclose(slope, gradients["sae_features"][0, -1, 2], rtol=0.1, atol=1e-3)


def test_a_transcoder_reads_one_site_and_writes_another(model):
    network, params, logits = model
    config = SAEConfig(6, 12, "relu", d_out=6)
    sae, _ = both_signs(6)
    spliced = splice_transcoder(network, "mlp_input[1]", "mlp_out[1]", sae, config)
    out, values = jax.jit(capture(spliced, ("mlp_input[1]", "mlp_out[1]", "resid_mid[1]", "resid_post[1]")).apply)(
        params, TOKENS
    )
    np.testing.assert_allclose(values["mlp_out[1]"], values["mlp_input[1]"], rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(out - logits).max()) > 1e-2
    cache = network.init_cache(2, 5)
    np.testing.assert_allclose(jax.jit(spliced.decode)(params, TOKENS, cache)[0], out, rtol=1e-3, atol=1e-3)


def test_loss_recovered_against_numpy(model):
    network, params, logits = model
    config = SAEConfig(6, 10, "relu")
    sae = sae_init(jax.random.key(1), config)
    mask = jnp.array([[True] * 5, [True, True, True, False, False]])
    found = jax.jit(lambda: loss_recovered(network, params, TOKENS, SITE, sae, config, mask=mask))()
    changed = jax.jit(splice_sae(network, SITE, sae, config).apply)(params, TOKENS)
    removed = jax.jit(patch(network, {SITE: jnp.zeros_like}).apply)(params, TOKENS)

    def log_softmax(x):
        x = np.asarray(x, np.float64)[:, :-1]
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    wanted = np.asarray(mask)[:, 1:]
    own = log_softmax(logits)
    for name, other in (("clean", logits), ("spliced", changed), ("ablated", removed)):
        picked = np.take_along_axis(log_softmax(other), np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
        np.testing.assert_allclose(getattr(found, name), -(picked * wanted).sum(1) / wanted.sum(1), rtol=1e-4)
    kl = ((np.exp(own) * (own - log_softmax(changed))).sum(-1) * wanted).sum(1) / wanted.sum(1)
    np.testing.assert_allclose(found.kl_spliced, kl, rtol=1e-3, atol=1e-5)


def test_recovered_is_one_for_the_model_itself_and_zero_for_zeros(model):
    network, params, _ = model
    sae, config = both_signs(6)
    perfect = jax.jit(lambda: loss_recovered(network, params, TOKENS, SITE, sae, config))()
    np.testing.assert_allclose(perfect.recovered, 1.0, atol=1e-4)
    nothing = {name: jnp.zeros_like(x) for name, x in sae.items()}
    zeros = jax.jit(lambda: loss_recovered(network, params, TOKENS, SITE, nothing, config))()
    np.testing.assert_allclose(zeros.recovered, 0.0, atol=1e-6)
    np.testing.assert_allclose(zeros.kl_spliced, zeros.kl_ablated, rtol=1e-5)
    by_hand = LossRecovered(jnp.array([1.0, 3.0]), jnp.array([2.0, 4.0]), jnp.array([6.0, 8.0]), *jnp.zeros((2, 2)))
    assert float(by_hand.recovered) == pytest.approx(4 / 5)
    low, high = by_hand.interval(jax.random.key(0))
    np.testing.assert_allclose([low, high], 0.8, rtol=1e-5)  # both texts lose alike


def test_bad_sizes_are_named(model):
    network, params, _ = model
    sae, config = both_signs(5)
    with pytest.raises(ValueError, match=r"value \(2, 5, 6\) does not end in axes of d_in = 5 numbers"):
        splice_sae(network, SITE, sae, config).apply(params, TOKENS)
    with pytest.raises(ValueError, match=r"at least 2 positions, got shape \(2, 1\)"):
        loss_recovered(network, params, TOKENS[:, :1], SITE, sae, config)
    with pytest.raises(ValueError, match=r"mask is \(2, 4\), tokens are \(2, 5\)"):
        loss_recovered(network, params, TOKENS, SITE, sae, config, mask=jnp.ones((2, 4)))
