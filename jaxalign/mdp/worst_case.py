"""Sets of transition probabilities around nominal ones, and the least mean that a value has over each.

A successor whose nominal probability is 0 is taken to be impossible and gets no mass, whatever the set, unless the
`support` of an L1Ball or a Contamination says so. KLBall and CVaR cannot give it any: their sets hold only
distributions with a density with respect to the nominal one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxalign.types import Array, ArrayLike


class L1Ball(NamedTuple):
    """All p with sum |p - nominal| <= radius: `worst_case_l1`.

    radius: in [0, 2], scalar or [S, A]
    support: bool, broadcast to the transition's probabilities [S, A, S] or [S, A, K]: successors p may use beside those
        of positive nominal probability (of a sparse transition, places of probability 0)
    """

    radius: ArrayLike
    support: ArrayLike | None = None

    def worst_case(self, value: Array, nominal: Array) -> Array:
        """The least mean of `value` over the set, [S], [S] -> scalar."""
        return worst_case_l1(value, nominal, self.radius, support=self.support)


class KLBall(NamedTuple):
    """All p with KL(p || nominal) <= radius: `worst_case_kl`.

    radius: >= 0, nats, scalar or [S, A]
    """

    radius: ArrayLike

    def worst_case(self, value: Array, nominal: Array) -> Array:
        """The least mean of `value` over the set, [S], [S] -> scalar."""
        return worst_case_kl(value, nominal, self.radius)


class Contamination(NamedTuple):
    """All (1 - epsilon) nominal + epsilon p': `worst_case_contamination`.

    epsilon: in [0, 1], scalar or [S, A]
    support: as for L1Ball. Wang & Zou (2021) let p' be any distribution over all states: that is support=True with a
        dense transition.
    """

    epsilon: ArrayLike
    support: ArrayLike | None = None

    def worst_case(self, value: Array, nominal: Array) -> Array:
        """The least mean of `value` over the set, [S], [S] -> scalar."""
        return worst_case_contamination(value, nominal, self.epsilon, support=self.support)


class CVaR(NamedTuple):
    """All p <= nominal / alpha: `worst_case_cvar`.

    Planning with it maximises the nested conditional value at risk, which takes the tail anew at every step; the tail
    of the whole return needs the level as part of the state (Chow et al., 2015, arXiv:1506.02188).

    alpha: in [0, 1], scalar or [S, A]
    """

    alpha: ArrayLike

    def worst_case(self, value: Array, nominal: Array) -> Array:
        """The least mean of `value` over the set, [S], [S] -> scalar."""
        return worst_case_cvar(value, nominal, self.alpha)


Uncertainty = L1Ball | KLBall | Contamination | CVaR
LARGEST = {L1Ball: 2.0, KLBall: np.inf, Contamination: 1.0, CVaR: 1.0}


def worst_case_l1(
    value: ArrayLike, nominal: ArrayLike, radius: ArrayLike, *, support: ArrayLike | None = None
) -> Array:
    """min of sum p value over distributions p with sum |p - nominal| <= radius, a scalar.

    Moves radius / 2 of the mass, from the highest values down, to the lowest value, in one sort:
    sum nominal value - sum removed (value - min value). radius 0 is the mean, 2 the minimum.

    Args:
        value, nominal: [S]; nominal sums to 1.
        radius: in [0, 2].
        support: bool [S], where p may be positive beside where `nominal` is; None: nowhere else.

    Linear in `value` while its order stays: the gradient is the worst p. Strehl & Littman (2008).
    Raises ValueError on other shapes or, outside jit, a radius outside [0, 2].
    """
    value, nominal = _distribution("worst_case_l1", value, nominal)
    check_number("worst_case_l1: radius", radius, 2.0)
    removed, negative = _take_in_order(-value, nominal, jnp.asarray(radius, value.dtype) / 2.0)
    return jnp.sum(nominal * value) + jnp.sum(removed * (negative + _lowest(value, nominal, support)))


def worst_case_kl(value: ArrayLike, nominal: ArrayLike, radius: ArrayLike) -> Array:
    """min of sum p value over distributions p with KL(p || nominal) <= radius, a scalar.

    Equal to the dual max over t >= 0 of -t log sum nominal exp(-value / t) - t radius (Nilim & El Ghaoui, 2005).
    The worst p is proportional to nominal exp(-value / t) with KL(p || nominal) = radius: one equation in 1 / t, solved
    by bisecting its logarithm as often as the dtype has bits. radius 0 is the mean; from -log nominal(lowest values)
    on it is the lowest value where nominal > 0.

    Args:
        value, nominal: [S]; nominal sums to 1.
        radius: >= 0, nats.

    Its gradient in `value` is the worst p, in `radius` -t; in `nominal` it is given for changes that sum to 0.
    Raises ValueError on other shapes or, outside jit, a negative radius.
    """
    value, nominal = _distribution("worst_case_kl", value, nominal)
    check_number("worst_case_kl: radius", radius, np.inf)
    return _worst_case_kl(value, nominal, jnp.asarray(radius, value.dtype))


def worst_case_cvar(value: ArrayLike, nominal: ArrayLike, alpha: ArrayLike) -> Array:
    """The mean of the worst alpha of the mass, a scalar: min of sum p value over distributions p <= nominal / alpha.

    Args:
        value, nominal: [S]; nominal sums to 1.
        alpha: in [0, 1]; 1 is the mean, 0 (a limit) the lowest value where nominal > 0.

    Linear in `value` while its order stays: the gradient is the worst p. Rockafellar & Uryasev (2002).
    Raises ValueError on other shapes or, outside jit, an alpha outside [0, 1].
    """
    value, nominal = _distribution("worst_case_cvar", value, nominal)
    check_number("worst_case_cvar: alpha", alpha, 1.0)
    # Small enough to lie within any one state's mass, and its square (in the derivative of a quotient) is not 0.
    alpha = jnp.maximum(jnp.asarray(alpha, value.dtype), jnp.sqrt(jnp.finfo(value.dtype).tiny))
    taken, value = _take_in_order(value, nominal, alpha)
    return jnp.sum(taken / alpha * value)


def worst_case_contamination(
    value: ArrayLike, nominal: ArrayLike, epsilon: ArrayLike, *, support: ArrayLike | None = None
) -> Array:
    """(1 - epsilon) sum nominal value + epsilon min value, a scalar; the minimum is over nominal > 0 and `support`.

    Args:
        value, nominal: [S]; nominal sums to 1.
        epsilon: in [0, 1], how much of the mass the adversary places.
        support: bool [S], where it may do so beside where `nominal` is positive; None: nowhere else.

    Huber's contamination; Wang & Zou (2021), arXiv:2109.14523, with support=True.
    Raises ValueError on other shapes or, outside jit, an epsilon outside [0, 1].
    """
    value, nominal = _distribution("worst_case_contamination", value, nominal)
    check_number("worst_case_contamination: epsilon", epsilon, 1.0)
    epsilon = jnp.asarray(epsilon, value.dtype)
    return (1.0 - epsilon) * jnp.sum(nominal * value) + epsilon * _lowest(value, nominal, support)


def _take_in_order(key: Array, mass: Array, amount: Array) -> tuple[Array, Array]:
    """Take `amount` from the lowest `key` [S] upwards: how much of each of `mass` [S] goes, and the keys, sorted.

    Comparing all pairs of few states would be quicker on a CPU, but under jit both sides of a comparison may be
    computed anew with different rounding, and then a state can come before itself.
    """
    order = jnp.argsort(key)
    mass = mass[order]
    return jnp.clip(amount - (jnp.cumsum(mass) - mass), 0.0, mass), key[order]


def _lowest(value: Array, nominal: Array, support: ArrayLike | None) -> Array:
    possible = nominal > 0.0 if support is None else (nominal > 0.0) | support
    return jnp.min(jnp.where(possible, value, jnp.inf))


@jax.custom_jvp
def _worst_case_kl(value: Array, nominal: Array, radius: Array) -> Array:
    worst, _, _ = _tilt(value, nominal, _sharpness(value, nominal, radius))
    return jnp.sum(worst * value)


@_worst_case_kl.defjvp
def _worst_case_kl_jvp(primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]) -> Any:
    """The envelope theorem: the derivative of the dual at the best t, which does not move to first order."""
    value, nominal, radius = primals
    d_value, d_nominal, d_radius = tangents
    sharpness = _sharpness(value, nominal, radius)
    worst, mass, above = _tilt(value, nominal, sharpness)
    # -t exp(-above / t) / mass up to a constant, so that a large t does not cancel.
    by_nominal = -jnp.expm1(-sharpness * above) / (sharpness * mass)
    tangent = jnp.sum(worst * d_value) + jnp.sum(by_nominal * d_nominal) - d_radius / sharpness
    return jnp.sum(worst * value), tangent


def _tilt(value: Array, nominal: Array, sharpness: Array) -> tuple[Array, Array, Array]:
    """(worst, mass, above): worst = nominal exp(-sharpness above) / mass, above = value - the lowest possible value."""
    above = jnp.where(nominal > 0.0, value - lax.stop_gradient(_lowest(value, nominal, None)), 0.0)
    weight = nominal * jnp.exp(-sharpness * above)
    mass = jnp.sum(weight)
    return weight / mass, mass, above


def _sharpness(value: Array, nominal: Array, radius: Array) -> Array:
    """1 / t > 0 with KL(worst || nominal) = radius, or an end of the bracket where the radius is 0 or too large."""
    spread = lax.stop_gradient(jnp.max(_tilt(value, nominal, jnp.zeros_like(radius))[2]))
    scale = jnp.where(spread > 0.0, spread, 1.0)
    finfo = jnp.finfo(value.dtype)
    edge = -jnp.log(finfo.eps)  # beyond exp(+-edge) / scale the worst case moves by a rounding error

    def excess(x: Array) -> Array:
        """KL(worst || nominal) - radius at sharpness exp(x) / scale; increases with x."""
        sharpness = jnp.exp(x) / scale
        worst, mass, above = _tilt(value, nominal, sharpness)
        # Near 0 the logarithm of a mass near 1 would be all rounding error.
        less = jnp.sum(nominal * jnp.expm1(-sharpness * above))
        log_mass = jnp.where(mass > 0.5, jnp.log1p(jnp.maximum(less, -0.75)), jnp.log(mass))
        return -sharpness * jnp.sum(worst * above) - log_mass - radius

    def solve(excess: Callable[[Array], Array], start: Array) -> Array:
        def halve(_: int, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bracket
            middle = 0.5 * (low + high)
            below = excess(middle) < 0.0
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = lax.fori_loop(0, finfo.nmant + 4, halve, (start - edge, start + edge))
        return 0.5 * (low + high)

    def solve_tangent(derivative: Callable[[Array], Array], y: Array) -> Array:
        slope = derivative(jnp.ones_like(y))
        return jnp.where(slope > 0.0, y / jnp.where(slope > 0.0, slope, 1.0), 0.0)

    x = lax.custom_root(excess, jnp.zeros_like(radius), solve, solve_tangent)
    return jnp.exp(x) / scale


def _distribution(name: str, value: ArrayLike, nominal: ArrayLike) -> tuple[Array, Array]:
    value, nominal = jnp.asarray(value), jnp.asarray(nominal)
    if value.ndim != 1 or value.shape != nominal.shape:
        raise ValueError(f"{name}: value and nominal must both be [S], got {value.shape} and {nominal.shape}")
    dtype = jnp.result_type(value, nominal, 0.0)
    return value.astype(dtype), nominal.astype(dtype)


def check_number(name: str, number: ArrayLike, largest: float) -> None:
    """Raise ValueError, outside jit, on a number [...] below 0 or above `largest`."""
    if isinstance(number, jax.core.Tracer):
        return
    wrong = np.asarray(number)[~((np.asarray(number) >= 0.0) & (np.asarray(number) <= largest))]
    if wrong.size:
        bounds = f"in [0, {largest:g}]" if np.isfinite(largest) else "at least 0"
        raise ValueError(f"{name} must be {bounds}, got {wrong.flat[0]}")
