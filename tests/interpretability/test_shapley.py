"""Shapley values of games whose values are known, and sampled ones against all coalitions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.attribution import completeness_residual
from jaxalign.interpretability.shapley import shapley_exact, shapley_sampling

KEY = jax.random.key(0)
WEIGHTS = np.random.default_rng(0).normal(size=(5, 5)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)


def quadratic(x):
    """[B, 5] -> [B], with interactions."""
    return jnp.einsum("bi,ij,bj->b", x, WEIGHTS, x) + jnp.tanh(x[:, 0] * x[:, 1] * x[:, 2])


run = jax.jit(quadratic)


def by_definition(value, players):
    """The mean over all orders of what each player adds, in float64."""
    total = np.zeros((len(value(())), players))
    for order in itertools.permutations(range(players)):
        for place, player in enumerate(order):
            total[:, player] += value(order[: place + 1]) - value(order[:place])
    return total / math.factorial(players)


def test_the_glove_game_and_an_additive_game_by_hand():
    # Players 0 and 1 have left gloves, player 2 the right one; a pair is worth 1: (1, 1, 4) / 6.
    gloves = lambda x: jnp.minimum(jnp.minimum(x[0] + x[1], 1.0), x[2])  # noqa: E731
    values = jax.jit(lambda x: shapley_exact(gloves, x, 0.0))(np.ones(3, np.float32))
    np.testing.assert_allclose(values, np.array([1, 1, 4]) / 6, rtol=1e-6)
    additive = lambda x: 2 * x[0] + jnp.sin(x[1]) - x[2] ** 2  # noqa: E731
    x = np.array([1.0, 2.0, 3.0], np.float32)
    exact, sampled = jax.jit(
        lambda x: (shapley_exact(additive, x, 0.0), shapley_sampling(KEY, additive, x, 0.0, permutations=4))
    )(x)
    np.testing.assert_allclose(exact, [2, np.sin(2), -9], rtol=1e-5)
    np.testing.assert_allclose(sampled.value, [2, np.sin(2), -9], rtol=1e-5)
    np.testing.assert_allclose(sampled.standard_error, np.zeros(3), atol=1e-5)


def test_all_coalitions_equal_all_orders_and_are_efficient():
    values = jax.jit(lambda x: shapley_exact(quadratic, x, 0.2, chunk=7))(X)

    def value(players):
        kept = np.isin(np.arange(5), players)
        return np.asarray(run(np.where(kept[None], X, np.float32(0.2))), np.float64)

    table = {frozenset(s): value(s) for n in range(6) for s in itertools.combinations(range(5), n)}
    np.testing.assert_allclose(values, by_definition(lambda s: table[frozenset(s)], 5), atol=1e-5)
    np.testing.assert_allclose(completeness_residual(quadratic, X, 0.2, values), np.zeros(3), atol=1e-5)


def test_sampling_reaches_the_exact_values_within_its_intervals():
    draws = jax.vmap(lambda key: shapley_sampling(key, quadratic, X, 0.2, permutations=32))
    exact, runs = jax.jit(lambda: (shapley_exact(quadratic, X, 0.2), draws(jax.random.split(KEY, 40))))()
    # Whatever the orders, each one's gains add up to all there is.
    np.testing.assert_allclose(runs.value.sum(axis=-1), jnp.broadcast_to(exact.sum(axis=-1), (40, 3)), rtol=1e-4)
    np.testing.assert_allclose(runs.value.mean(axis=0), exact, atol=0.1)
    np.testing.assert_allclose(jnp.std(runs.value, axis=0), jnp.mean(runs.standard_error, axis=0), rtol=0.5, atol=1e-5)
    covered = (runs.low - 1e-5 <= exact[None]) & (exact[None] <= runs.high + 1e-5)
    assert 0.88 < float(covered.mean()) < 1.0


def test_groups_are_players_across_a_pytree():
    parts = {"a": X[:, :2], "b": X[:, 2:]}
    joined = lambda parts: quadratic(jnp.concatenate([parts["a"], parts["b"]], axis=1))  # noqa: E731
    groups = {"a": 0, "b": np.array([1, 1, 0])}
    values, alone, whole = jax.jit(
        lambda parts: (
            shapley_exact(joined, parts, 0.0, groups=groups),
            shapley_exact(joined, parts, 0.0),
            shapley_exact(quadratic, X, 0.0),
        )
    )(parts)

    def value(players):
        kept = np.isin(np.array([0, 0, 1, 1, 0]), players)
        return np.asarray(run(np.where(kept[None], X, np.float32(0))), np.float64)

    np.testing.assert_allclose(values, by_definition(value, 2), atol=1e-5)
    np.testing.assert_allclose(alone, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapley_exact(jnp.sum, jnp.ones(17), 0.0), "17 players"),
        (lambda: shapley_sampling(KEY, quadratic, X, 0.0, permutations=7), "come in pairs"),
        (lambda: shapley_exact(quadratic, X, 0.0, groups=np.array([0, 2, 0, 2, 0])), "without gaps"),
    ],
)
def test_what_is_no_game_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)
