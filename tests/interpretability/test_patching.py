"""Patching: whole sites give the other run, pieces what patching by hand gives, slopes suffice if linear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Network
from jaxalign.interpretability.activations import capture, patch
from jaxalign.interpretability.mlp_graph import mlp_graph
from jaxalign.interpretability.patching import activation_patching, attribution_patching, last_position, path_patching
from jaxalign.networks.mlp import MLP
from jaxalign.networks.transformer import TransformerConfig, transformer

CONFIG = TransformerConfig(7, 8, 8, 2, 2, 1, 4, remat="none")


def first(output, target):
    return output[:, 0] * target


@pytest.fixture(scope="module")
def small():
    """A random transformer and two runs: (network, first, params, inputs, source, target)."""
    model, rng = transformer(CONFIG), np.random.default_rng(0)
    shapes, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    params = tree.unflatten([jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32) for leaf in shapes])
    inputs, source = (jnp.asarray(rng.integers(0, 7, (3, 4)), jnp.int32) for _ in range(2))
    return last_position(model), first, params, inputs, source, jnp.array([1.0, 2.0, -1.0])


@pytest.fixture(scope="module")
def effects(small):
    """Patches of all kinds, some of them by hand, in one program."""
    network = small[0]

    @jax.jit
    def everything(params, inputs, source, target):
        problem = network, first, params, inputs, source, target
        before, after = (first(network.apply(params, tokens), target) for tokens in (inputs, source))
        names = ["resid_post", "attention_z"]
        here, there = (capture(network, names).apply(params, tokens)[1] for tokens in (inputs, source))
        nearer = jax.tree.map(lambda x, y: x + 1e-2 * (y - x), here, there)
        by_hand = {
            "position 2 of layer 0": {"resid_post[0]": lambda x: x.at[:, 2].set(there["resid_post"][0, :, 2])},
            "a little of head 0.1": {"attention_z[0]": lambda x: x.at[:, :, 1].set(nearer["attention_z"][0, :, :, 1])},
        }
        patched = {name: patch(network, edit).apply(params, inputs) for name, edit in by_hand.items()}
        return {
            "change": after - before,
            "positions": activation_patching(*problem, "resid_post"),
            "heads": activation_patching(*problem, "attention_z", axes=(1, 2)),
            "last heads": activation_patching(*problem, "attention_z[1]", axes=(2,)),
            "estimates": attribution_patching(*problem, "attention_z", axes=(2,)),
            **{name: first(output, target) - before for name, output in patched.items()},
        }

    return everything(*small[2:])


def test_each_piece_is_what_patching_it_by_hand_gives(effects):
    effect = effects["positions"]
    assert effect.shape == (3, 2, 4)
    np.testing.assert_allclose(effect[:, 1, -1], effects["change"], rtol=1e-3, atol=1e-5)  # all that is read at the end
    np.testing.assert_allclose(effect[:, 1, :-1], 0, atol=1e-5)
    np.testing.assert_allclose(effect[:, 0, 2], effects["position 2 of layer 0"], rtol=1e-3, atol=1e-5)
    assert np.abs(effect[:, 0, 2]).min() > 1e-3


def test_heads_layers_and_single_sites_can_be_taken_apart(effects):
    heads, one = effects["heads"], effects["last heads"]
    assert heads.shape == (3, 2, 4, 2)
    np.testing.assert_allclose(heads[:, 1, -1], one, rtol=1e-3, atol=1e-5)  # the last layer counts at the end alone
    np.testing.assert_allclose(heads[:, 1, :-1], 0, atol=1e-5)


def test_estimates_are_the_slope_of_a_small_step(effects):
    assert effects["estimates"].shape == (3, 2, 2)
    np.testing.assert_allclose(
        effects["estimates"][:, 0, 1], effects["a little of head 0.1"] * 100, rtol=0.1, atol=2e-3
    )


def linear(activation=lambda x: x):
    """A network of two layers: (network, first, params, inputs, source, target)."""
    network, rng = Network.from_linen(MLP((4, 2), activation=activation), jnp.zeros((1, 3))), np.random.default_rng(0)
    params = {
        f"Dense_{i}": {"kernel": jnp.asarray(rng.normal(size=(n, m)), jnp.float32), "bias": jnp.zeros(m)}
        for i, (n, m) in enumerate(((3, 4), (4, 2)))
    }
    inputs, source = (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32) for _ in range(2))
    return network, first, params, inputs, source, jnp.arange(1.0, 6.0)


def test_slopes_suffice_for_a_linear_network():
    network, _, params, inputs, source, target = problem = linear()
    methods = activation_patching, attribution_patching
    given = lambda *given: [method(network, first, *given, "post_0") for method in methods]  # noqa: E731
    w, v = (np.asarray(params[f"Dense_{i}"]["kernel"]) for i in (0, 1))
    expected = (source - inputs) @ w * np.outer(target, v[:, 0])
    for found in jax.jit(given)(*problem[2:]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    whole = activation_patching(*problem, "post_0", axes=())
    np.testing.assert_allclose(whole, expected.sum(axis=1), rtol=1e-4, atol=1e-5)


def test_paths_into_the_output_carry_weight_times_gap():
    _, _, params, inputs, source, target = problem = linear(jnp.tanh)
    graph = mlp_graph(3, (4, 2), activation=jnp.tanh)
    readers = ["output 0"], ["neuron 0.1", "neuron 0.2"]
    direct, into = jax.jit(lambda *given: [path_patching(graph, first, *given, names) for names in readers])(
        *problem[2:]
    )
    w, v = (np.asarray(params[f"Dense_{i}"]["kernel"]) for i in (0, 1))
    expected = (np.tanh(source @ w) - np.tanh(inputs @ w)) * np.outer(target, v[:, 0])
    np.testing.assert_allclose(direct[:, 3:], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(direct[:, :3], 0)  # inputs have no direct path
    moved = np.concatenate([source[:, :1], inputs[:, 1:]], axis=1)
    change = (np.tanh(moved @ w) - np.tanh(inputs @ w))[:, 1:3] @ v[1:3, 0]
    np.testing.assert_allclose(into[:, 0], change * target, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    problem = linear()
    for method in (activation_patching, attribution_patching):
        with pytest.raises(ValueError, match=r"no site 'post'.*post_0"):
            method(*problem, "post")
        with pytest.raises(ValueError, match="begin with the batch"):
            method(*problem, "post_0", axes=(0,))
        with pytest.raises(ValueError, match="must agree"):
            method(*problem[:4], problem[4][:2], problem[5], "post_0")
    with pytest.raises(ValueError, match="no reader 'output 9'"):
        path_patching(mlp_graph(3, (4, 2)), *problem[1:], ["output 9"])
