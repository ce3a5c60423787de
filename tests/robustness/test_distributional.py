"""Risks over reweighted rows against SciPy; CVaR training and group DRO against the papers' algorithms in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.special
from scipy.special import expit

from jaxalign import sweep, train
from jaxalign.algorithm import Network
from jaxalign.robustness.distributional import (
    chi_square_risk,
    conditional_value_at_risk,
    cvar_training,
    group_dro,
    group_means,
    kl_risk,
)
from jaxalign.robustness.labelled_batch import LabelledBatch

LOSSES = np.array([1.0, 4.0, 2.0, 6.0, 3.0, 5.0])
NUMBER = len(LOSSES)


def cvar_reference(losses, alpha):
    """min over t of t + mean(max(losses - t, 0)) / alpha; the minimum is at one of the losses."""
    return min(t + np.maximum(losses - t, 0).mean() / alpha for t in losses)


def kl_reference(losses, radius):
    """The dual over the temperature, in one dimension."""

    def dual(log_t):
        t = np.exp(log_t)
        return t * (scipy.special.logsumexp(losses / t) - np.log(NUMBER) + radius)

    return scipy.optimize.minimize_scalar(dual, bounds=(-6, 9), method="bounded", options={"xatol": 1e-9}).fun


def chi_square_reference(losses, radius):
    """The primal: a linear objective over a ball within the simplex."""
    found = scipy.optimize.minimize(
        lambda p: -p @ losses,
        np.full(NUMBER, 1 / NUMBER),
        jac=lambda p: -losses,
        bounds=[(0, 1)] * NUMBER,
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "ineq", "fun": lambda p: radius - np.mean((NUMBER * p - 1) ** 2)},
        ],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    return -found.fun


# The name of the level, a reference, levels, and the levels at which nothing and everything is feared.
RISKS = {
    conditional_value_at_risk: ("alpha", cvar_reference, [0.05, 0.3, 0.5, 1.0], 1.0, 0.0),
    kl_risk: ("radius", kl_reference, [0.01, 0.3, 1.5], 0.0, 10.0),
    chi_square_risk: ("radius", chi_square_reference, [0.01, 0.5, 3.0], 0.0, 10.0),
}


@pytest.fixture(scope="module", params=RISKS, ids=lambda risk: risk.__name__)
def risk(request):
    """(reference, levels, nothing, everything, the jitted value and gradient of risk(losses [2, B], level))."""
    name, *rest = RISKS[request.param]
    both = jax.vmap(jax.value_and_grad(lambda x, level: request.param(x, **{name: level})), (0, None))
    return *rest, jax.jit(both)


def test_risk_is_the_reference_and_its_gradient_the_worst_weights(risk):
    reference, levels, nothing, everything, evaluate = risk
    with jax.enable_x64(True):
        for level in levels:
            (value, shifted), (p, _) = evaluate(np.stack([LOSSES, 2 * LOSSES + 1]), level)
            np.testing.assert_allclose(value, reference(LOSSES, level), rtol=1e-6)
            np.testing.assert_allclose([p.sum(), p @ LOSSES, shifted], [1.0, value, 2 * value + 1], rtol=1e-9)
            assert (p >= -1e-12).all()
        step = 1e-5 * np.sin(1.0 + np.arange(NUMBER))
        (above, below), _ = evaluate(np.stack([LOSSES + step, LOSSES - step]), levels[1])
        _, (p, _) = evaluate(np.stack([LOSSES] * 2), levels[1])
        np.testing.assert_allclose(above - below, 2 * step @ p, rtol=1e-5)
        for level, limit in [(nothing, LOSSES.mean()), (everything, LOSSES.max())]:
            (value, equal), _ = evaluate(np.stack([LOSSES, np.full(NUMBER, 3.0)]), level)
            np.testing.assert_allclose([value, equal], [limit, 3.0], rtol=1e-9)
    values, p = evaluate(jnp.float32(np.stack([LOSSES, np.full(NUMBER, 3.0)])), levels[1])
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [reference(LOSSES, levels[1]), 3.0], rtol=1e-4)


def test_risks_by_hand():
    # A quarter of six rows: the largest, and half of the next.
    cvar = jax.jit(conditional_value_at_risk)(LOSSES, alpha=0.25)
    np.testing.assert_allclose(cvar, (6 + 5 / 2) / 1.5, rtol=1e-6)
    # While all weights are positive: mean + sqrt(radius * variance).
    chi_square = jax.jit(chi_square_risk)(LOSSES, radius=0.2)
    np.testing.assert_allclose(chi_square, 3.5 + np.sqrt(0.2 * 35 / 12), rtol=1e-6)
    # Two rows: at KL = log 2 - H(1/4) the worst weights are 1/4 and 3/4.
    kl = jax.jit(kl_risk)(LOSSES[:2], radius=np.log(2) + 0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(kl, 0.25 * 1 + 0.75 * 4, rtol=1e-5)


START = np.array([0.5, -1.0])
LOGISTIC = Network(
    lambda key: jnp.asarray(START, jnp.float32), lambda w, x: jnp.stack([jnp.zeros(x.shape[0]), x @ w], axis=1)
)
RNG = np.random.default_rng(1)
X = RNG.normal(size=(3, 8, 2))
Y = RNG.integers(0, 2, (3, 8))


def cross_entropies(w, x, y):
    return np.logaddexp(0.0, x @ w) - y * (x @ w)


def weighted_slope(w, x, y, weights):
    return (weights * (expit(x @ w) - y)) @ x


def batches(group=None):
    return LabelledBatch(jnp.float32(X), jnp.asarray(Y), None if group is None else jnp.asarray(group))


def test_cvar_training_weighs_the_tail_alone():
    def run(alpha, key):
        algorithm = cvar_training(
            LOGISTIC, optax.sgd(0.5), alpha=alpha, attack=lambda key, apply, x, y: x + 1.0,
            augment=lambda key, x: x - 1.0,
        )  # fmt: skip
        state, metrics = train(algorithm, key, batches())
        return state.params, metrics

    params, metrics = sweep(run, jnp.array([0.375, 1.0]), jax.random.split(jax.random.key(0), 1))
    for lane, rows in enumerate((3, 8)):
        w = START
        for step, (x, y) in enumerate(zip(X, Y, strict=True)):
            losses = cross_entropies(w, x, y)
            tail = np.argsort(-losses)[:rows]
            np.testing.assert_allclose(metrics["loss"][lane, 0, step], losses[tail].mean(), rtol=1e-5)
            np.testing.assert_allclose(metrics["mean_loss"][lane, 0, step], losses.mean(), rtol=1e-5)
            w = w - 0.5 * weighted_slope(w, x, y, np.isin(np.arange(8), tail) / rows)
        np.testing.assert_allclose(params[lane, 0], w, rtol=1e-4)
    assert "adversarial_accuracy" in metrics
    assert "accuracy" not in metrics


def test_group_dro_is_the_papers_algorithm():
    """Sagawa et al. 2020, algorithm 1, all groups at a time; group 2 has no row in the second batch."""
    group = np.array([[0, 0, 1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 1, 1, 0, 0], [2, 1, 0, 1, 2, 1, 0, 0]])
    rate, step_size = 0.5, 0.8
    algorithm = group_dro(LOGISTIC, optax.sgd(rate), num_groups=3, step_size=step_size)
    state, step = jax.jit(algorithm.init)(jax.random.key(0)), jax.jit(algorithm.step)
    w, q = START, np.full(3, 1 / 3)
    for x, y, g in zip(X, Y, group, strict=True):
        state, metrics = step(state, LabelledBatch(jnp.float32(x), jnp.asarray(y), jnp.asarray(g)))
        members = (g[None] == np.arange(3)[:, None]).astype(float)
        counts = members.sum(axis=1)
        losses = members @ cross_entropies(w, x, y) / np.maximum(counts, 1)
        right = members @ ((x @ w > 0) == y) / np.maximum(counts, 1)
        q = q * np.exp(step_size * losses)
        q /= q.sum()
        np.testing.assert_allclose(metrics["group_weights"], q, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], q @ losses, rtol=1e-5)
        np.testing.assert_allclose(metrics["worst_group_loss"], losses[counts > 0].max(), rtol=1e-5)
        np.testing.assert_allclose(metrics["worst_group_accuracy"], right[counts > 0].min(), rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], np.mean((x @ w > 0) == y))
        w = w - rate * weighted_slope(w, x, y, (q / np.maximum(counts, 1)) @ members)
        np.testing.assert_allclose(state.params, w, rtol=1e-4)
    np.testing.assert_allclose(jnp.exp(state.log_group_weights), q, rtol=1e-5)


@pytest.mark.slow
def test_group_dro_evens_out_groups_that_disagree():
    """Nine rows say class 1 and one says 0 at the same x: by the mean p = 0.9, by the worst group p = 1/2."""
    constant = Network(lambda key: jnp.zeros(()), lambda b, x: jnp.stack([0.0 * x[:, 0], 0.0 * x[:, 0] + b], axis=1))
    y = jnp.array([1] * 9 + [0])
    batch = LabelledBatch(jnp.ones((10, 1)), y, 1 - y)

    def run(step_size, key):
        algorithm = group_dro(constant, optax.sgd(0.5), num_groups=2, step_size=step_size)
        state, metrics = train(algorithm, key, jax.tree.map(lambda v: jnp.tile(v[None], (400,) + (1,) * v.ndim), batch))
        # The last iterate circles the saddle point; its average is what the paper's theorem is about.
        return jnp.mean(metrics["group_weights"][100:], axis=0), state.params

    weights, bias = sweep(run, jnp.array([0.0, 0.1]), jax.random.split(jax.random.key(0), 1))
    np.testing.assert_allclose(weights[0, 0], [0.5, 0.5])  # never moved: both groups alike, which is 1/2 here too
    np.testing.assert_allclose(weights[1, 0], [0.5, 0.5], atol=0.02)
    np.testing.assert_allclose(bias, 0.0, atol=0.05)


def test_group_means_and_their_gradient_where_a_group_is_empty():
    values, group = jnp.array([1.0, 2.0, 6.0]), jnp.array([2, 0, 2])
    means, counts = jax.jit(lambda v: group_means(v, group, num_groups=3))(values)
    np.testing.assert_allclose(means, [2.0, np.nan, 3.5])
    np.testing.assert_array_equal(counts, [1, 0, 2])
    slope = jax.jit(jax.grad(lambda v: jnp.nansum(group_means(v, group, num_groups=3)[0])))(values)
    np.testing.assert_allclose(slope, [0.5, 1.0, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conditional_value_at_risk(np.ones((2, 2)), alpha=0.5), r"\[B\] with B >= 1, got shape \(2, 2\)"),
        (lambda: conditional_value_at_risk(np.ones(2), alpha=1.5), "alpha must be in"),
        (lambda: kl_risk(np.ones(2), radius=-1.0), "radius must be at least 0"),
        (lambda: chi_square_risk(np.ones(0), radius=1.0), r"B >= 1, got shape \(0,\)"),
        (lambda: chi_square_risk(np.ones(2), radius=-1.0), "radius must be at least 0"),
        (lambda: grouped(None), "no `group`"),
        (lambda: grouped(jnp.array([0, 2])), r"0..1, got \[0 2\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def grouped(group):
    algorithm = group_dro(LOGISTIC, optax.sgd(0.1), num_groups=2, step_size=0.1)
    state = algorithm.init(jax.random.key(0))
    return algorithm.step(state, LabelledBatch(jnp.ones((2, 2)), jnp.array([0, 1]), group))
