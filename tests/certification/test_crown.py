import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_crown as reference

from jaxalign.certification.crown import alpha_crown_bounds, crown_bounds
from jaxalign.certification.interval import interval_bounds
from jaxalign.certification.margins import margin_lower_bounds
from jaxalign.networks.convolution import convolve

RADIUS = 0.1


class SmallConv(nn.Module):
    """images [B, 6, 6, 1] -> logits [B, 4], with an untied stride, padding and two hidden layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), (2, 2), padding=1, conv_general_dilated=convolve)(x))
        x = nn.relu(nn.Dense(8)(x.reshape(x.shape[0], -1)))
        return nn.Dense(4)(x)


@pytest.fixture(scope="module")
def problem():
    """A net, its layers in NumPy, images and labels."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(0.2, 0.8, size=(3, 6, 6, 1)), jnp.float32)
    params = jax.jit(SmallConv().init)(jax.random.key(0), images)
    params = jax.tree.map(lambda v: v + jnp.asarray(rng.normal(size=v.shape) * 0.3, v.dtype), params)
    p = params["params"]
    layers = [
        reference.conv(p["Conv_0"]["kernel"], p["Conv_0"]["bias"], (6, 6, 1), stride=2, padding=1),
        reference.dense(p["Dense_0"]["kernel"], p["Dense_0"]["bias"]),
        reference.dense(p["Dense_1"]["kernel"], p["Dense_1"]["bias"]),
    ]
    return functools.partial(SmallConv().apply, params), layers, images, jnp.array([0, 3, 1])


@pytest.mark.parametrize("method", ["interval", "crown-interval", "crown"])
def test_margins_equal_the_equations_written_out_in_float64(problem, method):
    apply, layers, images, labels = problem
    found = margin_lower_bounds(apply, images, labels, RADIUS, method=method)
    for row, image, label in zip(np.asarray(found), np.asarray(images, np.float64), np.asarray(labels), strict=True):
        box = np.clip(image.reshape(-1) - RADIUS, 0, 1), np.clip(image.reshape(-1) + RADIUS, 0, 1)
        specification = reference.margins(int(label), 4)
        if method == "interval":
            expected, _ = reference.interval(layers, *box, specification)
        else:
            expected, _ = reference.crown(layers, *box, specification, intermediate=method.split("-")[-1])
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_few_elements_at_a_time_give_the_same_bounds(problem):
    apply, _, images, labels = problem
    whole = margin_lower_bounds(apply, images, labels, RADIUS, method="crown")
    for capacity in (5, 64):
        few = margin_lower_bounds(apply, images, labels, RADIUS, method="crown", capacity=capacity)
        np.testing.assert_allclose(few, whole, atol=1e-5)


def hand_net(x):
    """relu(x0 + x1) + relu(x0 - x1)."""
    return jnp.sum(jax.nn.relu(jnp.array([x[0] + x[1], x[0] - x[1]])))


def test_crown_by_hand():
    """Both ReLUs see [-2, 2]: lower line 0 (u = -l), upper line x/2 + 1; the upper lines add up to x0 + 2."""
    bounds = jax.jit(functools.partial(crown_bounds, hand_net))(-jnp.ones(2), jnp.ones(2))
    np.testing.assert_allclose(bounds.lower, 0, atol=1e-6)
    np.testing.assert_allclose(bounds.upper, 3, atol=1e-6)


def test_better_slopes_by_hand():
    """On [0.5, 1] x [-1, 1] slopes alpha give -|difference of alphas| + 0.5 sum: best at alpha 1, 1: 2 x0 >= 1."""
    lower, upper = jnp.array([0.5, -1.0]), jnp.array([1.0, 1.0])
    plain = crown_bounds(hand_net, lower, upper, intermediate="interval")
    better = jax.jit(functools.partial(alpha_crown_bounds, hand_net, steps=30))(lower, upper)
    np.testing.assert_allclose(better.lower, 1.0, atol=1e-4)
    assert better.lower >= plain.lower - 1e-6
    assert better.upper <= plain.upper + 1e-6
    lazy = alpha_crown_bounds(hand_net, -jnp.ones(2), jnp.ones(2), steps=0, optimizer=optax.sgd(0.1))
    np.testing.assert_allclose(lazy.lower, crown_bounds(hand_net, -jnp.ones(2), jnp.ones(2)).lower, atol=1e-6)


def test_slopes_of_each_row_are_sound_and_only_gain(problem):
    apply, _, images, labels = problem
    crown = margin_lower_bounds(apply, images, labels, RADIUS, method="crown")
    alpha = margin_lower_bounds(apply, images, labels, RADIUS, method="alpha-crown", slope_steps=10)
    assert (alpha >= crown - 1e-6).all()
    assert (alpha > crown + 1e-3).any()
    points = images[None] + RADIUS * jax.random.uniform(jax.random.key(0), (500, *images.shape), minval=-1.0)
    logits = jax.jit(jax.vmap(apply))(points)
    others = jnp.array([[1, 2, 3], [0, 1, 2], [0, 2, 3]])
    rows = jnp.arange(3)
    margins = logits[:, rows, labels][..., None] - logits[:, rows[:, None], others]
    assert (margins.min(0) >= alpha - 1e-5).all()


