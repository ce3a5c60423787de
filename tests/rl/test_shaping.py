"""Shaping by a potential changes no policy, on tabular MDPs of every kind; shaping by anything else does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxalign.mdp import (
    TabularMDP,
    arrival_reward,
    gridworld,
    policy_evaluation,
    random_mdp,
    soft_value_iteration,
    value_iteration,
)
from jaxalign.mdp.safety_gridworlds import EPISODE, boat_race
from jaxalign.rl.rollout import Steps
from jaxalign.rl.shaping import potential_based_shaping, potential_incentive, shaped_reward

S, A = 5, 3


@jax.jit
def plans(mdp, reward):
    hard, soft = value_iteration(mdp, reward), soft_value_iteration(mdp, reward, temperature=0.7)
    of_uniform = policy_evaluation(mdp, jnp.full((S, A), -jnp.log(3.0)), reward)
    return hard.value, hard.q, soft.value, soft.log_policy, of_uniform


def test_by_hand():
    after, terminated = np.array([10.0, 10.0, np.nan]), np.array([False, True, True])
    found = potential_based_shaping(np.ones(3), np.full(3, 2.0), after, terminated, discount=0.5)
    np.testing.assert_allclose(found, [4.0, -1.0, -1.0])  # a terminal state's potential is not even looked at


def test_the_return_of_any_trajectory_loses_the_first_potential():
    rng = np.random.default_rng(0)
    rewards, potential, g = rng.normal(size=12), rng.normal(size=13), 0.9
    terminated = np.arange(12) == 11
    shaped = np.asarray(potential_based_shaping(rewards, potential[:-1], potential[1:], terminated, discount=g))
    powers = g ** np.arange(12)
    np.testing.assert_allclose(powers @ shaped, powers @ rewards - potential[0], rtol=1e-5)
    # Cut off instead, the value of the last state is still to come, and so is its potential.
    cut = np.asarray(potential_based_shaping(rewards, potential[:-1], potential[1:], terminated & False, discount=g))
    np.testing.assert_allclose(powers @ cut, powers @ rewards - potential[0] + g**12 * potential[12], rtol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**31 - 1),
    terminal=st.lists(st.booleans(), min_size=S, max_size=S),
    discount=st.floats(0.0, 0.95),
    scale=st.floats(0.0, 10.0),
)
def test_policies_are_invariant(seed, terminal, discount, scale):
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(S, 0.3), (S, A)).astype(np.float32)
    mdp = TabularMDP(transition, np.full(S, 1 / S, np.float32), np.array(terminal), np.float32(discount))
    reward, potential = (rng.normal(size=n).astype(np.float32) for n in ((S, A), (S,)))
    potential = scale * potential
    before, after = (
        [np.asarray(x) for x in plans(mdp, r)] for r in (jnp.asarray(reward), shaped_reward(mdp, reward, potential))
    )
    moved = np.where(terminal, 0.0, potential)
    tolerance = {"rtol": 1e-4, "atol": 2e-4 * (1.0 + scale)}
    for i in (0, 2, 4):
        np.testing.assert_allclose(after[i], before[i] - moved, **tolerance)
    np.testing.assert_allclose(after[1], before[1] - moved[:, None], **tolerance)
    np.testing.assert_allclose(np.exp(after[3]), np.exp(before[3]), atol=1e-3 * (1.0 + scale))
    # Where one action is clearly best it stays the best one.
    first, second = np.sort(before[1], axis=-1)[:, :-3:-1].T
    clear = first - second > 1e-3 * (1.0 + scale)
    assert (before[1].argmax(-1) == after[1].argmax(-1))[clear].all()


def test_the_optimal_value_as_potential_leaves_nothing_to_plan():
    mdp = gridworld(2, 3, slip=0.1, goal=5)
    reward = arrival_reward(mdp, jnp.arange(6.0))
    shaped = shaped_reward(mdp, reward, value_iteration(mdp, reward).value)
    np.testing.assert_allclose(value_iteration(mdp, shaped).value, 0.0, atol=3e-4)
    np.testing.assert_allclose(shaped.max(-1), 0.0, atol=3e-4)  # the greedy action of one step is the best


def test_a_bonus_for_approaching_is_farmed_and_its_potential_is_not():
    """Three cells in a row, the goal on the right: paid for each step towards it, the agent goes to and fro."""
    mdp = gridworld(1, 4, goal=3, start=0, stay=False)
    reward = arrival_reward(mdp, jnp.array([0.0, 0.0, 0.0, 1.0]))
    closeness = jnp.arange(4.0)
    right, left = 1, 3
    approach = jnp.zeros((4, 4)).at[:3, right].set(1.0)
    rewards = (reward + approach, shaped_reward(mdp, reward, closeness))
    farmed, shaped = (value_iteration(mdp, r).policy for r in rewards)
    assert farmed[2, left] == 1.0  # turns away from the goal, to be paid for coming back
    np.testing.assert_array_equal(shaped[:3].argmax(-1), right)


def test_boat_race_bonus_is_no_potential():
    """The arrows' bonus of the boat race pays for a loop that leads nowhere; a potential sums to 0 round any loop."""
    world = boat_race(discount=1.0)
    there, back = 1, 3
    cell = {state.agent: i for i, state in enumerate(world.states)}
    start, arrow = cell[1, 1], cell[1, 2]
    assert world.reward[start, there] + world.reward[arrow, back] > 2 * world.reward.min()
    potential = jax.random.normal(jax.random.key(0), (len(world.states),))
    plain = jnp.full_like(world.reward, -1.0)
    shaped = shaped_reward(world.mdp, plain, potential)
    np.testing.assert_allclose(shaped[start, there] + shaped[arrow, back], -2.0, atol=1e-5)
    value = value_iteration(world.mdp, shaped, horizon=EPISODE).value[0]
    # A horizon ends in states that keep their potential, so 100 steps are worth -100 up to the potentials' range.
    np.testing.assert_allclose(value, -100.0 + potential.max() - potential, atol=1e-3)


