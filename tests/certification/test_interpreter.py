"""Every rule of the interpreter: bounds of many small functions against samples and corners of random boxes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.certification.bounds import Bounds
from jaxalign.certification.crown import crown_bounds
from jaxalign.certification.interpreter import UnsupportedPrimitive
from jaxalign.certification.interval import interval_bounds

SHAPE = (2, 3)
WEIGHTS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)


def fixed(module, shape):
    """A module with parameters of its own, as a function."""
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros(shape))
    return lambda x: module.apply(params, x)


@jax.custom_vjp
def halved(x):
    return x / 2


halved.defvjp(lambda x: (x / 2, None), lambda _, g: (g / 2,))

LINEAR = {
    "dense": lambda x: x @ WEIGHTS - 1,
    "data movement": lambda x: jnp.flip(jnp.pad(x, 1, constant_values=2.0).T, 0)[1:, None].reshape(4, 4),
    "gather and scatter": lambda x: x.at[1].set(0.5).at[0].add(x[1])[jnp.array([1, 0])],
    "concatenate, stack, split": lambda x: jnp.stack(jnp.split(jnp.concatenate([x, -x], 1), 3, axis=1)),
    "reductions": lambda x: (jnp.sum(x, 0), jnp.mean(x, 1), jnp.cumsum(x, 1)),
    "known choice": lambda x: jnp.where(jnp.array([True, False, True]), x, 2 * x[:, ::-1]),
    "calls": lambda x: halved(jax.checkpoint(jax.jit(lambda v: 3 * v))(x)) + jax.lax.stop_gradient(x),
    "known branch": lambda x: jax.lax.cond(jnp.array(3) > 2, lambda v: v + 1, lambda v: v * 2, x),
    "batch norm": fixed(nn.BatchNorm(use_running_average=True), SHAPE),
    "average pool": lambda x: nn.avg_pool(x[None, ..., None], (2, 2), padding="SAME"),
}
CURVES = {
    "exp, log, roots": lambda x: jnp.log(1 + jnp.exp(x)) + jnp.sqrt(1 + x**2) - jax.lax.rsqrt(2 + jnp.abs(x)),
    "s-shaped": lambda x: (jnp.tanh(x @ WEIGHTS), jax.nn.sigmoid(x), jax.scipy.special.erf(x)),
    "waves": lambda x: jnp.sin(x) + jnp.cos(x @ WEIGHTS),
    "gates": lambda x: (jax.nn.gelu(x), jax.nn.gelu(x, approximate=False), jax.nn.silu(x), jax.nn.softplus(x)),
    "kinks": lambda x: (jax.nn.relu(x @ WEIGHTS), jax.nn.leaky_relu(x), jnp.abs(x), jnp.clip(x, -0.5, 0.7)),
    "exponential unit": jax.nn.elu,
    "powers": lambda x: (x * x, x**3, (1 + x**2) ** -2, jnp.exp(x) ** 1.5, 2.0**x),
    "quotient": lambda x: (x[:, 0] / (2 + jnp.abs(x[:, 1])), 1 / (1 + jnp.exp(x)), x / 3),
}
SEVERAL = {
    "softmax": lambda x: (jax.nn.softmax(x @ WEIGHTS), jax.nn.log_softmax(x, axis=0)),
    "log of a sum": lambda x: jax.nn.logsumexp(x, axis=1),
    "mapped softmax": jax.vmap(jax.nn.softmax),
    "layer norm": fixed(nn.LayerNorm(), SHAPE),
    "attention": fixed(nn.MultiHeadDotProductAttention(num_heads=1, qkv_features=2), SHAPE),
    "products": lambda x: (x @ x.T, x[0] * x[1], jnp.einsum("ij,kj->ikj", x, x)),
    "maxima": lambda x: (jnp.max(x, 1), jnp.min(x @ WEIGHTS), jnp.maximum(x[0], x[1])),
    "max pool": lambda x: nn.max_pool(x[..., None], (2,), padding="SAME"),
    "order": lambda x: jnp.sort(x, axis=1),
    "unknown choice": lambda x: jnp.where((x > 0.1) & ~(x >= 2), x, 2 * x),
    "steps": lambda x: jnp.sign(x) + jnp.floor(x) * (x == 3),
    "loop": lambda x: jax.lax.scan(lambda c, v: (jnp.tanh(c @ WEIGHTS + v), c.sum()), jnp.zeros(3), x),
    "loop backward": lambda x: jax.lax.scan(lambda c, v: (jax.nn.relu(c - v), v), x[0], x, reverse=True),
    "gradient": jax.grad(lambda x: jnp.sum(jax.nn.relu(x @ WEIGHTS) ** 2)),
}
FUNCTIONS = {**LINEAR, **CURVES, **SEVERAL}


SLOW_TO_COMPILE = {"exp, log, roots", "waves", "gates", "powers", "quotient", "layer norm", "attention", "loop"}


def several(names):
    return lambda x: {name: FUNCTIONS[name](x) for name in names}


METHODS = {"interval": interval_bounds, "crown": crown_bounds}
QUICK = several(set(FUNCTIONS) - SLOW_TO_COMPILE)  # CROWN's lines around smooth functions are tested by themselves
CHOSEN = {"interval": several(FUNCTIONS), "crown": QUICK, "crown of all": several(FUNCTIONS)}


@functools.cache
def compiled(chosen):
    method, function = METHODS[chosen.split()[0]], CHOSEN[chosen]
    return jax.jit(lambda low, high: method(function, low, high)), jax.jit(jax.vmap(function))


def points_of(low, high, seed):
    """Corners and inner points of a box, [N, *SHAPE]."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 2, size=(100, *SHAPE)).astype(np.float32)
    places = np.concatenate([corners, rng.uniform(size=(100, *SHAPE)).astype(np.float32)])
    return np.clip(low[None] + places * (high - low)[None], low[None], high[None])


