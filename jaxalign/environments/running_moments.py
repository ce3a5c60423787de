"""Running mean and variance, merged batch by batch: what observations, returns and bonuses are normalised by."""

import flax.struct
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike

EPSILON = 1e-8  # added to variances, so that what never changes is not divided by 0


@flax.struct.dataclass
class RunningMoments:
    """The mean and (biased) variance of everything seen so far; of nothing, mean 0 and variance 1.

    count: [] float, how many members
    mean, variance: of a member's shape [...]
    """

    count: Array
    mean: Array
    variance: Array


def init_moments(shape: tuple[int, ...] = ()) -> RunningMoments:
    """The moments of nothing yet, for members of shape `shape`: `normalize` leaves them (nearly) as they are, [*shape].

    >>> moments = update_moments(init_moments(), jnp.array([1.0, 3.0]))
    >>> float(moments.mean), float(moments.variance)
    (2.0, 1.0)
    """
    return RunningMoments(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))


def update_moments(moments: RunningMoments, batch: ArrayLike, mask: ArrayLike | None = None) -> RunningMoments:
    """Add the members `batch` [..., *shape] at once, as if one by one; the leading axes may be none.

    With w = n / (count + n) for n new members of mean m and variance v:
    mean <- mean + w (m - mean);  variance <- (1 - w) variance + w v + w (1 - w) (m - mean)^2

    mask: bool, the leading axes of `batch`; members where it is False do not count, whatever they hold.
    Averages are kept, not sums, so float32 loses no more after a billion members than after one.
    Raises ValueError if `batch` does not end in the members' shape or `mask` has other axes than those before it.
    Chan, Golub & LeVeque (1983), eq. 2.1.
    """
    batch, shape = jnp.asarray(batch, moments.mean.dtype), moments.mean.shape
    lead = batch.ndim - len(shape)
    if lead < 0 or batch.shape[lead:] != shape:
        raise ValueError(f"update_moments: batch must be [..., *{shape}], got {batch.shape}")
    mask = jnp.ones(batch.shape[:lead], bool) if mask is None else jnp.asarray(mask, bool)
    if mask.shape != batch.shape[:lead]:
        raise ValueError(f"update_moments: mask must be {batch.shape[:lead]}, got {mask.shape}")
    axes = tuple(range(lead))
    present = mask.reshape(mask.shape + (1,) * len(shape))
    added = jnp.sum(mask, dtype=moments.count.dtype)

    def average(x: Array) -> Array:
        return jnp.sum(jnp.where(present, x, 0.0), axis=axes) / jnp.maximum(added, 1.0)

    # The first mean of large members is only nearly right in float32; that of what is left is.
    rough = average(batch)
    deviation = batch - jnp.expand_dims(rough, axes)
    rest = average(deviation)
    variance = average(jnp.square(deviation - jnp.expand_dims(rest, axes)))

    count = moments.count + added
    weight = added / jnp.maximum(count, 1.0)
    step = (rough - moments.mean) + rest
    return RunningMoments(
        count=count,
        mean=moments.mean + weight * step,
        variance=(1.0 - weight) * moments.variance + weight * variance + weight * (1.0 - weight) * jnp.square(step),
    )


def normalize(moments: RunningMoments, x: ArrayLike, *, clip: ArrayLike = 10.0) -> Array:
    """(x - mean) / sqrt(variance + 1e-8), cut to [-clip, clip] (jnp.inf: not cut), [..., *shape] -> the same."""
    x = jnp.asarray(x, moments.mean.dtype)
    axes = tuple(range(x.ndim - moments.mean.ndim))
    mean, variance = (jnp.expand_dims(m, axes) for m in (moments.mean, moments.variance))
    return jnp.clip((x - mean) / jnp.sqrt(variance + EPSILON), -clip, clip)
