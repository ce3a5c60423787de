"""EPIC, DARD and STARC: hand numbers, invariances, naive loops in float64, degenerate rewards, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxalign.irl.reward_distance import dard_distance, epic_distance, starc_distance
from jaxalign.mdp import (
    TabularMDP,
    action_reward,
    dense_transition,
    expected_return,
    gridworld,
    random_mdp,
    soft_value_iteration,
    sparse_transition,
    value_iteration,
)

S, A, G = 5, 3, 0.8
DISTANCES = {"epic": epic_distance, "dard": dard_distance, "starc": starc_distance}
MDP = random_mdp(jax.random.key(0), S, A, discount=G)
SPARSE = random_mdp(jax.random.key(1), S, A, branching=2, discount=G)
SHAPES = {"S": (S,), "SA": (S, A), "SAS": (S, A, S)}


def reward(seed, shape="SAS"):
    return np.random.default_rng(seed).normal(size=SHAPES[shape])


def shaped(table, potential, discount=G):
    return table + discount * potential[None, None, :] - potential[:, None, None]


def table(reward):
    reward = np.asarray(reward, np.float64)
    return np.broadcast_to(reward.reshape(reward.shape + (1,) * (3 - reward.ndim)), (S, A, S))


def naive(name, mdp, reward_a, reward_b, coverage=None):
    """The definitions, term by term, one transition at a time."""
    p, g = np.asarray(dense_transition(mdp.transition), np.float64), float(mdp.discount)
    coverage = np.ones((S, A, S)) if coverage is None else coverage
    w = coverage / coverage.sum()
    over_a, over_z = w.sum((0, 2)), w.sum((0, 1))
    over_s = w.sum((1, 2))

    def epic(r, s, a, z):
        total = 0.0
        for b in range(A):
            for y in range(S):
                total += over_a[b] * over_z[y] * (g * r[z, b, y] - r[s, b, y])
                total -= sum(g * over_s[x] * over_a[b] * over_z[y] * r[x, b, y] for x in range(S))
        return r[s, a, z] + total

    def dard(r, s, a, z):
        total = 0.0
        for b in range(A):
            for x in range(S):  # S'
                for y in range(S):  # S''
                    total += over_a[b] * p[s, b, x] * p[z, b, y] * (g * r[z, b, y] - r[s, b, x] - g * r[x, b, y])
        return r[s, a, z] + total

    def starc(r, s, a, z):
        expected = (p * r).sum(-1)
        value = np.linalg.solve(np.eye(S) - g * p.mean(1), expected.mean(1))
        return expected[s, a] - value[s] + g * p[s, a] @ value

    canonical = {"epic": epic, "dard": dard, "starc": starc}[name]
    if name == "dard":
        w = np.where(p > 0, coverage, 0.0)
        w = w / w.sum()
    tables = (table(reward_a), table(reward_b))
    a, b = (np.array([canonical(r, *at) for at in np.ndindex(S, A, S)]).reshape(S, A, S) for r in tables)
    if name == "starc":
        return 0.5 * np.sqrt((w * (a / np.sqrt((w * a**2).sum()) - b / np.sqrt((w * b**2).sum())) ** 2).sum())
    a, b = a - (w * a).sum(), b - (w * b).sum()
    rho = (w * a * b).sum() / np.sqrt((w * a**2).sum() * (w * b**2).sum())
    return np.sqrt((1 - rho) / 2)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("shapes", [("SAS", "SAS"), ("S", "SA"), ("SA", "SAS")])
def test_matches_naive_loops(name, shapes):
    a, b = reward(0, shapes[0]), reward(1, shapes[1])
    coverage = np.random.default_rng(2).random((S, A, S)) * (np.random.default_rng(3).random((S, A, S)) < 0.7)
    for mdp in (MDP, SPARSE):
        for weights in (None, coverage):
            expected = naive(name, mdp, a, b, weights)
            assert 0.05 < expected < 0.95
            np.testing.assert_allclose(DISTANCES[name](a, b, mdp, coverage=weights), expected, rtol=1e-5)
    with jax.enable_x64(True):
        wide = random_mdp(jax.random.key(0), S, A, discount=G)
        found = DISTANCES[name](a, b, wide, coverage=coverage)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, naive(name, wide, a, b, coverage), rtol=1e-11)


def test_state_only_rewards_have_the_closed_form():
    a, b = reward(0, "S"), reward(1, "S")
    rho = np.corrcoef(a, b)[0, 1]
    np.testing.assert_allclose(epic_distance(a, b, MDP), np.sqrt((1 - rho) / 2), rtol=1e-5)
    # (1, 0, 0, 0, 0) and (0, 1, 0, 0, 0) correlate by -1/4.
    eye = jnp.eye(S)
    np.testing.assert_allclose(epic_distance(eye[0], eye[1], MDP), np.sqrt(1.25 / 2), rtol=1e-6)


def test_starc_by_hand():
    """One state and two actions: the advantages under the uniform policy are half the difference of the rewards."""
    mdp = TabularMDP(np.ones((1, 2, 1)), [1.0], [False], 0.9)
    assert starc_distance([[1.0, 0.0]], [[5.0, 4.5]], mdp) < 1e-5
    np.testing.assert_allclose(starc_distance([[1.0, 0.0]], [[0.0, 2.0]], mdp), 1.0, rtol=1e-5)
    np.testing.assert_allclose(starc_distance([[1.0, 0.0]], [[3.0, 3.0]], mdp), 0.5)


@pytest.mark.parametrize("name", DISTANCES)
def test_invariances_and_extremes(name):
    distance, a, b = DISTANCES[name], reward(0), reward(1)
    potential = 3.0 * np.random.default_rng(4).normal(size=S)
    between = distance(a, b, MDP)
    np.testing.assert_allclose(distance(b, a, MDP), between, rtol=1e-6)
    for same in (shaped(a, potential), 7.0 * a, a + 2.0, 0.1 * shaped(a, potential) - 1.0):
        np.testing.assert_allclose(distance(same, b, MDP), between, rtol=1e-4)
        assert distance(same, a, MDP) < 1e-4
        np.testing.assert_allclose(distance(-same, a, MDP), 1.0, rtol=1e-5)
    assert distance(a, a, MDP) == 0.0
    np.testing.assert_allclose(distance(table(reward(5, "SA")), b, MDP), distance(reward(5, "SA"), b, MDP), rtol=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
def test_rewards_that_prefer_nothing_have_a_value_and_a_gradient(name):
    distance, a = DISTANCES[name], jnp.asarray(reward(0), jnp.float32)
    potential = np.random.default_rng(4).normal(size=S)
    nothing = [jnp.zeros((S, A, S)), jnp.full((S, A, S), 3.0), jnp.asarray(shaped(np.full((S, A, S), 1.0), potential))]
    for one in nothing:
        for other in nothing:
            assert distance(one, other, MDP) == 0.0
        np.testing.assert_allclose([distance(one, a, MDP), distance(a, one, MDP)], 0.5, rtol=1e-6)
    for at in (*nothing, a):
        gradients = jax.grad(distance, (0, 1))(at, a, MDP)
        assert all(jnp.isfinite(g).all() for g in gradients)


def test_epic_with_no_discount_sees_no_state_reward():
    """Then a reward of the state alone is a constant in every state: all actions are as good."""
    assert epic_distance(reward(0, "S"), reward(1, "S"), MDP.replace(discount=0.0)) == 0.0


@pytest.mark.parametrize("name", ["dard", "starc"])
def test_impossible_transitions_do_not_matter(name):
    """STARC never meets one; DARD only in its last term, from S' to S'', both after s."""
    mdp = random_mdp(jax.random.key(1), S, A, branching=1, discount=G)
    possible = np.asarray(dense_transition(mdp.transition)) > 0
    used = possible.copy()
    for s, z, x, y, action in np.ndindex(S, S, S, S, A if name == "dard" else 0):
        used[x, action, y] |= possible[s, :, z].any() and possible[s, action, x] and possible[z, action, y]
    a, b = reward(0), reward(1)
    changed = np.where(used, a, 100.0)
    assert (changed != a).sum() > 10
    np.testing.assert_allclose(DISTANCES[name](changed, b, mdp), DISTANCES[name](a, b, mdp), rtol=1e-4)
    assert epic_distance(changed, a, mdp) > 0.1


