"""Reward models: likelihoods by hand, padding and microbatches that change nothing, known rewards recovered."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network, networks
from jaxalign.algorithm import path_name
from jaxalign.preferences import bradley_terry_loss, plackett_luce_loss
from jaxalign.preferences.comparisons import Comparisons, Rankings, check_reward_batch, reward_batch
from jaxalign.preferences.reward_ensemble import (
    bootstrap_weights,
    ensemble_mean,
    ensemble_rewards,
    lower_confidence_bound,
    reward_ensemble,
    worst_case,
)
from jaxalign.preferences.reward_model import comparison_loss, pair_rewards, reward_model
from jaxalign.preferences.reward_networks import is_adapter_or_head, language_reward, trajectory_reward

ROWS, STEPS = 8, 5
TRUE, KEY = np.array([1.0, -2.0, 0.5]), jax.random.key(0)

per_step = Network(lambda key: {"w": 0.3 * jax.random.normal(key, (3,))}, lambda params, x: x @ params["w"])
network = trajectory_reward(per_step)


def trajectories(rows=ROWS, steps=STEPS, seed=0):
    """Two sides of uneven length, with garbage after their ends, and which has the larger true return."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(2, rows, steps, 3)).astype(np.float32)
    mask = np.arange(steps) < rng.integers(1, steps + 1, (2, rows))[..., None]
    returns = ((features @ TRUE) * mask).sum(axis=-1)
    features[~mask] = np.nan
    outcome = (returns[1] > returns[0]).astype(np.int32)
    return Comparisons(features[0], mask[0], features[1], mask[1], outcome=outcome, index=np.arange(rows))


def one_step(batch, algorithm=None, **options):
    algorithm = algorithm or reward_model(network, optax.sgd(1.0), **options)
    return jax.jit(algorithm.step)(algorithm.init(KEY), batch)


def assert_same_state(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6)


def test_comparison_loss_by_hand():
    chosen, rejected = np.array([1.0, 1.0, 1.0]), np.array([0.0, 0.0, 0.0])
    loss = comparison_loss(chosen, rejected, outcome=np.array([0, 1, 2]), margin=np.array([0.5, 0.5, 9.0]))
    by_hand = [np.logaddexp(0, -0.5), np.logaddexp(0, 1.5), (np.logaddexp(0, -1) + np.logaddexp(0, 1)) / 2]
    np.testing.assert_allclose(loss, by_hand, rtol=1e-6)
    plain = comparison_loss(chosen, rejected, label_smoothing=0.1)
    np.testing.assert_allclose(plain, bradley_terry_loss(chosen, rejected, label_smoothing=0.1))
    # Davidson's odds exp(1) : exp(0) : 2 exp(1/2)
    total = np.e + 1 + 2 * np.exp(0.5)
    loss = comparison_loss(chosen, rejected, outcome=np.array([0, 1, 2]), tie_strength=2.0)
    np.testing.assert_allclose(loss, -np.log(np.array([np.e, 1, 2 * np.exp(0.5)]) / total), rtol=1e-6)
    smoothed = comparison_loss(chosen, rejected, outcome=np.array([0, 1, 2]), tie_strength=2.0, label_smoothing=0.25)
    np.testing.assert_allclose(smoothed, 0.75 * loss + 0.25 * loss[jnp.array([1, 0, 2])], rtol=1e-6)


def logistic_regression(batch, w, weight, *, centering=0.0):
    """In float64: gradient of mean_i weight_i [-log sigma(+-d_i . w) + centering (s_i . w)^2], margins and loss.

    d and s are difference and sum of the two sides' summed features.
    """
    sides = (batch.chosen, batch.chosen_mask), (batch.rejected, batch.rejected_mask)
    first, second = (np.where(mask[..., None], x, 0).astype(np.float64).sum(axis=1) for x, mask in sides)
    difference, total, w = first - second, first + second, np.asarray(w, np.float64)
    x, y = difference @ w, 1.0 - batch.outcome
    rows = ((1 / (1 + np.exp(-x))) - y)[:, None] * difference + 2 * centering * (total @ w)[:, None] * total
    signed = np.where(y == 1, x, -x)
    loss = (weight * (np.logaddexp(0, -signed) + centering * (total @ w) ** 2)).mean()
    return (weight[:, None] * rows).mean(axis=0), signed, loss


