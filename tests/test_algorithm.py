"""Network, gradient_algorithm and train: hand numbers, identities, errors."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network, TrainState, gradient_algorithm, train
from jaxalign.algorithm import merge, partition
from jaxalign.sweeps import replicate


def scalar_network(value: float = 2.0) -> Network:
    return Network(init=lambda key: {"w": jnp.float32(value)}, apply=lambda params, x: params["w"] * x)


def squared(network: Network):
    def objective(params, batch, key):
        error = network.apply(params, batch["x"]) - batch["y"]
        weight = batch["mask"]
        loss = (weight * error**2).sum() / weight.sum()
        return loss, {"error": (weight * error).sum() / weight.sum()}

    return objective


def batch(x, y, mask=None):
    x = jnp.asarray(x, jnp.float32)
    return {"x": x, "y": jnp.asarray(y, jnp.float32), "mask": jnp.ones_like(x) if mask is None else jnp.asarray(mask)}


def test_one_step_by_hand():
    network = scalar_network()
    algorithm = gradient_algorithm(network, squared(network), optax.sgd(0.1))
    # w = 2, x = 3, y = 5: error 1, gradient 2 * 1 * 3 = 6, new w = 2 - 0.6.
    state, metrics = algorithm.step(algorithm.init(jax.random.key(0)), batch([3.0], [5.0]))
    np.testing.assert_allclose(state.params["w"], 1.4, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], 6.0, rtol=1e-6)
    np.testing.assert_allclose([metrics["loss"], metrics["error"]], [1.0, 1.0], rtol=1e-6)
    assert int(state.step) == 1


def test_train_is_a_loop_of_steps():
    network = scalar_network()
    algorithm = gradient_algorithm(network, squared(network), optax.adam(0.1))
    x = jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)
    batches = {"x": x, "y": 3 * x + 1, "mask": jnp.ones_like(x)}
    state, metrics = train(algorithm, jax.random.key(0), batches)
    expected = algorithm.init(jax.random.key(0))
    for t in range(5):
        expected, _ = algorithm.step(expected, jax.tree.map(lambda leaf, t=t: leaf[t], batches))
    chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)
    assert metrics["loss"].shape == (5,)
    assert int(state.step) == 5


def test_training_finds_the_least_squares_solution():
    x = jax.random.normal(jax.random.key(0), (64, 3))
    y = x @ jnp.array([1.0, -2.0, 0.5]) + 0.1 * jax.random.normal(jax.random.key(1), (64,))
    network = Network(init=lambda key: jnp.zeros(3), apply=lambda params, x: x @ params)

    def objective(params, batch, key):
        return jnp.mean((network.apply(params, batch[0]) - batch[1]) ** 2), {}

    batches = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (300, *a.shape)), (x, y))
    algorithm = gradient_algorithm(network, objective, optax.sgd(0.1))
    state, _ = jax.jit(lambda key: train(algorithm, key, batches))(jax.random.key(2))
    expected = np.linalg.lstsq(np.asarray(x, np.float64), np.asarray(y, np.float64))[0]
    np.testing.assert_allclose(state.params, expected, atol=1e-5)


def test_train_without_batches_needs_a_length():
    network = scalar_network()
    algorithm = gradient_algorithm(network, lambda params, batch, key: (params["w"] ** 2, {}), optax.sgd(0.1))
    with pytest.raises(ValueError, match="length"):
        train(algorithm, jax.random.key(0), None)
    _, metrics = train(algorithm, jax.random.key(0), None, length=3)
    np.testing.assert_allclose(metrics["loss"], [4.0, 2.56, 1.6384], rtol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_equals_full_batch_with_uneven_masks(parts):
    network = scalar_network()
    mask = jnp.array([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    data = batch(jax.random.normal(jax.random.key(1), (8,)), jax.random.normal(jax.random.key(2), (8,)), mask)

    def after_one(**options):
        algorithm = gradient_algorithm(network, squared(network), optax.sgd(1.0), **options)
        return algorithm.step(algorithm.init(jax.random.key(0)), data)

    # A part with no valid row must weigh nothing: its 0/0 is guarded as any objective must.
    safe = dict(data, mask=mask.at[6].set(1e-9))
    full, full_metrics = after_one()
    algorithm = gradient_algorithm(
        network, squared(network), optax.sgd(1.0), microbatches=parts, weight=lambda part: part["mask"].sum()
    )
    split, split_metrics = algorithm.step(algorithm.init(jax.random.key(0)), safe)
    chex.assert_trees_all_close(split.params, full.params, rtol=1e-5)
    chex.assert_trees_all_close(split_metrics, full_metrics, rtol=1e-5)


def test_microbatches_must_divide_the_batch():
    network = scalar_network()
    algorithm = gradient_algorithm(network, squared(network), optax.sgd(1.0), microbatches=3)
    with pytest.raises(ValueError, match=r"\[4\].*3 microbatches"):
        algorithm.step(algorithm.init(jax.random.key(0)), batch(jnp.ones(4), jnp.ones(4)))


def test_frozen_leaves_stay_and_get_no_optimiser_state():
    network = Network.from_linen(nn.Dense(2), jnp.zeros((1, 3)))

    def objective(params, batch, key):
        return jnp.mean((network.apply(params, batch) - 1.0) ** 2), {}

    algorithm = gradient_algorithm(network, objective, optax.adam(0.1), trainable=lambda name: name == "bias")
    state = algorithm.init(jax.random.key(0))
    assert state.params["kernel"] is None
    assert state.frozen["bias"] is None
    new, _ = algorithm.step(state, jnp.ones((4, 3)))
    np.testing.assert_array_equal(new.all_params["kernel"], state.all_params["kernel"])
    assert not np.array_equal(new.params["bias"], state.params["bias"])
    assert sum(leaf.size for leaf in jax.tree.leaves(new.opt_state)) == 2 * 2 + 1  # Adam's two moments and its count
    with pytest.raises(ValueError, match="no parameter"):
        gradient_algorithm(network, objective, optax.adam(0.1), trainable=lambda name: False).init(jax.random.key(0))


def test_partition_and_merge_are_inverse():
    tree = {"a": jnp.ones(2), "b": {"c": jnp.zeros(3), "d": jnp.ones(())}}
    trained, frozen = partition(tree, lambda name: name == "b/c")
    assert trained["a"] is None
    assert frozen["b"]["c"] is None
    chex.assert_trees_all_equal(merge(trained, frozen), tree)
    assert merge(tree, None) is tree


def test_networks_from_linen_refuse_running_statistics():
    network = Network.from_linen(nn.BatchNorm(use_running_average=True), jnp.zeros((1, 3)))
    with pytest.raises(ValueError, match="batch_stats"):
        network.init(jax.random.key(0))


def test_networks_from_nnx_are_pure_and_vmap():
    nnx = pytest.importorskip("flax.nnx")

    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second = nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 1, rngs=rngs)

        def __call__(self, x):
            return self.second(jnp.tanh(self.first(x)))

    network = Network.from_nnx(lambda rngs: Two(rngs))
    params = network.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 2))
    hidden = np.tanh(np.asarray(x) @ params["first"]["kernel"] + params["first"]["bias"][None])
    expected = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    np.testing.assert_allclose(jax.jit(network.apply)(params, x), expected, rtol=1e-5)
    stacked = jax.vmap(network.init)(jax.random.split(jax.random.key(0), 3))
    assert stacked["first"]["kernel"].shape == (3, 2, 3)
    gradient = jax.grad(lambda p: network.apply(p, x).sum())(params)
    np.testing.assert_allclose(gradient["second"]["bias"], [4.0])


def test_networks_from_nnx_refuse_other_state():
    nnx = pytest.importorskip("flax.nnx")
    with pytest.raises(ValueError, match="mean"):
        Network.from_nnx(lambda rngs: nnx.BatchNorm(2, rngs=rngs))


def test_starting_from_takes_what_is_given_and_draws_the_rest():
    network = Network.from_linen(nn.Dense(2), jnp.zeros((1, 3)))
    kernel = jnp.arange(6.0).reshape(3, 2)
    params = network.starting_from({"kernel": kernel}).init(jax.random.key(0))
    np.testing.assert_array_equal(params["kernel"], kernel)
    np.testing.assert_array_equal(params["bias"], network.init(jax.random.key(0))["bias"])
    with pytest.raises(ValueError, match="no parameter 'scale'"):
        network.starting_from({"scale": kernel}).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"kernel is \(3, 3\)"):
        network.starting_from({"kernel": jnp.ones((3, 3))}).init(jax.random.key(0))


@pytest.mark.parametrize("mode", ["vmap", "map"])
def test_replicated_lanes_are_independent_and_share_what_is_frozen(mode):
    network = Network.from_linen(nn.Dense(1), jnp.zeros((1, 3)))
    base = jnp.ones((3, 1))

    def objective(params, batch, key):
        return jnp.mean(network.apply(params, batch) ** 2), {}

    single = gradient_algorithm(
        network.starting_from({"kernel": base}), objective, optax.sgd(0.1), trainable=lambda name: name == "bias"
    )
    lanes = replicate(single, 3, mode=mode)
    state = lanes.init(jax.random.key(0))
    assert state.frozen["kernel"].shape == (3, 1)
    data = jax.random.normal(jax.random.key(1), (3, 5, 3))
    new, metrics = jax.jit(lanes.step)(state, data)
    assert metrics["loss"].shape == (3,)
    for lane in range(3):
        alone = single.init(jax.random.split(jax.random.key(0), 3)[lane])
        expected, _ = single.step(alone, data[lane])
        np.testing.assert_allclose(new.params["bias"][lane], expected.params["bias"], rtol=1e-6)
    with pytest.raises(ValueError, match="mode"):
        replicate(single, 2, mode="auto")


def test_state_has_the_promised_fields():
    state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(2)}, (), jax.random.key(0))
    assert jax.tree.leaves(state.all_params)[0].shape == (2,)
    assert state.frozen is None
    assert state.reference is None
