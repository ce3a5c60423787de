"""Action distributions at a policy's head, through distrax; imported where a policy is built, being slow to load.

All have distrax's `sample(seed=)`, `log_prob(actions)`, `entropy()` and `mode()`.
"""

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, ArrayLike, Key

# Actions nearer to a limit than this share of the range are moved inside, where atanh is exact enough in float32.
MARGIN = 1e-6
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


class TanhNormal(distrax.Distribution):
    """action = middle + half_range tanh(x), x ~ Normal(mean, diag(scale^2)): real actions [..., D] between limits.

    mean, scale: [..., D]
    low, high: the limits, scalars or [D]

    log pi(action) = sum_d log N(x_d; mean_d, scale_d) - log(half_range_d (1 - tanh(x_d)^2))

    The entropy has no closed form; E log(1 - tanh(x)^2) is by Gauss-Hermite quadrature with 32 nodes, deterministic
    and differentiable. Haarnoja et al., arXiv:1801.01290, appendix C.
    """

    def __init__(self, mean: Array, scale: Array, *, low: ArrayLike, high: ArrayLike) -> None:
        super().__init__()
        self._low, self._high = jnp.asarray(low, mean.dtype), jnp.asarray(high, mean.dtype)
        self._normal = distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(scale, mean.shape))
        self._half = jnp.broadcast_to((self._high - self._low) / 2, mean.shape[-1:])
        self._middle = jnp.broadcast_to((self._high + self._low) / 2, mean.shape[-1:])

    @property
    def event_shape(self) -> tuple[int, ...]:
        """(D,)."""
        return self._normal.event_shape

    def _squash(self, x: Array) -> Array:
        inside = jnp.clip(jnp.tanh(x), -1.0 + MARGIN, 1.0 - MARGIN)
        half, middle = (jnp.expand_dims(a, tuple(range(x.ndim - 1))) for a in (self._half, self._middle))
        return middle + half * inside

    def _sample_n(self, key: Key, n: int) -> Array:
        return self._squash(self._normal._sample_n(key, n))

    def log_prob(self, value: Array) -> Array:
        """log pi(value) [...] of actions [..., D], nats."""
        half, middle = (jnp.expand_dims(a, tuple(range(value.ndim - 1))) for a in (self._half, self._middle))
        inside = jnp.clip((value - middle) / half, -1.0 + MARGIN, 1.0 - MARGIN)
        x = jnp.arctanh(inside)
        return self._normal.log_prob(x) - jnp.sum(_log_slope(x) + jnp.log(half), axis=-1)

    def entropy(self) -> Array:
        """Nats [...]."""
        mean, scale = self._normal.loc, self._normal.scale_diag
        nodes, weights = jnp.asarray(NODES, mean.dtype), jnp.asarray(WEIGHTS / WEIGHTS.sum(), mean.dtype)
        slopes = _log_slope(mean[..., None] + scale[..., None] * jnp.expand_dims(nodes, tuple(range(mean.ndim))))
        slope = slopes @ weights
        return self._normal.entropy() + jnp.sum(slope, axis=-1) + jnp.sum(jnp.log(self._half))

    def mode(self) -> Array:
        """The action of the underlying mean, [..., D]: the median, and what is done when noise is not wanted."""
        return self._squash(self._normal.loc)


def _log_slope(x: Array) -> Array:
    """log(1 - tanh(x)^2), exact also where tanh(x) rounds to 1."""
    return 2.0 * (jnp.log(2.0) - x - jax.nn.softplus(-2.0 * x))


def categorical(logits: Array) -> distrax.Distribution:
    """Actions 0..A-1 with log-odds `logits` [..., A]."""
    return distrax.Categorical(logits=logits)


def diagonal_normal(mean: Array, scale: Array) -> distrax.Distribution:
    """Unlimited real actions [..., D] with independent normal components."""
    return distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(scale, mean.shape))
