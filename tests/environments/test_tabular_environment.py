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
from jaxalign.mdp import (
    absent_supervisor,
    arrival_reward,
    gridworld,
    occupancy_measure,
    policy_evaluation,
    random_mdp,
    side_effects,
    value_iteration,
)

KEY = jax.random.key(0)
EPISODES, HORIZON = 4000, 60


def returns(environment, log_policy, discount):
    """Discounted sums of the reward and of each measure, [EPISODES], until the episode ends or for HORIZON steps."""

    def one(key):
        reset_key, key = jax.random.split(key)
        _, state = environment.reset(reset_key)

        def advance(carry, key):
            state, weight = carry
            action_key, step_key = jax.random.split(key)
            action = jax.random.categorical(action_key, log_policy[state])
            new = environment.step(step_key, state, action)
            earned = {"reward": new.reward, **new.info}
            return (new.state, weight * discount * ~new.terminated), jax.tree.map(lambda x: weight * x, earned)

        _, earned = jax.lax.scan(advance, (state, jnp.ones(())), jax.random.split(key, HORIZON))
        return jax.tree.map(jnp.sum, earned)

    return jax.jit(jax.vmap(one))(jax.random.split(KEY, EPISODES))


def assert_mean(samples, expected):
    error = float(jnp.std(samples)) / np.sqrt(len(samples))
    assert abs(float(jnp.mean(samples)) - float(expected)) < 4 * error + 1e-5, (jnp.mean(samples), expected, error)


@pytest.mark.parametrize("branching", [None, 2])
def test_returns_agree_with_policy_evaluation_for_every_form_of_reward(branching):
    keys = jax.random.split(jax.random.key(3), 5)
    mdp = random_mdp(keys[0], 5, 3, branching=branching, discount=0.8)
    # One of the starts is terminal: nothing is earned in it.
    mdp = mdp.replace(terminal=jnp.array([False, True, False, False, True]))
    rewards = {n: jax.random.normal(k, (5, 3, 5)[:n]) for n, k in zip((1, 2, 3), keys[1:], strict=False)}
    log_policy = jax.nn.log_softmax(jax.random.normal(keys[4], (5, 3)))
    environment = tabular_environment(mdp, rewards[1], measures={"by action": rewards[2], "reward": rewards[3]})
    found = returns(environment, log_policy, 0.8)
    # A measure may be called "reward": it stays apart, and here hides the reward among the names of `returns`.
    assert_mean(found["reward"], mdp.initial @ policy_evaluation(mdp, log_policy, rewards[3]))
    assert_mean(found["by action"], mdp.initial @ policy_evaluation(mdp, log_policy, rewards[2]))
    paid = returns(tabular_environment(mdp, rewards[1]), log_policy, 0.8)["reward"]
    assert_mean(paid, mdp.initial @ policy_evaluation(mdp, log_policy, rewards[1]))


def test_a_grid_and_its_features():
    mdp = gridworld(3, 3, slip=0.3, goal=8, start=0, discount=0.9)
    reward = arrival_reward(mdp, jnp.zeros(9).at[8].set(1.0))
    plan = value_iteration(mdp, reward)
    environment = tabular_environment(mdp, reward, measures={"corner": jnp.eye(9)[2]})
    found = returns(environment, jnp.log(plan.policy), 0.9)
    assert_mean(found["reward"], plan.value[0])
    visits = occupancy_measure(mdp, jnp.log(plan.policy))
    assert_mean(found["corner"], visits[2].sum())


def test_safety_gridworlds_are_paid_one_thing_and_judged_by_another():
    for world in (side_effects(), absent_supervisor()):
        plan = value_iteration(world.mdp, world.reward)
        environment = tabular_environment(world.mdp, world.reward, measures={"performance": world.performance})
        found = returns(environment, jnp.log(plan.policy), world.mdp.discount)
        assert_mean(found["reward"], world.mdp.initial @ plan.value)
        hidden = policy_evaluation(world.mdp, jnp.log(plan.policy), world.performance)
        assert_mean(found["performance"], world.mdp.initial @ hidden)


def test_terminated_truncated_and_terminal_starts():
    mdp = gridworld(1, 3, goal=2, start=0, stay=False)
    environment = tabular_environment(mdp, jnp.ones(3), max_steps=2)
    _, state = environment.reset(KEY)
    first = environment.step(KEY, state, 1)
    second = environment.step(KEY, first.state, 1)
    assert (bool(first.terminated), bool(first.truncated)) == (False, False)
    assert (bool(second.terminated), bool(second.truncated)) == (True, True)
    after = environment.step(KEY, second.state, 3)
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
    environment = randomized(
        lambda p: cartpole(force=p["force"], max_steps=3), lambda key: {"force": jax.random.uniform(key, (), minval=5.0, maxval=15.0)}
    )
    batch = batched(environment, 4)
    step = jax.jit(batch.step)
    _, state = batch.reset(KEY)
    forces = [state.parameters["force"]]
    for t in range(4):
        before = state
        new = step(jax.random.key(t), state, jnp.ones(4, jnp.int32))
        state = new.state
        forces.append(state.parameters["force"])
        if t == 0:  # one step of the member with this force
            own = cartpole(force=forces[0][2], max_steps=3)
            inner = jax.tree.map(lambda x: x[2], before.inner)
            np.testing.assert_allclose(new.observation[2], own.step(KEY, inner, 1).observation, rtol=1e-5)
    forces = np.array(forces)
    assert len(np.unique(forces[0])) == 4
    np.testing.assert_array_equal(forces[0], forces[2])
    assert (forces[3] != forces[2]).all()  # the third step truncated
    np.testing.assert_array_equal(forces[3], forces[4])
    assert ((forces >= 5) & (forces <= 15)).all()


def test_a_single_draw_is_the_environment_itself():
    environment = randomized(lambda p: cartpole(gravity=p), lambda key: jnp.asarray(9.8))
    _, state = environment.reset(KEY)
    new, plain = environment.step(KEY, state, 1), cartpole().step(KEY, state.inner, 1)
    np.testing.assert_allclose(new.observation, plain.observation, rtol=1e-6)
