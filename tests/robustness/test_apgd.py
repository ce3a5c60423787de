"""Auto-PGD: its checkpoints, its steps against NumPy, and a linear classifier, where the truth is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.robustness.apgd import apgd, apgd_targeted, targeted_loss
from jaxalign.robustness.auto_pgd import AutoPGD, checkpoints
from jaxalign.robustness.survivors import Rows

BATCH, FEATURES, CLASSES = 6, 8, 5
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
SCALES = np.array([0.0, 0.9, 1.1, 1.5], np.float32)
KEY = jax.random.key(0)

weights = np.random.default_rng(1).normal(size=(FEATURES, CLASSES)).astype(np.float32)
x = np.random.default_rng(2).uniform(0.3, 0.7, (BATCH, FEATURES)).astype(np.float32)
y = np.argmax(x @ weights, axis=1)


def linear(x):
    return x @ weights


def distances(norm):
    """How far each row of x is from the nearest other class, in closed form."""
    gaps = (x @ weights)[np.arange(BATCH), y][:, None] - x @ weights
    sizes = np.linalg.norm(weights[:, y][:, :, None] - weights[:, None, :], DUAL[norm], axis=0)
    return np.min(np.where(np.arange(CLASSES)[None, :] == y[:, None], np.inf, gaps / np.maximum(sizes, 1e-9)), axis=1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(100, [0, 22, 41, 57, 70, 80, 87, 93, 99]), (10, [0, 3, 5, 6, 7, 8, 9, 10]), (1, [0, 1]), (0, [0])],
)
def test_checkpoints_by_hand(steps, expected):
    assert checkpoints(steps) == expected


@pytest.mark.parametrize(
    ("norm", "attack"),
    [
        ("linf", apgd),
        ("l1", apgd),
        pytest.param("l2", apgd, marks=pytest.mark.slow),
        pytest.param("l2", apgd_targeted, marks=pytest.mark.slow),
        pytest.param("linf", apgd_targeted, marks=pytest.mark.slow),
        pytest.param("l1", apgd_targeted, marks=pytest.mark.slow),
    ],
)
def test_a_linear_classifier_falls_exactly_where_epsilon_exceeds_its_distance(norm, attack):
    options = {"loss": "dlr"} if attack is apgd else {}
    options["steps"] = 100 if norm == "l1" else 25

    def over(scale):
        return attack(KEY, linear, x, y, scale * distances(norm), norm=norm, bounds=(-2.0, 2.0), **options)

    result = jax.jit(jax.vmap(over))(SCALES)
    np.testing.assert_array_equal(result.success, np.broadcast_to(SCALES[:, None] > 1, (4, BATCH)))
    np.testing.assert_array_equal(result.x_adv[0], x)
    x_adv = np.asarray(result.x_adv)
    reached = np.linalg.norm(x_adv - x, ORDER[norm], axis=2)
    assert np.all(reached <= SCALES[:, None] * distances(norm) * (1 + 1e-5) + 1e-6)
    # The margin shown is that of the point shown.
    logits = x_adv @ weights
    others = np.where(np.arange(CLASSES)[None, None] == y[None, :, None], -np.inf, logits).max(axis=2)
    true = np.take_along_axis(logits, np.broadcast_to(y, (4, BATCH))[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(result.margin, true - others, atol=1e-5)


def in_numpy(start, rows, inner, outer, steps, rho):
    """Algorithm 1 of the paper for linf, one row at a time: the sequence of largest losses and the last iterate."""

    def evaluate(z, label):
        hidden = np.tanh(z @ inner)
        logits = hidden @ outer
        soft = np.exp(logits - logits.max())
        soft /= soft.sum()
        gradient = inner @ ((1 - hidden**2) * (outer @ (soft - np.eye(len(soft))[label])))
        return -np.log(soft[label]), gradient

    places, largest, last = checkpoints(steps), [], []
    for first, centre, label, radius in zip(start, rows.x, rows.y, rows.epsilon, strict=True):
        clip = lambda z, c=centre, r=radius: np.clip(np.clip(z, c - r, c + r), rows.lower, rows.upper)  # noqa: E731
        x, previous, eta = first, first, 2 * radius
        loss, gradient = evaluate(x, label)
        best, best_loss, best_gradient = x, loss, gradient
        rises, seen, halved = [], best_loss, False
        for k in range(steps):
            z = clip(x + eta * np.sign(gradient))
            weight = 1.0 if k == 0 else 0.75
            previous, x = x, clip(x + weight * (z - x) + (1 - weight) * (x - previous))
            new, gradient = evaluate(x, label)
            rises.append(new > loss)
            loss = new
            if loss > best_loss:
                best, best_loss, best_gradient = x, loss, gradient
            if k + 1 in places:
                stretch = k + 1 - places[places.index(k + 1) - 1]
                poor = sum(rises[-stretch:]) < rho * stretch
                halve = poor or (not halved and seen == best_loss)
                if halve:
                    eta, x, loss, gradient = eta / 2, best, best_loss, best_gradient
                seen, halved = best_loss, halve
        largest.append(best_loss)
        last.append(best)
    return np.array(largest), np.array(last)


def test_steps_are_those_of_the_algorithm_in_numpy_float64():
    rng = np.random.default_rng(5)
    inner, outer = rng.normal(size=(FEATURES, 7)) * 2, rng.normal(size=(7, CLASSES))
    with jax.enable_x64(True):
        centre = rng.uniform(0, 1, (BATCH, FEATURES))
        labels = np.argmax(np.tanh(centre @ inner) @ outer, axis=1)
        epsilon = np.linspace(0.05, 0.3, BATCH)
        rows = Rows(*map(jnp.asarray, (centre, labels, labels, epsilon, 0.0, 1.0)))
        search = AutoPGD(steps=20)
        state = jax.jit(search.init)(KEY, rows)

        def never_done(x):
            return jnp.tanh(x @ inner) @ outer

        climb = jax.jit(
            lambda state: jax.lax.fori_loop(
                0, search.length, lambda i, s: search.step(KEY, never_done, rows, s, i), state
            )
        )
        ours = climb(state)
        largest, best = in_numpy(np.asarray(state.x), jax.tree.map(np.asarray, rows), inner, outer, 20, 0.75)
        assert ours.x.dtype == jnp.float64
        assert len(set(np.asarray(ours.step_size / epsilon).round(9))) > 1  # rows halve on their own
        np.testing.assert_allclose(ours.best_loss, largest, rtol=1e-9)
        np.testing.assert_allclose(ours.best, best, rtol=1e-9)


def test_a_pytree_is_attacked_as_its_leaves_side_by_side():
    def joined(parts):
        return linear(jnp.concatenate([parts["a"], parts["b"][..., 0]], axis=1))

    parts = {"a": x[:, :3], "b": x[:, 3:].reshape(BATCH, 5, 1)}
    wrong = np.arange(BATCH) == 0
    labels, epsilon = np.where(wrong, (y + 1) % CLASSES, y), np.where(np.arange(BATCH) < 4, 1.2, 0.8)
    options = {"norm": "l2", "loss": "dlr", "bounds": (-2.0, 2.0)}
    result = apgd(KEY, joined, parts, labels, epsilon * distances("l2"), steps=8, restarts=2, **options)
    np.testing.assert_array_equal(result.success, epsilon > 1)
    assert result.x_adv["b"].shape == (BATCH, 5, 1)
    # The row that is wrong already comes back as it is.
    np.testing.assert_array_equal(result.x_adv["a"][0], x[0, :3])
    np.testing.assert_array_equal(result.x_adv["b"][0, :, 0], x[0, 3:])


@pytest.mark.slow
def test_eot_climbs_the_mean_over_draws():
    def noisy(x, key):  # of 256 draws, the mean's noise is a hundredth of the classes' differences
        return linear(x) + 0.2 * jax.random.normal(key, (BATCH, CLASSES))

    def over(scale):
        return apgd(KEY, noisy, x, y, scale * distances("linf"), steps=8, eot=256, bounds=(-2.0, 2.0))

    success = jax.jit(jax.vmap(over))(jnp.array([0.5, 3.0])).success
    np.testing.assert_array_equal(success, [[False] * BATCH, [True] * BATCH])


@pytest.mark.slow
def test_two_classes_have_one_target():
    two = jax.jit(lambda e: apgd_targeted(KEY, lambda x: x[:, :2], x, np.argmax(x[:, :2], 1), e, steps=4))(0.9)
    assert two.success.all()


def test_few_classes_and_bad_arguments():
    z = jnp.array([[1.0, 3.0, -1.0]])
    np.testing.assert_allclose(targeted_loss(3)(z, jnp.array([1]), jnp.array([0])), [-2.0])
    for name, call in {
        "loss": lambda: apgd(KEY, linear, x, y, 0.1, loss="hinge"),
        "dlr_loss": lambda: apgd(KEY, lambda x: x[:, :2], x, y % 2, 0.1, loss="dlr"),
        "apgd_targeted: loss": lambda: apgd_targeted(KEY, linear, x, y, 0.1, loss="ce"),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.slow
def test_nan_in_a_gradient_is_named():
    def broken(x):  # the square root has no slope at 0, its value is fine
        return linear(x) + jnp.sqrt(jnp.sum(jnp.abs(x - x), axis=1, keepdims=True))

    assert jnp.isfinite(broken(x)).all()
    with pytest.raises(ValueError, match="NaN"):
        apgd(KEY, broken, x, y, 1e-3, steps=3)
