"""Wrappers on a staircase of three steps whose every number is known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.environments.protocol import Box, Discrete, Environment, TimeStep, check_environment, valid_action
from jaxalign.environments.wrappers import (
    auto_reset,
    batched,
    clip_actions,
    episode_statistics,
    normalize_observations,
    normalize_rewards,
    rescale_actions,
    time_limit,
)

KEY = jax.random.key(0)


class Step(NamedTuple):
    start: jax.Array
    count: jax.Array


def staircase(top: int = 3) -> Environment:
    """Observes [start in 0..9 drawn at reset, steps taken]; step n pays n and the top one terminates."""

    def observe(state):
        return jnp.stack([state.start, state.count]).astype(jnp.float32)

    def reset(key):
        start = (jax.random.key_data(key)[-1] % 10).astype(jnp.int32)  # quicker to compile than randint
        state = Step(start, jnp.zeros((), jnp.int32))
        return observe(state), state

    def step(key, state, action):
        new = state._replace(count=state.count + action)
        reward = new.count.astype(jnp.float32)
        return TimeStep(observe(new), new, reward, new.count >= top, jnp.zeros((), bool), {})

    return Environment(reset, step, Box(0.0, 9.0, (2,)), Discrete(2), "staircase")


def echo() -> Environment:
    """Pays the sum of its action, of [-1, 3] and [-2, 2]; NaN for one out of these limits."""
    space = Box(np.array([-1.0, -2.0]), np.array([3.0, 2.0]), (2,))

    def step(key, state, action):
        valid = valid_action("echo", space, action)
        never = jnp.zeros((), bool)
        return TimeStep(action, state, jnp.where(valid, action.sum(), jnp.nan), never, never, {})

    return Environment(lambda key: (jnp.zeros(2), jnp.zeros(())), step, Box(-9.0, 9.0, (2,)), space, "echo")


def play(environment, length, action=1):
    """TimeSteps [length, ...] of always the same action, without their states."""

    @jax.jit
    def run(key):
        start_key, key = jax.random.split(key)
        first, state = environment.reset(start_key)

        def advance(state, key):
            new = environment.step(key, state, jnp.full(first.shape[:-1], action))
            return new.state, new._replace(state=None)

        return first, jax.lax.scan(advance, state, jax.random.split(key, length))[1]

    return run(KEY)


def test_time_limit_truncates_and_keeps_termination_apart():
    _, steps = play(time_limit(staircase(), 2), 3)
    np.testing.assert_array_equal(steps.truncated, [False, True, True])
    np.testing.assert_array_equal(steps.terminated, [False, False, True])
    limit = jax.jit(lambda n: time_limit(staircase(), n).step(KEY, time_limit(staircase(), n).reset(KEY)[1], 1))
    assert limit(1).truncated
    assert not limit(2).truncated


def test_auto_reset_gives_the_next_start_and_the_true_successor():
    first, steps = play(auto_reset(staircase()), 7)
    np.testing.assert_array_equal(steps.observation[:, 1], [1, 2, 0, 1, 2, 0, 1])
    np.testing.assert_array_equal(steps.info["final_observation"][:, 1], [1, 2, 3, 1, 2, 3, 1])
    np.testing.assert_array_equal(steps.terminated, [False, False, True] * 2 + [False])
    np.testing.assert_array_equal(steps.reward, [1, 2, 3, 1, 2, 3, 1])
    # The successor belongs to the old episode, the observation to the new.
    assert steps.info["final_observation"][2, 0] == first[0]
    starts = steps.observation[:, 0]
    assert starts[2] == starts[3] == starts[4]


def test_auto_reset_follows_truncation_and_the_limit_counts_anew():
    _, steps = play(auto_reset(time_limit(staircase(), 2)), 6)
    np.testing.assert_array_equal(steps.truncated, [False, True] * 3)
    assert not steps.terminated.any()
    np.testing.assert_array_equal(steps.observation[:, 1], [1, 0] * 3)


def test_batched_resets_those_that_are_done_and_no_others():
    batch = batched(time_limit(staircase(), 5), 3)
    observation, state = jax.jit(batch.reset)(KEY)
    assert observation.shape == (3, 2)
    step = jax.jit(batch.step)
    # The first climbs at every step, the second at every other one, the third never (truncated after 5).
    counts, finals, terminated, truncated = [], [], [], []
    for t in range(6):
        new = step(jax.random.key(t), state, jnp.array([1, t % 2, 0]))
        state = new.state
        counts.append(new.observation[:, 1])
        finals.append(new.info["final_observation"][:, 1])
        terminated.append(new.terminated)
        truncated.append(new.truncated)
    np.testing.assert_array_equal(counts, [[1, 0, 0], [2, 1, 0], [0, 1, 0], [1, 2, 0], [2, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(finals, [[1, 0, 0], [2, 1, 0], [3, 1, 0], [1, 2, 0], [2, 2, 0], [3, 1, 0]])
    np.testing.assert_array_equal(np.argwhere(terminated), [[2, 0], [5, 0]])
    np.testing.assert_array_equal(np.argwhere(truncated), [[4, 1], [4, 2]])


def test_batched_steps_equal_single_steps_and_starts_differ():
    batch = batched(staircase(), 64)
    first, state = jax.jit(batch.reset)(KEY)
    assert len(np.unique(first[:, 0])) > 3
    new = jax.jit(batch.step)(KEY, state, jnp.ones(64, jnp.int32))
    one = staircase().step(KEY, jax.tree.map(lambda x: x[5], state), 1)
    np.testing.assert_array_equal(new.observation[5], one.observation)
    _, steps = play(batched(staircase(1), 64), 4)
    assert len({tuple(row) for row in np.asarray(steps.observation[..., 0])}) == 4  # new starts at each reset


def test_only_a_done_batch_pays_for_starts():
    starts = []

    def counted(key):
        jax.debug.callback(lambda: starts.append(1))
        return staircase().reset(key)

    batch = batched(staircase().replace(reset=counted), 4)
    _, state = jax.jit(batch.reset)(KEY)
    step = jax.jit(batch.step)
    for expected in (1, 1, 2):  # the episodes end in the third step; without arguments, one call for all four
        state = step(KEY, state, jnp.ones(4, jnp.int32)).state
        jax.effects_barrier()
        assert len(starts) == expected


@pytest.mark.parametrize(("inner", "outer"), [(episode_statistics, auto_reset), (auto_reset, episode_statistics)])
def test_episode_statistics_of_either_order(inner, outer):
    _, steps = play(outer(inner(time_limit(staircase(), 4))), 6)
    np.testing.assert_array_equal(steps.info["episode_return"], [1, 3, 6, 1, 3, 6])
    np.testing.assert_array_equal(steps.info["episode_length"], [1, 2, 3, 1, 2, 3])


def test_normalized_observations_of_a_batch_agree_with_numpy():
    environment = batched(staircase(), 5)
    plain_first, plain = play(environment, 20)
    _, steps = play(normalize_observations(environment, clip=3.0), 20)
    seen = np.asarray(jnp.concatenate([plain_first[None], plain.observation]), np.float64)
    for t in (1, 7, 20):
        rows = seen[: t + 1].reshape(-1, 2)
        mean, deviation = rows.mean(0), np.sqrt(rows.var(0) + 1e-8)
        np.testing.assert_allclose(
            steps.observation[t - 1], np.clip((seen[t] - mean) / deviation, -3, 3), rtol=1e-4, atol=1e-5
        )
        final = np.asarray(plain.info["final_observation"][t - 1], np.float64)
        np.testing.assert_allclose(
            steps.info["final_observation"][t - 1], np.clip((final - mean) / deviation, -3, 3), rtol=1e-4, atol=1e-5
        )
    np.testing.assert_array_equal(steps.reward, plain.reward)


@pytest.mark.parametrize("environment", [auto_reset(staircase()), batched(staircase(), 5)])
def test_normalized_rewards_agree_with_numpy(environment):
    _, plain = play(environment, 20)
    _, steps = play(normalize_rewards(environment, discount=0.9), 20)
    rewards, done = np.asarray(plain.reward, np.float64), np.asarray(plain.terminated)
    total, seen = np.zeros(rewards.shape[1:]), []
    for t in range(20):
        total = 0.9 * total + rewards[t]
        seen.append(total)
        expected = np.clip(rewards[t] / np.sqrt(np.var(seen) + 1e-8), -10, 10)
        np.testing.assert_allclose(steps.reward[t], expected, rtol=1e-4)
        total = np.where(done[t], 0.0, total)


def test_moments_live_through_resets_outside_and_not_inside():
    _, outside = play(normalize_rewards(auto_reset(staircase()), discount=0.5), 4)
    _, inside = play(auto_reset(normalize_rewards(staircase(), discount=0.5)), 4)
    assert inside.reward[3] == inside.reward[0] == 10.0  # a first reward has no deviation: cut
    assert 0.0 < outside.reward[3] < 2.0


def test_a_reward_that_is_no_number_stays_and_spoils_no_other():
    def broken(environment):
        def step(key, state, action):
            new = environment.step(key, state, action)
            return new._replace(reward=jnp.where(state.count == 1, jnp.nan, new.reward))

        return environment.replace(step=step)

    _, steps = play(normalize_rewards(auto_reset(broken(staircase())), discount=0.5), 9)
    np.testing.assert_array_equal(np.isnan(steps.reward), [False, True, False] * 3)


def test_clip_and_rescale_actions():
    step = jax.jit(clip_actions(echo()).step)
    np.testing.assert_allclose(step(KEY, jnp.zeros(()), jnp.array([7.0, -7.0])).reward, 3.0 - 2.0)
    assert np.isnan(step(KEY, jnp.zeros(()), jnp.array([jnp.nan, 0.0])).reward)
    step = jax.jit(rescale_actions(echo()).step)
    np.testing.assert_allclose(step(KEY, jnp.zeros(()), jnp.array([0.5, -0.5])).observation, [2.0, -1.0])
    for end in (-1.0, 1.0):  # at the limits rounding must not make an action invalid
        assert np.isfinite(step(KEY, jnp.zeros(()), jnp.full(2, end)).reward)
    assert np.isnan(step(KEY, jnp.zeros(()), jnp.array([1.01, 0.0])).reward)
    with pytest.raises(ValueError, match=r"echo: action \[1.5, 0.0\] is not in"):
        rescale_actions(echo()).step(KEY, jnp.zeros(()), np.array([1.5, 0.0]))
    thirds = rescale_actions(echo(), 0.1, 0.3)
    sweep = jax.vmap(lambda x: jax.jit(thirds.step)(KEY, jnp.zeros(()), jnp.stack([x, x])).reward)
    assert np.isfinite(sweep(jnp.linspace(0.1, 0.3, 50).clip(0.1, 0.3))).all()


def test_wrong_uses_are_named():
    with pytest.raises(ValueError, match="staircase resets itself"):
        play(auto_reset(auto_reset(staircase())), 1)
    with pytest.raises(ValueError, match="staircase resets itself"):
        play(batched(auto_reset(staircase()), 2), 1)
    for wrapper in (clip_actions, rescale_actions):
        with pytest.raises(ValueError, match="staircase takes integer actions"):
            wrapper(staircase())
    with pytest.raises(ValueError, match="without limits"):
        rescale_actions(clip_actions(echo()))
    with pytest.raises(ValueError, match="observes integers"):
        normalize_observations(staircase().replace(observation_space=Discrete(3)))


def test_wrapped_environments_keep_the_protocol():
    for wrapped in (
        time_limit(staircase(), 5),
        auto_reset(episode_statistics(time_limit(staircase(), 5))),
        normalize_rewards(normalize_observations(auto_reset(staircase())), discount=0.9),
        clip_actions(echo()),
        rescale_actions(echo()),
    ):
        check_environment(wrapped)
