import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.certification.crown import METHODS
from jaxalign.certification.margins import (
    certified_accuracy_curve,
    certified_radius,
    margin_lower_bounds,
    margin_rows,
)
from jaxalign.networks.mlp import MLP

WEIGHTS = jnp.array([[1.0, 0.0, -1.0], [0.0, 2.0, 0.5]])
POINTS, LABELS = jnp.array([[0.6, 0.1], [0.2, 0.5], [0.1, 0.1], [0.9, 0.1]]), jnp.array([0, 1, 2, 0])


def linear(x):
    """x [B, 2] -> logits [B, 3]."""
    return x @ WEIGHTS


def test_rows_by_hand():
    np.testing.assert_array_equal(margin_rows(3, jnp.array(1)), [[-1, 1, 0], [0, 1, -1]])


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_classifier_has_its_exact_margins_and_radius(method):
    """z_y - z_j falls by epsilon |w_y - w_j|_1 in the corner of the ball: no method may lose any of it."""
    found = margin_lower_bounds(linear, POINTS, LABELS, 0.05, method=method, bounds=None)
    rows = np.stack([margin_rows(3, label) for label in LABELS]) @ np.asarray(WEIGHTS).T  # [B, 2, 2]
    plain = np.einsum("bji,bi->bj", rows, np.asarray(POINTS))
    np.testing.assert_allclose(found, plain - 0.05 * np.abs(rows).sum(-1), atol=1e-6)
    radius = certified_radius(linear, POINTS, LABELS, method=method, maximum=0.4, bounds=None, steps=14)
    exact = (plain / np.abs(rows).sum(-1)).min(1)
    np.testing.assert_allclose(radius, np.where(exact > 0, np.minimum(exact, 0.4), -1.0), atol=0.4 / 2**13)


def test_the_box_of_valid_inputs_cuts_the_ball():
    """At 0.9 with epsilon 0.2 the first pixel cannot pass 1; at 0.1 the second cannot fall under 0."""
    inside = margin_lower_bounds(linear, POINTS[3:], LABELS[3:], 0.2)
    np.testing.assert_allclose(inside, [[0.7 - 0.6, 0.7 + 0.7 - 0.15]], atol=1e-6)
    lower_still = margin_lower_bounds(linear, POINTS[3:], LABELS[3:], 0.2, bounds=(0.0, jnp.array([1.0, 0.15])))
    np.testing.assert_allclose(lower_still, [[0.7 - 0.3, 0.7 + 0.7 - 0.075]], atol=1e-6)


@pytest.fixture(scope="module")
def network():
    """A small MLP that gives every one of 12 points its own class, by construction of the labels."""
    net = MLP((16, 3))
    x = jax.random.uniform(jax.random.key(0), (12, 4))
    params = net.init(jax.random.key(1), x)
    return functools.partial(net.apply, params), x, jnp.argmax(net.apply(params, x), 1)


def test_curve_and_radius_tell_one_story(network):
    apply, x, y = network
    radius = certified_radius(apply, x, y, method="crown", maximum=0.2, steps=10)
    epsilons = jnp.array([0.02, 0.0, 0.2, 0.05])
    certified = certified_accuracy_curve(apply, x, y, epsilons, method="crown")
    assert certified.shape == (4, 12)
    assert certified[1].all()
    assert (radius > 0).all()
    for row, epsilon in zip(np.asarray(certified), np.asarray(epsilons), strict=True):
        clear = np.abs(np.asarray(radius) - epsilon) > 0.2 / 2**9
        np.testing.assert_array_equal(row[clear], (np.asarray(radius) >= epsilon)[clear])
    just_inside = margin_lower_bounds(apply, x, y, radius, method="crown")
    assert (just_inside > 0).all()


def test_a_misclassified_point_has_no_radius(network):
    apply, x, y = network
    radius = certified_radius(apply, x, (y + 1) % 3, method="interval", maximum=0.1)
    np.testing.assert_array_equal(radius, -1)
    assert not certified_accuracy_curve(apply, x, (y + 1) % 3, jnp.array([0.0, 0.1])).any()


def test_tighter_methods_certify_more(network):
    apply, x, y = network
    margins = [margin_lower_bounds(apply, x, y, 0.1, method=m, slope_steps=5).mean() for m in METHODS]
    assert all(a <= b + 1e-6 for a, b in itertools.pairwise(margins))
    assert margins[0] < margins[2] - 0.01


def test_composes_with_jit_vmap_and_grad(network):
    apply, x, y = network
    epsilons = jnp.array([0.0, 0.05, 0.1])
    traces = []

    @jax.jit
    def sweep(radii):
        traces.append(1)
        return jax.vmap(lambda e: margin_lower_bounds(apply, x, y, e))(radii)

    found = sweep(epsilons)
    sweep(epsilons * 0.5)
    assert len(traces) == 1
    np.testing.assert_allclose(found[1], margin_lower_bounds(apply, x, y, 0.05), atol=1e-5)
    logits = apply(x)
    rows = jnp.arange(12)
    exact = logits[rows, y][:, None] - logits
    np.testing.assert_allclose(jnp.sort(found[0], 1), jnp.sort(exact, 1)[:, 1:], atol=1e-5)  # epsilon 0
    slope = jax.jit(jax.grad(lambda e: margin_lower_bounds(apply, x, y, e, bounds=None).sum()))(0.05)
    ends = [margin_lower_bounds(apply, x, y, e, bounds=None).sum() for e in (0.049, 0.051)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 0.002, rtol=2e-2)


def test_new_parameters_are_never_stale():
    scale = jnp.array(1.0)

    def apply(x):
        return scale * linear(x)

    before = margin_lower_bounds(apply, POINTS, LABELS, 0.01)
    scale = jnp.array(2.0)
    np.testing.assert_allclose(margin_lower_bounds(apply, POINTS, LABELS, 0.01), 2 * before, rtol=1e-6)


def test_float64(network):
    apply, x, y = network
    single = margin_lower_bounds(apply, x, y, 0.05, method="crown-interval")
    with jax.enable_x64(True):
        double = margin_lower_bounds(lambda v: linear(v), np.asarray(POINTS, np.float64), LABELS, 0.05)
        assert double.dtype == np.float64
    np.testing.assert_allclose(double, margin_lower_bounds(linear, POINTS, LABELS, 0.05), atol=1e-6)
    assert np.isfinite(single).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="method must be one of interval, crown-interval, crown, alpha-crown, got"):
        margin_lower_bounds(linear, POINTS, LABELS, 0.1, method="ibp")
    with pytest.raises(ValueError, match="epsilon must not be negative"):
        margin_lower_bounds(linear, POINTS, LABELS, -0.1)
    with pytest.raises(ValueError, match="outside the box"):
        margin_lower_bounds(linear, POINTS + 1, LABELS, 0.1)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        certified_radius(linear, POINTS, LABELS + 1, maximum=0.1)
    with pytest.raises(ValueError, match="must give logits"):
        margin_lower_bounds(lambda x: x[:, 0], POINTS, LABELS, 0.1)


@pytest.mark.parametrize("method", ["interval", "crown"])
def test_sound_margins_give_up_little(network, method):
    apply, x, y = network
    plain = margin_lower_bounds(apply, x, y, 0.05, method=method)
    sound = margin_lower_bounds(apply, x, y, 0.05, method=method, sound=True)
    assert (sound < plain).all()
    assert (sound > plain - 1e-3).all()
    with pytest.raises(ValueError, match="sound must be False for method 'alpha-crown'"):
        margin_lower_bounds(apply, x, y, 0.05, method="alpha-crown", sound=True)