def test_the_gradient_is_that_of_logistic_regression_on_feature_differences():
    batch = trajectories()
    before = reward_model(network, optax.sgd(1.0)).init(KEY)
    after, metrics = one_step(batch, centering=0.25)
    gradient, signed, loss = logistic_regression(batch, before.params["w"], np.ones(ROWS), centering=0.25)
    np.testing.assert_allclose(before.params["w"] - after.params["w"], gradient, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/margins"], signed.mean(), rtol=1e-4)
    assert metrics["rewards/accuracies"] == (signed > 0).mean()
    np.testing.assert_allclose(metrics["rewards/chosen"] - metrics["rewards/rejected"], signed.mean(), rtol=1e-4)


def test_padding_and_invalid_rows_change_nothing():
    batch = trajectories()

    def padded_to(x, value):
        return np.concatenate([x, np.full((ROWS, 3, *x.shape[2:]), value, x.dtype)], axis=1)

    padded = batch._replace(
        chosen=padded_to(batch.chosen, np.nan), chosen_mask=padded_to(batch.chosen_mask, False),
        rejected=padded_to(batch.rejected, np.nan), rejected_mask=padded_to(batch.rejected_mask, False),
    )  # fmt: skip
    filled = jax.tree.map(lambda x: np.concatenate([x, x[:3]]), batch)
    filled = filled._replace(valid=np.arange(ROWS + 3) < ROWS, chosen_mask=filled.chosen_mask.copy())
    filled.chosen_mask[ROWS:] = False
    state, metrics = one_step(batch)
    for other in (padded, filled):
        new, found = one_step(other)
        assert_same_state(new, state)
        for name, value in metrics.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["comparisons", "rankings"])
def test_accumulated_equals_full_batch_with_uneven_masks_and_a_part_that_is_all_invalid(kind):
    batch = trajectories()
    if kind == "rankings":
        items, mask = np.stack([batch.chosen, batch.rejected], 1), np.stack([batch.chosen_mask, batch.rejected_mask], 1)
        batch = Rankings(items, mask, np.stack([batch.outcome, 1 - batch.outcome], axis=1))
    batch = batch._replace(valid=np.array([1, 0, 1, 1, 0, 0, 1, 0]))
    state, metrics = one_step(batch, centering=0.1)
    split, found = one_step(batch, centering=0.1, microbatches=4)
    assert_same_state(split, state)
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_no_nan_where_there_is_nothing_to_learn(microbatches):
    batch = trajectories()
    before = reward_model(network, optax.sgd(1.0)).init(KEY)
    state, metrics = one_step(batch._replace(valid=np.zeros(ROWS)), microbatches=microbatches)
    assert_same_state(state, before)
    assert all(np.isfinite(x) for x in metrics.values())
    empty = batch._replace(chosen_mask=np.zeros_like(batch.chosen_mask), rejected_mask=np.zeros_like(batch.chosen_mask))
    state, metrics = one_step(empty, microbatches=microbatches)
    assert_same_state(state, before)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=1e-6)


def test_a_ranking_of_two_is_a_comparison_and_of_three_is_plackett_luce():
    batch = trajectories()
    items, mask = np.stack([batch.chosen, batch.rejected], 1), np.stack([batch.chosen_mask, batch.rejected_mask], 1)
    two = Rankings(items, mask, np.stack([batch.outcome, 1 - batch.outcome], axis=1))
    state, metrics = one_step(batch, centering=0.3)
    new, found = one_step(two, centering=0.3)
    assert_same_state(new, state)
    for name in metrics:
        np.testing.assert_allclose(found[name], metrics[name], rtol=1e-5, err_msg=name)
    three = jax.tree.map(lambda x: np.concatenate([x, x[:, :1]], axis=1), two)._replace(
        ranking=np.tile([2, 0, 1], (ROWS, 1))
    )
    params = reward_model(network, optax.sgd(1.0)).init(KEY).params
    rewards = np.stack([network.apply(params, three.items[:, k], three.mask[:, k]) for k in range(3)], axis=1)
    _, found = one_step(three)
    np.testing.assert_allclose(found["loss"], plackett_luce_loss(rewards, three.ranking).mean(), rtol=1e-5)
    right = 1.0 * (rewards[:, 2] > rewards[:, 1]) + (rewards[:, 0] > rewards[:, 1]) + 0.5  # items 0 and 2 are equal
    np.testing.assert_allclose(found["rewards/accuracies"], right.mean() / 3, rtol=1e-5)


@functools.cache
def trained_ensemble():
    batch = trajectories(rows=256, seed=1)
    algorithm = reward_ensemble(network, optax.adam(0.1), size=3)
    state = algorithm.init(jax.random.key(2))

    def many(state):
        return jax.lax.scan(lambda s, _: algorithm.step(s, batch), state, None, length=60)

    return state, *jax.jit(many)(state)


