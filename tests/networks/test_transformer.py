"""The transformer against a float64 NumPy forward pass; causality; the cache; adapters; precision."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.networks import RopeScaling, TransformerConfig, apply_rope, merge_lora, rope_frequencies, transformer

SIZES = {"vocab_size": 17, "hidden_size": 12, "intermediate_size": 20, "num_layers": 2, "num_heads": 4, "head_dim": 6}


def config(**options) -> TransformerConfig:
    return TransformerConfig(**SIZES, **{"num_kv_heads": 2, **options})


@pytest.fixture(scope="module")
def model():
    network = transformer(config())
    return network, network.init(jax.random.key(0))


TOKENS = np.random.default_rng(0).integers(0, 17, (2, 7))


def numpy_forward(params, tokens, c: TransformerConfig):
    """The definition, in float64, with loops."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.rms_norm_epsilon) * scale

    def rope(x):  # [B, T, H, E]
        half = c.head_dim // 2
        out = np.empty_like(x)
        for t in range(x.shape[1]):
            for i in range(half):
                angle = t * c.rope_theta ** (-2 * i / c.head_dim)
                a, b = x[:, t, :, i], x[:, t, :, i + half]
                out[:, t, :, i] = a * np.cos(angle) - b * np.sin(angle)
                out[:, t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = p["embedding"][tokens]
    batch, length = tokens.shape
    for layer in range(c.num_layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["layers"])
        y = norm(x, w["attention_norm"]["scale"])

        def heads(name, y=y, w=w):
            z = y @ w["attention"][name]["kernel"] + w["attention"][name].get("bias", 0.0)
            return z.reshape(batch, length, -1, c.head_dim)

        q, k, v = rope(heads("q")), rope(heads("k")), heads("v")
        out = np.zeros((batch, length, c.num_heads, c.head_dim))
        for h in range(c.num_heads):
            group = h // (c.num_heads // c.num_kv_heads)
            for t in range(length):
                scores = np.einsum("be,bse->bs", q[:, t, h], k[:, : t + 1, group]) / np.sqrt(c.head_dim)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                out[:, t, h] = np.einsum("bs,bse->be", weights, v[:, : t + 1, group])
        x = x + out.reshape(batch, length, -1) @ w["attention"]["o"]["kernel"]
        y = norm(x, w["mlp_norm"]["scale"])
        gate, up = y @ w["mlp"]["gate"]["kernel"], y @ w["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w["mlp"]["down"]["kernel"]
    return norm(x, p["final_norm"]["scale"]) @ p.get("unembedding", p["embedding"]).T


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "tie_embeddings": False, "rope_theta": 500.0}])
def test_agrees_with_numpy(options):
    c = config(**options)
    network = transformer(c)
    params = network.init(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    np.testing.assert_allclose(network.apply(params, TOKENS), numpy_forward(params, TOKENS, c), atol=2e-5)


def test_a_layer_of_zeros_is_the_identity(model):
    network, params = model
    zeroed = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}
    x = params["embedding"][TOKENS]
    expected = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(network.hidden(zeroed, TOKENS), expected, rtol=1e-5)


def test_no_position_sees_the_future(model):
    network, params = model

    def from_embeddings(embedded):
        # Tokens 0 .. 6 index a table of the given rows, so a gradient reaches each position's input alone.
        table = params["embedding"].at[:7].set(embedded)
        return network.hidden({**params, "embedding": table}, jnp.arange(7)[None, :])[0].sum(axis=-1)

    jacobian = jax.jacobian(from_embeddings)(params["embedding"][:7])
    influence = np.abs(jacobian).sum(axis=-1)
    assert (influence[np.triu_indices(7, 1)] == 0).all()
    assert (influence[np.tril_indices(7)] > 0).all()


def test_right_padding_does_not_change_what_stands_before_it(model):
    network, params = model
    padded = np.pad(TOKENS, ((0, 0), (0, 4)))
    np.testing.assert_allclose(network.apply(params, padded)[:, :7], network.apply(params, TOKENS), atol=1e-6)


def test_decoding_with_the_cache_equals_the_full_pass(model):
    network, params = model
    full = network.apply(params, TOKENS)
    cache = network.init_cache(2, 9)
    first, cache = jax.jit(network.decode)(params, TOKENS[:, :4], cache)
    rest = []
    for t in range(4, 7):
        logits, cache = jax.jit(network.decode)(params, TOKENS[:, t : t + 1], cache)
        rest.append(logits)
    np.testing.assert_allclose(jnp.concatenate([first, *rest], axis=1), full, atol=1e-5)
    np.testing.assert_array_equal(cache.length, [7, 7])


