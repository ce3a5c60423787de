"""Curves and evaluations against the exact radii of a linear classifier, and with attacks whose answers are known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxalign.robustness.attack_result import AttackResult
from jaxalign.robustness.evaluation import intervals_over_seeds, robust_curve, robustness_evaluation
from jaxalign.robustness.pgd import pgd

ROWS = 60
RNG = np.random.default_rng(0)
W = RNG.normal(size=(5,)).astype(np.float32)
X = RNG.normal(size=(ROWS, 5)).astype(np.float32)
Y = ((X @ W > 0) ^ (RNG.random(ROWS) < 0.1)).astype(np.int32)
SIGNED = np.where(Y == 1, 1.0, -1.0) * (X @ W)
EXACT = np.maximum(SIGNED, 0.0) / np.abs(W).sum()  # the L-infinity distance to the boundary
EPSILONS = np.array([0.3, 0.0, 0.1, 0.2])
KEY = jax.random.key(0)


def apply(x):
    return jnp.stack([jnp.zeros(x.shape[0]), x @ W], axis=1)


def breaking(function):
    """An attack that breaks row i (numbered by x) at radius e where function(i, e)."""

    def attack(key, apply, x, y, epsilon):
        broken = jnp.asarray(function(np.asarray(x)[:, 0], float(epsilon)))
        return AttackResult(x, broken, jnp.where(broken, -1.0, 1.0))

    return attack


@pytest.fixture(scope="module")
def evaluation():
    said = []
    found = robustness_evaluation(
        KEY, apply, X, Y, attacks={"pgd": functools.partial(pgd, steps=4, bounds=None)}, epsilons=EPSILONS,
        progress=lambda *report: said.append(report),
    )  # fmt: skip
    return found, said


def test_evaluation_of_a_linear_classifier_is_exact(evaluation):
    found, said = evaluation
    expected = np.array([np.mean((SIGNED > 0) & (epsilon < EXACT)) for epsilon in EPSILONS])
    assert 0.1 < expected[0] < expected[3] < expected[2] < expected[1] < 1
    np.testing.assert_allclose(found.robust_accuracy, expected[None])
    np.testing.assert_allclose(found.worst_case_accuracy, expected)
    np.testing.assert_allclose(found.clean_accuracy, np.mean(SIGNED > 0))
    least = np.array([min([e for e in EPSILONS if e >= radius], default=np.nan) for radius in EXACT])
    np.testing.assert_allclose(found.smallest_epsilon, least)
    broken = least[(SIGNED > 0) & ~np.isnan(least)]
    np.testing.assert_allclose(found.mean_smallest_epsilon, broken.mean())
    np.testing.assert_allclose(found.median_smallest_epsilon, np.median(broken))
    assert [done for done, _, _ in said] == [1, 2, 3, 4]
    assert said[0][1:] == (4, f"pgd at 0: {expected[1]:.1%} robust")


def test_intervals_are_wilsons(evaluation):
    found, _ = evaluation
    for accuracy, interval in [
        (found.clean_accuracy, found.clean_interval),
        (found.robust_accuracy[0, 2], found.robust_interval[0, 2]),
        (found.worst_case_accuracy[0], found.worst_case_interval[0]),
    ]:
        reference = scipy.stats.binomtest(round(accuracy * ROWS), ROWS).proportion_ci(method="wilson")
        np.testing.assert_allclose(interval, reference, rtol=1e-5)


def test_worst_case_over_attacks_counts_what_no_attack_broke():
    rows = np.arange(10.0)
    attacks = {
        "even": breaking(lambda i, e: i % 2 == 0),
        "low": breaking(lambda i, e: i < 10 * e),
        "fickle": breaking(lambda i, e: (i == 9) & (e < 0.2)),
    }
    x, right = rows[:, None], jnp.array([[0.0, 1.0]])
    found = robustness_evaluation(
        KEY, lambda x: jnp.tile(right, (x.shape[0], 1)), x, np.array([0] + [1] * 9),
        attacks=attacks, epsilons=[0.1, 0.5, 0.1], batch_size=4,
    )  # fmt: skip
    # Row 0 is wrong as it is; even: 2, 4, 6, 8; low: none at 0.1 and 1 to 4 at 0.5; fickle: 9 at 0.1, and so at 0.5.
    np.testing.assert_allclose(found.robust_accuracy, [[0.5, 0.5, 0.5], [0.9, 0.5, 0.9], [0.8, 0.8, 0.8]])
    np.testing.assert_allclose(found.worst_case_accuracy, [0.4, 0.2, 0.4])
    np.testing.assert_allclose(found.smallest_epsilon, [0, 0.5, 0.1, 0.5, 0.1, np.nan, 0.1, np.nan, 0.1, 0.1])
    assert found.attacks == ("even", "low", "fickle")
    assert found.broken.shape == (3, 3, 10)


def test_nothing_broken_is_not_a_number():
    found = robustness_evaluation(
        KEY, apply, X, (X @ W > 0).astype(int), attacks={"none": breaking(lambda i, e: i > np.inf)}, epsilons=[0.1]
    )
    assert np.isnan(found.mean_smallest_epsilon)
    assert np.isnan(found.smallest_epsilon).all()
    assert found.worst_case_accuracy == 1.0


def test_curve_inside_and_outside_jit_and_in_any_order():
    attack = functools.partial(pgd, KEY, apply, X, Y, steps=4, bounds=None)
    expected = (EXACT[None] < EPSILONS[:, None]) | (SIGNED[None] < 0)
    np.testing.assert_array_equal(jax.jit(lambda epsilons: robust_curve(attack, epsilons))(EPSILONS), expected)
    np.testing.assert_array_equal(robust_curve(attack, EPSILONS), expected)


def test_curve_never_rises_whatever_the_attack_does():
    rows = np.arange(4.0)[:, None]
    attack = breaking(lambda i, e: i == round(10 * e))
    broken = robust_curve(lambda e: attack(None, None, rows, None, e), np.array([0.2, 0.0, 0.1]))
    np.testing.assert_array_equal(broken, [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])


def test_intervals_over_seeds(evaluation):
    found, _ = evaluation
    # Of two seeds a resample holds one of them twice half the time, so that the interval has the seeds as its ends.
    seeds = [found, found._replace(robust_accuracy=found.robust_accuracy + 0.1)]
    over = intervals_over_seeds(KEY, seeds, resamples=200)
    expected = found.robust_accuracy[..., None] + np.array([0.05, 0.0, 0.1])
    np.testing.assert_allclose(over.robust_accuracy, expected, rtol=1e-6)
    np.testing.assert_allclose(over.clean_accuracy, np.full(3, found.clean_accuracy), rtol=1e-6)
    np.testing.assert_allclose(over.worst_case_accuracy[:, 1], found.worst_case_accuracy, rtol=1e-6)
    with pytest.raises(ValueError, match="at least two evaluations, got 1"):
        intervals_over_seeds(KEY, seeds[:1])
    with pytest.raises(ValueError, match=r"\('pgd',\).*\('fab',\)"):
        intervals_over_seeds(KEY, [found, found._replace(attacks=("fab",))])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attacks": {}}, "at least one attack"),
        ({"epsilons": 0.1}, r"epsilons \[E\]"),
        ({"epsilons": [-0.1]}, "not negative"),
        ({"y": Y + 1}, "labels must lie in 0..1"),
        ({"y": Y[:9]}, r"integers \[60\]"),
        ({"x": np.full_like(X, np.nan)}, "nan"),
        ({"apply": lambda x: apply(x) + jnp.where(x[:, :1] > 1, jnp.nan, 0.0)}, r"NaN for \d+ rows, the first x\["),
        ({"apply": lambda x: x[:, 0]}, "must give logits"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        given = {"apply": apply, "x": X, "y": Y, "attacks": {"pgd": pgd}, "epsilons": [0.1]} | changed
        robustness_evaluation(KEY, **given)
    with pytest.raises(ValueError, match=r"\[E\] with E >= 1, got shape \(\)"):
        robust_curve(lambda e: None, 0.1)
