"""Sampling a tabular MDP earns, on average, what planning says; and domain randomisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.cartpole import cartpole
from jaxalign.environments.protocol import Discrete
from jaxalign.environments.randomization import randomized
from jaxalign.environments.tabular import tabular_environment
from jaxalign.environments.wrappers import batched
from jaxalign.mdp import TabularMDP, gridworld, policy_evaluation, side_effects, value_iteration

KEY = jax.random.key(0)
EPISODES, HORIZON = 2000, 60


def returns(environment, log_policy, discount):
    """Discounted sums of what is "paid" and of each measure, [EPISODES]; until the end of the episode or HORIZON."""

    def one(key):
        reset_key, key = jax.random.split(key)
        _, state = environment.reset(reset_key)

        def advance(carry, key):
            state, weight = carry
            action_key, step_key = jax.random.split(key)
            action = jax.random.categorical(action_key, log_policy[state])
            new = environment.step(step_key, state, action)
            earned = {"paid": new.reward, **new.info}
            return (new.state, weight * discount * ~new.terminated), jax.tree.map(lambda x: weight * x, earned)

        _, earned = jax.lax.scan(advance, (state, jnp.ones(())), jax.random.split(key, HORIZON))
        return jax.tree.map(jnp.sum, earned)

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, EPISODES))


def assert_mean(samples, expected):
    error = np.std(samples) / np.sqrt(len(samples))
    np.testing.assert_allclose(np.mean(np.asarray(samples, np.float64)), expected, rtol=1e-5, atol=4 * error)


def test_returns_agree_with_planning_for_every_form_of_reward():
    draw = np.random.default_rng(3)
    transition = draw.dirichlet(np.ones(5), (5, 3))
    # One of the starts is terminal: nothing is earned in it.
    terminal = np.array([False, True, False, False, True])
    mdp = TabularMDP(np.float32(transition), np.full(5, 0.2, np.float32), terminal, 0.8)
    rewards = [draw.normal(size=(5, 3, 5)[:n]).astype(np.float32) for n in (1, 2, 3)]
    policy = draw.dirichlet(np.ones(3), 5)
    measures = {"by action": rewards[1], "reward": rewards[2]}  # a measure may have any name
    environment = tabular_environment(mdp, rewards[0], measures=measures)
    found = returns(environment, jnp.log(policy), 0.8)

    expected = [rewards[0][:, None] + np.zeros((5, 3)), rewards[1], np.einsum("sat,sat->sa", transition, rewards[2])]
    leave = ~terminal[:, None] * np.einsum("sa,sat->st", policy, transition)
    for paid, reward in zip((found["paid"], found["by action"], found["reward"]), expected, strict=True):
        value = np.linalg.solve(np.eye(5) - 0.8 * leave, ~terminal * np.einsum("sa,sa->s", policy, reward))
        assert_mean(paid, value.mean())
    # `value` is of the reward [S, A, S] now.
    np.testing.assert_allclose(policy_evaluation(mdp, jnp.log(policy), rewards[2]), value, rtol=1e-4, atol=1e-5)


def test_safety_gridworlds_are_paid_one_thing_and_judged_by_another():
    world = side_effects()  # sparse transitions
    plan = value_iteration(world.mdp, world.reward)
    environment = tabular_environment(world.mdp, world.reward, measures={"performance": world.performance})
    found = returns(environment, jnp.log(plan.policy), world.mdp.discount)
    assert_mean(found["paid"], plan.value @ world.mdp.initial)
    hidden = policy_evaluation(world.mdp, jnp.log(plan.policy), world.performance)
    assert_mean(found["performance"], hidden @ world.mdp.initial)
    assert hidden @ world.mdp.initial < plan.value @ world.mdp.initial - 5.0


def test_a_slippery_grid():
    mdp = gridworld(2, 3, slip=0.3, goal=5, start=0, discount=0.9)
    reward = jnp.zeros((6, 5, 6)).at[:, :, 5].set(1.0)  # for coming to the goal
    plan = value_iteration(mdp, reward)
    assert_mean(returns(tabular_environment(mdp, reward), jnp.log(plan.policy), 0.9)["paid"], plan.value[0])


def test_terminated_truncated_and_terminal_starts():
    mdp = gridworld(1, 3, goal=2, start=0, stay=False)
    environment = tabular_environment(mdp, jnp.ones(3), max_steps=2)
    _, state = environment.reset(KEY)
    step = jax.jit(environment.step)
    first = step(KEY, state, 1)
    second = step(KEY, first.state, 1)
    assert (bool(first.terminated), bool(first.truncated)) == (False, False)
    assert (bool(second.terminated), bool(second.truncated)) == (True, True)
    after = step(KEY, second.state, 3)
    assert after.reward == 0.0
    assert after.terminated
    np.testing.assert_array_equal(after.observation, [0, 0, 1])


def test_observations():
    mdp = gridworld(2, 2, start=1)
    index = tabular_environment(mdp, jnp.zeros(4), observe="index")
    assert index.observation_space == Discrete(4)
    assert index.reset(KEY)[0] == 1
    features = np.arange(8.0).reshape(4, 2)
    seen = tabular_environment(mdp, jnp.zeros(4), observe=features)
    np.testing.assert_array_equal(seen.reset(KEY)[0], features[1])
    np.testing.assert_array_equal(seen.step(KEY, jnp.int32(1), 2).observation, features[3])
    for options, message in (
        ({"observe": "pixels"}, "observe must be"),
        ({"observe": np.zeros((3, 2))}, "S=4"),
        ({"measures": {"cost": np.zeros(3)}}, r"measures\['cost'\].*\(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            tabular_environment(mdp, jnp.zeros(4), **options)
    with pytest.raises(ValueError, match="reward must be"):
        tabular_environment(mdp, jnp.zeros((4, 4)))


def test_rewards_may_be_traced():
    mdp = gridworld(2, 2, start=1)
    paid = jax.vmap(lambda r: tabular_environment(mdp, r).step(KEY, jnp.int32(1), 4).reward)(jnp.eye(4) * 3)
    np.testing.assert_array_equal(paid, [0, 3, 0, 0])


def test_each_episode_keeps_the_numbers_it_drew():
    def draw(key):
        return {"force": jax.random.uniform(key, (), minval=5.0, maxval=15.0)}

    environment = randomized(lambda p: cartpole(force=p["force"], max_steps=3), draw)
    batch = batched(environment, 4)
    step = jax.jit(batch.step)
    _, state = jax.jit(batch.reset)(KEY)
    forces = [state.parameters["force"]]
    for t in range(4):
        before = state
        new = step(jax.random.key(t), state, jnp.ones(4, jnp.int32))
        state = new.state
        forces.append(state.parameters["force"])
        if t == 0:  # one step of the member with this force
            own = cartpole(force=forces[0][2], max_steps=3)
            inner = jax.tree.map(lambda x: x[2], before.inner)
            np.testing.assert_allclose(new.observation[2], jax.jit(own.step)(KEY, inner, 1).observation, rtol=1e-5)
    forces = np.array(forces)
    assert len(np.unique(forces[0])) == 4
    np.testing.assert_array_equal(forces[0], forces[2])
    assert (forces[3] != forces[2]).all()  # the third step truncated
    np.testing.assert_array_equal(forces[3], forces[4])
    assert ((forces >= 5) & (forces <= 15)).all()
