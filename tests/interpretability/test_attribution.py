"""Attributions of functions whose attributions are known, and of a network by its axioms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.attribution import (
    completeness_residual,
    expected_gradients,
    gradient_times_input,
    input_gradient,
    integrated_gradients,
    occlusion,
    saliency,
    smooth_grad,
    weighted_sum,
)

KEY = jax.random.key(0)
W = np.array([2.0, -3.0, 0.5], np.float32)
X = np.array([[1.0, 2.0, -1.0], [0.5, -1.0, 4.0]], np.float32)


def linear(x):
    return x @ W + 7.0


@pytest.fixture(scope="module")
def network():
    """A smooth network, [B, 6] -> [B], and a batch."""
    rng = np.random.default_rng(0)
    x, w, v = (rng.normal(size=size).astype(np.float32) for size in ((4, 6), (6, 8), (8,)))
    return jax.jit(lambda x: jnp.tanh(x @ w) @ v), x


@pytest.mark.parametrize("x", [X[0], X])
def test_a_linear_function_by_hand_one_example_or_a_batch(x):
    # Each input's share of a linear function is its weight times how far it is from the baseline.
    baseline = np.array([0.5, 0.0, 1.0], np.float32)
    gradient = np.broadcast_to(W, x.shape)
    np.testing.assert_allclose(saliency(linear, x), np.abs(gradient))
    np.testing.assert_allclose(gradient_times_input(linear, x), gradient * x)
    shares = gradient * (x - baseline)

    @jax.jit
    def attributions(x):
        integrated = integrated_gradients(linear, x, baseline, steps=2)
        expected = expected_gradients(KEY, linear, x, baseline[None], samples=4)
        covered, smoothed = occlusion(linear, x, (1,), baseline=baseline), smooth_grad(KEY, linear, x, sigma=3.0)
        return integrated, expected, covered, smoothed

    *complete, smoothed = attributions(x)
    np.testing.assert_allclose(smoothed, gradient, rtol=1e-5)
    for each in complete:
        np.testing.assert_allclose(each, shares, rtol=1e-5, atol=1e-6)
        residual = completeness_residual(linear, x, baseline, each)
        np.testing.assert_allclose(residual, np.zeros(x.shape[:-1]), atol=5e-6)


def test_integrated_gradients_of_a_product_and_of_a_clipped_sum_by_hand():
    # x0 x1 from 0: the gradient (a x1, a x0) averages to half of it, so the inputs share equally.
    product = lambda x: x[0] * x[1]  # noqa: E731
    np.testing.assert_allclose(integrated_gradients(product, np.array([3.0, 5.0]), 0.0, steps=1), [7.5, 7.5])
    # relu(x - 1) at 3 from 0 slopes from a = 1/3 on, 3 * 2/3; a kink is where quadrature errs, by less with more steps.
    clipped = lambda x: jax.nn.relu(x[0] - 1.0)  # noqa: E731

    def residual(steps):
        run = lambda x: completeness_residual(clipped, x, 0.0, integrated_gradients(clipped, x, 0.0, steps=steps))  # noqa: E731
        return abs(float(jax.jit(run)(np.array([3.0], np.float32))))

    assert residual(64) < 0.05 < residual(4)


def test_integrated_gradients_equal_a_riemann_sum_in_float64_and_are_complete(network):
    fn, x = network
    attributions = jax.jit(lambda x: integrated_gradients(fn, x, 0.1, steps=24, chunk=5))(x)
    np.testing.assert_allclose(completeness_residual(fn, x, 0.1, attributions), np.zeros(4), atol=1e-5)
    middles = (np.arange(400) + 0.5) / 400
    along = 0.1 + middles[:, None, None] * (x - 0.1)[None]
    gradients = jax.jit(lambda along: input_gradient(fn, along))(along.reshape(-1, 6)).reshape(400, 4, 6)
    expected = (x.astype(np.float64) - 0.1) * np.asarray(gradients, np.float64).mean(axis=0)
    np.testing.assert_allclose(attributions, expected, atol=2e-5)
    single = jax.jit(jax.vmap(lambda x: integrated_gradients(lambda x: fn(x[None])[0], x, 0.1, steps=24)))(x)
    np.testing.assert_allclose(single, attributions, atol=1e-6)


def test_a_pytree_of_inputs_has_the_attributions_of_its_parts(network):
    fn, x = network
    parts = {"pixels": x[:, :2], "words": x[:, 2:].reshape(4, 2, 2)}
    split = lambda parts: fn(jnp.concatenate([parts["pixels"], parts["words"].reshape(-1, 4)], axis=1))  # noqa: E731
    baseline = {"pixels": 0.1, "words": np.full((2, 2), 0.1)}
    attributions = jax.jit(lambda parts: integrated_gradients(split, parts, baseline, steps=8))(parts)
    joined = jnp.concatenate([attributions["pixels"], attributions["words"].reshape(4, 4)], axis=1)
    np.testing.assert_allclose(joined, jax.jit(lambda x: integrated_gradients(fn, x, 0.1, steps=8))(x), atol=1e-6)


def test_without_noise_smooth_grad_is_the_gradient_and_with_it_a_smoothed_one(network):
    fn, x = network
    smooth = jax.jit(functools.partial(smooth_grad, fn=fn, samples=3))
    np.testing.assert_allclose(smooth(KEY, x=x, sigma=0.0), input_gradient(fn, x), rtol=1e-5)
    # E d(x^3)/dx at x + sigma n = 3 (x^2 + sigma^2)
    cube = lambda x: jnp.sum(x**3, axis=1)  # noqa: E731
    cubed = jax.jit(lambda x: smooth_grad(KEY, cube, x, sigma=0.5, samples=40))(np.full((1, 500), 2.0, np.float32))
    np.testing.assert_allclose(cubed.mean(), 3 * (4 + 0.25), rtol=0.01)


def test_expected_gradients_sum_to_what_the_baselines_leave(network):
    fn, x = network
    baselines = np.random.default_rng(1).normal(size=(20, 6)).astype(np.float32)
    run = jax.jit(lambda baselines: expected_gradients(KEY, fn, x, baselines, samples=2000, chunk=50))
    np.testing.assert_allclose(run(baselines).sum(axis=1), fn(x) - fn(baselines).mean(), atol=0.25)
    one = run(np.full((20, 6), 0.1, np.float32))
    np.testing.assert_allclose(one, jax.jit(lambda x: integrated_gradients(fn, x, 0.1, steps=8))(x), atol=0.02)
    with pytest.raises(ValueError, match=r"baselines \(20, 6\) are no rows like x \(4, 5\)"):
        expected_gradients(KEY, fn, x[:, :5], baselines)


def test_occlusion_covers_windows_as_a_loop_over_them_does():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 5, 4, 3)).astype(np.float32), rng.normal(size=(5, 4, 3)).astype(np.float32)
    fn = lambda x: jnp.tanh(jnp.sum(x * weights[None], axis=(1, 2, 3)) / 4)  # noqa: E731
    falls, times = np.zeros(x.shape), np.zeros(x.shape)
    for row in (0, 2, 4):  # the last windows reach past the end
        for column in (0, 1, 2):
            covered = x.copy()
            covered[:, row : row + 2, column : column + 2] = 0.3
            falls[:, row : row + 2, column : column + 2] += np.asarray(fn(x) - fn(covered))[:, None, None, None]
            times[:, row : row + 2, column : column + 2] += 1
    result = jax.jit(lambda x: occlusion(fn, x, (2, 2), stride=(2, 1), baseline=0.3, chunk=4))(x)
    np.testing.assert_allclose(result, falls / times, atol=1e-5)
    all_at_once = np.broadcast_to((fn(x) - fn(0 * x + 0.3))[:, None, None, None], x.shape)
    np.testing.assert_allclose(jax.jit(lambda x: occlusion(fn, x, (5, 4), baseline=0.3))(x), all_at_once, rtol=1e-5)


def test_a_sum_in_chunks_is_the_sum():
    weights, points = np.arange(7.0), np.arange(14.0).reshape(7, 2)
    run = lambda chunk: weighted_sum(lambda p: {"square": p**2}, weights, points, chunk=chunk)["square"]  # noqa: E731
    for total in jax.jit(lambda: [run(chunk) for chunk in (1, 3, 7, 100)])():
        np.testing.assert_allclose(total, weights @ points**2)


def test_float64_under_x64():
    with jax.enable_x64():
        x = X.astype(np.float64)
        exponential = lambda x: jnp.sum(jnp.exp(x), axis=1)  # noqa: E731
        attributions = jax.jit(lambda x: integrated_gradients(exponential, x, 0.0, steps=12))(x)
        assert attributions.dtype == jnp.float64
        np.testing.assert_allclose(attributions, np.exp(x) - 1, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: integrated_gradients(linear, X, 0.0, steps=0), "steps must be at least 1"),
        (lambda: integrated_gradients(linear, X, jnp.zeros(2)), r"baseline of shape \(2,\) does not broadcast"),
        (lambda: integrated_gradients(linear, X, {"a": 0.0}), "baseline is"),
        (lambda: saliency(lambda x: x, X), r"fn\(x\) is \(2, 3\)"),
        (lambda: saliency(lambda x: x[0], X), r"fn\(x\) is \(3,\)"),
        (lambda: occlusion(linear, X, (4,)), "does not fit"),
        (lambda: occlusion(linear, X, (1,), stride=(2,)), "does not fit"),
        (lambda: smooth_grad(KEY, linear, X, sigma=1.0, chunk=0), "chunk must be at least 1"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call)
