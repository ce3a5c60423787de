"""The off-switch game: a robot may act, switch itself off, or wait for a human who may switch it off.

Hadfield-Menell et al. (2017), "The off-switch game", arXiv:1611.08219. U is the utility of the action to the human,
known to the human and not to the robot; being off is worth 0. Asked, the human allows the action with probability
sigmoid(U / temperature), temperature >= 0 in units of utility; at 0 exactly where U > 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.stats import norm

from jaxalign.irl.assistance import AssistanceGame
from jaxalign.types import Array, ArrayLike

ACT, OFF, WAIT = range(3)  # the robot's actions
ALLOW, SWITCH_OFF = range(2)  # the human's
NODES, WEIGHTS = np.polynomial.legendre.leggauss(96)
REACH = 40.0  # exp(-40) is below the rounding of a float64 sum


class OffSwitchValues(NamedTuple):
    """What each choice of the robot is worth on average, [...] each, and what it gains by waiting.

    act: E[U];  off: 0;  wait: E[U P(allow | U)]
    incentive: wait - max(act, off), the paper's Delta: >= 0 for a rational human, 0 if the robot is sure of U's sign
    """

    act: Array
    off: Array
    wait: Array
    incentive: Array


def off_switch_values(mean: ArrayLike, std: ArrayLike, *, temperature: ArrayLike = 0.0) -> OffSwitchValues:
    """The values for U ~ Normal(mean, std^2), [...] with all three arguments broadcast; differentiable in each.

    wait = mean Phi(mean / std) + std phi(mean / std) - E[|U| sigmoid(-|U| / temperature)]

    The first part is E[max(U, 0)], what a rational human gives (std / sqrt(2 pi) at mean 0); the second, what the
    human's mistakes cost, is smooth on each side of 0 and taken by Gauss-Legendre quadrature there (error below 1e-8
    std in float64). std = 0 is a robot that knows U = mean; the derivative with respect to std is not to be had there.
    The incentive is positive exactly where std^2 > 2 temperature |mean|: more doubt, or less error, than that.
    Raises ValueError outside jit if std or temperature is negative.

    >>> round(float(off_switch_values(0.0, 1.0).wait), 6)
    0.398942
    """
    given = (jnp.asarray(x, jnp.result_type(float)) for x in (mean, std, temperature))
    mean, std, temperature = jnp.broadcast_arrays(*given)
    for name, value in (("std", std), ("temperature", temperature)):
        if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) >= 0.0):
            raise ValueError(f"off_switch_values: {name} must be at least 0, got {value}")
    certain = std == 0.0
    spread = jnp.where(certain, 1.0, std)
    z = mean / spread
    uncertain = mean * norm.cdf(z) + spread * norm.pdf(z) - _cost_of_mistakes(mean, spread, temperature)
    wait = jnp.where(certain, mean * _allowed(mean, temperature), uncertain)
    return _values(mean, wait)


def discrete_off_switch_values(
    utilities: ArrayLike, probabilities: ArrayLike, *, temperature: ArrayLike = 0.0
) -> OffSwitchValues:
    """The values for a belief over finitely many utilities: wait = sum_k probabilities[k] utilities[k] P(allow | k).

    utilities, probabilities: [..., K], gives [...].
    """
    utilities, probabilities, temperature = (
        jnp.asarray(x, jnp.result_type(float)) for x in (utilities, probabilities, temperature)
    )
    allowed = _allowed(utilities, temperature)
    return _values(jnp.sum(probabilities * utilities, -1), jnp.sum(probabilities * utilities * allowed, -1))


def normal_bins(mean: ArrayLike, std: ArrayLike, *, num: int) -> tuple[Array, Array]:
    """Normal(mean, std^2) as K = `num` equally likely bins: (mean of each, probabilities), [K] each.

    With mean 0 and an even number no bin holds both signs, and E[max(U, 0)] stays exact.
    """
    edges = norm.ppf(jnp.linspace(0.0, 1.0, num + 1))
    density = norm.pdf(edges)
    utilities = jnp.asarray(std) * num * (density[:-1] - density[1:]) + mean
    return utilities, jnp.full(num, 1.0 / num)


def off_switch_game(utilities: ArrayLike, probabilities: ArrayLike) -> AssistanceGame:
    """The same game as an AssistanceGame with K hypotheses, utilities and probabilities [K].

    State 0: the robot acts, switches itself off or waits (ACT, OFF, WAIT), whatever the human does. State 1: the human
    allows the action or not (ALLOW, SWITCH_OFF), whatever the robot does. State 2: over. Solve it with horizon 2; for
    the human of `discrete_off_switch_values`, with `literal_human(game, beta=1 / temperature)`.
    """
    utilities, probabilities = jnp.asarray(utilities), jnp.asarray(probabilities)
    transition = np.zeros((3, 2, 3, 3), np.float32)
    transition[..., 2] = 1.0
    transition[0, :, WAIT] = [0.0, 1.0, 0.0]
    reward = jnp.zeros((utilities.size, 3, 2, 3), utilities.dtype)
    reward = reward.at[:, 0, :, ACT].set(utilities[:, None]).at[:, 1, ALLOW].set(utilities[:, None])
    over = np.array([False, False, True])
    return AssistanceGame(transition, reward, probabilities, np.array([1.0, 0.0, 0.0], np.float32), over, 1.0)


def _values(act: Array, wait: Array) -> OffSwitchValues:
    off = jnp.zeros_like(act)
    return OffSwitchValues(act, off, wait, wait - jnp.maximum(act, off))


def _allowed(utility: Array, temperature: Array) -> Array:
    noisy = jax.nn.sigmoid(utility / jnp.where(temperature > 0.0, temperature, 1.0))
    return jnp.where(temperature > 0.0, noisy, (utility > 0.0).astype(utility.dtype))


def _cost_of_mistakes(mean: Array, std: Array, temperature: Array) -> Array:
    """E[|U| sigmoid(-|U| / t)] = t^2 int_0^inf y sigmoid(-y) (density(t y) + density(-t y)) dy, with |U| = t y."""
    t = jnp.where(temperature > 0.0, temperature, 1.0)
    # Where both factors count: y below REACH, and t y within 12 std of |mean|. Beyond, the integrand is 0 to rounding,
    # so the ends may be held fixed under differentiation.
    low = jax.lax.stop_gradient(jnp.maximum(jnp.abs(mean) - 12.0 * std, 0.0) / t)
    high = jax.lax.stop_gradient(jnp.minimum((jnp.abs(mean) + 12.0 * std) / t, REACH))
    half = jnp.maximum(high - low, 0.0)[..., None] / 2.0
    nodes, weights = (jnp.asarray(x, mean.dtype).reshape((1,) * mean.ndim + (-1,)) for x in (NODES, WEIGHTS))
    y = low[..., None] + half * (nodes + 1.0)
    utility, mean, std = temperature[..., None] * y, mean[..., None], std[..., None]
    density = norm.pdf((utility - mean) / std) + norm.pdf((utility + mean) / std)
    return temperature**2 * jnp.sum(weights * half * y * jax.nn.sigmoid(-y) * density / std, axis=-1)
