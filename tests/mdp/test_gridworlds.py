"""Gridworlds: moves by hand, walls, slip, the cliff's returns, Objectworld's reward, and a grid of 90,000 cells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.mdp import (
    arrival_reward,
    cliff,
    cliff_reward,
    dense_transition,
    expected_return,
    gridworld,
    objectworld,
    occupancy_measure,
    policy_evaluation,
    soft_value_iteration,
    value_iteration,
)
from jaxalign.mdp.gridworlds import DOWN, LEFT, RIGHT, STAY, UP
from jaxalign.programs import largest_value


def test_moves_by_hand():
    # 0 1 2
    # 3 4 5
    p = np.asarray(dense_transition(gridworld(2, 3).transition))
    assert p.shape == (6, 5, 6)
    for action, row in {
        UP: (0, 1, 2, 0, 1, 2),
        RIGHT: (1, 2, 2, 4, 5, 5),
        DOWN: (3, 4, 5, 3, 4, 5),
        LEFT: (0, 0, 1, 3, 3, 4),
        STAY: (0, 1, 2, 3, 4, 5),
    }.items():
        np.testing.assert_array_equal(p[:, action], np.eye(6)[list(row)])


def test_slip_mixes_in_the_four_moves():
    p = np.asarray(dense_transition(gridworld(2, 2, slip=0.2, stay=False).transition))
    assert p.shape == (4, 4, 4)
    # From the top left cell, right: 0.8 + 0.05 arrives, down 0.05; up and left (0.05 each) are blocked.
    np.testing.assert_allclose(p[0, RIGHT], [0.1, 0.85, 0.05, 0.0], rtol=1e-6)
    stays = np.asarray(dense_transition(gridworld(2, 2, slip=0.2).transition))[0, STAY]
    np.testing.assert_allclose(stays, [0.9, 0.05, 0.05, 0.0], rtol=1e-6)


def test_walls_block_and_no_episode_starts_in_them_or_at_the_goal():
    walls = np.array([[0, 1, 0], [0, 0, 0]], bool)
    mdp = gridworld(2, 3, walls=walls, goal=(0, 2))
    p = np.asarray(dense_transition(mdp.transition))
    np.testing.assert_array_equal(p[[0, 4], [RIGHT, UP]], np.eye(6)[[0, 4]])
    np.testing.assert_allclose(mdp.initial, [0.25, 0, 0, 0.25, 0.25, 0.25])
    np.testing.assert_array_equal(mdp.terminal, np.arange(6) == 2)
    np.testing.assert_array_equal(gridworld(2, 3, goal=5, start=(1, 0)).initial, np.arange(6) == 3)
    np.testing.assert_array_equal(gridworld(2, 3, goal=5).terminal, np.arange(6) == 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"goal": (2, 0)}, r"goal \(2, 0\) is outside the 2 x 3 grid"),
        ({"goal": 6}, "goal 6 is outside"),
        ({"goal": -1}, "goal -1 is outside"),
        ({"start": (0, 3)}, "start"),
        ({"start": (0, 1), "walls": np.array([[0, 1, 0], [0, 0, 0]], bool)}, "start .* is in a wall"),
        ({"walls": np.zeros((3, 2), bool)}, r"walls must be \(2, 3\)"),
        ({"walls": np.ones((2, 3), bool)}, "no open cell"),
        ({"slip": -0.1}, "slip"),
        ({"slip": 1.1, "stay": False}, "slip"),
        ({"discount": 1.5}, "discount"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        gridworld(2, 3, **options)


def test_slip_and_discount_are_traced():
    def value(slip, discount):
        return value_iteration(gridworld(2, 3, slip=slip, discount=discount, goal=5), jnp.full(6, -1.0)).value[0]

    slips = jnp.array([0.0, 0.3])
    together = jax.jit(jax.vmap(value, (0, None)))(slips, 0.9)
    np.testing.assert_allclose(together, [value(float(s), 0.9) for s in slips], rtol=1e-6)
    assert jax.jit(jax.grad(value))(0.3, 0.9) < 0  # slipping delays the goal


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 4)])
def test_shortest_paths(height, width):
    """Each step costs 1 and nothing is discounted: the value is minus the Manhattan distance to the goal."""
    mdp = gridworld(height, width, discount=1.0, goal=(0, 0), start=None if height > 1 else (0, 0))
    plan = value_iteration(mdp, jnp.full(height * width, -1.0))
    distance = np.add.outer(np.arange(height), np.arange(width)).reshape(-1)
    np.testing.assert_allclose(plan.value, -distance)


def test_cliff_has_its_known_returns():
    """Without slip or discount the optimal path of 13 steps runs along the edge (Sutton & Barto, example 6.6)."""
    mdp = cliff(discount=1.0)
    plan = value_iteration(mdp, arrival_reward(mdp, cliff_reward()))
    assert mdp.initial @ plan.value == -13.0
    # One step from the edge down the cliff: -100 once, and the episode is over.
    q = plan.q.reshape(4, 12, 4)
    assert q[2, 5, DOWN] == -100.0
    assert not plan.value.reshape(4, 12)[3, 1:].any()


def test_objectworld_reward_and_features_by_naive_loops():
    height, width, objects, colors, key = 6, 5, 7, 3, jax.random.key(4)
    world = objectworld(key, height, width, num_objects=objects, num_colors=colors)
    place_key, color_key = jax.random.split(key)
    places = np.asarray(jax.random.choice(place_key, height * width, (objects,), replace=False))
    outer, inner = np.asarray(jax.random.randint(color_key, (2, objects), 0, colors))
    assert len(set(places.tolist())) == objects
    assert world.features.shape == (height * width, 2 * colors)
    for s in range(height * width):
        far = [np.hypot(s // width - p // width, s % width - p % width) for p in places]
        nearest = [
            min([d for d, c in zip(far, colour, strict=True) if c == k], default=np.inf)
            for colour in (outer, inner)
            for k in range(colors)
        ]
        expected = 0.0 if nearest[0] > 3 else (1.0 if nearest[1] <= 2 else -1.0)
        assert world.reward[s] == expected
        scaled = np.minimum(np.array(nearest) / np.hypot(height - 1, width - 1), 1.0)
        np.testing.assert_allclose(world.features[s], scaled, rtol=1e-5)
    assert len(np.unique(world.reward)) == 3
    for bad in ({"num_objects": 0}, {"num_objects": 31}, {"num_objects": 3, "num_colors": 1}):
        with pytest.raises(ValueError, match="objectworld"):
            objectworld(key, height, width, **bad)


def test_plans_in_x64():
    with jax.enable_x64(True):
        mdp = gridworld(3, 3, slip=0.1, goal=8)
        plan = soft_value_iteration(mdp, jnp.full(9, -1.0), tolerance=1e-13)
        assert plan.value.dtype == jnp.float64
        assert plan.residual <= 1e-13
        dense = mdp.replace(transition=dense_transition(mdp.transition))
        solved = policy_evaluation(dense, plan.log_policy, jnp.ones(9))
        iterated = policy_evaluation(mdp, plan.log_policy, jnp.ones(9), tolerance=1e-13)
        np.testing.assert_allclose(iterated, solved, rtol=1e-11)


@pytest.mark.slow
def test_a_grid_of_90000_cells_holds_nothing_of_its_square():
    side = 300
    mdp = gridworld(side, side, slip=0.1, discount=0.9, goal=(150, 150))
    reward = jnp.where(mdp.terminal, 0.0, -1.0)

    def everything(reward):
        plan = soft_value_iteration(mdp, reward)
        value = policy_evaluation(mdp, plan.log_policy, reward)
        occupancy = occupancy_measure(mdp, plan.log_policy)
        return plan, value, occupancy, expected_return(mdp, plan.log_policy, reward)

    def total(reward):
        return mdp.initial @ soft_value_iteration(mdp, reward).value

    for program in (everything, jax.grad(total)):
        assert largest_value(jax.make_jaxpr(program)(reward)) <= 20 * side**2
    plan, value, occupancy, earned = jax.jit(everything)(reward)
    assert plan.residual <= 1e-5
    np.testing.assert_allclose(occupancy.sum(), 10.0, rtol=1e-2)  # nearly nobody meets the goal
    np.testing.assert_allclose(jnp.sum(occupancy * reward[:, None]), earned, rtol=1e-4)
    np.testing.assert_allclose(mdp.initial @ value, earned, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(reward), occupancy.sum(-1), atol=1e-8, rtol=1e-3)
