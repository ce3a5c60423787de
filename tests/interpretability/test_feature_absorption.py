"""Absorption on a hierarchy of a parent with two children, by SAEs written down by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interpretability.feature_absorption import feature_absorption

PARENT = jnp.array([-1, 0, 0, -1])
DICTIONARY = jnp.eye(4, 6)
# The parent alone, with its first child, with its second, nothing, the loose feature; magnitudes 2.
FEATURES = 2.0 * jnp.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], jnp.float32)
measure = jax.jit(feature_absorption)


def test_a_perfect_sae_absorbs_nothing():
    found = measure(FEATURES, FEATURES, DICTIONARY, DICTIONARY, PARENT)
    np.testing.assert_array_equal(found.rate, [np.nan, 0, 0, np.nan])
    np.testing.assert_array_equal(found.missed, [np.nan, 0, 0, np.nan])
    assert float(found.mean) == 0
    assert int(found.pairs) == 2


def test_a_child_latent_with_the_parents_direction_absorbs_it():
    """Latent 1 is (parent + 1.2 child 1) / 2; where child 1 fires, the parent's latent is silent."""
    decoder = DICTIONARY.at[1].set(jnp.array([1, 1.2, 0, 0, 0, 0]) / 2)
    latents = FEATURES.at[1].set(jnp.array([0.0, 4.0, 0.0, 0.0]))
    found = measure(latents, FEATURES, decoder, DICTIONARY, PARENT)
    np.testing.assert_array_equal(found.rate, [np.nan, 1, 0, np.nan])
    np.testing.assert_array_equal(found.missed, [np.nan, 1, 0, np.nan])
    np.testing.assert_array_equal(found.missed_alone, [np.nan, 0, 0, np.nan])
    assert float(found.mean) == 0.5
    # The child's latent puts back 4 / 2 = 2 of the parent's 2, and not more.
    assert float(measure(latents, FEATURES, decoder, DICTIONARY, PARENT, share=1.01).mean) == 0


def test_a_silent_parent_that_nobody_carries_is_missed_not_absorbed():
    latents = FEATURES.at[1, 0].set(0.0)
    found = measure(latents, FEATURES, DICTIONARY, DICTIONARY, PARENT)
    np.testing.assert_array_equal(found.rate, [np.nan, 0, 0, np.nan])
    np.testing.assert_array_equal(found.missed, [np.nan, 1, 0, np.nan])


def test_what_no_latent_found_is_not_measured():
    decoder = DICTIONARY.at[2].set(jnp.eye(6)[5])
    found = measure(FEATURES, FEATURES, decoder, DICTIONARY, PARENT)
    np.testing.assert_array_equal(found.rate, [np.nan, 0, np.nan, np.nan])
    nothing = measure(FEATURES, FEATURES, decoder.at[0].set(jnp.eye(6)[4]), DICTIONARY, PARENT)
    assert np.isnan(nothing.mean)
    assert int(nothing.pairs) == 0


def test_overlapping_directions_are_not_taken_for_absorption():
    """The child's direction leans on the parent's; a latent of exactly that direction carries nothing of the parent."""
    dictionary = DICTIONARY.at[1].set(jnp.array([0.6, 0.8, 0, 0, 0, 0]))
    latents = FEATURES.at[1, 0].set(0.0)
    found = measure(latents, FEATURES, dictionary, dictionary, PARENT)
    assert float(found.rate[1]) == 0
    with pytest.raises(AssertionError):
        measure(latents[:2], FEATURES, dictionary, dictionary, PARENT)
