"""Every pair loss: a hand number, NumPy float64, jit and vmap, gradients, and dtypes; then what is special to each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import expit, log_expit

from jaxalign import preferences

BETA, SMOOTHING = 0.3, 0.1
LENGTHS = {"chosen_lengths": np.array([4, 7, 1, 3, 9]), "rejected_lengths": np.array([5, 2, 6, 3, 0])}


def logistic(x, e=0.0):
    return -(1 - e) * log_expit(x) - e * log_expit(-x)


def exo(x, e):
    return expit(x) * (log_expit(x) - np.log(1 - e)) + expit(-x) * (log_expit(-x) - np.log(e))


def normalised(c, r):
    return c / LENGTHS["chosen_lengths"] - r / np.maximum(LENGTHS["rejected_lengths"], 1)


def blend(x):
    return expit(x / 0.05) * np.exp(-x) - expit(-x / 0.05) * log_expit(x)


b, e = BETA, SMOOTHING
# name: (keywords, the loss of c and r written out in NumPy, its value at c = r = 0)
RATIO_LOSSES = {
    "dpo_loss": ({}, lambda c, r: logistic(b * (c - r)), np.log(2)),
    "length_normalized_dpo_loss": (LENGTHS, lambda c, r: logistic(b * normalised(c, r)), np.log(2)),
    "ipo_loss": ({}, lambda c, r: (c - r - 1 / (2 * b)) ** 2, 25 / 9),
    "hinge_loss": ({}, lambda c, r: np.maximum(0, 1 - b * (c - r)), 1.0),
    "robust_dpo_loss": (
        {"label_smoothing": e},
        lambda c, r: ((1 - e) * logistic(b * (c - r)) - e * logistic(-b * (c - r))) / (1 - 2 * e),
        np.log(2),
    ),
    "exo_pair_loss": ({"label_smoothing": e}, lambda c, r: exo(b * (c - r), e), -np.log(0.6)),
    "nca_pair_loss": ({}, lambda c, r: logistic(b * c) + (logistic(-b * c) + logistic(-b * r)) / 2, 2 * np.log(2)),
    "bco_pair_loss": ({"shift": 0.2}, lambda c, r: logistic(b * c - 0.2) + logistic(0.2 - b * r), 1.396273),
    "sppo_hard_loss": ({}, lambda c, r: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2, 50 / 9),
    "apo_zero_loss": ({}, lambda c, r: 1 - expit(b * c) + expit(b * r), 1.0),
    "apo_down_loss": ({}, lambda c, r: expit(b * c) + 1 - expit(b * (c - r)), 1.0),
    "discopop_loss": ({}, lambda c, r: blend(b * (c - r)), (np.log(2) + 1) / 2),
    "aot_unpaired_loss": ({}, lambda c, r: logistic(b * (np.sort(c) - np.sort(r))), np.log(2)),
}
PAIR_LOSSES = {**RATIO_LOSSES, "aot_loss": ({}, None, np.log(2))}


@pytest.fixture
def logps():
    """Policy chosen, policy rejected, reference chosen, reference rejected, [5] each."""
    return tuple(-np.random.default_rng(3).uniform(1, 40, (4, 5)))


def bound(name):
    return functools.partial(getattr(preferences, name), beta=BETA, **PAIR_LOSSES[name][0])


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_value_where_policy_equals_reference(name, logps):
    loss = bound(name)(logps[0], logps[1], logps[0], logps[1])
    assert loss.shape == (5,)
    np.testing.assert_allclose(loss, PAIR_LOSSES[name][2], rtol=1e-5)


@pytest.mark.parametrize("name", RATIO_LOSSES)
def test_matches_numpy_in_float64(name, logps):
    expected = RATIO_LOSSES[name][1](logps[0] - logps[2], logps[1] - logps[3])
    single = bound(name)(*(x.astype(np.float32) for x in logps))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=2e-4, atol=1e-6)
    assert bound(name)(*(jnp.asarray(x, jnp.bfloat16) for x in logps)).dtype == jnp.float32
    with jax.enable_x64(True):
        double = bound(name)(*logps)
        assert double.dtype == jnp.float64
        np.testing.assert_allclose(double, expected, rtol=1e-12)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_jit_vmap_and_gradients(name, logps):
    loss = bound(name)
    with jax.enable_x64(True):
        np.testing.assert_allclose(jax.jit(loss)(*logps), loss(*logps), rtol=1e-12)
        lanes = tuple(np.stack([x, x[::-1] - 1]) for x in logps)
        expected = [loss(*(x[i] for x in lanes)) for i in range(2)]
        np.testing.assert_allclose(jax.vmap(loss)(*lanes), expected, rtol=1e-12)
        check_grads(loss, logps, order=1, modes=["rev"])


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_beta_is_traced_and_far_log_ratios_stay_finite(name, logps):
    keywords = PAIR_LOSSES[name][0]

    @jax.jit
    def total(beta, *args):
        return getattr(preferences, name)(*args, beta=beta, **keywords).sum()

    zeros = jnp.zeros(5)
    # x = beta D reaches -240: there exp(-x) alone overflows float32.
    for c, r in [(-400.0, 400.0), (0.0, 0.0), (400.0, -400.0)]:
        value, gradients = jax.value_and_grad(total, (0, 1, 2))(0.3, zeros + c, zeros + r, zeros, zeros)
        assert jnp.isfinite(value)
        assert all(jnp.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_shapes_that_would_broadcast_raise(name):
    with pytest.raises(AssertionError):
        bound(name)(jnp.zeros((5, 1)), jnp.zeros(5), jnp.zeros(5), jnp.zeros(5))


def test_dpo_by_hand_and_its_gradient():
    # c = 2, r = -1, beta = 0.5: x = 1.5
    args = tuple(jnp.array([x]) for x in (-3.0, -7.0, -5.0, -6.0))
    np.testing.assert_allclose(preferences.dpo_loss(*args, beta=0.5), [0.20141328], rtol=1e-6)
    gradients = jax.grad(lambda *a: preferences.dpo_loss(*a, beta=0.5)[0], (0, 1, 2, 3))(*args)
    slope = 0.5 * expit(-1.5)
    np.testing.assert_allclose(np.concatenate(gradients), slope * np.array([-1, 1, 1, -1]), rtol=1e-6)


def test_smoothing_limits(logps):
    dpo, robust = preferences.dpo_loss, preferences.robust_dpo_loss
    plain = dpo(*logps, beta=BETA)
    np.testing.assert_allclose(dpo(*logps, beta=BETA, label_smoothing=0.0), plain)
    np.testing.assert_allclose(robust(*logps, beta=BETA, label_smoothing=0.0), plain, rtol=1e-6)
    swapped = (logps[1], logps[0], logps[3], logps[2])
    # Averaged over labels flipped at the rate it assumes, the robust loss is the clean one.
    mean = 0.8 * robust(*logps, beta=BETA, label_smoothing=0.2) + 0.2 * robust(*swapped, beta=BETA, label_smoothing=0.2)
    np.testing.assert_allclose(mean, plain, rtol=1e-4, atol=1e-5)
    conservative = dpo(*logps, beta=BETA, label_smoothing=0.2)
    np.testing.assert_allclose(conservative, 0.8 * plain + 0.2 * dpo(*swapped, beta=BETA), rtol=1e-5)


def test_exo_is_zero_where_the_policy_agrees_with_the_labels():
    c = jnp.array([np.log(0.9 / 0.1) / BETA])
    zero = jnp.zeros(1)
    assert abs(preferences.exo_pair_loss(c, zero, zero, zero, beta=BETA, label_smoothing=0.1)[0]) < 1e-6


def test_ipo_with_lengths_takes_means(logps):
    expected = (normalised(logps[0] - logps[2], logps[1] - logps[3]) - 1 / (2 * BETA)) ** 2
    np.testing.assert_allclose(preferences.ipo_loss(*logps, beta=BETA, **LENGTHS), expected, rtol=1e-4)
    ones = np.ones(5)
    same = preferences.ipo_loss(*logps, beta=BETA, chosen_lengths=ones, rejected_lengths=ones)
    np.testing.assert_allclose(same, preferences.ipo_loss(*logps, beta=BETA), rtol=1e-6)


def test_aot_compares_sorted_margins(logps):
    policy, reference = np.sort(logps[0] - logps[1]), np.sort(logps[2] - logps[3])
    for e in (0.0, 0.1):
        ours = preferences.aot_loss(*logps, beta=BETA, label_smoothing=e)
        np.testing.assert_allclose(ours, logistic(BETA * (policy - reference), e), rtol=1e-4)
    one = tuple(x[:1] for x in logps)
    np.testing.assert_allclose(
        preferences.aot_loss(*one, beta=BETA), preferences.dpo_loss(*one, beta=BETA), rtol=1e-5
    )


@pytest.mark.parametrize("name", ["aot_loss", "aot_unpaired_loss"])
def test_rows_that_are_not_valid_enter_no_quantile(name, logps):
    loss = getattr(preferences, name)
    valid = np.array([1, 0, 1, 1, 0])
    spoiled = tuple(np.where(valid, x, s) for x, s in zip(logps, (1e6, -1e6, np.nan, 3.0), strict=True))
    kept = loss(*(x[valid == 1] for x in logps), beta=BETA)
    out = loss(*spoiled, beta=BETA, valid=valid)
    np.testing.assert_allclose(out[valid == 1], kept, rtol=1e-6)
    np.testing.assert_array_equal(out[valid == 0], 0.0)
    assert not loss(*logps, beta=BETA, valid=np.zeros(5)).any()


def test_discopop_slope_changes_sign():
    zero = jnp.zeros(1)
    slope = jax.grad(lambda c: preferences.discopop_loss(c, zero, zero, zero, beta=1.0)[0])
    signs = [np.sign(slope(jnp.array([c]))[0]) for c in (-3.0, 0.0, 3.0)]
    assert signs == [-1, 1, -1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: preferences.robust_dpo_loss(*a, beta=1.0, label_smoothing=0.5), "label_smoothing"),
        (lambda a: preferences.exo_pair_loss(*a, beta=1.0, label_smoothing=0.0), "label_smoothing"),
        (lambda a: preferences.ipo_loss(*a, beta=1.0, chosen_lengths=np.ones(5)), "rejected_lengths"),
        (lambda a: preferences.mixture_loss([preferences.dpo_loss], [0.5, 0.5]), "weight"),
    ],
)
def test_bad_values_are_named(call, message, logps):
    with pytest.raises(ValueError, match=message):
        call(logps)
