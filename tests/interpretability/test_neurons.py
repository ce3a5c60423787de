"""Neurons of hand-built networks, whose parts are known, and of a small trained classifier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithm import Network
from jaxalign.interpretability.neuron_ablation import ablate_neurons, ablation_effect
from jaxalign.interpretability.neurons import (
    describe_neuron,
    gradient_times_activation,
    important_neurons,
    neuron_conductance,
    neuron_sentence,
    trace_connections,
)
from jaxalign.networks import MLP
from jaxalign.networks.sites import site

KEY = jax.random.key(0)
# XOR of bits 0 and 1: neuron 2 counts them, neuron 0 fires when both are on and takes two away. Bit 2 drives neurons 1
# and 3, which nothing reads (3) or which cancels for both classes (1).
W_IN = np.array([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 5.0]], np.float32)
B_IN = np.array([-1.0, 0.0, 0.0, 1.0], np.float32)
W_OUT = np.array([[2.0, -2.0], [1.0, 1.0], [-1.0, 1.0], [0.0, 0.0]], np.float32)
B_OUT = np.array([0.5, -0.5], np.float32)
BITS = np.array([[(i >> b) & 1 for b in range(3)] for i in range(8)] * 4, np.float32)
LABELS = (BITS[:, 0] != BITS[:, 1]).astype(np.int32)


def xor(x):
    """[B, 3] -> logits [B, 2] for "the same" and "different"."""
    h = site(jax.nn.relu(x @ W_IN + B_IN[None]), "hidden")
    return h @ W_OUT + B_OUT[None]


def margin(x):
    logits = xor(x)
    return logits[:, 1] - logits[:, 0]


def ranked(baseline):
    return jax.jit(lambda x: important_neurons(margin, x, ["hidden"], baseline=baseline))(BITS)["hidden"]


def test_the_network_computes_xor():
    np.testing.assert_array_equal(np.argmax(jax.jit(xor)(BITS), axis=1), LABELS)


def test_important_neurons_of_xor_by_hand():
    # margin = -4 h0 + 2 h2 - 1: h0 is 1 in a quarter of the cases and 0 else, h2 is 0, 1, 1, 2.
    from_zero, from_mean = ranked(0.0), ranked(None)
    np.testing.assert_array_equal(from_zero.order[:2], [2, 0])
    np.testing.assert_allclose(from_zero.score, [1, 0, 2, 0], atol=0.01)
    np.testing.assert_allclose(from_zero.effect, [-1, 0, 2, 0], atol=0.01)
    np.testing.assert_array_equal(from_mean.order[:2], [0, 2])
    np.testing.assert_allclose(from_mean.score, [1.5, 0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(from_mean.effect, np.zeros(4), atol=1e-6)


def test_connections_of_xors_neurons_by_hand():
    both = np.ones((1, 3), np.float32)
    run = jax.jit(lambda n: trace_connections(xor, both, "hidden", n, steps=64))
    found = run(0)
    np.testing.assert_allclose(found.activation, [1])
    # relu(a + a - 1) for a in [0, 1]: the bits share equally, and bit 2 has no part.
    np.testing.assert_allclose(found.inputs, [[0.5, 0.5, 0]], atol=0.02)
    np.testing.assert_allclose(found.outputs, [[2, -2]], rtol=1e-6)
    np.testing.assert_allclose(run(1).outputs, [[2, 2]], rtol=1e-6)


def test_a_profile_says_what_a_neuron_responds_to_and_writes():
    described = lambda x, n: describe_neuron(xor, x, LABELS, "hidden", n, num_classes=3)  # noqa: E731
    every = jax.vmap(described, in_axes=(None, 0))
    profiles, silent = jax.jit(lambda x: (every(x, jnp.arange(4)), described(x - 9, 0)))(BITS)
    np.testing.assert_allclose(profiles.firing_rate, [0.25, 0.5, 0.75, 1])
    both = jax.tree.map(lambda leaf: leaf[0], profiles)
    assert (BITS[np.asarray(both.top_examples)][:, :2] == 1).all()
    np.testing.assert_allclose(both.class_means, [0.5, 0, np.nan])
    np.testing.assert_allclose(both.selectivity, 1)
    np.testing.assert_allclose(both.outputs, [2, -2], rtol=1e-6)
    np.testing.assert_allclose(profiles.class_means[2], [1, 1, np.nan])
    np.testing.assert_allclose(profiles.selectivity[2], 0, atol=1e-6)
    sentence = neuron_sentence(both, name="hidden 0", classes=("same", "different", "other"))
    assert sentence == (
        "hidden 0 fires for 25% of examples, most for same (mean 0.5, selectivity 1.00); "
        "it speaks for same (+2) and against different (-2)."
    )
    assert neuron_sentence(silent) == "the neuron fires for none of 32 examples."


def test_ablation_by_hand_and_the_important_neurons_are_the_needed_ones():
    # Without neuron 0, the pair (1, 1) counts 2 and is called different.
    first, means = np.arange(4) == 0, np.array([0.25, 1, 1, 3.5], np.float32)
    without_one, without_all = jax.jit(
        lambda x: (ablate_neurons(xor, "hidden", first)(x), ablate_neurons(xor, "hidden", first | True, means)(x))
    )(BITS)
    np.testing.assert_array_equal(np.argmax(without_one, axis=1), BITS[:, :2].max(axis=1))
    np.testing.assert_allclose(without_all, np.broadcast_to(means @ W_OUT + B_OUT, (32, 2)), atol=1e-6)
    order = ranked(0.0).order
    run = jax.jit(lambda order: ablation_effect(KEY, xor, BITS, LABELS, "hidden", order, (1, 2, 4), replacement=0.0))
    effect = run(order)
    # Without h2 all are called the same; without all neurons too.
    np.testing.assert_allclose(effect.accuracy, [0.5, 0.5, 0.5])
    np.testing.assert_allclose(effect.random_accuracy[2], 0.5)
    assert effect.accuracy_excess[0, 1] > 0
    np.testing.assert_allclose(effect.accuracy_excess[2], np.zeros(3), atol=1e-6)
    np.testing.assert_allclose(effect.accuracy_excess[:, 0], effect.random_accuracy - effect.accuracy, atol=1e-6)
    np.testing.assert_allclose(effect.log_prob_excess[:, 0], effect.random_log_prob - effect.log_prob, atol=1e-5)
    np.testing.assert_allclose(effect.log_prob[2], jax.nn.log_softmax(B_OUT).mean(), rtol=1e-5)
    useless = run(np.array([3, 1, 0, 2], np.int32))
    # No set loses less than nothing, and there is one set of all four.
    np.testing.assert_allclose(useless.p_value[::2], [1, 1])
    assert effect.p_value[0] < 0.8
    np.testing.assert_allclose(useless.accuracy[:2], [1, 1])
    assert useless.accuracy_excess[0, 2] < 0


@pytest.fixture(scope="module")
def deep():
    module = Network.from_linen(MLP((6, 5, 3), jnp.tanh), jnp.zeros((1, 4)))
    rng, shapes = np.random.default_rng(0), jax.eval_shape(module.init, KEY)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 2, shapes)
    return (lambda x: module.apply(params, x)), rng.normal(size=(7, 4)).astype(np.float32)


def test_conductance_of_a_layer_that_all_passes_through_is_complete(deep):
    apply, x = deep
    fn = lambda x: apply(x)[:, 0]  # noqa: E731
    baseline = np.full_like(x, 0.2)
    found = jax.jit(lambda x: neuron_conductance(fn, x, 0.2, ["post_0", "post_1"], chunk=3))(x)
    first_order = jax.jit(lambda x: (fn(x), gradient_times_activation(fn, x, ["post_1"])["post_1"]))
    (value, here), (value_there, there) = first_order(x), first_order(baseline)
    for conductances in found.values():
        np.testing.assert_allclose(conductances.sum(axis=1), value - value_there, atol=1e-5)
    # The last layer is linear: a neuron's conductance is its weight times the change of its activation.
    np.testing.assert_allclose(found["post_1"], here - there, atol=1e-5)


def test_connections_between_layers_are_complete(deep):
    apply, x = deep
    run = jax.jit(lambda x: trace_connections(apply, x, "post_1", 2, upstream=("post_0",)))
    found, at_zero = run(x), run(0 * x).activation
    np.testing.assert_allclose(found.inputs.sum(axis=1), found.activation - at_zero, atol=1e-5)
    np.testing.assert_allclose(found.upstream["post_0"].sum(axis=1), found.activation - at_zero, atol=1e-5)


def test_each_site_has_its_ranking_also_by_conductance(deep):
    apply, x = deep
    fn = lambda x: apply(x)[:, 1]  # noqa: E731
    ranking = jax.jit(lambda x: important_neurons(fn, x, ["post_0", "post_1"], baseline=0.0))(x)
    for found in ranking.values():
        np.testing.assert_array_equal(found.order, np.argsort(-np.asarray(found.score), kind="stable"))
    assert {name: r.order.shape for name, r in ranking.items()} == {"post_0": (6,), "post_1": (5,)}


def test_a_scanned_layers_neurons_and_their_places():
    # Two layers h + relu(h w), each neuron at three places of integer tokens; the second layer feeds the output alone.
    w, table = np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32), np.arange(20.0, dtype=np.float32)
    tokens = np.array([[0, 3, 1], [4, 2, 2]])

    def apply(tokens):
        body = lambda h, w: (h + site(jax.nn.relu(h @ w), "layer"), None)  # noqa: E731
        h = jax.lax.scan(body, jnp.asarray(table.reshape(5, 4))[tokens], w)[0]
        return h.sum(axis=1) @ np.array([[1.0, 0], [2, 0], [3, 0], [4, 1]], np.float32)

    run = jax.jit(lambda x: gradient_times_activation(lambda x: apply(x)[:, 0], x, ["layer[1]"])["layer[1]"])
    h = table.reshape(5, 4)[tokens].astype(np.float64)
    h = h + np.maximum(h @ w[0], 0)
    np.testing.assert_allclose(run(tokens), np.maximum(h @ w[1], 0).sum(axis=1) * [1, 2, 3, 4], rtol=1e-4)


def test_what_does_not_fit_is_named(deep):
    apply, x = deep
    with pytest.raises(ValueError, match=r"no site 'post_7'; .*post_0, post_1"):
        jax.eval_shape(lambda: important_neurons(lambda x: apply(x)[:, 0], x, ["post_7"]))
    with pytest.raises(ValueError, match=r"counts must be in 1..4"):
        ablation_effect(KEY, xor, BITS, LABELS, "hidden", np.arange(4), (0, 5))
    with pytest.raises(ValueError, match=r"ablated is \(3,\)"):
        jax.eval_shape(ablate_neurons(xor, "hidden", np.ones(3, bool)), BITS)
    stacked = lambda x: jnp.sum(jax.lax.scan(lambda c, _: (site(c * 2, "layer"), None), x, None, length=3)[0], axis=1)  # noqa: E731
    with pytest.raises(ValueError, match=r"of scanned layers name one, layer\[0\]"):
        jax.eval_shape(lambda: important_neurons(stacked, x, ["layer"]))
