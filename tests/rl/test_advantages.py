"""GAE, lambda-returns, returns and V-trace: hand numbers, float64 loops, limits, masks, and JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxalign.rl.advantages import discounted_returns, generalized_advantage_estimation, lambda_returns, vtrace

T, N = 13, 5
METHODS = ("scan", "associative")
jitted_gae = jax.jit(generalized_advantage_estimation, static_argnames="method")
jitted_vtrace = jax.jit(vtrace, static_argnames="method")
jitted_lambda = jax.jit(lambda_returns, static_argnames="method")
jitted_returns = jax.jit(discounted_returns, static_argnames="method")


def steps(seed=0, shape=(T, N)):
    """Rewards, values, true next values, terminated, done; episodes end both ways, the rows then jump."""
    rng = np.random.default_rng(seed)
    rewards, values, beyond = rng.normal(size=(3, *shape))
    terminated, truncated = rng.random((2, *shape)) < 0.2
    done = terminated | truncated
    next_values = np.where(done, beyond, np.concatenate([values[1:], beyond[-1:]]))
    return rewards, values, next_values, terminated, done


def gae_loop(rewards, values, next_values, terminated, done, discount, gae_lambda):
    """One sequence [T] in float64."""
    discount, gae_lambda = (np.broadcast_to(x, rewards.shape) for x in (discount, gae_lambda))
    advantages, following = np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + discount[t] * (1 - terminated[t]) * next_values[t] - values[t]
        following = delta + discount[t] * gae_lambda[t] * (1 - done[t]) * following
        advantages[t] = following
    return advantages


def vtrace_loop(log_ratio, rewards, values, next_values, terminated, done, discount, gae_lambda, clips):
    advantages, errors, following = np.zeros(len(rewards)), np.zeros(len(rewards)), 0.0
    for t in reversed(range(len(rewards))):
        rho, c, policy_rho = (min(clip, np.exp(log_ratio[t])) for clip in clips)
        delta = rewards[t] + discount * (1 - terminated[t]) * next_values[t] - values[t]
        decay = discount * gae_lambda * (1 - done[t])
        advantages[t] = policy_rho * (delta + decay * following)
        errors[t] = following = rho * delta + decay * c * following
    return advantages, errors + values


def columns(loop, *arrays, **keywords):
    found = [loop(*(x[:, n] for x in arrays), **keywords) for n in range(arrays[0].shape[1])]
    return jax.tree.map(lambda *x: np.stack(x, axis=1), *found)


@pytest.mark.parametrize("method", METHODS)
def test_gae_by_hand(method):
    # Row 1 is truncated: its advantage 2 + 0.5 * 8 - 1 uses the true successor's value 8, and row 0 sees it decayed;
    # row 2 is a new episode that ends in a terminal state, whose value (100) counts for nothing.
    advantages, targets = jitted_gae(
        np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 4.0]), np.array([1.0, 8.0, 100.0]), np.array([0, 0, 1]),
        np.array([0, 1, 1]), discount=0.5, gae_lambda=0.5, method=method,
    )  # fmt: skip
    np.testing.assert_allclose(advantages, [-0.5 + 0.25 * 5.0, 5.0, -1.0])
    np.testing.assert_allclose(targets, [2.75, 6.0, 3.0])


@pytest.mark.parametrize("method", METHODS)
def test_gae_matches_the_loop(method):
    data = steps()
    expected = columns(gae_loop, *data, discount=0.97, gae_lambda=0.9)
    single, targets = jitted_gae(*data, discount=0.97, gae_lambda=0.9, method=method)
    assert single.dtype == targets.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(targets, single + data[1].astype(np.float32))
    with jax.enable_x64(True):
        double, _ = jitted_gae(*data, discount=0.97, gae_lambda=0.9, method=method)
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(T,), (T, 1), (N,)])
def test_discount_and_lambda_may_be_arrays(shape):
    rng = np.random.default_rng(4)
    data, (discount, gae_lambda) = steps(1), rng.uniform(0.5, 1.0, (2, *shape))
    if shape == (T,):  # one sequence
        data = tuple(x[:, 0] for x in data)
        expected = gae_loop(*data, discount, gae_lambda)
    else:
        wide = [np.broadcast_to(x, (T, N)) for x in (discount, gae_lambda)]
        expected = columns(gae_loop, *data, *wide)
    for method in METHODS:
        found, _ = jitted_gae(*data, discount=discount, gae_lambda=gae_lambda, method=method)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def padded(seed, before, length, after, gap=0):
    """One sequence of `length` tokens alone and in a row with masked positions around and `gap` inside, all spoiled."""
    data = steps(seed, (length,))
    place = np.r_[np.zeros(before, bool), np.ones(length, bool), np.zeros(after, bool)]
    place = np.insert(place, before + length // 2, np.zeros(gap, bool))
    wide = []
    for x, spoiled in zip(data, (np.nan, 7.0, np.nan, True, True), strict=True):
        row = np.full(place.shape, spoiled, x.dtype)
        row[place] = x
        wide.append(row)
    return data, wide, place


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("before", "after", "gap"), [(6, 0, 0), (0, 6, 0), (2, 4, 0), (1, 3, 2)])
def test_masked_positions_are_as_if_not_there(method, before, after, gap):
    alone, wide, mask = padded(2, before, 6, after, gap)
    options = {"discount": 0.9, "gae_lambda": 0.8, "method": method}
    advantages, targets = jitted_gae(*wide, **options, mask=mask)
    expected, expected_targets = jitted_gae(*alone, **options)
    np.testing.assert_allclose(advantages[mask], expected, rtol=1e-5)
    np.testing.assert_allclose(targets[mask], expected_targets, rtol=1e-5)
    np.testing.assert_array_equal(advantages[~mask], 0.0)
    np.testing.assert_array_equal(targets[~mask], 7.0)  # the values there


@pytest.mark.parametrize(("before", "after", "gap"), [(6, 0, 0), (2, 4, 0), (1, 3, 2)])
def test_the_other_functions_mask_alike(before, after, gap):
    alone, wide, mask = padded(2, before, 6, after, gap)
    ratio = np.where(mask, np.linspace(-1, 1, 12), np.nan)

    @jax.jit
    def all_three(ratio, rewards, values, next_values, terminated, done, mask):
        options = {"discount": 0.9, "mask": mask}
        return (
            lambda_returns(rewards, next_values, terminated, done, return_lambda=0.8, **options),
            discounted_returns(rewards, done, **options),
            *vtrace(ratio, rewards, values, next_values, terminated, done, **options),
        )

    found, expected = all_three(ratio, *wide, mask), all_three(ratio[mask], *alone, np.ones(6))
    for masked, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(masked[mask], plain, rtol=1e-5)
    for masked in found[:3]:
        np.testing.assert_array_equal(masked[~mask], 0.0)
    np.testing.assert_array_equal(found[3][~mask], 7.0)  # V-trace's targets are the values there


def test_masked_nan_stays_out_of_gradients():
    _, wide, mask = padded(3, 2, 6, 4)

    def total(floats, discount, log_ratio):
        rewards, values, next_values = floats
        rest = (*wide[3:],)
        gae, _ = generalized_advantage_estimation(
            rewards, values, next_values, *rest, discount=discount, gae_lambda=0.8, mask=mask
        )
        off_policy, _ = vtrace(log_ratio, rewards, values, next_values, *rest, discount=discount, mask=mask)
        return jnp.sum(gae) + jnp.sum(off_policy)

    log_ratio = jnp.where(mask, -0.1, jnp.nan)
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))([jnp.asarray(x) for x in wide[:3]], 0.9, log_ratio)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_two_sequences_in_one_row_do_not_see_each_other():
    rewards = np.array([0.0, 1.0, 9.0, 0.0, 5.0])
    mask, done = np.array([0, 1, 0, 0, 1], bool), np.array([0, 1, 0, 0, 1], bool)
    advantages, _ = jitted_gae(
        rewards, np.zeros(5), np.ones(5), np.zeros(5, bool), done, discount=0.5, gae_lambda=1.0, mask=mask
    )
    np.testing.assert_allclose(advantages, [0, 1.5, 0, 0, 5.5])


def test_lambda_zero_is_the_td_error_and_one_the_return_minus_the_baseline():
    rewards, values, next_values, terminated, done = data = steps(5)
    advantages, _ = jitted_gae(*data, discount=0.9, gae_lambda=0.0)
    td_errors = rewards + 0.9 * (1 - terminated) * next_values - values
    np.testing.assert_allclose(advantages, td_errors, rtol=1e-4, atol=1e-6)
    _, targets = jitted_gae(*data, discount=0.9, gae_lambda=1.0)
    last = np.arange(T)[:, None] == T - 1
    cut = (done | last) & ~terminated
    bootstrapped = jitted_returns(rewards + np.where(cut, 0.9 * next_values, 0.0), done, discount=0.9)
    np.testing.assert_allclose(targets, bootstrapped, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), discount=st.floats(0, 1), gae_lambda=st.floats(0, 1))
def test_ways_agree(seed, discount, gae_lambda):
    """scan == associative; GAE's targets are the lambda-returns; V-trace of the policy's own steps is GAE."""
    data = steps(seed)
    options = {"discount": discount, "gae_lambda": gae_lambda}
    advantages, targets = jitted_gae(*data, **options)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    close(jitted_gae(*data, **options, method="associative")[0], advantages)
    close(jitted_lambda(data[0], *data[2:], discount=discount, return_lambda=gae_lambda), targets)
    on_policy = jitted_vtrace(np.zeros((T, N)), *data, **options)
    close(on_policy[0], advantages)
    close(on_policy[1], targets)


@pytest.mark.parametrize("method", METHODS)
def test_vtrace_matches_the_loop(method):
    data, log_ratio = steps(6), np.random.default_rng(7).normal(size=(T, N))
    expected = columns(vtrace_loop, log_ratio, *data, discount=0.9, gae_lambda=0.8, clips=(1.5, 1.2, 2.0))
    options = {"discount": 0.9, "gae_lambda": 0.8, "clip_rho": 1.5, "clip_c": 1.2, "clip_policy_rho": 2.0}
    found = jitted_vtrace(log_ratio, *data, **options, method=method)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_vtrace_by_hand():
    # ratio 2 clipped to 1, then 0.5: error_1 = 0.5 (4 - 2), advantage_0 = 1 + 0.5 * error_1
    advantages, targets = jitted_vtrace(
        np.log([2.0, 0.5]), np.array([0.0, 4.0]), np.array([0.0, 2.0]), np.array([2.0, 0.0]), np.array([0, 1]),
        np.array([0, 1]), discount=0.5,
    )  # fmt: skip
    np.testing.assert_allclose(advantages, [1.5, 1.0])
    np.testing.assert_allclose(targets, [1.5, 3.0])


def test_vmap_and_gradients():
    data, log_ratio = steps(8), np.random.default_rng(9).normal(size=(T, N))
    lanes = jax.vmap(lambda *x: jitted_gae(*x, discount=0.9, gae_lambda=0.8), 1, 1)(*data)
    np.testing.assert_allclose(lanes, jitted_gae(*data, discount=0.9, gae_lambda=0.8), rtol=1e-5, atol=1e-6)
    flags = data[3:]

    def everything(rewards, values, next_values, discount, gae_lambda, log_ratio):
        arrays = (rewards, values, next_values, *flags)
        options = {"discount": discount, "gae_lambda": gae_lambda}
        return (
            generalized_advantage_estimation(*arrays, **options),
            lambda_returns(rewards, next_values, *flags, discount=discount, return_lambda=gae_lambda),
            vtrace(log_ratio, *arrays, **options),
        )

    with jax.enable_x64(True):
        check_grads(jax.jit(everything), (*data[:3], 0.9, 0.8, log_ratio), order=1, modes=["rev"], rtol=1e-5)


def test_mistakes_are_named():
    data = steps(0, (4, 3))
    options = {"discount": 0.9, "gae_lambda": 0.8}
    with pytest.raises(ValueError, match="'fast'"):
        generalized_advantage_estimation(*data, **options, method="fast")
    with pytest.raises(AssertionError):
        generalized_advantage_estimation(data[0][:, :1], *data[1:], **options)
    with pytest.raises(AssertionError):
        generalized_advantage_estimation(*data[:4], data[4][:, 0], **options)
    with pytest.raises(AssertionError):
        generalized_advantage_estimation(*data, **options, mask=np.ones(4))
