"""Gradient attacks on a linear classifier, whose worst case is known, and what `attack_program` promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxalign import Network
from jaxalign.networks import MLP
from jaxalign.robustness.attack_losses import cross_entropy, dlr_loss, margins, targeted_dlr_loss
from jaxalign.robustness.attack_program import _programs
from jaxalign.robustness.attack_result import checked_result, within
from jaxalign.robustness.pgd import fgsm, pgd
from jaxalign.robustness.threat_model import NORMS, norms

KEY = jax.random.key(0)
WEIGHTS = jnp.array([[1.0, -1.0], [2.0, -2.0], [-0.5, 0.5]])  # [D, C]: the margin of class 0 is w . x, w = (2, 4, -1)
W = jnp.array([2.0, 4.0, -1.0])
DUAL = {"linf": 7.0, "l2": float(jnp.sqrt(21.0)), "l1": 4.0}
X = jnp.array([[0.5, 0.5, 0.5], [0.6, 0.2, 0.4], [0.5, 0.4, 0.9]])
Y = jnp.array([0, 0, 1])


def linear(x):
    return x @ WEIGHTS


@pytest.fixture(scope="module")
def network():
    module = Network.from_linen(MLP((16, 4)), jnp.zeros((1, 6)))
    return module, module.init(jax.random.key(3))


def test_losses_by_hand():
    logits, labels = jnp.array([[3.0, 1.0, 0.0, -1.0]]), jnp.array([1])
    np.testing.assert_allclose(margins(logits, labels), [-2])
    np.testing.assert_allclose(dlr_loss(logits, labels), [2 / 3])
    np.testing.assert_allclose(targeted_dlr_loss(logits, labels, jnp.array([0])), [2 / 3.5])
    np.testing.assert_allclose(cross_entropy(logits, labels), [np.log(np.exp([3.0, 1, 0, -1]).sum()) - 1], rtol=1e-6)
    np.testing.assert_allclose(dlr_loss(5 * logits + 7, labels), dlr_loss(logits, labels), rtol=1e-6)
    with pytest.raises(ValueError, match="three classes"):
        dlr_loss(logits[:, :2], labels)


@pytest.mark.parametrize("norm", NORMS)
def test_both_attacks_reach_the_closed_form_optimum_of_a_linear_classifier(norm):
    # min over the ball of w . (x + delta) = w . x - epsilon |w|_dual
    epsilon = 0.2
    signs = jnp.where(Y == 0, 1.0, -1.0)
    expected = signs * (X @ W) - epsilon * DUAL[norm]
    result = pgd(KEY, linear, X, Y, epsilon, norm=norm, bounds=None)
    x_adv = fgsm(linear, X, Y, epsilon, norm=norm, bounds=None)
    np.testing.assert_allclose(margins(linear(x_adv), Y), expected, rtol=1e-5)
    # A row that has fallen may rest, so its margin need only be negative.
    np.testing.assert_array_equal(result.success, expected < 0)
    standing = np.asarray(expected >= 0)
    np.testing.assert_allclose(result.margin[standing], expected[standing], atol=0.02)


def test_fgsm_by_hand():
    np.testing.assert_allclose(fgsm(linear, X[:1], Y[:1], 0.1), [[0.4, 0.4, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(fgsm(linear, X[:1], Y[:1], 0.1, targeted=True), [[0.6, 0.6, 0.4]], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_no_ball_no_change_and_more_ball_no_fewer_successes(network, norm):
    net, params = network
    x = jax.random.uniform(jax.random.key(1), (12, 6))
    y = jnp.argmax(net.apply(params, x), axis=1)
    run = jax.jit(jax.vmap(lambda e: pgd(KEY, lambda x: net.apply(params, x), x, y, e, norm=norm, steps=10)))
    radii = {"linf": 0.3, "l2": 0.7, "l1": 1.5}[norm] * jnp.array([0.0, 0.3, 1.0])
    result = run(radii)
    np.testing.assert_array_equal(result.x_adv[0], x)
    assert not jnp.any(result.success[0])
    counts = jnp.sum(result.success, axis=1)
    assert counts[0] <= counts[1] <= counts[2]
    assert counts[2] > 0
    sizes = jax.vmap(lambda a: norms(a - x, norm))(result.x_adv)
    assert jnp.all(sizes <= radii[:, None] + 1e-5)
    assert jnp.all((result.x_adv >= 0) & (result.x_adv <= 1))


def test_an_epsilon_for_each_row_restarts_momentum_and_targets(network):
    net, params = network
    apply = lambda x: net.apply(params, x)  # noqa: E731
    x = jax.random.uniform(jax.random.key(1), (12, 6))
    y = jnp.argmax(apply(x), axis=1)
    mixed = pgd(KEY, apply, x, y, jnp.where(jnp.arange(12) < 6, 0.0, 0.3), steps=10)
    np.testing.assert_array_equal(mixed.x_adv[:6], x[:6])
    assert jnp.any(mixed.success[6:])
    several = pgd(KEY, apply, x, y, 0.1, steps=10, restarts=3, momentum=0.75)
    assert jnp.sum(several.success) >= jnp.sum(margins(apply(fgsm(apply, x, y, 0.1)), y) < 0)
    wanted = (y + 1) % 4
    targeted = pgd(KEY, apply, x, wanted, 1.0, steps=10, targeted=True)
    reached = jnp.argmax(apply(targeted.x_adv), axis=1) == wanted
    np.testing.assert_array_equal(targeted.success, reached)
    assert jnp.any(reached)


def test_embeddings_and_pixels_in_one_ball():
    x = {"pixels": X[:, :1], "embedding": X[:, 1:]}
    joined = pgd(KEY, linear, X, Y, 0.1, norm="l2", bounds=None, random_start=False)
    apply = lambda t: linear(jnp.concatenate([t["pixels"], t["embedding"]], axis=1))  # noqa: E731
    split = pgd(KEY, apply, x, Y, 0.1, norm="l2", bounds=None, random_start=False)
    np.testing.assert_allclose(split.margin, joined.margin, rtol=1e-5)


def test_nothing_outside_the_ball_or_the_box_counts():
    x, y = jnp.full((3, 3), 0.5), jnp.zeros(3, jnp.int32)
    wrong = jnp.array([[0.3, 0.3, 0.5], [0.1, 0.1, 0.5], [0.5, -0.2, 0.5]])  # inside, out of the ball, out of the box
    fools = lambda x: jnp.stack([jnp.zeros(len(x)), jnp.ones(len(x))], axis=1)  # noqa: E731
    result = checked_result(fools, x, wrong, y, 0.21, norm="linf", bounds=(0.0, 1.0))
    np.testing.assert_array_equal(result.success, [True, False, False])
    np.testing.assert_array_equal(within(x, wrong, None, norm="linf", bounds=None), [True, True, True])
    assert not within(x, x * jnp.nan, None, norm="l2", bounds=None).any()


def test_what_apply_closes_over_is_never_stale_and_never_compiled_again(network):
    net, params = network
    x = jax.random.uniform(jax.random.key(1), (5, 6))
    y = jnp.zeros(5, jnp.int32)
    held = {"params": params}
    apply = lambda x: net.apply(held["params"], x)  # noqa: E731
    run = lambda: fgsm(apply, x, y, 0.05)  # noqa: E731
    first = run()
    programs = len(_programs)
    held["params"] = net.init(jax.random.key(9))
    second = run()
    assert len(_programs) == programs
    assert not jnp.array_equal(first, second)
    compiled = list(_programs.values())[-1]
    assert compiled._cache_size() == 1
    pure = jax.jit(lambda params: fgsm(lambda x: net.apply(params, x), x, y, 0.05))
    np.testing.assert_allclose(pure(held["params"]), second, atol=1e-6)


def test_convolutions_inside_an_attack_give_what_they_give_outside():
    w = jax.random.normal(KEY, (3, 3, 1, 2))
    conv = lambda x: lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))  # noqa: E731
    apply = jax.jit(lambda x: jnp.sum(jax.nn.relu(conv(x)), axis=(1, 2)))
    x = jax.random.uniform(jax.random.key(1), (4, 6, 6, 1))
    y = jnp.argmax(apply(x), axis=1)
    result = pgd(KEY, apply, x, y, 0.1, steps=5)
    np.testing.assert_allclose(result.margin, margins(apply(result.x_adv), y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X * 3}, r"x\[0\] is outside the box \[0.0, 1.0\]"),
        ({"x": X.at[1, 0].set(jnp.nan)}, r"x\[1\] is outside the box"),
        ({"y": Y + 5}, r"y\[0\] is 5; labels must lie in 0..1"),
        ({"y": Y[:2]}, r"y must be integers \[3\]"),
        ({"y": Y.astype(jnp.float32)}, r"y must be integers"),
        ({"epsilon": -0.1}, "epsilon must not be negative"),
        ({"epsilon": jnp.ones(2)}, r"epsilon must be a scalar or \[3\], got shape \(2,\)"),
        ({"apply": lambda x: jnp.sum(x, axis=1)}, r"apply must give logits \[3, C\]"),
        ({"apply": lambda x: linear(x) * jnp.nan}, "apply gives NaN"),
        ({"norm": "l7"}, "norm must be one of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"apply": linear, "x": X, "y": Y, "epsilon": 0.1} | change
    with pytest.raises(ValueError, match=message):
        fgsm(**arguments)


def test_double_precision_and_gradients_through_an_attack():
    with jax.enable_x64(True):
        wide = pgd(KEY, lambda x: x @ jnp.asarray(np.asarray(WEIGHTS)), jnp.asarray(np.asarray(X), jnp.float64), Y, 0.1)
        assert wide.x_adv.dtype == jnp.float64
        assert wide.success.dtype == bool
    through = jax.grad(lambda w: jnp.sum(margins(fgsm(lambda x: x @ w, X, Y, 0.1) @ w, Y)))(WEIGHTS)
    assert jnp.all(jnp.isfinite(through))
