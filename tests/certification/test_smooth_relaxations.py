"""Every smooth function's range and lines against float64 values, on intervals of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxalign.certification.smooth_relaxations import SMOOTH, elu, integer_power, real_power

REFERENCE = {  # the function in float64, and the least number it is tried on
    "abs": (np.abs, -np.inf),
    "exp": (np.exp, -np.inf),
    "exp2": (np.exp2, -np.inf),
    "expm1": (np.expm1, -np.inf),
    "log": (np.log, 1e-6),
    "log1p": (np.log1p, -0.999),
    "sqrt": (np.sqrt, 0.0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 1e-6),
    "reciprocal": (lambda x: 1 / x, 1e-3),
    "square": (np.square, -np.inf),
    "tanh": (np.tanh, -np.inf),
    "logistic": (special.expit, -np.inf),
    "erf": (special.erf, -np.inf),
    "erfc": (special.erfc, -np.inf),
    "atan": (np.arctan, -np.inf),
    "asinh": (np.arcsinh, -np.inf),
    "sinh": (np.sinh, -np.inf),
    "cosh": (np.cosh, -np.inf),
    "sin": (np.sin, -np.inf),
    "cos": (np.cos, -np.inf),
    "softplus": (lambda x: np.logaddexp(x, 0), -np.inf),
    "elu": (lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))), -np.inf),
    "silu": (lambda x: x * special.expit(x), -np.inf),
    "gelu": (lambda x: x * special.ndtr(x), -np.inf),
    "gelu_tanh": (lambda x: x * special.expit(np.sqrt(8 / np.pi) * (x + 0.044715 * x**3)), -np.inf),
    "sign": (np.sign, -np.inf),
    "round": (np.round, -np.inf),
    "floor": (np.floor, -np.inf),
    "ceil": (np.ceil, -np.inf),
}
FAMILIES = {
    "x^0": (integer_power(0), lambda x: x**0, -np.inf),
    "x^1": (integer_power(1), lambda x: x, -np.inf),
    "x^3": (integer_power(3), lambda x: x**3, -np.inf),
    "x^4": (integer_power(4), lambda x: x**4, -np.inf),
    "x^-2": (integer_power(-2), lambda x: x**-2.0, 1e-2),
    "x^-3": (integer_power(-3), lambda x: x**-3.0, 1e-2),
    "x^0.3": (real_power(0.3), lambda x: x**0.3, 0.0),
    "x^2.5": (real_power(2.5), lambda x: x**2.5, 0.0),
    "x^-0.7": (real_power(-0.7), lambda x: x**-0.7, 1e-3),
    "steep elu": (elu(1.67), lambda x: np.where(x > 0, x, 1.67 * np.expm1(np.minimum(x, 0))), -np.inf),
}
CASES = {name: (SMOOTH[name], *REFERENCE[name]) for name in SMOOTH} | FAMILIES
CONVEX = ("exp", "square", "softplus", "reciprocal", "rsqrt", "x^4", "x^-2", "x^2.5")
DIFFERENTIATED = ("log", "sqrt", "reciprocal", "tanh", "gelu", "sin", "erfc", "x^3")  # the others are made the same way
ALPHAS = (0.5, 0.0, 0.3, 1.0)
COUNT = 160
BY_HAND = [(-1, 3), (-2, 3), (1, 4), (-4, -1), (0, 2), (0, np.pi / 2)]
EXTREME = [(-1, 2), (0, 2), (2, np.inf), (-np.inf, 1), (50, 100), (-2e8, 2e8)]  # outside of domains, or of float32


def intervals(least):
    """Widths from 1e-6 to 20, some empty; places near 0 and far from it, or from `least` on; BY_HAND and EXTREME."""
    random = np.random.default_rng(0)
    width = 10 ** random.uniform(-6, np.log10(20), COUNT) * (np.arange(COUNT) >= 10)
    if np.isfinite(least):
        lower = least + 10 ** random.uniform(-3, 1, COUNT) * (np.arange(COUNT) >= 20)
    else:
        lower = random.normal(size=COUNT) * 10 ** random.uniform(-3, 0.8, COUNT) - width * random.uniform(size=COUNT)
    lower = lower.astype(np.float32)
    upper = np.maximum(lower, (lower + width).astype(np.float32))
    lows, highs = np.array(BY_HAND + EXTREME, np.float32).T
    return np.concatenate([lower, lows]), np.concatenate([upper, highs])


@pytest.fixture(scope="module")
def evaluated():
    """Ranges, lines [alpha, interval] and derivatives; one step at a time, as few steps are much less to compile."""
    found = {}
    with jax.disable_jit():
        for name, (rule, _, least) in CASES.items():
            lower, upper = (jnp.tile(v, len(ALPHAS)) for v in intervals(least))
            alphas = jnp.repeat(jnp.array(ALPHAS), len(lower) // len(ALPHAS))
            if name in DIFFERENTIATED:
                lines, pull = jax.vjp(rule.relax, lower, upper, alphas)
                gradients = pull(jax.tree.map(jnp.ones_like, lines))
            else:
                lines, gradients = rule.relax(lower, upper, alphas), ()
            lines, gradients = jax.tree.map(lambda v: np.asarray(v).reshape(len(ALPHAS), -1), (lines, gradients))
            found[name] = [np.asarray(v)[: lines[0].shape[1]] for v in rule.image(lower, upper)], lines, gradients
    return found


@pytest.mark.parametrize("name", CASES)
def test_lines_and_range_hold_the_function(evaluated, name):
    _, f, least = CASES[name]
    (low, high), lines, gradients = jax.tree.map(lambda v: v[..., :COUNT].astype(np.float64), evaluated[name])
    lower, upper = (v[:COUNT].astype(np.float64) for v in intervals(least))
    x = lower + np.linspace(0, 1, 401)[:, None] * (upper - lower)
    y = f(x)
    eps, size = np.finfo(np.float32).eps, np.max(np.abs(y), 0)
    rounding = 16 * eps * size + 1e-12
    assert np.all(low <= np.min(y, 0) + rounding)
    assert np.all(high >= np.max(y, 0) - rounding)
    # The grid misses an extreme inside by at most half a step of the steepest slope.
    missed = 1e-4 * (1 + size) + np.max(np.abs(np.diff(y, axis=0)), 0)
    assert np.all(low >= np.min(y, 0) - missed)
    assert np.all(high <= np.max(y, 0) + missed)
    reach = np.maximum(np.abs(lower), np.abs(upper))
    for below, low, above, high in zip(*lines, strict=True):
        rounding = 8 * eps * (2 * size + np.maximum(np.abs(below), np.abs(above)) * reach) + 1e-12
        assert np.all(below * x + low <= y + rounding)
        assert np.all(above * x + high >= y - rounding)
    if name in CONVEX:
        gap = np.min(y - lines.lower_slope[0] * x - lines.lower_intercept[0], 0)
        assert np.all(gap <= 1e-4 * (np.ptp(y, 0) + size))
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


def test_every_function_is_tested():
    assert set(REFERENCE) == set(SMOOTH)


def test_lines_by_hand(evaluated):
    def lines(name, interval, alpha=0.5):
        return [v[ALPHAS.index(alpha), COUNT + BY_HAND.index(interval)] for v in evaluated[name][1]]

    # x^2 on [-1, 3]: the tangent at 1, the chord.
    np.testing.assert_allclose(lines("square", (-1, 3)), [2, -1, 2, 3], rtol=1e-5)
    # x^3 on [-2, 3]: the tangent through (-2, -8) touches at 1, the one through (3, 27) at -1.5.
    np.testing.assert_allclose(lines("x^3", (-2, 3)), [3, -2, 6.75, 6.75], rtol=1e-5)
    # x^-2 on [1, 4]: the tangent at 2.5, the chord; mirrored on [-4, -1].
    tangent, chord = (-2 / 2.5**3, 3 / 2.5**2), ((1 / 16 - 1) / 3, 1 + (1 - 1 / 16) / 3)
    np.testing.assert_allclose(lines("x^-2", (1, 4)), [*tangent, *chord], rtol=1e-5)
    np.testing.assert_allclose(lines("x^-2", (-4, -1)), [-tangent[0], tangent[1], -chord[0], chord[1]], rtol=1e-5)
    np.testing.assert_allclose(lines("reciprocal", (-4, -1)), [-0.25, -1.25, -0.16, -0.8], rtol=1e-5)
    # |x| on [-1, 3]: x below, and for alpha 0 -x; (x + 3) / 2 above.
    np.testing.assert_allclose(lines("abs", (-1, 3), 1.0), [1, 0, 0.5, 1.5])
    np.testing.assert_allclose(lines("abs", (-1, 3), 0.0), [-1, 0, 0.5, 1.5])
    # tanh on [0, 2]: the chord below, the tangent at 1 above.
    slope, chord = 1 - np.tanh(1) ** 2, np.tanh(2) / 2
    np.testing.assert_allclose(lines("tanh", (0, 2)), [chord, 0, slope, np.tanh(1) - slope], rtol=1e-5)
    np.testing.assert_allclose(lines("sin", (0, np.pi / 2))[2], np.cos(np.pi / 4), rtol=1e-5)


@pytest.mark.parametrize("name", ["tanh", "x^3", "gelu", "silu", "sin", "erfc", "softplus"])
def test_default_lines_leave_the_least_area(evaluated, name):
    """No line below f is higher at the middle of the interval than the lowest chord of f there; likewise above."""
    _, f, least = CASES[name]
    lower, upper = (v[:COUNT].astype(np.float64) for v in intervals(least))
    chosen = (upper - lower > 0.5) & (upper - lower < 6)
    lower, upper = lower[chosen], upper[chosen]
    below, low, above, high = (v[0, :COUNT][chosen] for v in evaluated[name][1])
    left = np.linspace(0, 0.5, 201)[:, None, None] * (upper - lower) + lower
    right = np.linspace(0.5, 1, 201)[1:, None] * (upper - lower) + lower
    middle = (lower + upper) / 2
    share = (middle - left) / (right - left)
    chords = f(left) * (1 - share) + f(right) * share
    near = 2e-3 * (1 + np.ptp(chords, axis=(0, 1)))
    assert np.all(below * middle + low >= chords.min((0, 1)) - near)
    assert np.all(above * middle + high <= chords.max((0, 1)) + near)


def test_outside_the_domain_the_range_says_so_and_nothing_is_nan(evaluated):
    for (low, high), lines, gradients in evaluated.values():
        assert not any(np.isnan(v).any() for v in (low, high, *lines, *gradients))
        assert np.all(low <= high)

    def image(name, interval):
        return [v[COUNT + len(BY_HAND) + EXTREME.index(interval)] for v in evaluated[name][0]]

    for name in ("log", "sqrt", "rsqrt", "reciprocal", "x^-2", "x^0.3"):
        assert image(name, (-1, 2)) == [-np.inf, np.inf]
    np.testing.assert_allclose(image("log", (0, 2)), [-np.inf, np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(image("sqrt", (0, 2)), [0, np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(image("rsqrt", (0, 2)), [np.sqrt(0.5), np.inf], rtol=1e-6)
    np.testing.assert_allclose(image("tanh", (2, np.inf)), [np.tanh(2), 1], rtol=1e-6)
    np.testing.assert_allclose(image("reciprocal", (2, np.inf)), [0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(image("exp", (-np.inf, 1)), [0, np.e], rtol=1e-6)
    np.testing.assert_allclose(image("silu", (-np.inf, 1)), [-0.2784645, special.expit(1)], rtol=1e-5)
    np.testing.assert_allclose(image("gelu", (-np.inf, 1)), [-0.1699712, special.ndtr(1)], rtol=1e-5)
    assert image("cos", (-np.inf, 1)) == [-1, 1]
    assert image("exp", (50, 100))[1] == np.inf
    assert image("sin", (-2e8, 2e8)) == [-1, 1]
    flat = [v[0, COUNT + len(BY_HAND) + EXTREME.index((-np.inf, 1))] for v in evaluated["exp"][1]]
    np.testing.assert_allclose(flat, [0, 0, 0, np.e], rtol=1e-6)


def test_alpha_goes_over_the_touching_points(evaluated):
    lower, upper = (v[100:COUNT] for v in intervals(-np.inf))
    for alpha, slope in zip(ALPHAS, evaluated["exp"][1].lower_slope[:, 100:COUNT], strict=True):
        np.testing.assert_allclose(np.log(slope), lower + alpha * (upper - lower), atol=1e-3 * np.max(upper - lower))


def test_compiled_lines_over_leading_axes_of_alpha_and_their_derivatives(evaluated):
    lower, upper = (v[:COUNT] for v in intervals(-np.inf))
    alphas = np.broadcast_to(np.float32(ALPHAS)[:, None], (len(ALPHAS), COUNT))
    step, weights = np.float32(1e-2), (1, 0.7, 1.3, 0.4)

    @jax.jit
    def run(lower, upper, alphas):
        plain, pull = jax.vjp(SMOOTH["tanh"].relax, lower, upper)
        slopes = pull(type(plain)(*(jnp.full_like(v, w) for w, v in zip(weights, plain, strict=True))))
        return plain, slopes, SMOOTH["tanh"].relax(lower, upper, alphas)

    def total(lower, upper):
        return sum(w * v for w, v in zip(weights, run(lower, upper, alphas)[0], strict=True))

    plain, (by_lower, by_upper), lines = jax.device_get(run(lower, upper, alphas))
    for one, default, eager in zip(lines, plain, evaluated["tanh"][1], strict=True):
        np.testing.assert_allclose(one, eager[:, :COUNT], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(one[0], default, rtol=1e-6)
    wide = upper - lower > 0.1
    for found, low, high in ((by_lower, step, 0), (by_upper, 0, step)):
        difference = (total(lower + low, upper + high) - total(lower - low, upper - high)) / (2 * step)
        # Where another kind of line takes over within the step, the two may differ.
        assert np.mean(np.abs(found - difference)[wide] < 1e-2) > 0.9


def test_a_power_may_be_traced_and_a_whole_one_is_an_integer_power():
    lower, upper = np.array([[0.5, 0.0, 1.0]], np.float32), np.array([[2.0, 1.0, 4.0]], np.float32)
    exponents = np.array([[0.5, 2.5, -1.5]], np.float32)
    rules = jax.jit(lambda p: (real_power(p).image(lower, upper), real_power(p).relax(jnp.asarray(lower), upper)))
    (low, high), lines = jax.device_get(rules(exponents))
    np.testing.assert_allclose(low, [[np.sqrt(0.5), 0, 0.125]], rtol=1e-6)
    np.testing.assert_allclose(high, [[np.sqrt(2), 1, 1]], rtol=1e-6)
    x = lower + np.linspace(0, 1, 101)[:, None] * (upper - lower)
    y = x**exponents
    assert np.all(lines.lower_slope * x + lines.lower_intercept <= y + 1e-5)
    assert np.all(lines.upper_slope * x + lines.upper_intercept >= y - 1e-5)
    np.testing.assert_allclose(real_power(2.0).image(-upper, lower)[1], np.maximum(lower, upper) ** 2)


def test_lines_survive_a_search_that_ends_early(monkeypatch):
    monkeypatch.setattr("jaxalign.certification.hull_lines.SEARCH_STEPS", 2)
    lower, upper = (np.tile(v, len(ALPHAS)) for v in intervals(-np.inf))
    with jax.disable_jit():
        below, low, above, high = jax.device_get(SMOOTH["tanh"].relax(jnp.asarray(lower), jnp.asarray(upper)))
    finite = np.isfinite(lower) & np.isfinite(upper)
    x = np.linspace(lower[finite], upper[finite], 401)
    assert np.all(below[finite] * x + low[finite] <= np.tanh(x) + 1e-6)
    assert np.all(above[finite] * x + high[finite] >= np.tanh(x) - 1e-6)