def violations(bounds, values):
    """By name, how far values [N, ...] leave the bounds, relative to their size."""

    def beyond(low, high, value):
        value = np.asarray(value, np.float64)
        scale = 1 + np.abs(value).max()
        return max(float((low[None] - value).max()), float((value - high[None]).max())) / scale

    found = jax.tree.map(beyond, bounds.lower, bounds.upper, values)
    return {name: max(jax.tree.leaves(tree)) for name, tree in found.items()}


@pytest.mark.parametrize("chosen", ["interval", "crown", pytest.param("crown of all", marks=pytest.mark.slow)])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.0, 1e-4, 0.1, 1.0]), spread=st.sampled_from([0.1, 2.0]))
def test_every_point_of_the_box_lies_within_the_bounds(chosen, seed, scale, spread):
    rng = np.random.default_rng(seed)
    low = rng.normal(size=SHAPE).astype(np.float32) * spread
    high = low + rng.uniform(size=SHAPE).astype(np.float32) * scale
    bound, evaluate = compiled(chosen)
    found = violations(bound(low, high), evaluate(points_of(low, high, seed)))
    assert {name: v for name, v in found.items() if not v <= 2e-5} == {}


@pytest.mark.parametrize("chosen", ["interval", "crown", pytest.param("crown of all", marks=pytest.mark.slow)])
def test_a_point_box_gives_the_function_itself(chosen):
    x = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    bound, evaluate = compiled(chosen)
    bounds, exact = bound(x, x), jax.tree.map(lambda v: v[0], evaluate(points_of(x, x, 0)))
    for name in exact:
        for side in (bounds.lower, bounds.upper):
            for found, expected in zip(jax.tree.leaves(side[name]), jax.tree.leaves(exact[name]), strict=True):
                np.testing.assert_allclose(found, expected, atol=3e-4, rtol=3e-4, err_msg=name)


def test_crown_is_never_looser_than_intervals():
    low = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
    loose, tight = (compiled(m)[0](low, low + 0.3) for m in ("interval", "crown"))
    loose = Bounds(*({name: side[name] for name in tight.lower} for side in (loose.lower, loose.upper)))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a <= b + 1e-5).all()), loose.lower, tight.lower)))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a >= b - 1e-5).all()), loose.upper, tight.upper)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("function", "primitive", "words"),
    [
        (lambda x: jnp.argmax(x), "argmax", "no rule"),
        (lambda x: jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c + 1, x), "while", "no rule"),
        (lambda x: x[x[0, 0].astype(int)], "convert_element_type", "bounded real"),
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda v: v, lambda v: -v, x), "", "bounded"),
        (lambda x: jnp.linalg.cholesky(x.T @ x), "cholesky", "no rule"),
    ],
)
def test_an_unsupported_step_is_named_with_its_place(method, function, primitive, words):
    with pytest.raises(UnsupportedPrimitive, match=f"`{primitive}") as error:
        METHODS[method](function, jnp.zeros(SHAPE), jnp.ones(SHAPE))
    assert words in str(error.value)
    assert "test_interpreter.py" in str(error.value)


def test_a_function_that_only_bears_a_known_name_is_bounded_by_what_it_does():
    @jax.jit
    def relu(x):
        return x * x - 3

    bounds = interval_bounds(relu, jnp.full((2,), -1.0), jnp.full((2,), 2.0))
    np.testing.assert_allclose(bounds.lower, -3)
    np.testing.assert_allclose(bounds.upper, 1)


def test_division_by_zero_and_missing_parameters_give_infinite_bounds():
    bounds = interval_bounds(lambda x: 1 / x - 1 / x, jnp.array([-1.0]), jnp.array([1.0]))
    assert float(bounds.lower[0]) == -np.inf
    assert float(bounds.upper[0]) == np.inf
    for broken in (lambda x: x * jnp.nan, lambda x: x @ jnp.full((1, 1), jnp.nan), lambda x: jnp.tanh(x) / jnp.nan):
        for method in METHODS.values():
            bounds = method(broken, jnp.array([-1.0]), jnp.array([1.0]))
            assert float(bounds.lower[0]) == -np.inf
            assert float(bounds.upper[0]) == np.inf
