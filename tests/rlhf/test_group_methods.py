"""GRPO, RLOO, Dr. GRPO and DAPO: what a rollout is turned into, by hand, and that each learns what it is paid for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from online_problem import MODEL, PROMPTS, REWARD, STOP

import jaxalign
from jaxalign.rl.group_relative import grpo_advantages, rloo_advantages
from jaxalign.rlhf.generation import Completions
from jaxalign.rlhf.group_methods import dapo, dr_grpo, group_steps, grpo, overlong_penalty, rloo
from jaxalign.rlhf.language_rollout import Rollout, reward_of, rollout_metrics
from jaxalign.rlhf.token_steps import sequence_mean

MASK = jnp.array([[0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 1, 1]]) != 0
FEW = {"samples": 4, "max_new_tokens": 4, "stop_ids": (STOP,)}


def rollout(scores):
    log_probs = jnp.where(MASK, -1.0, 0.0)
    completions = Completions(jnp.ones((4, 3), jnp.int32), MASK, log_probs, jnp.array([False, True, False, False]))
    prompts = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), PROMPTS)
    return Rollout(prompts, completions, jnp.asarray(scores), jnp.where(MASK, -1.5, 0.0))


def test_groups_by_hand():
    steps, uniform = group_steps(
        rollout([1.0, 3.0, 5.0, 5.0]), samples=2, advantages=rloo_advantages, aggregation=sequence_mean
    )
    assert float(uniform) == 0.5
    np.testing.assert_allclose(steps.advantages, [[0, -2, -2], [0, 2, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(steps.weights[0], [0, 0.5, 0.5])


def test_the_price_of_kl_enters_the_scores_before_they_are_compared():
    # The first completion is one nat away (two tokens, half a nat each), the second half a nat.
    steps, _ = group_steps(
        rollout([1.0, 1.0, 0.0, 0.0]), samples=2, advantages=rloo_advantages, aggregation=sequence_mean,
        kl_reward_coefficient=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(steps.advantages[:2, 1], [-0.05, 0.05], rtol=1e-5)


def test_uniform_groups_can_be_left_out():
    scores = rollout([1.0, 3.0, 5.0, 5.0])
    steps, _ = group_steps(
        scores, samples=2, advantages=grpo_advantages, aggregation=sequence_mean, skip_uniform=True
    )
    np.testing.assert_allclose(steps.weights[:2], [[0, 1, 1], [0, 2, 0]])  # twice as much for half of the groups
    assert not np.asarray(steps.weights)[2:].any()
    np.testing.assert_allclose(jnp.sum(steps.share), 4.0)


def test_rollout_metrics_by_hand():
    found = {name: float(x) for name, x in rollout_metrics(rollout([0.0, 1.0, 1.0, 2.0])).items()}
    assert found["objective/kl"] == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert found["objective/kl_per_token"] == pytest.approx(0.5)
    assert (found["objective/scores"], found["completion/length"], found["completion/ended"]) == (1.0, 1.75, 0.25)


def test_overlong_penalty_by_hand():
    found = overlong_penalty(jnp.array([0, 16, 17, 20, 99]), limit=20, margin=4)
    np.testing.assert_allclose(found, [0, 0, -0.25, -1, -1])


# They share all but small parts.
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in (dapo, rloo, dr_grpo)]


@pytest.mark.parametrize("method", [grpo, *SLOW])
def test_each_method_learns_what_is_paid(method):
    algorithm = method(MODEL, optax.adam(3e-2), REWARD, **FEW)
    batches = jax.tree.map(lambda x: jnp.stack([x] * 30), PROMPTS)
    state, metrics = jax.jit(lambda key: jaxalign.train(algorithm, key, batches))(jax.random.key(0))
    scores = np.asarray(metrics["objective/scores"])
    assert scores[:3].mean() < 0.35
    assert scores[-5:].mean() > 0.8
    assert int(state.step) == 30
    # On-policy, with one gradient step for each rollout, sampler and trainer agree: every ratio is 1.
    np.testing.assert_allclose(metrics["val/ratio"], 1.0, atol=1e-4)
    assert float(metrics["objective/kl"][0]) == pytest.approx(0.0, abs=1e-4)


def test_a_reward_of_the_wrong_shape_and_rows_that_do_not_split_are_named():
    wrong = grpo(MODEL, optax.sgd(0.1), reward_of(lambda prompts, completions: completions.mask), **FEW)
    state = jax.eval_shape(wrong.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"returned \(8, 7\) for 8 completions"):
        jax.eval_shape(wrong.step, state, PROMPTS)
    uneven = grpo(MODEL, optax.sgd(0.1), REWARD, num_minibatches=3, **FEW)
    with pytest.raises(ValueError, match="8 completions do not split into 3 minibatches"):
        jax.eval_shape(uneven.step, state, PROMPTS)


def test_a_reward_that_is_nan_is_seen_in_the_metrics():
    broken = grpo(
        MODEL, optax.sgd(0.1), reward_of(lambda prompts, completions: jnp.full(8, jnp.nan)), **FEW
    )
    _, metrics = jax.jit(lambda key: broken.step(broken.init(key), PROMPTS))(jax.random.key(0))
    assert np.isnan(metrics["objective/scores"])


def test_reward_parameters_travel_frozen():
    from jaxalign import Network

    reward = Network(
        lambda key: {"price": jnp.float32(2.0)},
        lambda params, prompts, completions: params["price"] * completions.mask.sum(axis=1),
    )
    algorithm = grpo(MODEL, optax.sgd(0.1), reward, **FEW)
    state = algorithm.init(jax.random.key(0))
    assert state.params["reward"]["price"] is None
    assert float(state.frozen["reward"]["price"]) == 2.0


def test_the_factories_are_the_same_function_with_other_choices():
    assert {f.__name__ for f in (rloo, dr_grpo, dapo)} == {"rloo", "dr_grpo", "dapo"}
    step = functools.partial(jax.eval_shape, grpo(MODEL, optax.sgd(0.1), REWARD, **FEW).step)
    for method in (rloo, dr_grpo, dapo):
        algorithm = method(MODEL, optax.sgd(0.1), REWARD, **FEW)
        state = jax.eval_shape(algorithm.init, jax.random.key(0))
        assert jax.tree.structure(step(state, PROMPTS)) == jax.tree.structure(
            jax.eval_shape(algorithm.step, state, PROMPTS)
        )
