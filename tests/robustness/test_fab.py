"""FAB: its projections against SciPy, and a linear classifier, whose nearest boundary is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from jaxalign.robustness.fab import fab, project_onto_hyperplane

BATCH, FEATURES, CLASSES = 6, 8, 5
NORMS = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
KEY = jax.random.key(0)

weights = np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)
x = np.random.default_rng(2).uniform(0.3, 0.7, (BATCH, FEATURES)).astype(np.float32)
y = np.argmax(x @ weights, axis=1)


def linear(x):
    return x @ weights


def distances(norm):
    """How far each row of x is from the nearest other class, in closed form."""
    gaps = (x @ weights)[np.arange(BATCH), y][:, None] - x @ weights
    sizes = np.linalg.norm(weights[:, y][:, :, None] - weights[:, None, :], DUAL[norm], axis=0)
    return np.min(np.where(np.arange(CLASSES)[None, :] == y[:, None], np.inf, gaps / np.maximum(sizes, 1e-9)), axis=1)


def in_scipy(point, normal, gap, norm):
    """The norm of the smallest step to the hyperplane within the unit box, from a general solver."""
    size, one = len(point), np.ones(len(point))
    if norm == "l2":
        found = minimize(
            lambda d: d @ d, np.zeros(size), jac=lambda d: 2 * d, bounds=np.stack([-point, 1 - point], axis=1),
            constraints={"type": "eq", "fun": lambda d: normal @ d + gap, "jac": lambda d: normal},
            options={"ftol": 1e-14},
        )  # fmt: skip
        return np.sqrt(found.fun)
    # d = up - down with both parts in the room that the box leaves; linf adds a bound t on all of them.
    rooms = np.concatenate([1 - point, point])
    if norm == "l1":
        return linprog(np.ones(2 * size), A_eq=[[*normal, *-normal]], b_eq=[-gap], bounds=[(0, r) for r in rooms]).fun
    below = np.hstack([np.eye(2 * size), -np.concatenate([one, one])[:, None]])
    bounds = [*((0, r) for r in rooms), (0, None)]
    cost, equal = np.r_[np.zeros(2 * size), 1], [[*normal, *-normal, 0]]
    return linprog(cost, A_ub=below, b_ub=np.zeros(2 * size), A_eq=equal, b_eq=[-gap], bounds=bounds).fun


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_smallest_step_to_the_hyperplane_in_the_box(norm):
    rng = np.random.default_rng(7)
    with jax.enable_x64(True):
        points, normals = rng.uniform(0, 1, (8, 6)), rng.normal(size=(8, 6))
        normals[0, 2] = 0.0
        inside = rng.uniform(0, 1, (8, 6))  # a point of the hyperplane, so that there is one
        gaps = np.sum(normals * (points - inside), axis=1)
        gaps[1] = 0.0
        step = jax.jit(lambda *a: project_onto_hyperplane(*a, 0.0, 1.0, norm))(points, normals, gaps)
        step = np.asarray(step)
    np.testing.assert_allclose(np.sum(normals * step, axis=1), -gaps, atol=1e-12)
    assert np.all((points + step >= -1e-12) & (points + step <= 1 + 1e-12))
    expected = [in_scipy(*row, norm) for row in zip(points, normals, gaps, strict=True)]
    np.testing.assert_allclose(np.linalg.norm(step, NORMS[norm], axis=1), expected, atol=2e-6)


def test_projection_by_hand():
    point, normal = jnp.array([[0.5, 0.5], [0.9, 0.5], [0.9, 0.5]]), jnp.array([[1.0, 2.0], [1.0, 1.0], [1.0, 1.0]])
    gap = jnp.array([0.5, -0.4, -9.0])
    # Row 0 is free: -gap w / |w|^2, -gap sign(w) / |w|_1, all on the larger weight. Row 1 meets the side at 1 and makes
    # up for it with the other coordinate. Row 2 cannot get there and goes to the corner.
    expected = {
        "l2": [[-0.1, -0.2], [0.1, 0.3], [0.1, 0.5]],
        "linf": [[-1 / 6, -1 / 6], [0.1, 0.3], [0.1, 0.5]],
        "l1": [[0.0, -0.25], [0.1, 0.3], [0.1, 0.5]],
    }
    for norm, rows in expected.items():
        step = jax.jit(lambda *a, norm=norm: project_onto_hyperplane(*a, 0.0, 1.0, norm))(point, normal, gap)
        np.testing.assert_allclose(step, rows, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "num_targets"),
    [
        ("linf", None),
        pytest.param("l2", 4, marks=pytest.mark.slow),
        pytest.param("l1", None, marks=pytest.mark.slow),
        pytest.param("linf", 4, marks=pytest.mark.slow),
        pytest.param("l2", None, marks=pytest.mark.slow),
        pytest.param("l1", 4, marks=pytest.mark.slow),
    ],
)
def test_finds_the_nearest_boundary_of_a_linear_classifier(norm, num_targets):
    result = jax.jit(lambda x: fab(KEY, linear, x, y, norm=norm, steps=6, num_targets=num_targets, bounds=None))(x)
    assert result.success.all()
    found = np.linalg.norm(np.asarray(result.x_adv) - x, NORMS[norm], axis=1)
    np.testing.assert_allclose(found, distances(norm), rtol=2e-3)
    assert np.all(found >= distances(norm) * (1 - 1e-5))


@pytest.mark.slow
def test_with_an_epsilon_only_what_is_nearer_succeeds():
    scales = np.array([0.0, 0.9, 1.2], np.float32)
    over = lambda scale: fab(KEY, linear, x, y, scale * distances("l2"), norm="l2", steps=6, restarts=2, bounds=None)  # noqa: E731
    result = jax.jit(jax.vmap(over))(scales)
    np.testing.assert_array_equal(result.success, np.broadcast_to(scales[:, None] > 1, (3, BATCH)))


@pytest.mark.slow
def test_restarts_reach_a_boundary_that_the_first_walk_misses_and_stay_in_the_box():
    def step_like(x):  # no slope at the start, so no direction
        return jnp.stack([jnp.zeros(len(x)), jnp.maximum(x[:, 0] - 0.6, 0.0) + jnp.minimum(x[:, 1], 0.5) - 0.4], axis=1)

    start = np.full((2, 2), 0.3, np.float32)
    result = fab(KEY, step_like, start, np.zeros(2, int), norm="l2", steps=8, restarts=3)
    assert result.success.all()
    np.testing.assert_allclose(np.asarray(result.x_adv)[:, 1], 0.4, atol=1e-3)
    wrong = fab(KEY, step_like, start, np.ones(2, int), norm="l2", steps=8, restarts=3)
    np.testing.assert_array_equal(wrong.x_adv, start)  # misclassified as it is: nothing is nearer
