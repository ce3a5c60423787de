"""The three forms of P(s' | s, a) against arrays filled in by naive loops, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxalign.mdp import (
    GridTransition,
    SparseTransition,
    dense_transition,
    expected_next,
    gridworld,
    push_forward,
    sample_next,
)
from jaxalign.mdp import sparse_transition as successors_of_grid
from jaxalign.mdp.transitions import expected_reward, num_states_and_actions

S, A = 6, 3
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -2), (0, 0))
OPEN = np.array([[1, 1, 0], [1, 1, 1]], bool)


def dense(rng):
    probability = rng.dirichlet(np.ones(S), (S, A))
    return jnp.asarray(probability), probability


def sparse(rng):
    """Successors drawn with repetition: one state may fill several places."""
    next_state, weight = rng.integers(0, S, (S, A, 4)), rng.dirichlet(np.ones(4), (S, A))
    full = np.zeros((S, A, S))
    for s, a, k in np.ndindex(next_state.shape):
        full[s, a, next_state[s, a, k]] += weight[s, a, k]
    return SparseTransition(jnp.asarray(next_state, jnp.int32), jnp.asarray(weight)), full


def grid(rng):
    weight = rng.dirichlet(np.ones(len(MOVES)), A)
    full = np.zeros((S, A, S))
    height, width = OPEN.shape
    for y, x, a in np.ndindex(height, width, A):
        for (down, right), p in zip(MOVES, weight[a], strict=True):
            to = (y + down, x + right)
            if not (0 <= to[0] < height and 0 <= to[1] < width and OPEN[to]):
                to = (y, x)
            full[y * width + x, a, to[0] * width + to[1]] += p
    return GridTransition(jnp.asarray(weight), jnp.asarray(OPEN), MOVES), full


FORMS = {"dense": dense, "sparse": sparse, "grid": grid}


@pytest.fixture(params=FORMS)
def form(request):
    with jax.enable_x64(True):
        yield FORMS[request.param](np.random.default_rng(0))


def test_every_form_by_hand():
    # Two cells side by side; action 0 moves right with 0.9, else stays. Cell 0 reaches 1, cell 1 the edge.
    by_grid = GridTransition(jnp.array([[0.9, 0.1]]), jnp.ones((1, 2), bool), ((0, 1), (0, 0)))
    by_place = SparseTransition(jnp.array([[[1, 0]], [[1, 1]]]), jnp.array([[[0.9, 0.1]], [[0.9, 0.1]]]))
    by_array = jnp.array([[[0.1, 0.9]], [[0.0, 1.0]]])
    for transition in (by_grid, by_place, by_array):
        np.testing.assert_allclose(expected_next(transition, jnp.array([10.0, 20.0])), [[19.0], [20.0]], rtol=1e-6)
        np.testing.assert_allclose(push_forward(transition, jnp.array([[2.0], [1.0]])), [0.2, 2.8], rtol=1e-6)
        np.testing.assert_allclose(dense_transition(transition), by_array, rtol=1e-6)
        paid = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
        np.testing.assert_allclose(expected_reward(transition, paid), [[1.9], [4.0]], rtol=1e-6)


def test_matches_naive_loops(form):
    transition, full = form
    rng = np.random.default_rng(1)
    value, mass, paid = rng.normal(size=S), rng.random((S, A)), rng.normal(size=(S, A, S))
    assert num_states_and_actions(transition) == (S, A)
    np.testing.assert_allclose(dense_transition(transition), full, atol=1e-15)
    np.testing.assert_allclose(expected_next(transition, value), full @ value, rtol=1e-12)
    np.testing.assert_allclose(push_forward(transition, mass), np.einsum("sa,saz->z", mass, full), rtol=1e-12)
    np.testing.assert_allclose(expected_reward(transition, paid), (full * paid).sum(-1), rtol=1e-12)


def test_mass_is_kept_and_a_constant_is_its_own_mean(form):
    transition, _ = form
    np.testing.assert_allclose(expected_next(transition, jnp.ones(S)), 1.0, rtol=1e-12)
    np.testing.assert_allclose(push_forward(transition, jnp.ones((S, A))).sum(), S * A, rtol=1e-12)


def test_a_grid_as_successors_is_the_same_grid():
    with jax.enable_x64(True):
        transition, full = grid(np.random.default_rng(2))
        places = successors_of_grid(transition)
        assert places.next_state.shape == places.probability.shape == (S, A, len(MOVES))
        np.testing.assert_allclose(dense_transition(places), full, atol=1e-15)


def test_jit_vmap_and_gradients(form):
    transition, full = form
    rng = np.random.default_rng(3)
    values, mass = rng.normal(size=(4, S)), rng.random((S, A))
    together = jax.jit(jax.vmap(lambda v: expected_next(transition, v)))(values)
    np.testing.assert_allclose(together, np.einsum("saz,nz->nsa", full, values), rtol=1e-12)
    pushed = jax.jit(jax.vmap(lambda m: push_forward(transition, m)))(np.stack([mass, 2 * mass]))
    np.testing.assert_allclose(pushed[1], 2 * pushed[0], rtol=1e-12)
    check_grads(jax.jit(lambda v: expected_next(transition, v)), (values[0],), order=1, modes=["fwd", "rev"])
    check_grads(jax.jit(lambda m: push_forward(transition, m)), (mass,), order=1, modes=["fwd", "rev"])
    np.testing.assert_allclose(
        jax.grad(lambda v: jnp.sum(mass * expected_next(transition, v)))(values[0]),
        push_forward(transition, mass),
        rtol=1e-12,
    )


def test_samples_follow_the_probabilities(form):
    transition, full = form
    keys = jax.random.split(jax.random.key(0), 4000)
    states, actions = jnp.repeat(jnp.arange(S), A), jnp.tile(jnp.arange(A), S)
    draw = jax.vmap(jax.vmap(sample_next, (0, None, None, None)), (None, None, 0, 0))
    drawn = np.asarray(jax.jit(draw)(keys, transition, states, actions))
    counted = np.stack([np.bincount(row, minlength=S) for row in drawn]).reshape(S, A, S) / len(keys)
    assert not counted[full == 0].any()
    deviation = np.sqrt(full * (1 - full) / len(keys))
    assert (np.abs(counted - full) <= 5 * deviation + 1e-12).all()


def test_a_grid_is_an_array_to_numpy():
    grid = gridworld(2, 3, slip=0.2).transition
    np.testing.assert_array_equal(np.asarray(grid), dense_transition(grid))
    assert np.asarray(grid, np.float64).dtype == np.float64