def test_a_linear_function_is_bounded_exactly():
    weights = jnp.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    lower, upper = jnp.array([-1.0, 0.0, 2.0]), jnp.array([1.0, 1.0, 2.0])
    bounds = crown_bounds(lambda x: (weights @ (2 * x) + 1) - weights @ x, lower, upper)
    np.testing.assert_allclose(bounds.lower, [1 - 1 - 2 + 1, -2 + 1], atol=1e-6)
    np.testing.assert_allclose(bounds.upper, [1 + 1 + 0 + 1, 3 - 2 + 1], atol=1e-6)
    loose = interval_bounds(lambda x: (weights @ (2 * x) + 1) - weights @ x, lower, upper)
    assert (loose.lower < bounds.lower - 0.5).all()  # intervals forget that both terms are of one x


def test_specification_rows_are_bounded_together(problem):
    apply, layers, images, _ = problem
    rows = np.random.default_rng(1).normal(size=(2, 4))
    box = images[0] - RADIUS, images[0] + RADIUS
    bounds = crown_bounds(lambda x: apply(x[None])[0], *box, specification=rows)
    lower, upper = reference.crown(layers, *(np.asarray(v, np.float64).reshape(-1) for v in box), rows)
    np.testing.assert_allclose(bounds.lower, lower, atol=1e-4)
    np.testing.assert_allclose(bounds.upper, upper, atol=1e-4)


def test_composes_with_vmap_grad_and_float64():
    boxes = jnp.array([[-1.0, 0.5], [0.0, 0.2]])
    traces = []

    def one(low):
        traces.append(1)
        return crown_bounds(hand_net, low, low + 0.4).upper

    mapped = jax.jit(jax.vmap(one))
    found = mapped(boxes)
    mapped(boxes + 0.1)
    assert len(traces) == 1
    np.testing.assert_allclose(found, [one(b) for b in boxes], atol=1e-6)
    slope = jax.grad(one)(boxes[1])
    step = 1e-3
    numeric = (one(boxes[1] + jnp.array([step, 0])) - one(boxes[1] - jnp.array([step, 0]))) / (2 * step)
    np.testing.assert_allclose(slope[0], numeric, rtol=2e-2)
    with jax.enable_x64(True):
        wide = crown_bounds(hand_net, np.array([-1.0, 0.5]), np.array([-0.6, 0.9]))
        assert wide.upper.dtype == np.float64
        np.testing.assert_allclose(wide.upper, found[0], atol=1e-6)


def test_pytrees_in_and_out():
    def fn(pair):
        return {"sum": pair["a"] + pair["b"], "known": jnp.array(2.0)}

    low, high = {"a": jnp.zeros(2), "b": -jnp.ones(2)}, {"a": jnp.ones(2), "b": jnp.ones(2)}
    for method in (interval_bounds, crown_bounds):
        bounds = method(fn, low, high)
        np.testing.assert_allclose(bounds.lower["sum"], -1)
        np.testing.assert_allclose(bounds.upper["sum"], 2)
        np.testing.assert_allclose(bounds.upper["known"], 2)


@pytest.mark.parametrize("method", [interval_bounds, crown_bounds, alpha_crown_bounds])
@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ([0.0, 1.0], [1.0, 0.5], r"\[1\] is \[1.0, 0.5\]: lower above upper"),
        ([0.0, -np.inf], [1.0, 0.5], "must be finite"),
        ([0.0, np.nan], [1.0, 0.5], "must be finite"),
        ([0.0, 0.0], [1.0], r"agree in shape and type, got float32\[2\] and float32\[1\]"),
        ([0, 0], [1, 1], "must be floating point, got int32"),
    ],
)
def test_a_bad_box_is_named(method, low, high, words):
    with pytest.raises(ValueError, match=words):
        method(lambda x: x, jnp.asarray(low), jnp.asarray(high))


def test_bad_arguments_are_named():
    box = jnp.zeros(2), jnp.ones(2)
    with pytest.raises(ValueError, match="intermediate"):
        crown_bounds(hand_net, *box, intermediate="ibp")
    with pytest.raises(ValueError, match="capacity"):
        crown_bounds(hand_net, *box, capacity=0)
    with pytest.raises(ValueError, match=r"specification must be \[S, \*\[2\]\], got \[1, 3\]"):
        crown_bounds(lambda x: x, *box, specification=np.ones((1, 3)))
    with pytest.raises(ValueError, match="one array as its result, got 2"):
        crown_bounds(lambda x: (x, x), *box, specification=np.ones((1, 2)))
