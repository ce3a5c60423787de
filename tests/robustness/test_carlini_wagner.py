"""Carlini and Wagner's attack against the distance to the boundary of a linear classifier."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.robustness.carlini_wagner import carlini_wagner
from jaxalign.robustness.pgd import pgd
from jaxalign.robustness.threat_model import norms

WEIGHTS = jnp.array([[1.0, -1.0, 0.2], [2.0, -2.0, -0.3], [-0.5, 0.5, 0.1]])
X = jnp.array([[0.5, 0.5, 0.5], [0.4, 0.2, 0.9], [0.3, 0.2, 0.9]])
Y = jnp.zeros(3, jnp.int32)


def linear(x):
    return x @ WEIGHTS


def distances():
    """|w . x| / |w| to the nearest other class, in NumPy; these points' nearest boundaries are inside the box."""
    x, w = np.asarray(X, np.float64), np.asarray(WEIGHTS, np.float64)
    gaps = [(x @ (w[:, 0] - w[:, j])) / np.linalg.norm(w[:, 0] - w[:, j]) for j in (1, 2)]
    return np.min(gaps, axis=0)


def test_finds_the_distance_to_the_boundary_with_and_without_a_box():
    for bounds in [(0.0, 1.0), None]:
        result = carlini_wagner(linear, X, Y, bounds=bounds)
        found = norms(result.x_adv - X, "l2")
        assert jnp.all(result.success)
        assert np.all(found >= distances() - 1e-4)  # nothing nearer exists
        np.testing.assert_allclose(found, distances(), rtol=0.03)


def test_misclassified_rows_stay_and_confidence_costs_distance():
    y = Y.at[0].set(1)
    run = jax.jit(jax.vmap(lambda c: carlini_wagner(linear, X, y, confidence=c, steps=100, search_steps=6)))
    result = run(jnp.array([0.0, 0.3]))
    np.testing.assert_array_equal(result.x_adv[0, 0], X[0])
    sizes = jax.vmap(lambda a: norms(a - X, "l2"))(result.x_adv)
    assert jnp.all(sizes[1, 1:] > sizes[0, 1:])
    assert jnp.all(result.margin[1, 1:] < -0.3)


def test_targets_are_reached_and_what_cannot_be_comes_back():
    targets = jnp.array([2, 2, 1])
    result = carlini_wagner(linear, X, targets, targeted=True, steps=100, search_steps=6)
    np.testing.assert_array_equal(jnp.argmax(linear(result.x_adv), axis=1)[result.success], targets[result.success])
    assert jnp.any(result.success)
    flat = carlini_wagner(lambda x: 0 * linear(x) + jnp.array([1.0, 0, 0])[None, :], X, Y, steps=5, search_steps=3)
    assert not jnp.any(flat.success)
    np.testing.assert_array_equal(flat.x_adv, X)


def test_agrees_with_a_ball_of_the_size_it_found():
    result = carlini_wagner(linear, X, Y)
    size = norms(result.x_adv - X, "l2")
    key = jax.random.key(0)
    assert jnp.all(pgd(key, linear, X, Y, 1.02 * size, norm="l2").success)
    assert not jnp.any(pgd(key, linear, X, Y, 0.9 * size, norm="l2").success)