def test_incentive_is_the_function_of_observations():
    rng = np.random.default_rng(1)
    seen, after = rng.normal(size=(2, 4, 3, 2)).astype(np.float32)
    flags = np.zeros((4, 3), bool)
    terminated, truncated = flags.copy(), flags.copy()
    terminated[1, 0], truncated[2, 1] = True, True
    rewards = rng.normal(size=(4, 3)).astype(np.float32)
    steps = Steps(seen, flags, rewards, after, terminated, truncated, rewards, {})
    potential = lambda observation: observation[0] * 2.0 + observation[1] ** 2  # noqa: E731
    incentive = potential_incentive(potential, discount=0.9)
    _, paid, metrics = jax.jit(incentive.apply)(incentive.init(jax.random.key(0)), steps, jax.random.key(1))
    p, p_after = (x[..., 0] * 2.0 + x[..., 1] ** 2 for x in (seen, after))
    np.testing.assert_allclose(paid, rewards + 0.9 * np.where(terminated, 0.0, p_after) - p, rtol=1e-5, atol=1e-5)
    assert metrics == {}


def test_transformations_and_errors():
    mdp = random_mdp(jax.random.key(0), S, A)
    reward, potential = jax.random.normal(jax.random.key(1), (S, A)), jax.random.normal(jax.random.key(2), (3, S))
    together = jax.jit(jax.vmap(lambda p: shaped_reward(mdp, reward, p)))(potential)
    np.testing.assert_allclose(together[1], shaped_reward(mdp, reward, potential[1]), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda g: potential_based_shaping(1.0, 2.0, 3.0, False, discount=g))(0.5)
    assert slope == 3.0
    with jax.enable_x64(True):
        assert potential_based_shaping(np.ones(2), np.ones(2), np.ones(2), [0, 1], discount=0.5).dtype == jnp.float64
    with pytest.raises(ValueError, match=r"potential must be \[5\]"):
        shaped_reward(mdp, reward, jnp.zeros((S, 1)))
