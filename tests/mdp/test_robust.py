"""Worst cases by hand, by SciPy's optimisers, as properties and under transformations; then planning with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.optimize import linprog, minimize_scalar

from jaxalign.mdp import (
    Contamination,
    CVaR,
    KLBall,
    L1Ball,
    SparseTransition,
    TabularMDP,
    gridworld,
    random_mdp,
    robust_policy_evaluation,
    robust_value_iteration,
    value_iteration,
    worst_case_contamination,
    worst_case_cvar,
    worst_case_kl,
    worst_case_l1,
)
from jaxalign.mdp.planning import policy_evaluation
from jaxalign.mdp.transitions import dense_transition

OPTIMIZED = True

VALUE, NOMINAL = np.array([0.0, 1.0, 2.0]), np.array([0.2, 0.3, 0.5])  # mean 1.3
WORST_CASES = {
    L1Ball: worst_case_l1,
    KLBall: worst_case_kl,
    Contamination: worst_case_contamination,
    CVaR: worst_case_cvar,
}
SETS = [L1Ball(0.4), KLBall(0.2), Contamination(0.15), CVaR(0.6)]
ids = {"ids": lambda x: type(x).__name__}


def reference(uncertainty, value, nominal, support=None):
    """The same worst case in float64 from a linear program or a scalar optimiser."""
    number, size = float(uncertainty[0]), len(value)
    one = {"A_eq": np.ones((1, size)), "b_eq": [1.0]}
    support = nominal > 0 if support is None else support | (nominal > 0)
    if isinstance(uncertainty, L1Ball):
        # p and its distance d to the nominal: |p - nominal| <= d, sum d <= radius
        eye = np.eye(size)
        rows = np.block([[eye, -eye], [-eye, -eye], [np.zeros((1, size)), np.ones((1, size))]])
        limits = np.concatenate([nominal, -nominal, [number]])
        bounds = [(0, None if possible else 0) for possible in support] + [(0, None)] * size
        equality = {"A_eq": np.r_[np.ones(size), np.zeros(size)][None], "b_eq": [1.0]}
        return linprog(np.r_[value, np.zeros(size)], rows, limits, bounds=bounds, **equality).fun
    if isinstance(uncertainty, CVaR):
        return linprog(value, bounds=[(0, p / number) for p in nominal], **one).fun
    if isinstance(uncertainty, Contamination):
        bounds = [((1 - number) * p, None if ok else (1 - number) * p) for p, ok in zip(nominal, support, strict=True)]
        return linprog(value, bounds=bounds, **one).fun
    value, nominal = value[nominal > 0], nominal[nominal > 0]
    low = value.min()

    def dual(log_t):
        t = np.exp(log_t)
        return t * np.log(nominal @ np.exp(-(value - low) / t)) + t * number - low

    return -minimize_scalar(dual, bounds=(-25, 12), method="bounded", options={"xatol": 1e-10}).fun


def random_pair(seed, size, zeros=1):
    random = np.random.default_rng(seed)
    nominal = random.dirichlet(np.ones(size))
    nominal[:zeros] = 0.0
    return random.normal(size=size) * 3, nominal / nominal.sum()


def test_by_hand():
    # L1: 0.2 of the mass goes from 2 to 0. CVaR: the worst half is 0.2 of 0 and 0.3 of 1.
    np.testing.assert_allclose(worst_case_l1(VALUE, NOMINAL, 0.4), 1.3 - 0.2 * 2, rtol=1e-6)
    np.testing.assert_allclose(worst_case_cvar(VALUE, NOMINAL, 0.5), 0.3 / 0.5, rtol=1e-6)
    np.testing.assert_allclose(worst_case_contamination(VALUE, NOMINAL, 0.1), 0.9 * 1.3, rtol=1e-6)
    # A fair coin tilted to 3/4: radius = log 2 - H(3/4).
    radius = np.log(2) + 0.75 * np.log(0.75) + 0.25 * np.log(0.25)
    np.testing.assert_allclose(worst_case_kl(VALUE[:2], np.array([0.5, 0.5]), radius), 0.25, rtol=1e-5)


@pytest.mark.parametrize("nothing", [L1Ball(0.0), KLBall(0.0), Contamination(0.0), CVaR(1.0)], **ids)
def test_nothing_uncertain_is_the_mean(nothing):
    value, nominal = random_pair(0, 30)
    for pair in ((VALUE, NOMINAL), (value, nominal), (value * 0 + 2, nominal)):
        np.testing.assert_allclose(nothing.worst_case(*pair), pair[0] @ pair[1], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("everything", [L1Ball(2.0), KLBall(50.0), Contamination(1.0), CVaR(0.0)], **ids)
def test_everything_uncertain_is_the_lowest_possible_value(everything):
    # The first states have nominal probability 0, and the lowest values.
    value, nominal = np.array([-9.0, -8.0, 3.0, 1.0, 2.0]), np.array([0.0, 0.0, 0.5, 1e-3, 0.499])
    np.testing.assert_allclose(everything.worst_case(value, nominal), 1.0, rtol=1e-5)


def test_mass_where_the_nominal_has_none_only_if_asked():
    value, nominal = np.array([-5.0, -7.0, 1.0, 2.0]), np.array([0.0, 0.0, 0.5, 0.5])
    first = np.array([True, False, False, False])
    for support, lowest in ((None, 1.0), (first, -5.0), (np.ones(4, bool), -7.0)):
        moved = worst_case_l1(value, nominal, 0.2, support=support)
        np.testing.assert_allclose(moved, 1.5 - 0.1 * (2 - lowest), rtol=1e-6)
        contaminated = worst_case_contamination(value, nominal, 0.1, support=support)
        np.testing.assert_allclose(contaminated, 0.9 * 1.5 + 0.1 * lowest, rtol=1e-6)


@pytest.mark.parametrize("kind", WORST_CASES)
def test_matches_scipy_in_float64(kind):
    with jax.enable_x64(True):
        for seed, size in ((0, 6), (1, 6), (2, 40)):
            value, nominal = random_pair(seed, size)
            for number in (0.03, 0.3, 0.9):
                expected = reference(kind(number), value, nominal)
                found = jitted(WORST_CASES[kind])(value, nominal, number)
                np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)
                if kind in (L1Ball, Contamination):
                    support = np.arange(size) < 1
                    expected = reference(kind(number), value, nominal, support)
                    found = WORST_CASES[kind](value, nominal, number, support=support)
                    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


def test_kl_at_extremes_in_float32():
    # Tiny and huge radii, scales and offsets, nearly tied and nearly impossible states.
    for scale, offset in ((1.0, 0.0), (1e-3, 0.0), (1e4, -1e4), (1.0, 100.0)):
        value = scale * np.array([1.0, 0.0, 1e-4, 3.0]) + offset
        nominal = np.array([0.5, 1e-6, 0.2, 0.299999])
        for radius in (1e-8, 1e-4, 0.1, 2.0, 13.0, 14.0, 1e3):
            found = jitted(worst_case_kl)(value.astype(np.float32), nominal.astype(np.float32), radius)
            with jax.enable_x64(True):
                expected = jitted(worst_case_kl)(value, nominal, radius)
            np.testing.assert_allclose(found, expected, atol=1e-5 * scale + 1e-6 * abs(offset))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_between_the_lowest_value_and_the_mean_and_monotone(seed, a, b):
    value, nominal = random_pair(seed, 5)
    low, high = sorted((a, b))
    for kind, worst_case in WORST_CASES.items():
        less, more = (float(jitted(worst_case)(value, nominal, x)) for x in (low, high))
        less, more = (more, less) if kind is CVaR else (less, more)  # alpha shrinks the set as it grows
        slack = 1e-5 * np.abs(value).max()
        assert value[nominal > 0].min() - slack <= more <= less + slack
        assert less <= value @ nominal + slack


@functools.cache
def jitted(function):
    return jax.jit(function)


@functools.cache
def gradient(function):
    return jax.jit(jax.grad(function, (0, 1, 2)))


@pytest.mark.parametrize("uncertainty", SETS, **ids)
def test_jit_vmap_and_gradients(uncertainty):
    worst_case, number = jitted(WORST_CASES[type(uncertainty)]), uncertainty[0]
    values, nominals = (np.stack(x) for x in zip(*(random_pair(seed, 5, 0) for seed in range(3)), strict=True))
    with jax.enable_x64(True):
        together = jax.vmap(worst_case, (0, 0, None))(values, nominals, number)
        np.testing.assert_allclose(together, [worst_case(*x, number) for x in zip(values, nominals, strict=True)])
        by_logits = jax.jit(lambda v, logits, x: worst_case(v, jax.nn.softmax(logits), x))
        order = 2 if isinstance(uncertainty, KLBall) else 1  # the others are piecewise linear
        check_grads(by_logits, (values[0], np.log(nominals[0]), number), order=order, modes=["rev"])
        worst = jax.grad(worst_case)(values[0], nominals[0], number)
        # The gradient is the worst distribution itself, and attains the worst case.
        np.testing.assert_allclose([worst.sum(), worst @ values[0]], [1.0, together[0]], rtol=1e-9)


@pytest.mark.parametrize("number", [0.0, 1.0])
@pytest.mark.parametrize("kind", WORST_CASES)
def test_gradients_stay_finite_at_the_ends(kind, number):
    for value in (VALUE, VALUE * 0):
        gradients = gradient(WORST_CASES[kind])(value, NOMINAL, number)
        assert all(np.isfinite(x).all() for x in gradients)
        np.testing.assert_allclose(gradients[0].sum(), 1.0, rtol=1e-5)


def small_mdp(branching=None, states=5, discount=0.8):
    mdp = random_mdp(jax.random.key(2), states, 2, branching=branching, discount=discount)
    return mdp.replace(terminal=jnp.arange(states) == states - 1)


def brute_force(mdp, reward, uncertainty, policy=None):
    """Value iteration in NumPy float64 with every worst case from SciPy; reward [S, A, S]."""
    probability, reward = (np.asarray(x, np.float64) for x in (dense_transition(mdp.transition), reward))
    discount, value = float(mdp.discount), np.zeros(mdp.num_states)
    probability = probability / probability.sum(-1, keepdims=True)
    for _ in range(18):  # the discount is 0.4: 0.4^18 is 7e-8
        q = np.zeros(reward.shape[:2])
        for s, a in np.argwhere(~np.asarray(mdp.terminal)[:, None] & np.ones_like(q, bool)):
            q[s, a] = reference(uncertainty, reward[s, a] + discount * value, probability[s, a])
        value = q.max(1) if policy is None else (policy * q).sum(1)
    return value, q


@pytest.mark.parametrize("uncertainty", SETS, **ids)
def test_planning_matches_brute_force(uncertainty):
    mdp = small_mdp(branching=3, states=4, discount=0.4)
    reward = np.random.default_rng(0).normal(size=(4, 2, 4))
    value, q = brute_force(mdp, reward, uncertainty)
    plan = robust_value_iteration(mdp, reward, uncertainty)
    np.testing.assert_allclose(plan.value, value, atol=3e-5)
    np.testing.assert_allclose(plan.q, q, atol=3e-5)
    np.testing.assert_array_equal(plan.policy, np.eye(2)[q.argmax(1)])
    assert plan.residual <= 1e-6
    assert plan.iterations < 100


def test_policy_evaluation_matches_brute_force():
    mdp, random = small_mdp(states=4, discount=0.4), np.random.default_rng(1)
    reward, policy = random.normal(size=(4, 2, 4)), random.dirichlet(np.ones(2), 4)
    value, _ = brute_force(mdp, reward, SETS[0], policy)
    found = robust_policy_evaluation(mdp, np.log(policy), reward, SETS[0])
    np.testing.assert_allclose(found, value, atol=3e-5)


@pytest.mark.parametrize("uncertainty", SETS, **ids)
@pytest.mark.parametrize(("kind", "axes"), [("sparse", 3), ("grid", 1)])
def test_sparse_dense_and_grid_agree(uncertainty, axes, kind):
    # In the grid several moves of one action lead to one cell.
    mdp = small_mdp(branching=3) if kind == "sparse" else gridworld(2, 3, slip=0.4, goal=(0, 2))
    states, actions = mdp.num_states, mdp.num_actions
    reward = jax.random.normal(jax.random.key(4), (states, actions, states)[:axes])
    expected = robust_value_iteration(mdp.replace(transition=dense_transition(mdp.transition)), reward, uncertainty)
    found = robust_value_iteration(mdp, reward, uncertainty)
    np.testing.assert_allclose(found.q, expected.q, atol=2e-5)
    assert not found.q[mdp.terminal].any()


def test_nothing_uncertain_is_value_iteration():
    mdp, reward = small_mdp(), jax.random.normal(jax.random.key(0), (5, 2, 5))
    for nothing in (KLBall(0.0), CVaR(1.0)):
        for horizon in (None, 3):
            expected = value_iteration(mdp, reward, horizon=horizon)
            found = robust_value_iteration(mdp, reward, nothing, horizon=horizon)
            np.testing.assert_allclose(found.value, expected.value, atol=1e-5)
            np.testing.assert_array_equal(found.policy, expected.policy)
        log_policy = jax.nn.log_softmax(reward[..., 0])
        np.testing.assert_allclose(
            robust_policy_evaluation(mdp, log_policy, reward, nothing),
            policy_evaluation(mdp, log_policy, reward),
            atol=1e-5,
        )


def test_a_full_adversary_plays_a_deterministic_game():
    # Only state 2 pays. From 0, action 0 goes to 1 or 2 as nature likes, action 1 to 2 surely at a cost of 0.3.
    next_state = jnp.array([[[1, 2], [2, 2]], [[1, 1], [1, 1]], [[2, 2], [2, 2]]], jnp.int32)
    probability = jnp.array([[[0.01, 0.99], [1.0, 0.0]], [[1.0, 0.0]] * 2, [[1.0, 0.0]] * 2])
    mdp = TabularMDP(SparseTransition(next_state, probability), jnp.eye(3)[0], jnp.zeros(3, bool), 0.5)
    reward = jnp.array([[0.0, -0.3], [0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(value_iteration(mdp, reward).value, [0.99, 0.0, 2.0], atol=1e-5)
    plan = robust_value_iteration(mdp, reward, L1Ball(2.0))
    np.testing.assert_allclose(plan.value, [0.7, 0.0, 2.0], atol=1e-5)
    np.testing.assert_allclose(plan.q[0], [0.0, 0.7], atol=1e-5)
    # One number per state and action: nature is only free in state 1, where it does not matter.
    free = jnp.zeros((3, 2)).at[1].set(2.0)
    np.testing.assert_allclose(robust_value_iteration(mdp, reward, L1Ball(free)).value, [0.99, 0.0, 2.0], atol=1e-5)
    # Asked for, a listed successor of probability 0: action 1 may now end in state 1 as well.
    unsafe = mdp.replace(transition=SparseTransition(next_state.at[0, 1, 1].set(1), probability))
    for uncertainty, value in ((Contamination(0.5), 0.7), (Contamination(0.5, support=True), 0.5 * 0.99)):
        np.testing.assert_allclose(robust_value_iteration(unsafe, reward, uncertainty).value[0], value, atol=1e-5)


def test_horizon_steps_backwards_and_tends_to_the_fixed_point():
    mdp, reward = small_mdp(), jax.random.normal(jax.random.key(0), (5, 2))
    plan = robust_value_iteration(mdp, reward, KLBall(0.1), horizon=60)
    assert (plan.value.shape, plan.q.shape, plan.policy.shape) == ((61, 5), (60, 5, 2), (60, 5, 2))
    np.testing.assert_array_equal(plan.value[-1], 0.0)
    np.testing.assert_allclose(plan.q[-1], jnp.where(mdp.terminal[:, None], 0.0, reward), atol=1e-6)
    np.testing.assert_allclose(plan.value[0], robust_value_iteration(mdp, reward, KLBall(0.1)).value, atol=1e-4)


@pytest.mark.parametrize("uncertainty", SETS, **ids)
def test_vmap_over_rewards_and_numbers(uncertainty):
    mdp, kind = small_mdp(branching=3), type(uncertainty)
    rewards = jax.random.normal(jax.random.key(0), (3, 5, 2))
    numbers = jnp.array([0.1, 0.5, 0.9])

    def value(reward, number):
        return robust_value_iteration(mdp, reward, kind(number)).value

    together = jax.jit(jax.vmap(jax.vmap(value, (None, 0)), (0, None)))(rewards, numbers)
    np.testing.assert_allclose(together[1, 2], value(rewards[1], 0.9), atol=1e-5)
    falls = np.diff(together, axis=1) * (-1.0 if kind is CVaR else 1.0)
    assert (falls <= 1e-5).all()
    assert (falls < -1e-3).any()


@pytest.mark.parametrize("uncertainty", SETS, **ids)
def test_implicit_gradients_match_finite_differences(uncertainty):
    with jax.enable_x64(True):
        mdp = random_mdp(jax.random.key(6), 4, 2, discount=0.7)
        log_policy = jax.nn.log_softmax(jax.random.normal(jax.random.key(7), (4, 2)))

        @jax.jit
        def optimal(reward, number):
            plan = robust_value_iteration(mdp, reward, type(uncertainty)(number), tolerance=1e-12)
            return jnp.sum(jnp.sin(plan.value))

        @jax.jit
        def followed(reward, number):
            value = robust_policy_evaluation(mdp, log_policy, reward, type(uncertainty)(number), tolerance=1e-12)
            return jnp.sum(jnp.sin(value))

        for function, shape in ((optimal, (4, 2, 4)), (followed, (4, 2))):
            reward = jax.random.normal(jax.random.key(8), shape)
            check_grads(function, (reward, uncertainty[0]), order=1, modes=["rev"], rtol=1e-5)


def test_clear_errors():
    mdp, reward = small_mdp(), jnp.zeros((5, 2))
    for wrong, message in (
        (L1Ball(2.5), r"L1Ball: radius must be in \[0, 2\], got 2.5"),
        (KLBall(-0.1), "KLBall: radius must be at least 0"),
        (CVaR(jnp.full((5, 2), 1.5)), r"CVaR: alpha must be in \[0, 1\]"),
        (Contamination(float("nan")), "Contamination: epsilon"),
        (L1Ball(jnp.zeros(5)), r"radius must be a scalar or \[S, A\]"),
    ):
        with pytest.raises(ValueError, match=message):
            robust_value_iteration(mdp, reward, wrong)
    with pytest.raises(TypeError, match="L1Ball, KLBall, Contamination or CVaR, got float"):
        robust_value_iteration(mdp, reward, 0.3)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        robust_value_iteration(mdp, reward, L1Ball(0.1), horizon=0)
    with pytest.raises(ValueError, match="reward must be"):
        robust_value_iteration(mdp, jnp.zeros(4), L1Ball(0.1))
    endless = mdp.replace(discount=1.0, terminal=jnp.zeros(5, bool))
    with pytest.raises(ValueError, match="robust_value_iteration: discount 1"):
        robust_value_iteration(endless, reward, L1Ball(0.1))
    with pytest.raises(ValueError, match=r"log_policy must be \[S, A\]"):
        robust_policy_evaluation(mdp, jnp.zeros((3, 5, 2)), reward, L1Ball(0.1))
    for worst_case in WORST_CASES.values():
        with pytest.raises(ValueError, match=r"value and nominal must both be \[S\]"):
            worst_case(jnp.zeros(3), jnp.ones(4) / 4, 0.1)
        with pytest.raises(ValueError, match=r"got -0\.5"):
            worst_case(VALUE, NOMINAL, -0.5)
