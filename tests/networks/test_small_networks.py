"""Dense, the orthogonal initialiser, MLP and ConvNet."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Network
from jaxalign.networks import MLP, ConvNet, Dense, matmul, merge_lora, orthogonal


@pytest.mark.parametrize("shape", [(16, 16), (40, 8), (8, 40), (3, 3, 4, 12)])
def test_orthogonal_columns(shape):
    w = np.asarray(orthogonal(2.0)(jax.random.key(0), shape)).reshape(-1, shape[-1])
    small = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
    np.testing.assert_allclose(small, 4.0 * np.eye(len(small)), atol=1e-5)


def test_orthogonal_is_haar_and_differs_by_key():
    """Entries of a Haar matrix of size n have mean 0 and variance 1/n; rotations of it look the same."""
    ws = np.asarray(jax.vmap(lambda key: orthogonal()(key, (4, 4)))(jax.random.split(jax.random.key(0), 2000)))
    assert abs(ws.mean()) < 4 * 0.5 / np.sqrt(ws.size)
    np.testing.assert_allclose((ws**2).mean(axis=0), 0.25, atol=0.02)
    np.testing.assert_allclose((ws**4).mean(), 3 / (4 * 6), rtol=0.05)  # E w^4 = 3 / (n (n + 2))
    assert 0.4 < (np.linalg.det(ws) > 0).mean() < 0.6


def test_orthogonal_calls_no_lapack():
    text = jax.jit(lambda key: orthogonal()(key, (8, 8))).lower(jax.random.key(0)).as_text()
    assert "custom_call" not in text.replace("custom_call @Sharding", "")


def test_orthogonal_refuses_vectors():
    with pytest.raises(ValueError, match=r"two axes.*\(3,\)"):
        orthogonal()(jax.random.key(0), (3,))


def test_matmul_16_bit_value_and_gradient():
    x = jax.random.normal(jax.random.key(0), (6, 5))
    w = jax.random.normal(jax.random.key(1), (5, 4))
    low = matmul(x, w, "bfloat16")
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, x @ w, atol=0.05)
    exact = x.astype(jnp.bfloat16).astype(jnp.float32) @ w.astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(low, exact, rtol=1e-6)
    dx, dw = jax.grad(lambda x, w: matmul(x, w, "bfloat16").sum(), argnums=(0, 1))(x, w)
    np.testing.assert_allclose(dx, jnp.broadcast_to(w.sum(axis=1)[None], x.shape), atol=0.05)
    np.testing.assert_allclose(dw, jnp.broadcast_to(x.sum(axis=0)[:, None], w.shape), atol=0.05)
    together = jax.vmap(lambda x: matmul(x, w, "bfloat16"))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(together[1], 2 * low, rtol=1e-5)


def test_dense_by_hand_with_adapters():
    layer = Dense(2, lora_rank=1, lora_alpha=3.0)
    params = {
        "kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "bias": jnp.array([0.5, -0.5]),
        "lora_a": jnp.array([[1.0], [1.0]]), "lora_b": jnp.array([[1.0, 2.0]]),
    }  # fmt: skip
    x = jnp.array([[[1.0, 2.0]]])
    # x @ I + bias + 3 * (1 + 2) * [1, 2]
    np.testing.assert_allclose(layer.apply({"params": params}, x), [[[10.5, 19.5]]])
    merged = merge_lora(params, scale=3.0)
    assert set(merged) == {"kernel", "bias"}
    np.testing.assert_allclose(Dense(2).apply({"params": merged}, x), [[[10.5, 19.5]]])


def test_mlp_and_convnet_shapes_and_vmapped_seeds():
    mlp = Network.from_linen(MLP((7, 3)), jnp.zeros((1, 5)))
    conv = Network.from_linen(ConvNet(4, channels=(2, 3), hidden_sizes=(6,)), jnp.zeros((1, 9, 9, 1)))
    keys = jax.random.split(jax.random.key(0), 3)
    for network, x, out in ((mlp, jnp.ones((2, 5)), (3, 2, 3)), (conv, jnp.ones((2, 9, 9, 1)), (3, 2, 4))):
        params = jax.jit(jax.vmap(network.init))(keys)
        assert jax.vmap(network.apply, in_axes=(0, None))(params, x).shape == out
    params = conv.init(keys[0])
    chex.assert_trees_all_close(conv.apply(params, jnp.ones((2, 9, 9))), conv.apply(params, jnp.ones((2, 9, 9, 1))))
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        conv.apply(params, jnp.ones((2, 3)))


def test_mlp_is_its_equation():
    network = Network.from_linen(MLP((4, 2)), jnp.zeros((1, 3)))
    params = network.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 3))
    first, second = params["Dense_0"], params["Dense_1"]
    hidden = np.maximum(np.asarray(x) @ first["kernel"] + first["bias"][None], 0)
    np.testing.assert_allclose(network.apply(params, x), hidden @ second["kernel"] + second["bias"][None], rtol=1e-5)
    np.testing.assert_allclose(first["kernel"] @ first["kernel"].T, 2.0 * np.eye(3), atol=1e-5)
