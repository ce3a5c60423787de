"""Annotators: how often they prefer what, against their closed forms and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from jaxalign.rlhf.annotators import (
    TIE,
    biased_annotator,
    boltzmann_annotator,
    intransitive_annotator,
    last_steps_annotator,
    length_bias,
    myopic_annotator,
    noisy_annotator,
    return_scorer,
    segment_returns,
)

PERFECT = boltzmann_annotator(beta=jnp.inf)
DRAWS = 4000


def ask(annotator, first, second, *, first_mask=None, second_mask=None, draws=DRAWS, seed=0):
    """The outcomes [draws] of one pair of segments."""

    def rows(x):
        return jnp.broadcast_to(jnp.asarray(x, float)[None], (draws, len(x)))

    masks = [
        rows(np.ones(len(x)) if mask is None else mask) != 0 for x, mask in ((first, first_mask), (second, second_mask))
    ]
    key = jax.random.key(seed)
    return np.asarray(jax.jit(annotator)(key, rows(first), masks[0], rows(second), masks[1]))


def close(found, probability):
    """Within five standard errors of a frequency of DRAWS."""
    error = np.sqrt(max(probability * (1.0 - probability), 1e-3) / DRAWS)
    assert abs(np.mean(found) - probability) < 5.0 * error, (np.mean(found), probability)


def test_returns_are_of_real_steps():
    rewards, mask = jnp.array([[1.0, 2.0, jnp.nan]]), jnp.array([[True, True, False]])
    np.testing.assert_allclose(segment_returns(rewards, mask), [3.0])
    with pytest.raises(ValueError, match=r"rewards \(1, 3\) and mask \(1, 2\)"):
        segment_returns(rewards, mask[:, :2])


@pytest.mark.parametrize(("beta", "probability"), [(0.0, 0.5), (2.0, expit(2.0 * (1.5 - 1.0)))])
def test_boltzmann_frequencies(beta, probability):
    outcome = ask(boltzmann_annotator(beta=beta), [1.0, 0.5], [1.0, 0.0])
    assert outcome.dtype == np.int32
    close(outcome == 0, probability)


def test_without_end_of_reason_the_larger_return_wins_and_equals_are_a_coin():
    assert (ask(PERFECT, [1.0, 0.5], [1.0, 0.0]) == 0).all()
    assert (ask(PERFECT, [1.0, 0.0], [1.0, 0.5]) == 1).all()
    close(ask(PERFECT, [1.0, 0.5], [0.5, 1.0]) == 0, 0.5)
    assert (ask(PERFECT, [1.0, 9.0], [1.5, 0.0], first_mask=[1, 0]) == 1).all()  # the 9 is past the end


def test_noise_flips_and_ties():
    slips = noisy_annotator(PERFECT, flip_probability=0.2, tie_threshold=0.3)
    close(ask(slips, [1.0], [0.0]) == 1, 0.2)
    assert (ask(slips, [1.0], [0.8]) == TIE).all()
    assert (ask(noisy_annotator(PERFECT), [1.0], [0.9]) == 0).all()  # no noise: the annotator itself
    twice = noisy_annotator(noisy_annotator(PERFECT, tie_threshold=0.3), flip_probability=1.0)
    assert (ask(twice, [1.0], [0.8]) == TIE).all()  # a tie is not flipped
    # A flip is drawn apart from the answer: 0.7 0.8 + 0.3 0.2
    first = noisy_annotator(boltzmann_annotator(beta=np.log(7 / 3)), flip_probability=0.2)
    close(ask(first, [1.0], [0.0]) == 0, 0.7 * 0.8 + 0.3 * 0.2)


def test_bias_for_length():
    longer = biased_annotator(PERFECT, length_bias(0.4))
    short, long = [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    assert (ask(longer, short, long, first_mask=[1, 0, 0]) == 0).all()  # 1 + 0.4 against 3 x 0.4 = 1.2
    longer = biased_annotator(PERFECT, length_bias(0.6))
    assert (ask(longer, short, long, first_mask=[1, 0, 0]) == 1).all()  # 1 + 0.6 against 1.8
    rational = biased_annotator(boltzmann_annotator(beta=2.0), lambda rewards, mask: -2.0 * rewards)
    close(ask(rational, [1.0], [0.5]) == 0, expit(2.0 * -0.5))


def test_the_myopic_forget_the_beginning():
    # Discounted towards the last real step: 0.5 x 1 + 1 x 1 = 1.5 against 0.25 x 4 = 1, though 4 > 2.
    half = myopic_annotator(PERFECT, discount=0.5)
    assert (ask(half, [1.0, 1.0, 9.0], [4.0, 0.0, 0.0], first_mask=[1, 1, 0]) == 0).all()
    assert (ask(myopic_annotator(PERFECT, discount=1.0), [0.0, 1.0, 1.0], [4.0, 0.0, 0.0]) == 1).all()
    blind = myopic_annotator(PERFECT, discount=0.0)
    assert (ask(blind, [9.0, 0.0], [0.0, 1.0]) == 1).all()
    assert (ask(last_steps_annotator(PERFECT, count=1), [9.0, 0.0], [0.0, 1.0]) == 1).all()
    assert (ask(last_steps_annotator(PERFECT, count=2), [9.0, 0.0], [0.0, 1.0]) == 0).all()


def test_no_reward_explains_a_circle():
    circle = intransitive_annotator(beta=0.0, strength=8.0, period=3.0)
    low, middle, high = [0.0], [1.0], [2.0]
    p = expit(8.0 * np.sin(2 * np.pi / 3))
    close(ask(circle, middle, low) == 0, p)
    close(ask(circle, high, middle) == 0, p)
    close(ask(circle, low, high) == 0, p)
    assert p > 0.99
    # Without a circle it is Boltzmann, answer by answer; both orders of a pair say the same.
    plain, none = boltzmann_annotator(beta=1.0), intransitive_annotator(beta=1.0, strength=0.0, period=3.0)
    np.testing.assert_array_equal(ask(plain, high, low), ask(none, high, low))
    mixed = intransitive_annotator(beta=0.5, strength=1.0, period=5.0)
    p = expit(0.5 * 2 + np.sin(2 * np.pi * 2 / 5))
    close(ask(mixed, high, low) == 0, p)
    close(ask(mixed, low, high) == 1, p)


def test_wrapped_in_each_other_and_over_a_batch_of_settings():
    def frequency(flip):
        hurried = noisy_annotator(
            myopic_annotator(biased_annotator(boltzmann_annotator(beta=1.0), length_bias(0.5)), discount=0.5),
            flip_probability=flip,
        )
        rewards = jnp.broadcast_to(jnp.array([[1.0, 2.0]]), (DRAWS, 2))
        mask = jnp.ones((DRAWS, 2), bool)
        return jnp.mean(hurried(jax.random.key(1), rewards, mask, 0.0 * rewards, mask) == 0)

    found = jax.jit(jax.vmap(frequency))(jnp.array([0.0, 0.3]))
    right = expit((0.5 * 1.5 + 2.5) - (0.5 * 0.5 + 0.5))
    close(np.array([found[0]]), right)
    close(np.array([found[1]]), 0.7 * right + 0.3 * (1 - right))
    assert found[1] < found[0]


def test_scores():
    rewards, mask = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[True, True], [True, False]])
    np.testing.assert_allclose(return_scorer(scale=2.0)(jax.random.key(0), rewards, mask), [6.0, 6.0])
    many = jnp.broadcast_to(rewards[:1], (DRAWS, 2))
    noisy = return_scorer(noise=0.5)(jax.random.key(0), many, jnp.ones_like(many, bool))
    assert abs(float(noisy.mean()) - 3.0) < 5 * 0.5 / np.sqrt(DRAWS)
    assert abs(float(noisy.std()) - 0.5) < 0.05