def test_a_known_reward_is_recovered_by_every_member_and_each_differs():
    start, state, metrics = trained_ensemble()
    held_out = trajectories(rows=300, seed=5)
    assert metrics["loss"].shape == (60, 3)
    sides = [(held_out.chosen, held_out.chosen_mask), (held_out.rejected, held_out.rejected_mask)]
    chosen, rejected = (ensemble_rewards(network, state.params, *side) for side in sides)
    right = (rejected > chosen) == held_out.outcome[None].astype(bool)
    assert (right.mean(axis=1) > 0.93).all()
    w = np.asarray(state.params["w"])
    cosine = w @ TRUE / np.linalg.norm(w, axis=1) / np.linalg.norm(TRUE)
    assert (cosine > 0.98).all()
    assert np.abs(w[0] - w[1]).max() > 0.01
    assert (jax.random.key_data(start.bootstrap_key) == jax.random.key_data(state.bootstrap_key)).all()


def test_bootstrap_counts_are_poisson_and_depend_on_key_and_row_alone():
    counts = np.asarray(bootstrap_weights(jax.random.key(3), np.arange(4000)))
    expected = 4000 * np.exp(-1.0) / np.array([1, 1, 2, 6])
    seen = np.array([(counts == k).sum() for k in range(4)])
    assert (np.abs(seen - expected) < 4 * np.sqrt(expected)).all()
    assert abs(counts.mean() - 1) < 0.07
    some = np.array([17, 3, 3999, 17])
    np.testing.assert_array_equal(bootstrap_weights(jax.random.key(3), some), counts[some])
    assert (bootstrap_weights(jax.random.key(4), np.arange(50)) != counts[:50]).any()


def test_each_member_learns_from_its_bootstrap():
    batch = trajectories()
    algorithm = reward_ensemble(network, optax.sgd(1.0), size=2, microbatches=2)
    state = algorithm.init(jax.random.key(4))
    new, metrics = jax.jit(algorithm.step)(state, batch)
    for e in range(2):
        counts = np.asarray(bootstrap_weights(state.bootstrap_key[e], batch.index))
        gradient, _, loss = logistic_regression(batch, state.params["w"][e], counts)
        np.testing.assert_allclose(state.params["w"][e] - new.params["w"][e], gradient, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"][e], loss, rtol=1e-5)


def test_ensemble_reductions_by_hand():
    rewards = np.array([[1.0, 2.0, 0.0], [3.0, 2.0, 4.0]])
    np.testing.assert_allclose(ensemble_mean(rewards), [2.0, 2.0, 2.0])
    np.testing.assert_allclose(lower_confidence_bound(rewards, coefficient=0.5), [1.5, 2.0, 1.0])
    np.testing.assert_allclose(worst_case(rewards), [1.0, 2.0, 0.0])
    np.testing.assert_array_equal(lower_confidence_bound(rewards, coefficient=0.0), ensemble_mean(rewards))
    gradient = jax.grad(lambda r: lower_confidence_bound(r, coefficient=1.0).sum())(jnp.asarray(rewards))
    assert jnp.isfinite(gradient).all()
    np.testing.assert_allclose(gradient[:, 1], [0.5, 0.5])  # where both agree
    with jax.enable_x64(True):
        assert lower_confidence_bound(rewards, coefficient=0.5).dtype == np.float64
    with pytest.raises(ValueError, match=r"\[E, ...\] with E >= 1, got \(0, 3\)"):
        worst_case(np.zeros((0, 3)))


CONFIG = networks.TransformerConfig(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    lora_rank=2, lora_alpha=4.0,
)  # fmt: skip
MODEL = networks.transformer(CONFIG)


def test_language_reward_reads_the_last_marked_token_and_nothing_after_it():
    reward = language_reward(MODEL)
    params = jax.jit(reward.init)(KEY)
    tokens = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 9, 9], [1, 2, 3, 4, 5]], np.int32)
    mask = np.array([[0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    rewards = jax.jit(reward.apply)(params, tokens, mask)
    hidden = jax.jit(MODEL.hidden)(params["model"], tokens[:1, :3])[0, -1]
    np.testing.assert_allclose(rewards[0], hidden @ params["head"]["kernel"], rtol=1e-5)
    np.testing.assert_allclose(rewards[1], rewards[0], rtol=1e-5)
    assert rewards[2] == 0.0
    assert np.abs(params["head"]["kernel"]).max() < 4 / 9


def test_an_ensemble_over_one_frozen_base_keeps_one_copy_of_it():
    def init(key):
        return {"base": jax.random.normal(key, (3, 3)), "head": per_step.init(key)}

    over_base = trajectory_reward(Network(init, lambda p, x: per_step.apply(p["head"], x @ p["base"])))
    algorithm = reward_ensemble(
        over_base, optax.sgd(0.1), size=2, bootstrap=False, mode="map", trainable=lambda name: name.startswith("head/")
    )
    state = algorithm.init(KEY)
    batch = trajectories()
    new, metrics = jax.jit(algorithm.step)(state, batch._replace(index=None))
    assert state.frozen["base"].shape == (3, 3)
    assert new.params["base"] is None
    assert new.params["head"]["w"].shape == (2, 3)
    assert metrics["rewards/margins"].shape == (2,)
    both = ensemble_rewards(over_base, new.params, batch.chosen, batch.chosen_mask, frozen=new.frozen)
    second = {"base": new.frozen["base"], "head": {"w": new.params["head"]["w"][1]}}
    np.testing.assert_allclose(both[1], pair_rewards(over_base, second, batch)[0], rtol=1e-5)


def test_adapters_and_head_are_what_lora_trains():
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(jax.eval_shape(language_reward(MODEL).init, KEY))]
    trained = [name for name in names if is_adapter_or_head(name)]
    assert "head/kernel" in trained
    assert len(trained) == 15  # a and b of seven matrices
    assert "model/embedding" not in trained


def test_mappings_and_preference_batches_are_comparisons():
    batch = trajectories()
    fields = {name: value for name, value in batch._asdict().items() if value is not None}
    chex.assert_trees_all_equal(reward_batch(fields), batch)
    named = {"chosen_tokens": batch.chosen, "chosen_mask": batch.chosen_mask, "rejected_tokens": batch.rejected,
             "rejected_mask": batch.rejected_mask}  # fmt: skip
    chex.assert_trees_all_equal(reward_batch(named), batch._replace(outcome=None, index=None))
    ranked = {"items": np.zeros((2, 3, 4)), "mask": np.ones((2, 3, 4)), "ranking": np.zeros((2, 3), int)}
    assert isinstance(reward_batch(ranked), Rankings)


def bad(**changes):
    return trajectories()._replace(**changes)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (bad(valid=np.zeros(ROWS)), "`valid` is 0 on every row"),
        (bad(chosen_mask=np.eye(ROWS, STEPS)), r"chosen_mask\[5\] marks no step"),
        (bad(outcome=np.full(ROWS, 2)), "every row of `outcome` is a tie"),
        (bad(outcome=np.full(ROWS, 3)), r"outcome\[0\] is 3"),
        (bad(outcome=np.zeros((ROWS, 1))), r"outcome must be \(8,\), got \(8, 1\)"),
        (bad(rejected_mask=np.ones((ROWS, 2))), r"rejected_mask must be \[B, T\]"),
        (bad(chosen=np.zeros((3, STEPS, 3))), r"chosen has a leaf \(3, 5, 3\)"),
        (Rankings(np.zeros((2, 3, 4, 3)), np.ones((2, 3, 4)), np.array([[0, 1, 2], [0, 0, 2]])), r"ranking\[1\]"),
        (Rankings(np.zeros((2, 3, 4, 3)), np.ones((2, 3, 4)), np.zeros((2, 2))), r"ranking must be \(2, 3\)"),
    ],
)
def test_bad_batches_are_named_outside_jit(batch, message):
    algorithm = reward_model(network, optax.sgd(1.0))
    with pytest.raises(ValueError, match=message):
        algorithm.step(algorithm.init(KEY), batch)


