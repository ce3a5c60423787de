"""Making an MDP: what is refused and by which name, rewards of three shapes, random MDPs, and the pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.mdp import (
    GridTransition,
    SparseTransition,
    TabularMDP,
    action_reward,
    arrival_reward,
    dense_transition,
    occupancy_measure,
    random_mdp,
    soft_value_iteration,
)

P = np.array([[[0.25, 0.75], [1.0, 0.0]], [[0.0, 1.0], [0.5, 0.5]]])
START, NEVER = np.array([1.0, 0.0]), np.zeros(2, bool)


def made(**changes):
    return TabularMDP(**{"transition": P, "initial": START, "terminal": NEVER, "discount": 0.9, **changes})


def places(next_state=((0, 1), (1, 0)), probability=((1.0, 0.0), (1.0, 0.0))):
    return SparseTransition(np.array(next_state)[:, None], np.array(probability)[:, None])


BAD = {
    "a negative probability": ({"transition": P - [0.25, -0.25]}, r"transition\[0, 1, 1\]|transition\[1, 0, 0\]"),
    "not a number": ({"transition": P * np.nan}, r"transition\[0, 0, 0\] is negative or not a number"),
    "a row that is too large": ({"transition": P * [1.0, 1.1]}, r"transition\[0, 0\] does not sum to 1"),
    "no square": ({"transition": P[:, :, :1]}, r"transition must be \[S, A, S\]"),
    "two axes": ({"transition": P[0]}, r"transition must be \[S, A, S\]"),
    "initial too short": ({"initial": np.ones(1)}, r"initial must be \[2\]"),
    "initial not a distribution": ({"initial": np.ones(2)}, "initial does not sum to 1"),
    "initial negative": ({"initial": np.array([2.0, -1.0])}, r"initial\[1\] is negative"),
    "terminal too long": ({"terminal": np.zeros(3, bool)}, r"terminal must be \[2\]"),
    "terminal of numbers": ({"terminal": np.zeros(2)}, "terminal must be bool"),
    "discount above 1": ({"discount": 1.01}, r"discount must be in \[0, 1\], got 1.0"),
    "discount below 0": ({"discount": -0.1}, "discount must be in"),
    "discount not a number": ({"discount": float("nan")}, "discount must be in"),
    "a discount per state": ({"discount": np.full(2, 0.9)}, r"discount must be \[\]"),
    "successor too large": ({"transition": places(((0, 1), (2, 0)))}, r"transition.next_state\[1, 0, 0\] is 2, not in"),
    "successor below 0": ({"transition": places(((0, -1), (1, 0)))}, r"transition.next_state\[0, 0, 1\] is -1"),
    "successors of floats": ({"transition": places(((0.0, 1.0), (1.0, 0.0)))}, "next_state must be integers"),
    "sparse row": ({"transition": places(probability=((0.5, 0.4), (1, 0)))}, r"transition\[0, 0\] does not sum"),
    "sparse shapes": (
        {"transition": SparseTransition(np.zeros((2, 1, 3), int), np.ones((2, 1, 1)))},
        "transition.next_state and transition.probability must both be",
    ),
    "grid row": (
        {"transition": GridTransition(jnp.array([[0.5, 0.4]]), jnp.ones((1, 2), bool), ((0, 1), (0, 0)))},
        r"transition\[0\] does not sum to 1",
    ),
    "grid moves": (
        {"transition": GridTransition(jnp.array([[0.5, 0.5]]), jnp.ones((1, 2), bool), ((0, 1),))},
        r"probability \[A, 1\]",
    ),
    "grid cells": (
        {"transition": GridTransition(jnp.ones((1, 1)), jnp.ones(2, bool), ((0, 1),))},
        r"open \[H, W\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        made(**changes)


def test_replace_checks_again_and_jit_does_not():
    with pytest.raises(ValueError, match="discount"):
        made().replace(discount=2.0)
    assert jax.jit(lambda g: made().replace(discount=g).discount)(2.0) == 2.0


def test_shapes_are_checked_under_jit():
    with pytest.raises(ValueError, match="initial"):
        jax.jit(lambda x: made(initial=x).initial)(np.ones(3))


def test_rewards_of_every_shape_by_hand():
    mdp = made(terminal=np.array([False, True]))
    np.testing.assert_allclose(action_reward(mdp, [2, 5]), [[2, 2], [0, 0]])
    np.testing.assert_allclose(action_reward(mdp, [[2.0, 3.0], [5.0, 7.0]]), [[2, 3], [0, 0]])
    paid = np.arange(8.0).reshape(2, 2, 2)
    np.testing.assert_allclose(action_reward(mdp, paid), [[0.75, 2.0], [0, 0]])
    np.testing.assert_allclose(arrival_reward(mdp, jnp.array([2.0, 6.0])), [[5.0, 2.0], [0, 0]])
    # A table that pays by the state entered is the same reward as [S, A, S].
    entered = np.broadcast_to([2.0, 6.0], (2, 2, 2))
    np.testing.assert_allclose(action_reward(mdp, entered), arrival_reward(mdp, jnp.array([2.0, 6.0])))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (3, 2), (2, 2, 1), (2, 2, 2, 2), (1, 2)])
def test_rewards_of_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"reward must be \[S\], \[S, A\] or \[S, A, S\] with S=2, A=2"):
        action_reward(made(), jnp.zeros(shape))


def test_dtypes_follow_the_arrays():
    assert made(initial=[1, 0]).initial.dtype == jnp.float32
    assert made().discount.dtype == jnp.float32
    with jax.enable_x64(True):
        assert {x.dtype for x in jax.tree.leaves(made())} == {np.dtype("float64"), np.dtype(bool)}
        assert action_reward(made(), [1, 2]).dtype == jnp.float64
        mixed = made(initial=START.astype(np.float32))
        assert {mixed.initial.dtype, mixed.discount.dtype, mixed.transition.dtype} == {np.dtype("float64")}
        plan = soft_value_iteration(mixed, np.ones(2, np.float32))
        assert occupancy_measure(mixed, plan.log_policy.astype(jnp.float32)).dtype == jnp.float64


def test_is_a_pytree_that_maps_over_mdps():
    discounts = jnp.array([0.0, 0.5])
    many = jax.vmap(lambda g: made().replace(discount=g))(discounts)
    assert many.transition.shape == (2, 2, 2, 2)
    reward = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    together = jax.jit(jax.vmap(lambda mdp: soft_value_iteration(mdp, reward).value))(many)
    alone = [soft_value_iteration(made(discount=float(g)), reward).value for g in discounts]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(made())]
    assert names == [".transition", ".initial", ".terminal", ".discount"]


def test_random_mdps_are_flat_dirichlet():
    rows = np.asarray(random_mdp(jax.random.key(0), 40, 50).transition).reshape(2000, 40)
    # Each entry of a flat Dirichlet over n is Beta(1, n - 1).
    np.testing.assert_allclose(rows.mean(0), 1 / 40, atol=5 * np.sqrt(39 / (1600 * 41 * 2000)))
    np.testing.assert_allclose(rows.var(), 39 / (1600 * 41), rtol=0.1)
    with pytest.raises(ValueError, match=r"branching must be in 1\.\.40, got 41"):
        random_mdp(jax.random.key(0), 40, 2, branching=41)


def test_random_successors_are_distinct_and_keys_matter():
    one, other = (random_mdp(jax.random.key(k), 9, 4, branching=3, discount=0.5) for k in (0, 1))
    sorted_places = np.sort(np.asarray(one.transition.next_state), axis=-1)
    assert (np.diff(sorted_places, axis=-1) > 0).all()
    assert (np.count_nonzero(dense_transition(one.transition), axis=-1) == 3).all()
    assert (one.num_states, one.num_actions, float(one.discount)) == (9, 4, 0.5)
    assert not np.array_equal(one.transition.next_state, other.transition.next_state)
    jitted = jax.jit(lambda key: random_mdp(key, 9, 4, branching=3))(jax.random.key(0))
    np.testing.assert_array_equal(jitted.transition.next_state, one.transition.next_state)