def test_rows_of_unequal_length_share_a_cache(model):
    """A prompt right-padded to the batch's length is continued where its own tokens end."""
    network, params = model
    _, cache = network.decode(params, TOKENS[:, :4], network.init_cache(2, 8))
    cache = cache._replace(length=jnp.array([4, 2]))
    logits, _ = network.decode(params, TOKENS[:, 4:5], cache)
    shorter = np.concatenate([TOKENS[1:, :2], TOKENS[1:, 4:5]], axis=1)
    np.testing.assert_allclose(logits[1, 0], network.apply(params, shorter)[0, -1], atol=1e-5)
    np.testing.assert_allclose(logits[0, 0], network.apply(params, TOKENS)[0, 4], atol=1e-5)


def test_sequences_packed_into_a_row_do_not_see_each_other(model):
    network, params = model
    first, second = jnp.array([[1, 2, 3]]), jnp.array([[4, 5, 6, 7]])
    row, segments = jnp.concatenate([first, second], axis=1), jnp.array([[5, 5, 5, 2, 2, 2, 2]])
    packed = jax.jit(network.apply)(params, row, segments)
    alone = jnp.concatenate([network.apply(params, first), network.apply(params, second)], axis=1)
    np.testing.assert_allclose(packed, alone, atol=1e-5)
    assert jnp.abs(network.apply(params, row) - alone).max() > 1e-3  # without segments they do


def test_rope_by_hand_and_relative():
    frequencies = rope_frequencies(4, 100.0)
    np.testing.assert_allclose(frequencies, [1.0, 0.1], rtol=1e-6)
    x = jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    turned = apply_rope(x, jnp.array([[2]]), frequencies)
    np.testing.assert_allclose(turned[0, 0, 0], [np.cos(2.0), 0.0, np.sin(2.0), 0.0], atol=1e-6)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 4))
    products = [
        (apply_rope(q, jnp.array([[t]]), frequencies) * apply_rope(k, jnp.array([[t + 3]]), frequencies)).sum()
        for t in (0, 5, 11)
    ]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


def test_llama3_scaling_keeps_fast_frequencies_and_stretches_slow_ones():
    plain = rope_frequencies(64, 500_000.0)
    scaled = rope_frequencies(64, 500_000.0, RopeScaling(8.0, 1.0, 4.0, 8192))
    wavelength = 2 * np.pi / np.asarray(plain)
    np.testing.assert_allclose(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-5)
    assert (np.diff(np.asarray(scaled)) < 0).all()


def test_fresh_adapters_change_nothing_and_merged_ones_agree():
    adapted = transformer(config(lora_rank=3, lora_alpha=6.0))
    params = adapted.init(jax.random.key(0))
    base = merge_lora(params, scale=2.0)
    plain = transformer(config())
    np.testing.assert_allclose(adapted.apply(params, TOKENS), plain.apply(base, TOKENS), atol=1e-6)
    noisy = jax.tree.map_with_path(
        lambda path, x: x + 0.1 if path[-1].key == "lora_b" else x, params
    )
    merged = plain.apply(merge_lora(noisy, scale=2.0), TOKENS)
    assert np.abs(merged - plain.apply(base, TOKENS)).max() > 1e-2
    np.testing.assert_allclose(adapted.apply(noisy, TOKENS), merged, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_rematerialisation_does_not_change_gradients(model, remat):
    _, params = model
    network = transformer(config(remat=remat))
    gradient = jax.grad(lambda p: (network.apply(p, TOKENS) ** 2).mean())
    expected = jax.grad(lambda p: (transformer(config()).apply(p, TOKENS) ** 2).mean())(params)
    chex.assert_trees_all_close(gradient(params), expected, rtol=1e-4, atol=1e-7)


def test_bfloat16_products_stay_near_float32_in_value_and_gradient(model):
    network, params = model
    low = transformer(config(dtype="bfloat16"))
    value, expected = low.apply(params, TOKENS), network.apply(params, TOKENS)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, atol=0.02 * float(jnp.abs(expected).max()))

    def loss(net):
        return lambda p: (net.hidden(p, TOKENS)[..., 0]).sum()

    one, other = jax.grad(loss(low))(params), jax.grad(loss(network))(params)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == jnp.float32
        assert float(jnp.abs(x - y).max()) <= 0.05 * float(jnp.abs(y).max()) + 1e-3


def test_double_precision_agrees_to_rounding():
    with jax.enable_x64(True):
        c = config(dtype="float64")
        network = transformer(c)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
        # RoPE's angles are computed in float32 on purpose: positions and frequencies are small there.
        np.testing.assert_allclose(network.apply(params, TOKENS), numpy_forward(params, TOKENS, c), atol=1e-6)


def test_vmap_over_initialisations():
    network = transformer(config())
    keys = jax.random.split(jax.random.key(0), 2)
    stacked = jax.vmap(network.init)(keys)
    out = jax.vmap(network.apply, in_axes=(0, None))(stacked, TOKENS)
    np.testing.assert_allclose(out[1], network.apply(network.init(keys[1]), TOKENS), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_kv_heads": 3}, "multiple"), ({"remat": "some"}, "remat"), ({"head_dim": 5}, "odd")],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SIZES, "num_kv_heads": 2, **options})
