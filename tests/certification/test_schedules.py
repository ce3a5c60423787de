"""The ramp of certified training by hand numbers, its jump, and traced."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.certification.schedules import between, ramp_fraction


def test_the_ramp_by_hand():
    steps = jnp.array([0, 2, 3, 4, 6, 9])
    np.testing.assert_allclose(ramp_fraction(steps, warm_up=2, ramp=4), [0.0, 0.0, 0.25, 0.5, 1.0, 1.0])
    np.testing.assert_allclose(ramp_fraction(steps, warm_up=2.5, ramp=2.0), [0.0, 0.0, 0.25, 0.75, 1.0, 1.0])


def test_a_ramp_of_no_steps_is_a_jump():
    np.testing.assert_array_equal(ramp_fraction(jnp.arange(4), warm_up=2, ramp=0), [0.0, 0.0, 1.0, 1.0])


def test_lengths_may_be_traced_and_differ_by_lane():
    lanes = jax.jit(jax.vmap(lambda w, r: ramp_fraction(jnp.array(3, jnp.int32), warm_up=w, ramp=r)))
    found = lanes(jnp.array([0, 1, 3]), jnp.array([4, 4, 0]))
    np.testing.assert_allclose(found, [0.75, 0.5, 1.0])
    assert found.dtype == jnp.float32
    assert not found.weak_type


def test_between_its_ends():
    np.testing.assert_allclose(between(1.0, 0.5, jnp.array([0.0, 0.5, 1.0])), [1.0, 0.75, 0.5])
    assert between(0.1, 0.7, 1.0) == np.float32(0.7)