def test_epic_uses_no_transitions_and_coverage_zeros_hide_a_row():
    a, b = reward(0), reward(1)
    np.testing.assert_allclose(epic_distance(a, b, MDP), epic_distance(a, b, SPARSE), rtol=1e-6)
    # With an action never covered, what it pays cannot be seen.
    coverage = np.ones((S, A, S))
    coverage[:, 1] = 0.0
    changed = a.copy()
    changed[:, 1] += 100.0
    for distance in (epic_distance, dard_distance):
        one, other = (distance(x, b, MDP, coverage=coverage) for x in (a, changed))
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_terminal_states():
    """STARC sees what is earned, and needs a potential of 0 there; EPIC and DARD see tables, shaped in every row."""
    mdp = MDP.replace(terminal=np.arange(S) == 2)
    a, b, potential = reward(0), reward(1), np.random.default_rng(4).normal(size=S)
    rows = a.copy()
    rows[2] = 50.0
    np.testing.assert_allclose(starc_distance(rows, b, mdp), starc_distance(a, b, mdp), rtol=1e-6)
    for distance in (epic_distance, dard_distance):
        np.testing.assert_allclose(distance(shaped(a, potential), b, mdp), distance(a, b, mdp), rtol=1e-4)
    assert starc_distance(shaped(a, potential), a, mdp) > 0.01
    potential[2] = 0.0
    assert starc_distance(shaped(a, potential), a, mdp) < 1e-4
    # A bonus for every step is no constant shift where episodes end: it pays to stay.
    assert starc_distance(a + 1.0, a, mdp) > 0.01
    assert starc_distance(a + 1.0, a, MDP) < 1e-4
    undiscounted = starc_distance(a, b, mdp.replace(discount=1.0))
    assert 0.0 < undiscounted < 1.0


