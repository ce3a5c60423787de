"""Planning: hand numbers, limits, NumPy float64 loops over every form, shape and horizon, and implicit gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import logsumexp, softmax

from jaxalign.mdp import (
    Contamination,
    GridTransition,
    SparseTransition,
    TabularMDP,
    action_reward,
    dense_transition,
    expected_return,
    fixed_point,
    gridworld,
    occupancy_measure,
    policy_evaluation,
    random_mdp,
    robust_value_iteration,
    soft_value_iteration,
    value_iteration,
)
from jaxalign.mdp.fixed_point import l1_norm, sup_norm
from jaxalign.mdp.planning import MAX_SOLVE_STATES

S, A = 6, 3
TIGHT = {"tolerance": 1e-13, "max_iterations": 100_000}


def problem(form: str, *, discount: float = 0.8, ends: bool = True) -> TabularMDP:
    """Six states and three actions; the last state is terminal if `ends`. Call under x64 for float64."""
    rng = np.random.default_rng(5)
    if form == "dense":
        transition = rng.dirichlet(np.ones(S), (S, A))
    elif form == "sparse":
        transition = SparseTransition(rng.integers(0, S, (S, A, 3)), rng.dirichlet(np.ones(3), (S, A)))
        transition.next_state[0, :, 0] = S - 1  # a way to the end
    else:
        moves = ((-1, 0), (0, 1), (1, 0), (0, -1))
        transition = GridTransition(jnp.asarray(rng.dirichlet(np.ones(4), A)), jnp.ones((2, 3), bool), moves)
    terminal = np.zeros(S, bool)
    terminal[-1] = ends
    return TabularMDP(transition, rng.dirichlet(np.ones(S)), terminal, discount)


def rewards(shape: str) -> np.ndarray:
    axes = {"S": (S,), "SA": (S, A), "SAS": (S, A, S)}[shape]
    return np.random.default_rng(6).normal(size=axes)


class Naive:
    """The same quantities by loops over states and actions, float64."""

    def __init__(self, mdp: TabularMDP, reward: np.ndarray):
        self.p = np.asarray(dense_transition(mdp.transition), np.float64)
        self.initial, self.terminal, self.g = np.asarray(mdp.initial), np.asarray(mdp.terminal), float(mdp.discount)
        self.r = np.zeros((S, A))
        for s, a in np.ndindex(S, A):
            if not self.terminal[s]:
                paid = {1: lambda s, a: reward[s], 2: lambda s, a: reward[s, a]}.get(reward.ndim)
                self.r[s, a] = paid(s, a) if paid else sum(self.p[s, a, z] * reward[s, a, z] for z in range(S))

    def q(self, value):
        q = np.zeros((S, A))
        for s, a in np.ndindex(S, A):
            if not self.terminal[s]:
                q[s, a] = self.r[s, a] + self.g * sum(self.p[s, a, z] * value[z] for z in range(S))
        return q

    def plan(self, maximum, steps):
        """The values with 0..steps steps to go, latest first."""
        values = [np.zeros(S)]
        for _ in range(steps):
            q = self.q(values[0])
            values.insert(0, np.array([0.0 if self.terminal[s] else maximum(q[s]) for s in range(S)]))
        return values

    def occupancy(self, policies):
        mass, total = self.initial.copy(), np.zeros((S, A))
        for k, policy in enumerate(policies):
            arrived = np.zeros(S)
            for s, a in np.ndindex(S, A):
                if not self.terminal[s]:
                    total[s, a] += self.g**k * mass[s] * policy[s, a]
                    arrived += mass[s] * policy[s, a] * self.p[s, a]
            mass = arrived
        return total


def soft_max(t):
    return lambda q: t * logsumexp(q / t)


@pytest.mark.parametrize("form", ["dense", "sparse", "grid"])
@pytest.mark.parametrize("shape", ["S", "SA", "SAS"])
def test_matches_naive_loops(form, shape):
    with jax.enable_x64(True):
        mdp, reward = problem(form), rewards(shape)
        naive = Naive(mdp, reward)
        for plan, maximum in (
            (value_iteration(mdp, reward, **TIGHT), np.max),
            (soft_value_iteration(mdp, reward, temperature=0.3, **TIGHT), soft_max(0.3)),
        ):
            expected = naive.plan(maximum, 150)[0]
            np.testing.assert_allclose(plan.value, expected, rtol=1e-11, atol=1e-12)
            np.testing.assert_allclose(plan.q, naive.q(expected), rtol=1e-11, atol=1e-12)
            assert plan.residual <= 1e-13
            assert 20 < plan.iterations < 150
        greedy = value_iteration(mdp, reward, **TIGHT).policy
        np.testing.assert_array_equal(greedy, np.eye(A)[plan_argmax(naive)])
        np.testing.assert_allclose(jnp.exp(plan.log_policy), softmax(naive.q(expected) / 0.3, axis=-1), rtol=1e-10)
        occupancy = occupancy_measure(mdp, plan.log_policy, **TIGHT)
        np.testing.assert_allclose(
            occupancy, naive.occupancy([np.exp(plan.log_policy)] * 150), rtol=1e-10, atol=1e-12
        )
        value = policy_evaluation(mdp, plan.log_policy, reward, **TIGHT)
        for s in range(S):
            follow = Naive(mdp.replace(initial=np.eye(S)[s]), reward)
            earned = np.sum(follow.occupancy([np.exp(plan.log_policy)] * 150) * naive.r)
            np.testing.assert_allclose(value[s], earned, rtol=1e-10, atol=1e-12)


def plan_argmax(naive):
    return np.argmax(naive.q(naive.plan(np.max, 150)[0]), axis=-1)


@pytest.mark.parametrize("form", ["dense", "sparse", "grid"])
@pytest.mark.parametrize("shape", ["S", "SA", "SAS"])
def test_finite_horizon_matches_naive_loops(form, shape):
    horizon = 4
    with jax.enable_x64(True):
        mdp, reward = problem(form, discount=1.0, ends=False), rewards(shape)
        naive = Naive(mdp, reward)
        hard, soft = value_iteration(mdp, reward, horizon=4), soft_value_iteration(mdp, reward, horizon=4)
        for plan, maximum in ((hard, np.max), (soft, soft_max(1.0))):
            expected = naive.plan(maximum, horizon)
            assert (plan.value.shape, plan.q.shape) == ((horizon + 1, S), (horizon, S, A))
            np.testing.assert_allclose(plan.value, expected, rtol=1e-12)
            np.testing.assert_allclose(plan.q, [naive.q(v) for v in expected[1:]], rtol=1e-12)
            assert (int(plan.iterations), float(plan.residual)) == (horizon, 0.0)
        np.testing.assert_array_equal(hard.policy, np.eye(A)[np.argmax(hard.q, axis=-1)])
        policies = np.exp(soft.log_policy)
        occupancy = occupancy_measure(mdp, soft.log_policy)
        np.testing.assert_allclose(occupancy, naive.occupancy(policies), rtol=1e-12)
        np.testing.assert_allclose(occupancy, occupancy_measure(mdp, soft.log_policy, horizon=horizon), rtol=1e-15)
        earned = expected_return(mdp, soft.log_policy, reward)
        np.testing.assert_allclose(earned, np.sum(occupancy * naive.r), rtol=1e-12)
        stationary = occupancy_measure(mdp, soft.log_policy[0], horizon=horizon)
        np.testing.assert_allclose(stationary, naive.occupancy([policies[0]] * horizon), rtol=1e-12)


def two_states(discount=0.5, **changes):
    """State 0: action 0 stays, action 1 goes to state 1. State 1 is left for ever."""
    p = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    return TabularMDP(p, [1.0, 0.0], [False, False], discount).replace(**changes)


def test_two_states_by_hand():
    mdp, reward = two_states(), jnp.array([1.0, 3.0])
    plan = value_iteration(mdp, reward)
    # State 1 is worth 3 / (1 - 1/2); from state 0 going pays 1 + 6/2, staying 1 + 4/2.
    np.testing.assert_allclose(plan.value, [4.0, 6.0], rtol=1e-6)
    np.testing.assert_allclose(plan.q, [[3.0, 4.0], [6.0, 6.0]], rtol=1e-6)
    np.testing.assert_array_equal(plan.policy, [[0, 1], [1, 0]])
    half = jnp.log(jnp.full((2, 2), 0.5))
    # v0 = 1 + (v0 + 6) / 4;  mu0 = 1 + mu0 / 4, mu1 = (mu0 / 2 + mu1) / 2
    np.testing.assert_allclose(policy_evaluation(mdp, half, reward), [10 / 3, 6.0], rtol=1e-6)
    np.testing.assert_allclose(occupancy_measure(mdp, half), [[2 / 3, 2 / 3], [1 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(expected_return(mdp, half, reward), 10 / 3, rtol=1e-6)
    np.testing.assert_allclose(occupancy_measure(mdp, half, horizon=2), [[0.625, 0.625], [0.125, 0.125]], rtol=1e-6)


def test_absorbing_state_keeps_earning_reward_and_entropy():
    plan = soft_value_iteration(two_states(0.9), jnp.array([0.0, 0.7]))
    np.testing.assert_allclose(plan.value[1], (0.7 + np.log(2)) / 0.1, rtol=1e-5)
    np.testing.assert_allclose(plan.log_policy[1], -np.log(2), rtol=1e-6)


def test_terminal_state_earns_nothing_even_without_discounting():
    mdp = two_states(1.0, terminal=np.array([False, True]))
    plan = soft_value_iteration(mdp, jnp.array([-1.0, 100.0]))
    # v = log(exp(-1 + v) + exp(-1)): v = -1 - log(1 - 1/e)
    np.testing.assert_allclose(plan.value, [-1 - np.log(1 - np.exp(-1)), 0.0], rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(plan.log_policy[1]), 0.5, rtol=1e-6)
    hard = jax.jit(lambda r: value_iteration(mdp, r))(jnp.array([-1.0, 100.0]))
    np.testing.assert_allclose(hard.value, [-1.0, 0.0])
    # Staying with probability 1/e makes 1 / (1 - 1/e) visits, and the end is not visited.
    occupancy = occupancy_measure(mdp, plan.log_policy)
    np.testing.assert_allclose(occupancy.sum(-1), [1 / (1 - np.exp(-1)), 0.0], rtol=1e-5)


@pytest.mark.parametrize("form", ["dense", "sparse", "grid"])
def test_limits(form):
    with jax.enable_x64(True):
        mdp, reward = problem(form), rewards("SA")
        hard = value_iteration(mdp, reward, **TIGHT)
        cold = soft_value_iteration(mdp, reward, temperature=1e-4, **TIGHT)
        assert jnp.max(jnp.abs(cold.value - hard.value)) <= 1e-4 * np.log(A) / (1 - 0.8)
        np.testing.assert_allclose(jnp.exp(cold.log_policy)[:-1], hard.policy[:-1], atol=1e-12)
        for plan in (value_iteration, soft_value_iteration):
            far = plan(mdp, reward, horizon=120)
            near = plan(mdp, reward, **TIGHT)
            np.testing.assert_allclose(far.value[0], near.value, atol=1e-10)
        timed = jnp.broadcast_to(cold.log_policy, (120, S, A))
        stationary = policy_evaluation(mdp, cold.log_policy, reward, **TIGHT)
        np.testing.assert_allclose(policy_evaluation(mdp, timed, reward)[0], stationary, atol=1e-9)
        # With equal rewards only entropy counts: the policy is uniform, and shifts by the discount do not matter.
        flat = soft_value_iteration(problem(form, ends=False), jnp.zeros(S), temperature=2.0, **TIGHT)
        np.testing.assert_allclose(flat.value, 2.0 * np.log(A) / (1 - 0.8), rtol=1e-11)
        np.testing.assert_allclose(flat.log_policy, -np.log(A), rtol=1e-11)


@pytest.mark.parametrize("form", ["dense", "sparse", "grid"])
def test_occupancy_of_reward_is_the_return(form):
    with jax.enable_x64(True):
        for ends, discount in ((True, 1.0), (True, 0.8), (False, 0.95)):
            mdp = problem(form, discount=discount, ends=ends)
            log_policy = jax.nn.log_softmax(rewards("SA"))
            occupancy = occupancy_measure(mdp, log_policy, **TIGHT)
            for shape in ("S", "SA", "SAS"):
                earned = jnp.sum(occupancy * action_reward(mdp, rewards(shape)))
                value = policy_evaluation(mdp, log_policy, rewards(shape), **TIGHT)
                np.testing.assert_allclose(mdp.initial @ value, earned, rtol=1e-9)
                np.testing.assert_allclose(expected_return(mdp, log_policy, rewards(shape)), earned, rtol=1e-4)
            if not ends:
                np.testing.assert_allclose(occupancy.sum(), 1 / (1 - discount), rtol=1e-10)


def test_solved_and_iterated_evaluation_agree():
    """A sparse MDP of more states than the dense solve takes, against the solve made by hand."""
    size = MAX_SOLVE_STATES + 1
    with jax.enable_x64(True):
        mdp = random_mdp(jax.random.key(0), size, 2, branching=3)
        log_policy = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (size, 2)))
        between = np.einsum("sa,saz->sz", np.exp(log_policy), np.asarray(dense_transition(mdp.transition)))
        reward = np.random.default_rng(0).normal(size=size)
        value = np.linalg.solve(np.eye(size) - 0.9 * between, reward)
        visits = np.linalg.solve(np.eye(size) - 0.9 * between.T, np.asarray(mdp.initial))
        np.testing.assert_allclose(policy_evaluation(mdp, log_policy, reward, **TIGHT), value, atol=1e-11)
        occupancy = occupancy_measure(mdp, log_policy, **TIGHT)
        np.testing.assert_allclose(occupancy.sum(-1), visits, atol=1e-13)
    single = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, mdp)
    occupancy = occupancy_measure(single, log_policy.astype(jnp.float32))
    np.testing.assert_allclose(occupancy.sum(-1), visits, rtol=1e-3)


def start_value(mdp, reward, temperature=0.7, **options):
    return mdp.initial @ soft_value_iteration(mdp, reward, temperature=temperature, **{**TIGHT, **options}).value


def probabilities(mdp, logits):
    """The MDP with its transition probabilities as a softmax, so that finite differences stay inside the simplex."""
    p = jax.nn.softmax(logits)
    if isinstance(mdp.transition, SparseTransition):
        return mdp.replace(transition=mdp.transition._replace(probability=p))
    return mdp.replace(transition=p if isinstance(mdp.transition, jax.Array) else mdp.transition.replace(probability=p))


def logits_of(mdp):
    return jnp.log(mdp.transition if isinstance(mdp.transition, jax.Array) else mdp.transition.probability)


@pytest.mark.parametrize("form", ["dense", "sparse", "grid"])
def test_implicit_gradients(form):
    """To reward, transition, discount and temperature: by finite differences, and as an unrolled scan has them."""
    with jax.enable_x64(True):
        mdp = problem(form)

        def implicit(reward, logits, discount, temperature):
            return start_value(probabilities(mdp, logits).replace(discount=discount), reward, temperature)

        def unrolled(reward, logits, discount, temperature):
            changed = probabilities(mdp, logits).replace(discount=discount)
            return changed.initial @ soft_value_iteration(
                changed, reward, temperature=temperature, horizon=180
            ).value[0]

        args = (rewards("SAS"), logits_of(mdp), 0.8, 0.7)
        args = tuple(jnp.asarray(x) for x in args)
        check_grads(jax.jit(implicit), args, order=1, modes=["rev"], rtol=1e-5)
        every = (0, 1, 2, 3)
        for one, other in zip(
            jax.jit(jax.grad(implicit, every))(*args), jax.jit(jax.grad(unrolled, every))(*args), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
        _, tangent = jax.jvp(implicit, args, args)
        _, expected = jax.jvp(unrolled, args, args)
        np.testing.assert_allclose(tangent, expected, rtol=1e-9)


def test_implicit_second_derivatives():
    with jax.enable_x64(True):
        mdp, reward = problem("sparse"), jnp.asarray(rewards("S"))
        hessian = jax.jit(jax.hessian(lambda r: start_value(mdp, r)))(reward)
        horizon = {"horizon": 180}
        expected = jax.jit(
            jax.hessian(lambda r: mdp.initial @ soft_value_iteration(mdp, r, temperature=0.7, **horizon).value[0])
        )(reward)
        np.testing.assert_allclose(hessian, expected, rtol=1e-8, atol=1e-10)
        assert np.linalg.eigvalsh(hessian).min() >= -1e-9  # the soft value is convex in the reward


@pytest.mark.parametrize("form", ["dense", "sparse", "grid"])
def test_gradient_to_the_reward_is_the_occupancy(form):
    with jax.enable_x64(True):
        mdp, reward = problem(form), jnp.asarray(rewards("SA"))
        plan = soft_value_iteration(mdp, reward, temperature=0.7, **TIGHT)
        occupancy = occupancy_measure(mdp, plan.log_policy, **TIGHT)
        np.testing.assert_allclose(jax.grad(lambda r: start_value(mdp, r))(reward), occupancy, rtol=1e-9, atol=1e-12)
        hard = value_iteration(mdp, reward, **TIGHT)
        gradient = jax.grad(lambda r: mdp.initial @ value_iteration(mdp, r, **TIGHT).value)(reward)
        with np.errstate(divide="ignore"):
            best = occupancy_measure(mdp, jnp.log(hard.policy), **TIGHT)
        np.testing.assert_allclose(gradient, best, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "plan",
    [value_iteration, functools.partial(robust_value_iteration, uncertainty=Contamination(0.1))],
    ids=["hard", "robust"],
)
def test_tied_actions_count_once_in_the_gradient(plan):
    """1 more reward everywhere is worth 1 / (1 - discount) from each state, whichever of the tied moves are made."""
    grid = gridworld(2, 2, slip=0.2)
    gradient = jax.grad(lambda reward: plan(grid, reward).value.sum())

    def after_a_move(reward):  # two gradients in one program, for which XLA computes q anew in several fusions
        momentum = 1.0 + 0.04 * gradient(reward)
        reward = reward + 0.08 * momentum
        return reward, gradient(reward), momentum + 0.04 * gradient(reward)

    rewards = jax.random.normal(jax.random.key(0), (40, 2, 4))
    _, gradients, _ = jax.lax.map(jax.vmap(after_a_move), rewards)
    np.testing.assert_allclose(gradients.sum(axis=-1), 4 / (1 - 0.9), rtol=1e-4)


@pytest.mark.parametrize("form", ["dense", "grid"])  # solved and iterated
def test_value_is_the_inverse_of_the_evaluation_operator(form):
    """dV / dr = (I - discount P_pi)^-1."""
    with jax.enable_x64(True):
        mdp, logits = problem(form, ends=False), jnp.asarray(rewards("SA"))
        log_policy = jax.nn.log_softmax(logits)
        between = np.einsum("sa,saz->sz", np.exp(log_policy), np.asarray(dense_transition(mdp.transition)))
        expected = np.linalg.inv(np.eye(S) - 0.8 * between)
        for jacobian in (jax.jacfwd, jax.jacrev):
            found = jax.jit(jacobian(lambda r: policy_evaluation(mdp, log_policy, r, **TIGHT)))(jnp.zeros(S))
            np.testing.assert_allclose(found, expected, rtol=1e-10)
        occupancy = jax.jit(lambda logits: occupancy_measure(mdp, jax.nn.log_softmax(logits), **TIGHT))
        check_grads(occupancy, (logits,), order=1, modes=["fwd", "rev"], rtol=1e-5)


def test_the_gradient_of_the_causal_likelihood_is_the_feature_gap():
    """On population occupancies: d/dw E log policy_w = features of the expert - features of policy_w (t = 1)."""
    with jax.enable_x64(True):
        mdp = problem("dense", ends=False)
        features = np.random.default_rng(7).normal(size=(S, 4))
        expert = soft_value_iteration(mdp, features @ np.array([1.0, -1.0, 0.5, 0.0]), **TIGHT).log_policy
        visits = occupancy_measure(mdp, expert, **TIGHT)

        def likelihood(weights):
            return jnp.sum(visits * soft_value_iteration(mdp, features @ weights, **TIGHT).log_policy)

        weights = jnp.array([0.2, 0.1, -0.4, 1.0])
        policy = soft_value_iteration(mdp, features @ weights, **TIGHT).log_policy
        gap = (visits - occupancy_measure(mdp, policy, **TIGHT)).sum(-1) @ features
        np.testing.assert_allclose(jax.grad(likelihood)(weights), gap, rtol=1e-8)
        np.testing.assert_allclose(jax.grad(likelihood)(jnp.array([1.0, -1.0, 0.5, 0.0])), 0.0, atol=1e-9)


def test_jit_and_vmap_over_rewards_and_mdps():
    mdp = random_mdp(jax.random.key(0), S, A, branching=3)
    many = jax.random.normal(jax.random.key(1), (5, S, A))
    together = jax.jit(jax.vmap(lambda r: soft_value_iteration(mdp, r)))(many)
    for i in (0, 4):
        alone = soft_value_iteration(mdp, many[i])
        np.testing.assert_allclose(together.value[i], alone.value, rtol=1e-5, atol=1e-5)
        assert abs(together.iterations[i] - alone.iterations) <= 2
    mdps = jax.vmap(lambda key: random_mdp(key, S, A))(jax.random.split(jax.random.key(2), 3))

    def everything(mdp):
        plan = value_iteration(mdp, many[0])
        log_policy = jax.nn.log_softmax(plan.q)
        gradient = jax.grad(lambda r: mdp.initial @ soft_value_iteration(mdp, r).value)(many[0])
        return plan.value, occupancy_measure(mdp, log_policy), policy_evaluation(mdp, log_policy, many[0]), gradient

    lanes = jax.jit(jax.vmap(everything))(mdps)
    each = jax.jit(everything)
    for i in range(3):
        alone = each(jax.tree.map(lambda x: x[i], mdps))  # noqa: B023
        for one, other in zip(lanes, alone, strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-4, atol=1e-4)


def test_single_precision_stops_where_rounding_does():
    """A tolerance below what float32 can hold must not cost max_iterations."""
    mdp = random_mdp(jax.random.key(0), 20, 3, discount=0.99)
    plan = soft_value_iteration(mdp, 10.0 * jax.random.normal(jax.random.key(1), (20,)), tolerance=0.0)
    assert plan.iterations < 3000
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, mdp)
        reward = 10.0 * jax.random.normal(jax.random.key(1), (20,), jnp.float32).astype(jnp.float64)
        np.testing.assert_allclose(plan.value, soft_value_iteration(wide, reward, **TIGHT).value, rtol=1e-4)


def test_max_iterations_is_kept_and_the_residual_says_so():
    mdp = random_mdp(jax.random.key(0), S, A)
    plan = value_iteration(mdp, jnp.ones(S), max_iterations=3)
    np.testing.assert_allclose([plan.iterations, plan.residual], [3, 0.81], rtol=1e-6)


def test_fixed_point_of_a_line():
    """x = a x + b: x = b / (1 - a), dx/da = b / (1 - a)^2, and the residual bounds the error."""

    def found(a, b, norms=(sup_norm, l1_norm)):
        return fixed_point(lambda x: a * x + b, jnp.zeros(2), tolerance=1e-6, max_iterations=1000, norms=norms)

    b = jnp.array([1.0, -3.0])
    for norms in ((sup_norm, l1_norm), (l1_norm, sup_norm)):
        point, residual, iterations = found(0.5, b, norms)
        np.testing.assert_allclose(point, 2 * b, rtol=1e-6)
        assert norms[0](point - 2 * b) <= residual * 0.5 / (1 - 0.5) + 1e-6
        assert iterations.dtype == jnp.int32
        for derivative in (jax.jacfwd, jax.jacrev):
            np.testing.assert_allclose(derivative(lambda a: found(a, b, norms).point)(0.5), 4 * b, rtol=1e-5)  # noqa: B023
        np.testing.assert_allclose(jax.grad(jax.grad(lambda a: found(a, b, norms).point[0]))(0.5), 16.0, rtol=1e-4)  # noqa: B023
    assert float(jax.grad(lambda a: found(a, b).residual)(0.5)) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, r, p: value_iteration(m.replace(discount=1.0), r), "value_iteration: discount 1"),
        (lambda m, r, p: soft_value_iteration(m.replace(discount=1.0), r), "soft_value_iteration: discount 1"),
        (lambda m, r, p: policy_evaluation(m.replace(discount=1.0), p, r), "policy_evaluation: discount 1"),
        (lambda m, r, p: occupancy_measure(m.replace(discount=1.0), p), "occupancy_measure: discount 1"),
        (lambda m, r, p: value_iteration(m, r, horizon=0), "horizon must be at least 1, got 0"),
        (lambda m, r, p: soft_value_iteration(m, r, temperature=0.0), "temperature must be positive, got 0"),
        (lambda m, r, p: soft_value_iteration(m, r[:-1]), r"reward must be .*got \(5,\)"),
        (lambda m, r, p: value_iteration(m, r[None]), r"reward must be .*got \(1, 6\)"),
        (lambda m, r, p: policy_evaluation(m, p[:-1], r), r"policy_evaluation: log_policy must be .*got \(5, 3\)"),
        (lambda m, r, p: occupancy_measure(m, p[0]), r"occupancy_measure: log_policy must be .*got \(3,\)"),
        (lambda m, r, p: occupancy_measure(m, jnp.stack([p, p]), horizon=3), "horizon is 3, log_policy has 2 steps"),
        (lambda m, r, p: expected_return(m, p, jnp.zeros((2, 2))), "reward must be"),
    ],
)
def test_bad_input_is_named(call, message):
    mdp = random_mdp(jax.random.key(0), S, A)
    with pytest.raises(ValueError, match=message):
        call(mdp, jnp.zeros(S), jnp.full((S, A), -np.log(A)))
