"""Balls and boxes: projections against hand numbers, a convex solver's optimum, and the ball's own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.robustness.threat_model import (
    NORMS,
    clip_to_box,
    norms,
    project,
    project_l1_in_box,
    project_onto,
    random_in_ball,
    steepest_direction,
)

DELTA = jnp.array([[3.0, -4.0, 0.0], [0.1, 0.2, -0.1]])
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}


def test_projections_by_hand():
    np.testing.assert_allclose(project(DELTA, 2.0, "linf")[0], [2, -2, 0])
    np.testing.assert_allclose(project(DELTA, 1.0, "l2")[0], [0.6, -0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(project(DELTA, 2.0, "l1")[0], [0.5, -1.5, 0], rtol=1e-6)  # theta = 2.5


@pytest.mark.parametrize("norm", NORMS)
def test_rows_inside_stay_and_a_ball_of_zero_is_the_point(norm):
    np.testing.assert_array_equal(project(DELTA, 5.0, norm)[1], DELTA[1])
    np.testing.assert_array_equal(project(DELTA, 0.0, norm), jnp.zeros_like(DELTA))
    mixed = project(DELTA, jnp.array([0.5, 9.0]), norm)  # an epsilon for each row
    np.testing.assert_allclose(norms(mixed, norm)[0], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(mixed[1], DELTA[1])


@pytest.mark.parametrize("norm", NORMS)
def test_norms_match_numpy_and_join_the_leaves_of_a_pytree(norm):
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    expected = np.linalg.norm(x.reshape(5, -1).astype(np.float64), ORDER[norm], axis=1)
    np.testing.assert_allclose(norms(jnp.asarray(x), norm), expected, rtol=1e-6)
    tree = {"pixels": jnp.asarray(x[:, :1]), "text": jnp.asarray(x[:, 1:])}
    np.testing.assert_allclose(norms(tree, norm), expected, rtol=1e-6)
    joined = project(jnp.asarray(x), 1.0, norm)
    split = project(tree, 1.0, norm)
    np.testing.assert_allclose(jnp.concatenate([split["pixels"], split["text"]], axis=1), joined, rtol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_projection_is_the_nearest_point_as_a_convex_solver_finds_it(norm):
    target = np.random.default_rng(1).normal(size=4)
    ball = {"type": "ineq", "fun": lambda z: 1.0 - np.linalg.norm(z, ORDER[norm])}
    if norm == "l1":  # smooth form: z = u - v with u, v >= 0
        split = scipy.optimize.minimize(
            lambda w: np.sum((w[:4] - w[4:] - target) ** 2), np.full(8, 0.01), bounds=[(0, None)] * 8,
            constraints={"type": "ineq", "fun": lambda w: 1.0 - w.sum()}, tol=1e-12,
        ).x  # fmt: skip
        expected = split[:4] - split[4:]
    else:
        expected = scipy.optimize.minimize(
            lambda z: np.sum((z - target) ** 2), np.zeros(4), constraints=ball, tol=1e-12
        ).x
    np.testing.assert_allclose(project(jnp.asarray(target[None]), 1.0, norm)[0], expected, atol=2e-4)


def test_the_l1_ball_in_a_box_by_hand_and_as_a_convex_solver_finds_it():
    # theta = 1 leaves (2, 1), the box cuts the first to 0.5: theta falls to 0.5 and 0.5 + 1.5 = 2.
    np.testing.assert_allclose(project_l1_in_box(jnp.array([[3.0, -2.0]]), -9.0, 0.5, 2.0), [[0.5, -1.5]], rtol=1e-5)
    rng = np.random.default_rng(2)
    delta, least, most = rng.normal(size=4), -rng.uniform(size=4), rng.uniform(size=4)
    split = scipy.optimize.minimize(
        lambda w: np.sum((w[:4] - w[4:] - delta) ** 2), np.full(8, 0.01), tol=1e-12,
        bounds=[*((0, m) for m in most), *((0, -m) for m in least)],
        constraints={"type": "ineq", "fun": lambda w: 1.0 - w.sum()},
    ).x  # fmt: skip
    found = project_l1_in_box(jnp.asarray(delta[None]), jnp.asarray(least), jnp.asarray(most), 1.0)
    np.testing.assert_allclose(found[0], split[:4] - split[4:], atol=2e-4)
    unbounded = project_l1_in_box(DELTA, -jnp.inf, jnp.inf, 1.0)
    np.testing.assert_allclose(unbounded, project(DELTA, 1.0, "l1"), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), epsilon=st.floats(0.01, 3.0), norm=st.sampled_from(NORMS))
def test_ball_then_box_stays_inside_both(seed, epsilon, norm):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.uniform(size=(4, 6)), jnp.float32)
    delta = project_onto(x, jnp.asarray(3 * rng.normal(size=(4, 6)), jnp.float32), epsilon, norm, (0.0, 1.0))
    assert jnp.all(norms(delta, norm) <= epsilon * (1 + 1e-5) + 1e-6)
    assert jnp.all((x + delta >= -1e-6) & (x + delta <= 1 + 1e-6))


@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_direction_attains_the_dual_norm(norm):
    gradient = jax.random.normal(jax.random.key(0), (5, 7))
    direction = steepest_direction(gradient, norm)
    np.testing.assert_allclose(norms(direction, norm), 1, rtol=1e-6)
    dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[norm]
    np.testing.assert_allclose(jnp.sum(gradient * direction, axis=1), norms(gradient, dual), rtol=1e-5)
    assert not jnp.any(steepest_direction(jnp.zeros((2, 3)), norm))
    tiny = steepest_direction(gradient * 1e-30, norm)  # its squares underflow
    np.testing.assert_allclose(tiny, direction, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball(norm):
    points = random_in_ball(jax.random.key(0), jnp.zeros((4000, 3)), 2.0, norm)
    sizes = norms(points, norm)
    assert jnp.max(sizes) <= 2.0 * (1 + 1e-6)
    # In three dimensions a share r^3 of a uniform ball lies within r of its radius, whatever the norm.
    np.testing.assert_allclose(jnp.mean(sizes <= 1.0), 1 / 8, atol=0.02)
    np.testing.assert_allclose(jnp.mean(points, axis=0), 0, atol=0.06)


def test_boxes_clip_arrays_and_pytrees():
    tree = {"a": jnp.array([[-1.0, 2.0]]), "b": jnp.array([[5.0]])}
    clipped = clip_to_box(tree, (0.0, 1.0))
    np.testing.assert_array_equal(clipped["a"], [[0, 1]])
    per_leaf = clip_to_box(tree, ({"a": -5.0, "b": 0.0}, {"a": 5.0, "b": 1.0}))
    np.testing.assert_array_equal(per_leaf["a"], tree["a"])
    np.testing.assert_array_equal(per_leaf["b"], [[1]])
    by_coordinate = clip_to_box(tree["a"], (jnp.array([-0.5, 0.0]), jnp.array([1.0, 1.5])))
    np.testing.assert_array_equal(by_coordinate, [[-0.5, 1.5]])
    assert clip_to_box(tree, None) is tree


def test_an_unknown_norm_is_named():
    with pytest.raises(ValueError, match="linf, l2, l1, got 'max'"):
        project(DELTA, 1.0, "max")


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_and_wide_floats(norm):
    assert jnp.all(jnp.isfinite(jax.grad(lambda d: jnp.sum(norms(d, norm)))(jnp.zeros((2, 3)))))
    with jax.enable_x64(True):
        wide = project(jnp.asarray(np.asarray(DELTA), jnp.float64), 1.0, norm)
        assert wide.dtype == jnp.float64
    np.testing.assert_allclose(wide, project(DELTA, 1.0, norm), rtol=1e-6)
    over = jax.jit(jax.vmap(lambda e: project(DELTA, e, norm)))(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(over[1], project(DELTA, 1.0, norm), rtol=1e-6)