def test_ties_alone_can_be_learned_from_with_a_model_of_ties():
    check_reward_batch(bad(outcome=np.full(ROWS, 2)), tie_strength=0.5)
    _, metrics = one_step(bad(outcome=np.full(ROWS, 2)), tie_strength=0.5)
    assert np.isfinite(metrics["loss"])
    assert metrics["rewards/accuracies"] == 0.5


def test_bad_networks_and_options_are_named():
    column = Network(per_step.init, lambda params, x, mask: jnp.zeros((x.shape[0], 1)))
    with pytest.raises(ValueError, match=r"must return \[16\].*returned \(16, 1\)"):
        one_step(trajectories(), reward_model(column, optax.sgd(1.0)))
    with pytest.raises(ValueError, match=r"returned \(16, 5, 2\) for mask \(16, 5\)"):
        two = trajectory_reward(Network(per_step.init, lambda params, x: x[..., :2]))
        one_step(trajectories(), reward_model(two, optax.sgd(1.0)))
    with pytest.raises(ValueError, match="tie_strength must be positive"):
        reward_model(network, optax.sgd(1.0), tie_strength=0.0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        reward_ensemble(network, optax.sgd(1.0), size=0)
    with pytest.raises(ValueError, match="needs the batch's `index`"):
        one_step(bad(index=None), reward_ensemble(network, optax.sgd(1.0), size=2))
    with pytest.raises(ValueError, match="rankings take neither"):
        one_step(
            Rankings(np.zeros((2, 3, 4, 3)), np.ones((2, 3, 4)), np.tile(np.arange(3), (2, 1))),
            reward_model(network, optax.sgd(1.0), label_smoothing=0.1),
        )
