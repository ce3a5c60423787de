"""An attack that wins inside a certificate is found, named and kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.certification.self_check import contradictions
from jaxalign.robustness.attack_result import AttackResult
from jaxalign.robustness.pgd import pgd
from jaxalign.runtime.certificate_check import BrokenCertificateError, check_certificates

X = jnp.array([[0.5], [0.9], [0.2], [0.6]])
Y = jnp.array([1, 1, 0, 0])  # the last is wrong as it is


def apply(x):
    """Class 1 where x > 0.4: row b can be certified up to |x - 0.4|."""
    return jnp.concatenate([0.4 - x, x - 0.4], axis=1)


def true_radius(x, y):
    distance = (x[:, 0] - 0.4) * (2 * y - 1)
    return jnp.maximum(distance, 0.0)


@pytest.fixture(scope="module")
def attack():
    return pgd(jax.random.key(0), apply, X, Y, 0.3, steps=20)


def test_a_contradiction_is_a_certified_row_that_fell_inside_its_ball(attack):
    assert attack.success.tolist() == [True, False, True, True]
    honest = contradictions(true_radius(X, Y) > 0, attack, X, true_radius(X, Y) - 1e-5)
    assert not honest.any()
    everything = jnp.ones(4, bool)
    assert contradictions(everything, attack, X, 0.3).tolist() == [True, False, True, True]
    # An attack beyond the certificate says nothing about it; a row wrong as it is breaks any.
    distances = jnp.abs(attack.x_adv - X)[:, 0]
    assert contradictions(everything, attack, X, distances - 1e-3).tolist() == [False, False, False, False]
    clean = attack._replace(x_adv=X, success=jnp.array([False, False, False, True]))
    assert contradictions(everything, clean, X, 0.0).tolist() == [False, False, False, True]
    assert not contradictions(~everything, attack, X, 0.3).any()


def test_it_is_the_same_in_jit_and_by_rows(attack):
    radius = jnp.array([0.05, 0.3, 0.3, 0.1])
    everything = jnp.ones(4, bool)
    expected = contradictions(everything, attack, X, radius)
    np.testing.assert_array_equal(jax.jit(contradictions)(everything, attack, X, radius), expected)
    distance = np.abs(np.asarray(attack.x_adv - X, np.float64))[:, 0]
    np.testing.assert_array_equal(expected, np.asarray(attack.success) & (distance <= np.asarray(radius) + 1e-6))


def test_the_ball_is_meant_in_its_norm():
    x = jnp.zeros((1, 4))
    moved = AttackResult(jnp.full((1, 4), 0.1), jnp.array([True]), jnp.array([-1.0]))
    found = [bool(contradictions(jnp.array([True]), moved, x, 0.15, norm=n)[0]) for n in ("linf", "l2", "l1")]
    assert found == [True, False, False]


def test_a_broken_certifier_is_caught_and_the_example_kept(attack, tmp_path):
    radius = true_radius(X, Y)
    check_certificates(tmp_path, radius > 0, attack, X, Y, radius - 1e-5)
    assert not list(tmp_path.iterdir())

    broken = 1.5 * radius  # a certifier that claims half as much again
    at_its_edge = pgd(jax.random.key(0), apply, X, Y, broken, steps=20)
    words = r"3 of 4 rows .*: 0, 1, 2\. Row 1 is certified at 0\.75"
    with pytest.raises(BrokenCertificateError, match=words) as caught:
        check_certificates(tmp_path / "run", radius > 0, at_its_edge, X, Y, broken)
    assert caught.value.rows.tolist() == [0, 1, 2]
    with np.load(caught.value.path) as file:
        kept = {name: file[name] for name in file.files}
    np.testing.assert_array_equal(kept["row"], [0, 1, 2])
    np.testing.assert_array_equal(kept["y"], [1, 1, 0])
    np.testing.assert_array_equal(apply(jnp.asarray(kept["x_adv"])).argmax(axis=1), [0, 0, 1])
    np.testing.assert_allclose(kept["distance"], np.abs(kept["x_adv"] - kept["x"])[:, 0])
    assert (kept["distance"] <= kept["epsilon"] + 1e-6).all()
    assert (kept["margin"] < 0).all()


def test_shapes_that_disagree_are_named(attack):
    with pytest.raises(ValueError, match=r"must agree, got \(3,\), \(4,\)"):
        contradictions(jnp.ones(3, bool), attack, X, 0.3)
