"""The bounds that pay for their rounding, against rational arithmetic and float64."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from jaxalign.certification.bounds import Bounds
from jaxalign.certification.flat_program import Step
from jaxalign.certification.interpreter import UnsupportedPrimitive
from jaxalign.certification.interval import interval_bounds
from jaxalign.certification.rounding import CURVES, ROUNDED, outward, widen
from jaxalign.certification.smooth_relaxations import SMOOTH

CURVES_HERE = {  # the function, and the same in float64
    "exp": (jnp.exp, np.exp),
    "exp2": (jnp.exp2, np.exp2),
    "expm1": (jnp.expm1, np.expm1),
    "log": (lambda x: jnp.log(jnp.abs(x)), lambda x: np.log(np.abs(x))),
    "log1p": (lambda x: jnp.log1p(jnp.abs(x)), lambda x: np.log1p(np.abs(x))),
    "sqrt": (lambda x: jnp.sqrt(jnp.abs(x)), lambda x: np.sqrt(np.abs(x))),
    "rsqrt": (lambda x: jax.lax.rsqrt(jnp.abs(x)), lambda x: 1 / np.sqrt(np.abs(x))),
    "tanh": (jnp.tanh, np.tanh),
    "logistic": (jax.lax.logistic, special.expit),
    "erf": (jax.lax.erf, special.erf),
    "erfc": (jax.lax.erfc, special.erfc),
    "sin": (jnp.sin, np.sin),
    "cos": (jnp.cos, np.cos),
    "atan": (jnp.atan, np.arctan),
    "sinh": (jnp.sinh, np.sinh),
    "cosh": (jnp.cosh, np.cosh),
    "asinh": (jnp.asinh, np.arcsinh),
    "gelu": (lambda x: jax.nn.gelu(x, approximate=False), lambda x: x * special.erfc(-x / np.sqrt(2)) / 2),
    "silu": (jax.nn.silu, lambda x: x * special.expit(x)),
    "softplus": (jax.nn.softplus, lambda x: np.logaddexp(x, 0)),
    "elu": (jax.nn.elu, lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0)))),
    "square": (jnp.square, np.square),
    "cube": (lambda x: x**3, lambda x: x**3),
    "quotient": (lambda x: x / 3, lambda x: x / 3),
    "sum": (lambda x: x + jnp.float32(0.1), lambda x: x + float(np.float32(0.1))),
    "product": (lambda x: x * jnp.float32(0.1), lambda x: x * float(np.float32(0.1))),
}


def exact_network(x, layers):
    """relu(... relu(x W + b) ...) over the rational numbers."""
    values = [Fraction(float(v)) for v in x]
    for i, (weights, offsets) in enumerate(layers):
        columns = zip(*weights.tolist(), strict=True)
        values = [
            sum(Fraction(w) * v for w, v in zip(column, values, strict=True)) + Fraction(float(offset))
            for column, offset in zip(columns, offsets, strict=True)
        ]
        if i < len(layers) - 1:
            values = [max(v, Fraction(0)) for v in values]
    return values


def network(layers):
    def apply(x):
        for i, (weights, offsets) in enumerate(layers):
            x = x @ weights + offsets
            x = jax.nn.relu(x) if i < len(layers) - 1 else x
        return x

    return apply


def cancelling_network(random):
    """Large weights in pairs that cancel, a small rest: what is left of the sum is rounding in float32."""
    large = random.uniform(1e5, 1e6, (16, 8))
    first = np.concatenate([large, -large * (1 + 1e-7 * random.normal(size=large.shape))])
    second = random.normal(size=(8, 3))
    return [(first.astype(np.float32), np.ones(8, np.float32)), (second.astype(np.float32), np.zeros(3, np.float32))]


def test_ordinary_bounds_miss_the_exact_value_where_weights_cancel_and_sound_ones_do_not():
    random = np.random.default_rng(0)
    missed, width = 0, jnp.float32(1e-9)
    for _ in range(5):
        layers = cancelling_network(random)
        x = np.repeat(random.uniform(0.5, 1, 16), 2).reshape(16, 2).T.reshape(-1).astype(np.float32)
        exact = exact_network(x, layers)
        boxes = [interval_bounds(network(layers), x - width, x + width, sound=sound) for sound in (False, True)]
        held = [
            [Fraction(float(lo)) <= v <= Fraction(float(hi)) for lo, v, hi in zip(b.lower, exact, b.upper, strict=True)]
            for b in boxes
        ]
        missed += sum(not h for h in held[0])
        assert all(held[1])
    assert missed >= 5


def test_a_hand_made_sum():
    # 1e8 + 1 - 1e8 is 1, and 0 or 8 in float32.
    weights, x = jnp.array([[1e8], [1.0], [-1e8]], jnp.float32), jnp.ones(3)
    ordinary, sound = (interval_bounds(lambda x: x @ weights, x, x, sound=flag) for flag in (False, True))
    assert not ordinary.lower[0] <= 1 <= ordinary.upper[0]
    assert sound.lower[0] <= 1 <= sound.upper[0]


def test_random_networks_hold_every_corner_exactly_and_hardly_widen():
    random = np.random.default_rng(1)
    layers = [
        (random.normal(size=(6, 32)).astype(np.float32), random.normal(size=32).astype(np.float32)),
        (random.normal(size=(32, 16)).astype(np.float32) / 4, random.normal(size=16).astype(np.float32)),
        (random.normal(size=(16, 3)).astype(np.float32), random.normal(size=3).astype(np.float32)),
    ]
    x = random.normal(size=6).astype(np.float32)
    lower, upper = x - np.float32(0.1), x + np.float32(0.1)
    ordinary, sound = (interval_bounds(network(layers), lower, upper, sound=flag) for flag in (False, True))
    assert np.all(sound.lower < ordinary.lower)
    assert np.all(sound.upper > ordinary.upper)
    widened = (sound.upper - sound.lower) / (ordinary.upper - ordinary.lower) - 1
    assert np.all(widened < 1e-4)
    for corner in random.integers(0, 2, (8, 6)):
        for low, value, high in zip(
            sound.lower, exact_network(np.where(corner, upper, lower), layers), sound.upper, strict=True
        ):
            assert Fraction(float(low)) <= value <= Fraction(float(high))


def test_a_convolution_with_pooling_and_normalisation():
    random = np.random.default_rng(2)
    kernel = (1e3 * random.normal(size=(3, 3, 2, 4))).astype(np.float32)
    x = random.uniform(size=(1, 8, 8, 2)).astype(np.float32)

    def apply(x):
        y = jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel, x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jax.lax.reduce_window(y, np.zeros((), x.dtype), jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
        y = (y - jnp.mean(y, (1, 2), keepdims=True)) * jnp.asarray(np.float32(0.3), x.dtype)
        return jnp.cumsum(jax.nn.relu(y), axis=1)

    sound = interval_bounds(apply, x, x, sound=True)
    with jax.enable_x64(True):
        exact = np.asarray(apply(jnp.asarray(x, jnp.float64)))
    assert np.all((np.asarray(sound.lower, float) <= exact) & (exact <= np.asarray(sound.upper, float)))
    ordinary = interval_bounds(apply, x, x)
    assert np.any((np.asarray(ordinary.lower, float) > exact) | (exact > np.asarray(ordinary.upper, float)))
    assert np.max(sound.upper - sound.lower) < 1e-4 * np.max(np.abs(exact))


@pytest.fixture(scope="module")
def at_points():
    """Bounds at single points, where an interval is made of rounding alone."""
    random = np.random.default_rng(3)
    x = np.concatenate([random.normal(size=3000) * 10 ** random.uniform(-5, 1.2, 3000), random.uniform(-8, 8, 3000)])
    x = x.astype(np.float32)
    found = jax.jit(
        lambda x: interval_bounds(lambda x: {k: f(x) for k, (f, _) in CURVES_HERE.items()}, x, x, sound=True)
    )(x)
    return x.astype(float), jax.device_get(found)


@pytest.mark.parametrize("name", CURVES_HERE)
def test_rounding_of_a_function_is_paid_for(at_points, name):
    x, found = at_points
    exact = CURVES_HERE[name][1](x)
    low, high = found.lower[name].astype(float), found.upper[name].astype(float)
    assert np.all((low <= exact) & (exact <= high))
    assert np.all(high - low <= 2e-5 * np.abs(exact) + 2e-6)


def test_every_curve_has_a_known_rounding():
    flat = {"abs", "sign", "round", "floor", "ceil"}
    assert set(SMOOTH) <= set(CURVES) | set(ROUNDED) | flat


def test_softmax_and_its_logarithms():
    random = np.random.default_rng(4)
    x = (5 * random.normal(size=(20, 12))).astype(np.float32)

    def apply(x):
        return jax.nn.softmax(x), jax.nn.log_softmax(x), jax.nn.logsumexp(x, axis=-1)

    sound = interval_bounds(apply, x, x, sound=True)
    total = special.logsumexp(x.astype(float), axis=-1)
    exact = special.softmax(x.astype(float), axis=-1), x - total[:, None], total
    for low, value, high in zip(sound.lower, exact, sound.upper, strict=True):
        low, high = np.asarray(low, float), np.asarray(high, float)
        assert np.all((low <= value) & (value <= high))
        assert np.all(high - low <= 2e-3)


def test_widening_by_hand():
    eps, tiny = np.finfo(np.float32).eps, np.finfo(np.float32).tiny
    found = outward(Bounds(jnp.array([-2.0, 0.0, -jnp.inf]), jnp.array([4.0, 0.0, jnp.inf])), 1)
    np.testing.assert_array_equal(found.lower, [np.float32(-2 - 2 * eps), -2 * tiny, -np.inf])
    np.testing.assert_array_equal(found.upper, [np.float32(4 + 4 * eps), 2 * tiny, np.inf])
    bounds = [Bounds(jnp.zeros(2), jnp.ones(2))]
    assert widen(Step("reshape", None, {}, (), ()), [], bounds) is bounds
    with pytest.raises(UnsupportedPrimitive, match="rounding is not known"):
        widen(Step("igamma", None, {}, (), (), ()), [], bounds)


def test_conversion_to_a_coarser_type_and_back_holds_the_number_before_it():
    x = jnp.float32(1 + 2**-10)
    found = interval_bounds(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), x, x, sound=True)
    assert found.lower <= x <= found.upper
    assert found.upper - found.lower < 0.05


def test_under_vmap():
    x = jnp.linspace(0, 1, 12).reshape(3, 4)
    weights = jnp.ones((4, 2)) * 0.1
    function = lambda lo, hi: interval_bounds(lambda x: jnp.tanh(x @ weights), lo, hi, sound=True)  # noqa: E731
    together = jax.vmap(function)(x, x + 0.1)
    alone = [function(lo, lo + 0.1) for lo in x]
    np.testing.assert_allclose(together.lower, jnp.stack([b.lower for b in alone]), rtol=1e-6)
