"""Branch and bound against functions whose answer is known: never wrong, either way."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.certification.branch_and_bound import verify_property
from jaxalign.certification.crown import crown_bounds
from jaxalign.certification.linear_cuts import Rows, examine, linear_lower_bounds
from jaxalign.certification.properties import Property, UnsafeCase, misclassification

LIMITS = {"time_limit": 60.0, "batch_size": 8}
FEW = {**LIMITS, "memory_limit": 2000}  # bytes: about a hundred boxes, where the search would go on for ever


def bends(x):
    """[|x0| - x0 / 2, |x0| - x0 / 2 + |x1 - 0.3|]: never below zero, which CROWN alone cannot tell around zero."""
    into = jnp.array([[1, -1, 0, 0], [0, 0, 1, -1]], x.dtype)
    out = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], x.dtype)
    return out @ jax.nn.relu(x @ into + jnp.array([0, 0, -0.3, 0.3], x.dtype)) - x[0] / 2


WEIGHTS = [np.random.default_rng(3).normal(size=size) for size in ((2, 12), (12, 12), (12, 2))]


def network(x):
    """A random ReLU network 2-12-12-2."""
    first, second, last = (jnp.asarray(w, x.dtype) for w in WEIGHTS)
    return jax.nn.relu(jax.nn.relu(x @ first + 0.5) @ second) @ last


def at_most(bound, *, row=(1.0, 0.0), lower=(-1.0, -1.0), upper=(2.0, 1.0)):
    """Unsafe: row @ y <= bound somewhere in the box. Said twice, as then all tests share their programs."""
    return UnsafeCase(np.array(lower), np.array(upper), np.array([row] * 2), np.array([bound] * 2, np.float64))


def ask(*cases):
    return Property(cases, 2, 2)


@pytest.fixture(scope="module")
def valley():
    """The least of the network's first output over 401 x 401 points of the box, and where."""
    points = np.stack(np.meshgrid(np.linspace(-1, 2, 401), np.linspace(-1, 1, 401)), -1).reshape(-1, 2)
    hidden = np.maximum(np.maximum(points @ WEIGHTS[0] + 0.5, 0) @ WEIGHTS[1], 0) @ WEIGHTS[2]
    place = hidden[:, 0].argmin()
    return hidden[place, 0], points[place]


def test_crown_alone_cannot_tell_and_splitting_can():
    box = np.float32([-1, -1]), np.float32([2, 1])
    assert jax.jit(functools.partial(crown_bounds, bends))(*box).lower[0] == -0.5
    verdict = verify_property(bends, ask(at_most(-0.1)), **LIMITS)
    assert verdict.status == "verified"
    assert verdict.boxes > 1
    assert verdict.boxes_left == 0
    assert verdict.lower_bound == 0
    assert verdict.counterexample is None


def test_a_counterexample_is_found_and_is_one():
    unsafe = ask(at_most(0.01))
    verdict = verify_property(bends, unsafe, **LIMITS)
    assert verdict.status == "falsified"
    assert -0.01 / 1.5 <= verdict.counterexample[0] <= 0.02
    np.testing.assert_array_equal(verdict.output, bends(jnp.asarray(verdict.counterexample)))
    assert unsafe.broken_by(verdict.counterexample, verdict.output)


def test_a_conjunction_holds_only_where_all_its_rows_do():
    """y0 <= 0.5 and y0 >= 0.6 exclude each other, though each alone is met."""
    rows = np.array([[1.0, 0.0], [-1.0, 0.0]])
    apart = UnsafeCase(np.array([-1.0, -1.0]), np.array([2.0, 1.0]), rows, np.array([0.5, -0.6]))
    assert verify_property(bends, ask(apart), **LIMITS).status == "verified"
    assert verify_property(bends, ask(apart._replace(offsets=np.array([0.5, -0.4]))), **LIMITS).status == "falsified"


def test_of_a_disjunction_every_case_must_be_excluded():
    safe, far = at_most(-0.1), at_most(-0.1, lower=(0.5, -1.0))
    other = at_most(0.2, row=(-1.0, 1.0), lower=(0.5, 0.6))  # |x1 - 0.3| <= 0.2 for x1 in [0.6, 1]
    assert verify_property(bends, ask(safe, far, other), **LIMITS).status == "verified"
    met = other._replace(offsets=np.full(2, 0.3 + 1e-6))
    verdict = verify_property(bends, ask(safe, far, met), **LIMITS)
    assert verdict.status == "falsified"
    np.testing.assert_allclose(verdict.counterexample[1], 0.6, atol=1e-5)
    both = ask(safe, at_most(0.05))  # one box, two conjunctions
    assert verify_property(bends, both, **LIMITS).status == "falsified"


@pytest.mark.parametrize("gap", [-0.3, -1e-2])
def test_a_property_true_up_to_a_small_gap_is_verified(valley, gap):
    least, _ = valley
    verdict = verify_property(network, ask(at_most(least + gap)), **LIMITS)
    assert verdict.status == "verified", verdict


@pytest.mark.parametrize("gap", [0.0, 1e-6, 1e-2])
def test_a_property_that_a_sampled_point_breaks_is_never_verified(valley, gap):
    """The limit lies at, or just above, what a point of the box is known to reach."""
    least, _ = valley
    unsafe = ask(at_most(least + gap))
    verdict = verify_property(network, unsafe, **FEW)
    assert verdict.status == ("falsified" if gap == 1e-2 else verdict.status)
    assert verdict.status != "verified"
    if verdict.status == "falsified":
        assert unsafe.broken_by(verdict.counterexample, np.asarray(network(jnp.asarray(verdict.counterexample))))