def test_every_form_of_transition_gives_the_same():
    grid = gridworld(2, 3, slip=0.2, goal=5)
    forms = [grid, *(grid.replace(transition=f(grid.transition)) for f in (dense_transition, sparse_transition))]
    a, b = (jax.random.normal(jax.random.key(k), (6, 5)) for k in (0, 1))
    for distance in DISTANCES.values():
        np.testing.assert_allclose([distance(a, b, mdp) for mdp in forms], distance(a, b, grid), rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
def test_jit_vmap_and_gradients(name):
    distance, many = DISTANCES[name], np.stack([reward(k, "SA") for k in range(3)])
    together = jax.jit(jax.vmap(lambda a, b: distance(a, b, MDP)))(many, many[::-1])
    alone = [distance(a, b, MDP) for a, b in zip(many, many[::-1], strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-7)
    mdps = jax.vmap(lambda key: random_mdp(key, S, A))(jax.random.split(jax.random.key(3), 2))
    per_mdp = jax.jit(jax.vmap(lambda mdp: distance(many[0], many[1], mdp)))(mdps)
    first = jax.tree.map(lambda x: x[0], mdps)
    np.testing.assert_allclose(per_mdp[0], distance(many[0], many[1], first), rtol=1e-5)
    with jax.enable_x64(True):
        wide = random_mdp(jax.random.key(0), S, A, discount=G)
        check_grads(jax.jit(lambda a, b: distance(a, b, wide)), (many[0], many[1]), order=1, modes=["fwd", "rev"])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=3 * 6, max_size=3 * 6))
def test_triangle_inequality_and_range(entries):
    """Small integers, so that zero, equal and opposite rewards come up."""
    mdp = random_mdp(jax.random.key(4), 3, 2)
    a, b, c = np.array(entries, float).reshape(3, 3, 2)
    for distance in _JITTED:
        ab, bc, ac = (float(distance(x, y, mdp)) for x, y in ((a, b), (b, c), (a, c)))
        assert ac <= ab + bc + 1e-5
        assert all(0.0 <= d <= 1.0 + 1e-6 for d in (ab, bc, ac))


_JITTED = [jax.jit(d) for d in DISTANCES.values()]


def test_starc_orders_the_regret():
    """Towards another reward the distance and the regret of optimising the mixture grow together; at 0 both are 0."""
    a, b = reward(0, "SA"), reward(1, "SA")
    best = soft_value_iteration(MDP, action_reward(MDP, a), temperature=0.01)
    worst = MDP.initial @ -value_iteration(MDP, -a).value
    top = MDP.initial @ value_iteration(MDP, a).value
    distances, regrets = [], []
    for share in np.linspace(0.0, 1.0, 6):
        mixture = (1 - share) * a + share * b
        policy = soft_value_iteration(MDP, mixture, temperature=0.01).log_policy
        distances.append(float(starc_distance(mixture, a, MDP)))
        regrets.append(float((top - expected_return(MDP, policy, a)) / (top - worst)))
    assert best.residual < 1e-4
    assert (np.diff(distances) > 0).all()
    assert (np.diff(regrets) > -1e-4).all()
    assert distances[0] < 1e-5
    assert abs(regrets[0]) < 1e-3


@pytest.mark.parametrize("distance", DISTANCES.values())
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_a": np.zeros(S + 1)}, r"reward_a must be \[S\], \[S, A\] or \[S, A, S\] .* got \(6,\)"),
        ({"reward_b": np.zeros((A, S))}, "reward_b must be"),
        ({"coverage": np.ones((S, A))}, r"coverage must be \[S, A, S\]"),
        ({"coverage": -np.ones((S, A, S))}, "coverage must be at least 0"),
        ({"coverage": np.zeros((S, A, S))}, "coverage must be at least 0 everywhere and positive"),
    ],
)
def test_bad_input_is_named(distance, change, message):
    given = {"reward_a": reward(0), "reward_b": reward(1), "mdp": MDP, **change}
    with pytest.raises(ValueError, match=message):
        distance(**given)


def test_coverage_of_impossible_transitions_only_is_refused():
    impossible = np.asarray(dense_transition(SPARSE.transition)) == 0
    with pytest.raises(ValueError, match="possible transition"):
        dard_distance(reward(0), reward(1), SPARSE, coverage=impossible.astype(float))
