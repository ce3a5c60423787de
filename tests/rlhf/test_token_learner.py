"""The shared gradient step: aggregations by hand, the objective against NumPy, and padded, packed, accumulated rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from online_problem import MODEL, random_steps

from jaxalign import Network
from jaxalign.rlhf.packing import first_fit, pack_steps
from jaxalign.rlhf.token_learner import learn, token_learner, token_objective
from jaxalign.rlhf.token_steps import (
    TokenSteps,
    constant_length,
    mean_sequence_ratio,
    sequence_mean,
    sequence_ratio,
    token_mean,
    token_ratio,
    token_scores,
)

MASK = jnp.array([[0, 1, 1, 0], [0, 0, 1, 0]]) != 0
CHOICES = {"clip_epsilon": 0.05, "clip_epsilon_high": 0.08, "kl_coefficient": 0.3, "value_coefficient": 0.7}


@jax.jit
def make_params():
    head = {"kernel": jnp.linspace(-1.0, 1.0, 8), "bias": jnp.float32(0.3)}
    return {"policy": MODEL.init(jax.random.key(1)), "value": head}


@functools.partial(jax.jit, static_argnames=("ratio", "value_clip"))
def loss_and_gradient(params, steps, ratio=token_ratio, value_clip=0.2):
    def loss(params):
        clips = {"value_clip_epsilon": value_clip, "chunk_size": 8}
        return token_objective(MODEL, params, steps, ratio=ratio, **clips, **CHOICES)

    return jax.value_and_grad(loss, has_aux=True)(params)


def test_aggregations_by_hand():
    np.testing.assert_allclose(sequence_mean(MASK)[0], [[0, 0.5, 0.5, 0], [0, 0, 1, 0]])
    np.testing.assert_allclose(token_mean(MASK)[0], [[0, 1, 1, 0], [0, 0, 1, 0]])
    weights, share = constant_length(MASK, length=4)
    np.testing.assert_allclose(weights, [[0, 0.25, 0.25, 0], [0, 0, 0.25, 0]])
    loss = jnp.array([[9.0, 1.0, 3.0, 9.0], [9.0, 9.0, 5.0, 9.0]])

    def mean(aggregated):
        return float(jnp.sum(aggregated[0] * loss) / jnp.sum(aggregated[1]))

    assert mean(sequence_mean(MASK)) == pytest.approx((2 + 5) / 2)
    assert mean(token_mean(MASK)) == pytest.approx((1 + 3 + 5) / 3)
    assert mean((weights, share)) == pytest.approx((1 + 3 + 5) / (2 * 4))


def test_a_row_without_tokens_weighs_nothing():
    empty = jnp.zeros((2, 3), bool)
    for aggregated in (sequence_mean(empty), token_mean(empty), constant_length(empty, length=3)):
        assert all(float(jnp.sum(x)) == 0.0 for x in aggregated)


def test_ratios_by_hand_with_and_without_segments():
    log_ratio = jnp.array([[9.0, 0.1, 0.2, 9.0], [9.0, 9.0, 0.5, 9.0]])
    np.testing.assert_allclose(sequence_ratio(log_ratio, MASK, None), [[0.3] * 4, [0.5] * 4], rtol=1e-6)
    np.testing.assert_allclose(mean_sequence_ratio(log_ratio, MASK, None), [[0.15] * 4, [0.5] * 4], rtol=1e-6)
    packed, mask = log_ratio.reshape(1, 8), MASK.reshape(1, 8)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 2, 2]])
    np.testing.assert_allclose(sequence_ratio(packed, mask, segments), [[0.3] * 4 + [0.5] * 4], rtol=1e-6)
    np.testing.assert_allclose(mean_sequence_ratio(packed, mask, segments), [[0.15] * 4 + [0.5] * 4], rtol=1e-6)


def test_scores_are_those_of_the_full_logits():
    steps, _ = random_steps()
    params = make_params()["policy"]
    temperature = 0.7

    @jax.jit
    def score(params):
        return token_scores(MODEL, params, steps.tokens, steps.mask, temperature=temperature, chunk_size=4)

    found = score(params)
    logits = np.asarray(MODEL.apply(params, steps.tokens), np.float64) / temperature
    logps = scipy.special.log_softmax(logits, axis=-1)
    picked = np.take_along_axis(logps[:, :-1], np.asarray(steps.tokens)[:, 1:, None], -1)[..., 0]
    mask = np.asarray(steps.mask)[:, 1:]
    np.testing.assert_allclose(found.log_probs[:, 1:], picked * mask, atol=2e-6)
    entropies = -(np.exp(logps) * logps).sum(-1)[:, :-1] * mask
    np.testing.assert_allclose(found.entropies[:, 1:], entropies, atol=2e-6)
    assert not found.log_probs[:, 0].any()
    hidden = np.asarray(found.hidden, np.float64) @ np.asarray(MODEL.unembedding(params), np.float64).T
    np.testing.assert_allclose(hidden[:, 1:], logits[:, :-1] * temperature, atol=1e-5)


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio, mean_sequence_ratio])
def test_objective_agrees_with_numpy(ratio):
    steps, _ = random_steps()
    params = make_params()
    (loss, metrics), _ = loss_and_gradient(params, steps, ratio=ratio)
    scores = token_scores(MODEL, params["policy"], steps.tokens, steps.mask)
    new, hidden = (np.asarray(x, np.float64) for x in (scores.log_probs, scores.hidden))
    s = TokenSteps(*(None if x is None else np.asarray(x, np.float64) for x in steps))
    expected = clipped = 0.0
    for row in range(len(s.tokens)):
        places = np.flatnonzero(s.mask[row])
        total = sum(new[row, t] - s.log_probs[row, t] for t in places)
        for t in places:
            log_ratio = new[row, t] - s.log_probs[row, t]
            alternatives = {sequence_ratio: total, mean_sequence_ratio: total / len(places)}
            log_ratio = alternatives.get(ratio, log_ratio)
            importance, advantage = np.exp(log_ratio), s.advantages[row, t]
            inside = min(max(importance, 1 - 0.05), 1 + 0.08)
            policy = -min(importance * advantage, inside * advantage)
            difference = new[row, t] - s.reference_log_probs[row, t]
            kl = np.exp(-difference) - 1 + difference
            value = hidden[row, t] @ np.asarray(params["value"]["kernel"], np.float64) + 0.3
            near = s.values[row, t] + min(max(value - s.values[row, t], -0.2), 0.2)
            worst = 0.5 * max((value - s.targets[row, t]) ** 2, (near - s.targets[row, t]) ** 2)
            expected += s.weights[row, t] * (policy + 0.3 * kl + 0.7 * worst)
            clipped += s.share[row, t] * (inside != importance)
    assert float(loss) == pytest.approx(expected / s.share.sum(), rel=2e-5)
    assert float(metrics["policy/clipfrac"]) == pytest.approx(clipped / s.share.sum(), abs=1e-6)
    assert clipped > 0


def gradients(params, steps, **options):
    (loss, metrics), grads = loss_and_gradient(params, steps, **options)
    return jax.tree.leaves((loss, metrics, grads))


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_padded_packed_and_plain_rows_agree(ratio):
    steps, lengths = random_steps()
    params = make_params()
    plain = gradients(params, steps, ratio=ratio)

    def wider(x):
        return None if x is None else jnp.pad(x, ((0, 0), (0, 3)), constant_values=5 if x.dtype == jnp.int32 else 0)

    noise = TokenSteps(*(wider(x) for x in steps))
    # What stands where nobody chose a token is not read, not even NaN.
    noise = noise._replace(log_probs=jnp.where(noise.mask, noise.log_probs, jnp.nan))
    for ours, theirs in zip(plain, gradients(params, noise, ratio=ratio), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)
    packed = pack_steps(steps, lengths, width=16)
    assert packed.tokens.shape[0] < steps.tokens.shape[0]
    for ours, theirs in zip(plain, gradients(params, packed, ratio=ratio), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-6)


def test_packing_by_hand_and_refusals():
    assert first_fit([3, 6, 2, 4], 8) == [[1, 2], [3, 0]]
    with pytest.raises(ValueError, match=r"sequence 1 has 9 tokens; a row holds 8"):
        first_fit([3, 9], 8)


@pytest.mark.parametrize("aggregation", [sequence_mean, token_mean, functools.partial(constant_length, length=5)])
def test_accumulated_equals_full_batch(aggregation):
    steps, _ = random_steps(aggregation=aggregation)
    params = make_params()
    network = Network(lambda key: params, lambda params, tokens: tokens)
    results = []
    for parts in (1, 2):
        learner = token_learner(MODEL, network, optax.sgd(0.1), microbatches=parts, **CHOICES)
        state, metrics = jax.jit(learner.step)(learner.init(jax.random.key(0)), steps)
        results.append(jax.tree.leaves((state.params, metrics)))
    for full, accumulated in zip(*results, strict=True):
        np.testing.assert_allclose(accumulated, full, rtol=2e-4, atol=2e-6)


def test_several_gradient_steps_leave_the_frozen_alone():
    steps, _ = random_steps()
    params = make_params()
    network = Network(lambda key: params, lambda params, tokens: tokens)
    learner = token_learner(
        MODEL, network, optax.sgd(0.1), trainable=lambda name: name.startswith("value"), **CHOICES
    )
    state = learner.init(jax.random.key(0))
    update = jax.jit(lambda s: learn(learner, s, steps, jax.random.key(1), num_epochs=2, num_minibatches=2))
    new, metrics = update(state)
    assert int(new.step) == 1
    assert float(metrics["gradient_steps"]) == 4
    assert jax.tree.structure(new) == jax.tree.structure(state)
    np.testing.assert_array_equal(jax.tree.leaves(new.frozen)[0], jax.tree.leaves(state.frozen)[0])
    assert float(jnp.abs(new.params["value"]["kernel"] - params["value"]["kernel"]).max()) > 1e-3


def test_double_precision_and_shapes_that_differ():
    with jax.enable_x64(True):
        steps, _ = random_steps(dtype=np.float64)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), jax.device_get(make_params()))
        loss, _ = jax.eval_shape(lambda p: token_objective(MODEL, p, steps, **CHOICES), params)
        assert loss.dtype == jnp.float64
    with pytest.raises(AssertionError):
        token_scores(MODEL, params["policy"], jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 4), bool))