def test_a_hair_that_rounding_may_explain_stays_unknown():
    """|x1 - 0.3| is never below zero, but in float32 around 0.3 who could tell it from -1e-9."""
    verdict = verify_property(bends, ask(at_most(-1e-9, row=(-1.0, 1.0))), **FEW)
    assert verdict.status == "unknown"
    assert -1e-3 < verdict.lower_bound <= 0


def test_where_time_or_memory_ends_the_answer_is_unknown(valley):
    unsafe = ask(at_most(valley[0] - 1e-2))
    seen = []
    late = verify_property(network, unsafe, time_limit=1e-9, batch_size=8)
    assert (late.status, late.boxes, late.boxes_left, late.lower_bound) == ("unknown", 0, 1, -np.inf)
    assert "time limit" in late.reason
    full = verify_property(network, unsafe, memory_limit=100, **LIMITS, progress=lambda *now: seen.append(now))
    assert full.status == "unknown"
    assert "memory limit" in full.reason
    assert full.boxes_left > 1
    assert seen[-1] == (full.boxes, full.boxes_left, full.lower_bound)
    assert full.lower_bound < 0


def test_what_is_not_a_number_verifies_nothing():
    verdict = verify_property(lambda x: x * jnp.float32(np.nan), ask(at_most(-10.0)), **FEW)
    assert verdict.status == "unknown"
    assert verdict.lower_bound == -np.inf


def test_a_network_run_elsewhere_must_agree():
    """A counterexample of fn that the network itself does not confirm is none."""
    verdict = verify_property(bends, ask(at_most(0.01)), **FEW, run=lambda x: np.ones(2))
    assert verdict.status == "unknown"


def test_counterexamples_keep_inside_the_box_as_it_stands():
    """0.7 is no float32, and the nearest one lies below; a box of one point has to make do with it."""
    case = at_most(1.0, lower=(0.7, 0.7), upper=(0.7000001, 0.7000001))
    assert float(np.float32(0.7)) < 0.7
    verdict = verify_property(bends, ask(case), **LIMITS)
    assert verdict.status == "falsified"
    assert case.holds(verdict.counterexample)
    fixed = verify_property(bends, ask(case._replace(upper=case.lower)), **LIMITS)
    np.testing.assert_array_equal(fixed.counterexample, np.float32([0.7, 0.7]))


def test_without_a_row_every_output_is_unsafe():
    other = at_most(-0.1)
    case = other._replace(weights=np.zeros((0, 2)), offsets=np.zeros(0))
    assert verify_property(bends, ask(other, case), **LIMITS).status == "falsified"


def test_linear_bounds_are_crowns_and_hold():
    rows = jnp.float32([[1, 0], [0, -1], [1, 1]])
    low, high = jnp.float32([-0.4, 0.1]), jnp.float32([0.5, 0.9])
    slopes, constants = jax.jit(lambda low, high: linear_lower_bounds(bends, low, high, rows))(low, high)
    least = jnp.minimum(slopes * low[None], slopes * high[None]).sum(1) + constants
    expected = jax.jit(lambda low, high: crown_bounds(bends, low, high, specification=rows).lower)(low, high)
    np.testing.assert_allclose(least, expected, rtol=1e-4, atol=1e-5)
    paid = jax.jit(lambda low, high: linear_lower_bounds(bends, low, high, rows, sound=True))(low, high)
    assert (paid[1] < constants).all()
    np.testing.assert_allclose(paid[1], constants, atol=1e-4)
    x = np.random.default_rng(0).uniform(low, high, (200, 2)).astype(np.float32)
    assert (x @ slopes.T + constants[None] <= jax.vmap(bends)(x) @ rows.T + 1e-5).all()


def test_a_box_is_cut_where_a_linear_function_is_positive():
    """Unsafe is x0 - x1 <= -1 in [-2, 2]^2: x0 <= x1 - 1 <= 1 and x1 >= x0 + 1 >= -1 are kept."""
    rows = Rows(jnp.ones((1, 1, 1)), jnp.full((1, 1), -1.0))
    look = jax.jit(lambda lower, upper: examine(lambda x: x[:1] - x[1:], rows, lower, upper))
    seen = look(jnp.float32([-2, -2]), jnp.float32([2, 2]))
    np.testing.assert_allclose([*seen.lower, *seen.upper], [-2, -1, 1, 2], atol=1e-4)
    assert bool(seen.open)
    assert -3 - 1e-4 < float(seen.bound) <= -3 == float(seen.excess)


def test_a_misclassification_is_any_other_class_on_top():
    unsafe = misclassification([-1.0, 0.5], [2.0, 1.0], 1, 3)
    x = np.array([0.0, 0.75])
    for y, expected in (([0, 1, 0.5], False), ([2, 1, 0], True), ([0, 1, 1], True), ([1, 1.1, 1], False)):
        assert unsafe.broken_by(x, np.array(y)) == expected
    assert not unsafe.broken_by(-x, np.array([2, 1, 0]))


def test_wrong_arguments_are_named():
    case = at_most(0.0)
    with pytest.raises(ValueError, match=r"case 0: lower 3.0 is above upper 2.0 at input 0"):
        verify_property(bends, ask(case._replace(lower=np.array([3.0, 0.0]))))
    with pytest.raises(ValueError, match="case 0: upper must be finite"):
        verify_property(bends, ask(case._replace(upper=np.array([np.inf, 0.0]))))
    with pytest.raises(ValueError, match=r"case 0: weights must be \[2, 3\]"):
        verify_property(bends, Property((case,), 2, 3))
    with pytest.raises(ValueError, match=r"fn must return \[2\], got \[1\]"):
        verify_property(lambda x: x[:1], ask(case))
    with pytest.raises(ValueError, match="batch_size must be positive"):
        verify_property(bends, ask(case), batch_size=0)
