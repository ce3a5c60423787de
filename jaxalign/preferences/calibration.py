"""Whether probabilities mean what they say: of the events given 0.8, do four in five happen?"""

from typing import NamedTuple

import chex
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike


class ReliabilityCurve(NamedTuple):
    """What was said and what happened in each of the bins [b / bins, (b + 1) / bins], fields [bins].

    confidence: mean probability in the bin, NaN where it is empty
    frequency: share of the events that happened, NaN where it is empty
    count: how many events it holds
    """

    confidence: Array
    frequency: Array
    count: Array


def reliability_curve(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int) -> ReliabilityCurve:
    """Events sorted by their probability into `bins` bins of equal width.

    Args:
        probabilities: [N], in [0, 1]; 1 belongs to the last bin.
        outcomes: [N], 1 (or True) where the event happened, 0 where not; numbers between count in part (a tie: 0.5).
        bins: static.

    Raises ValueError if `bins` < 1 or there are no events, AssertionError if the shapes differ. A NaN probability gives
    NaN in every field of every bin. DeGroot and Fienberg, The Statistician 32 (1983).
    """
    p, y = _events(probabilities, outcomes)
    if bins < 1:
        raise ValueError(f"reliability_curve: bins must be at least 1, got {bins}")
    place = jnp.clip(jnp.floor(p * bins), 0, bins - 1)
    inside = (place[None, :] == jnp.arange(bins, dtype=p.dtype)[:, None]).astype(p.dtype)
    # A NaN is in no bin, where it would go unseen.
    poison = jnp.where(jnp.any(jnp.isnan(p) | jnp.isnan(y)), jnp.nan, 0.0)
    count = inside.sum(axis=1)
    sums = [jnp.sum(inside * jnp.nan_to_num(x)[None, :], axis=1) for x in (p, y)]
    confidence, frequency = (jnp.where(count > 0, s / jnp.maximum(count, 1), jnp.nan) + poison for s in sums)
    return ReliabilityCurve(confidence, frequency, count + poison)


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10) -> Array:
    """How far frequency is from confidence on average: sum_b (count_b / N) |frequency_b - confidence_b|, in [0, 1].

    It is biased upwards, by about sqrt(bins / N) / 3 for a calibrated forecast, so compare at equal N.
    Arguments as in `reliability_curve`. Naeini, Cooper and Hauskrecht, AAAI 2015.
    """
    curve = reliability_curve(probabilities, outcomes, bins=bins)
    # 0 * NaN of an empty bin is NaN; only a NaN count, which says that the input had one, is let through.
    gap = jnp.where(curve.count == 0, 0.0, jnp.abs(curve.frequency - curve.confidence))
    return jnp.sum(curve.count * gap) / jnp.sum(curve.count)


def brier_score(probabilities: ArrayLike, outcomes: ArrayLike) -> Array:
    """mean (probability - outcome)^2 over events [N]: 0 for a seer, 1/4 for always saying 1/2.

    Arguments as in `reliability_curve`.
    Unlike the calibration error it also rewards being sure where it is right. Brier, Monthly Weather Review 78 (1950).
    """
    p, y = _events(probabilities, outcomes)
    return jnp.mean(jnp.square(p - y))


def _events(probabilities: ArrayLike, outcomes: ArrayLike) -> tuple[Array, Array]:
    p, y = jnp.asarray(probabilities), jnp.asarray(outcomes)
    chex.assert_rank(p, 1)
    chex.assert_equal_shape([p, y])
    if not p.size:
        raise ValueError("calibration: needs at least one event, got none")
    p = p.astype(jnp.promote_types(p.dtype, jnp.float32))
    return p, y.astype(p.dtype)
