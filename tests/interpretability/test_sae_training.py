"""Training: a known dictionary found again, sweeps in one program, dead features, a target L0, a divided F."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import sweep, train
from jaxalign.interpretability.sae_control import resample_dead, target_l0
from jaxalign.interpretability.sparse_autoencoder import SAEConfig, sae_decode, sae_encode, sparse_autoencoder

D, TRUE, ROWS, STEPS = 16, 24, 128, 600
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))


@pytest.fixture(scope="module")
def data():
    """(directions [TRUE, D], batches [STEPS, ROWS, D]): each row the sum of about two directions in TRUE."""
    directions_key, key = jax.random.split(jax.random.key(1))
    directions = jax.random.normal(directions_key, (TRUE, D))
    directions = directions / jnp.linalg.norm(directions, axis=1, keepdims=True)
    which, amount = jax.random.split(key)
    shape = (STEPS, ROWS, TRUE)
    on = jax.random.bernoulli(which, 2 / TRUE, shape)
    return directions, (on * jax.random.uniform(amount, shape, minval=0.5, maxval=1.5)) @ directions


def recovery(params, directions):
    rows = params["W_dec"] / jnp.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    return (directions @ rows.T).max(axis=1).mean()


def test_topk_finds_the_dictionary_for_every_k_and_seed_in_one_program(data):
    directions, batches = data
    traces = []

    def run(k, key):
        traces.append(1)
        state, metrics = train(sparse_autoencoder(SAEConfig(D, 32, "topk", k=k), OPTIMIZER), key, batches)
        return recovery(state.params, directions), metrics["l0"][-1], metrics["explained_variance"][-1]

    found, l0, explained = sweep(run, jnp.array([2, 3]), jax.random.split(jax.random.key(0), 2), mode="vmap")
    assert len(traces) == 1
    assert found.shape == (2, 2)
    assert float(found[1].min()) > 0.95
    np.testing.assert_allclose(l0[0], 2.0, atol=0.2)
    assert float(explained[1].min()) > 0.85
    assert (explained[1] > explained[0]).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "fields", "least"),
    [
        ("relu", {"sparsity": 0.2}, 0.95),
        ("batchtopk", {"k": 3}, 0.95),
        ("jumprelu", {"sparsity": 0.05}, 0.9),
        ("gated", {"sparsity": 1.0}, 0.95),
        ("matryoshka", {"k": 2.2, "widths": (24, 32)}, 0.9),
    ],
)
def test_every_activation_finds_it(activation, fields, least, data):
    directions, batches = data
    algorithm = sparse_autoencoder(SAEConfig(D, 32, activation, dead_after=10_000, **fields), OPTIMIZER)
    twice = jnp.concatenate([batches] * 3)
    state, metrics = jax.jit(lambda key: train(algorithm, key, twice))(jax.random.key(0))
    assert float(recovery(state.params, directions)) > least
    assert float(metrics["explained_variance"][-1]) > 0.85


def test_lambda_and_a_target_are_swept_in_one_program(data):
    _, batches = data
    config, traces = SAEConfig(D, 32, "relu"), []

    def run(hyper, key):
        traces.append(1)
        sparsity, target = hyper
        here = dataclasses.replace(config, sparsity=sparsity)
        plain, led = (sparse_autoencoder(here, OPTIMIZER), target_l0(here, OPTIMIZER, target))
        return [train(algorithm, key, batches[:80])[1] for algorithm in (plain, led)]

    hypers = (jnp.array([0.05, 1.0]), jnp.array([30.0, 2.0]))
    plain, led = sweep(run, hypers, jax.random.split(jax.random.key(0), 1), mode="vmap")
    assert len(traces) == 1
    assert plain["l0"][0, 0, -1] > plain["l0"][1, 0, -1] + 1
    # With 13 features a row at first, lambda goes down for a target of 30 and up for one of 2.
    control = led["control"][:, 0]
    np.testing.assert_allclose(control[:, 0], hypers[0], rtol=1e-6)
    assert control[0, -1] < 0.05 < 1.0 < control[1, -1]


@pytest.mark.slow
def test_lambda_is_swept_and_a_target_is_reached(data):
    _, batches = data
    batches = jnp.concatenate([batches] * 2)
    config = SAEConfig(D, 32, "relu")

    def run(hyper, key):
        sparsity, target = hyper
        plain = sparse_autoencoder(dataclasses.replace(config, sparsity=sparsity), OPTIMIZER)
        led = target_l0(dataclasses.replace(config, sparsity=0.1), OPTIMIZER, target)
        return [train(algorithm, key, batches)[1] for algorithm in (plain, led)]

    hypers = (jnp.array([0.05, 0.5]), jnp.array([2.0, 4.0]))
    plain, led = sweep(run, hypers, jax.random.split(jax.random.key(0), 1), mode="vmap")
    assert plain["l0"][0, 0, -1] > plain["l0"][1, 0, -1] + 1
    np.testing.assert_allclose(led["l0"][:, 0, -100:].mean(axis=1), [2.0, 4.0], rtol=0.15)
    assert led["control"][0, 0, -1] > led["control"][1, 0, -1]


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["jumprelu", "gated"])
def test_other_activations_reach_a_target(activation, data):
    _, batches = data
    algorithm = target_l0(SAEConfig(D, 32, activation, sparsity=0.1), OPTIMIZER, 2.0)
    twice = jnp.concatenate([batches] * 3)
    _, metrics = jax.jit(lambda key: train(algorithm, key, twice))(jax.random.key(2))
    np.testing.assert_allclose(metrics["l0"][-100:].mean(), 2.0, rtol=0.15)


def test_target_is_checked():
    with pytest.raises(ValueError, match="topk"):
        target_l0(SAEConfig(D, 32, "topk"), OPTIMIZER, 3)
    with pytest.raises(ValueError, match="d_sae = 32"):
        target_l0(SAEConfig(D, 32, "relu"), OPTIMIZER, 33)


def test_counters_and_the_tracked_threshold(data):
    _, batches = data
    config = SAEConfig(D, 32, "batchtopk", k=2, dead_after=200)
    algorithm = sparse_autoencoder(config, optax.adamw(1e-3, weight_decay=0.5))
    state, threshold, since = algorithm.init(jax.random.key(0)), 0.0, np.zeros(32)
    step = jax.jit(algorithm.step)
    for i in range(3):
        p = jax.tree.map(np.asarray, state.params)
        z = (np.asarray(batches[i]) - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        f = np.maximum(z * np.linalg.norm(p["W_dec"], axis=1), 0)
        f = f * (f >= np.sort(f.reshape(-1))[-2 * ROWS])
        threshold = (i * threshold + f[f > 0].min()) / (i + 1)
        since = np.where((f > 0).any(axis=0), 0, since + ROWS)
        state, metrics = step(state, batches[i])
        # Neither the gradient nor the weight decay has moved it.
        np.testing.assert_allclose(state.params["threshold"], threshold, rtol=1e-4)
        np.testing.assert_array_equal(state.since_fired, since)
    np.testing.assert_allclose(metrics["l0"], 2.0, rtol=1e-6)
    late = state.replace(step=jnp.asarray(999, jnp.int32))
    params = jax.tree.map(np.asarray, late.params)
    z = (np.asarray(batches[3]) - params["b_dec"]) @ params["W_enc"] + params["b_enc"]
    f = np.sort((np.maximum(z, 0) * np.linalg.norm(params["W_dec"], axis=1)).reshape(-1))[-2 * ROWS :]
    moved = step(late, batches[3])[0].params["threshold"]
    np.testing.assert_allclose(moved, 0.99 * threshold + 0.01 * f.min(), rtol=1e-4)


def test_constraints_hold_after_a_step(data):
    _, batches = data
    for config, optimizer in (
        (SAEConfig(D, 32, "gated"), optax.sgd(0.1)),
        (SAEConfig(D, 32, "jumprelu", sparsity=-50.0, bandwidth=1.0), optax.sgd(1.0)),
    ):
        algorithm = sparse_autoencoder(config, optimizer)
        state, _ = jax.jit(algorithm.step)(algorithm.init(jax.random.key(0)), batches[0])
        if config.activation == "gated":
            np.testing.assert_allclose(jnp.linalg.norm(state.params["W_dec"], axis=1), 1.0, rtol=1e-6)
        else:
            assert float(state.params["threshold"].min()) == 0.0


def test_resampling_begins_dead_features_anew_and_leaves_the_others(data):
    _, batches = data
    config = SAEConfig(D, 32, "relu", dead_after=100)
    algorithm = sparse_autoencoder(config, OPTIMIZER)
    state, _ = jax.jit(algorithm.step)(algorithm.init(jax.random.key(0)), batches[0])
    dead = np.arange(32) < 5
    state = state.replace(since_fired=jnp.where(dead, 101, 100))
    new = jax.jit(lambda key, s: resample_dead(key, s, batches[1], config))(jax.random.key(3), state)
    np.testing.assert_array_equal(new.since_fired, np.where(dead, 0, 100))
    for name, axis in (("W_enc", 1), ("W_dec", 0), ("b_enc", 0)):
        old, fresh = (np.moveaxis(np.asarray(s.params[name]), axis, 0) for s in (state, new))
        np.testing.assert_array_equal(old[~dead], fresh[~dead])
        assert (old[dead] != fresh[dead]).any()
        for moment in ("mu", "nu"):
            moments = [getattr(s.opt_state[1][0], moment)[name] for s in (state, new)]
            old, fresh = (np.moveaxis(np.asarray(m), axis, 0) for m in moments)
            np.testing.assert_array_equal(old[~dead], fresh[~dead])
            assert not fresh[dead].any()
    # Each new decoder row points at some input of the batch, and its encoder column along it at 0.2 of the mean norm.
    rows = new.params["W_dec"][:5] / jnp.linalg.norm(new.params["W_dec"][:5], axis=1, keepdims=True)
    seen = batches[1] - state.params["b_dec"][None]
    seen = seen / jnp.maximum(jnp.linalg.norm(seen, axis=1, keepdims=True), 1e-9)
    np.testing.assert_allclose((rows @ seen.T).max(axis=1), 1.0, rtol=1e-5)
    columns = new.params["W_enc"][:, :5].T
    mean = np.linalg.norm(np.asarray(state.params["W_enc"])[:, 5:], axis=0).mean()
    np.testing.assert_allclose(columns, 0.2 * mean * rows, rtol=1e-4, atol=1e-6)
    same = resample_dead(jax.random.key(3), new, batches[1], config)
    jax.tree.map(np.testing.assert_array_equal, same.params, new.params)


@pytest.mark.parametrize(
    "activation",
    ["matryoshka", *(pytest.param(name, marks=pytest.mark.slow) for name in ("topk", "jumprelu", "gated"))],
)
def test_features_divided_over_devices_train_as_on_one(activation, data):
    if jax.device_count() < 2:
        pytest.skip("needs 2 devices: XLA_FLAGS=--xla_force_host_platform_device_count=4")
    _, batches = data
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("features",))
    widths = {"widths": (10, 32)} if activation == "matryoshka" else {}
    config = SAEConfig(D, 32, activation, k=3, dead_after=50, k_aux=4, aux_coefficient=1.0, **widths)
    ends = []
    for where in (None, mesh):
        algorithm = sparse_autoencoder(config, OPTIMIZER, mesh=where)
        state = algorithm.init(jax.random.key(0))
        state = state.replace(since_fired=state.since_fired + 100 * (jnp.arange(32) % 3 == 0))
        step = jax.jit(algorithm.step)
        for i in range(2):
            state, metrics = step(state, batches[i])
        ends.append((state.params, state.since_fired, metrics))
    if "aux_loss" in metrics:
        assert metrics["aux_loss"] > 0
    assert state.params["W_enc"].sharding.spec == jax.sharding.PartitionSpec(None, "features")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *ends)
    with pytest.raises(ValueError, match="features"):
        sparse_autoencoder(SAEConfig(D, 33, "relu"), OPTIMIZER, mesh=mesh)


@pytest.mark.slow
def test_crosscoder_and_transcoder_learn(data):
    directions, batches = data
    cross = jnp.stack([batches, batches @ directions.T[:, :D]], axis=2)[:60]
    for fields, given in (({"layers": 2}, cross), ({"d_out": D}, (cross[:, :, 0], cross[:, :, 1]))):
        config = SAEConfig(D, 32, "topk", k=3, **fields)
        algorithm = sparse_autoencoder(config, OPTIMIZER)
        state, metrics = jax.jit(lambda x, run=algorithm: train(run, jax.random.key(0), x))(given)
        assert metrics["mse"][-1] < 0.7 * metrics["mse"][0]
        x = jax.tree.map(lambda x: x[0], given)
        f = sae_encode(state.params, x[0] if "d_out" in fields else x, config)
        assert sae_decode(state.params, f, config).shape == (ROWS, *config.output_shape)
