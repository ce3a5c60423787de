"""What an attack climbs: losses of logits [B, C], one number an example, larger the nearer it is to failing."""

import chex
import jax
import jax.numpy as jnp

from jaxalign.types import Array, ArrayLike

SMALLEST_SPREAD = 1e-12  # of logits, below which a ratio of them says nothing


def margins(logits: ArrayLike, labels: ArrayLike) -> Array:
    """`z[y] - max_{j != y} z[j]`: negative where the example is misclassified, in the units of the logits.

    Args:
        logits: z [B, C] with C >= 2.
        labels: y [B] int.

    Returns [B].
    """
    logits, labels = _checked(logits, labels)
    true = _at(logits, labels)
    return true - jnp.max(_without(logits, labels), axis=1)


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> Array:
    """`logsumexp(z) - z[y]` in nats. Args: logits z [B, C], labels y [B] int. Returns [B]."""
    logits, labels = _checked(logits, labels)
    return jax.nn.logsumexp(logits, axis=1) - _at(logits, labels)


def dlr_loss(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Difference of logits ratio: `-margins(z, y) / (z_1 - z_3)` with z_1 >= z_2 >= z_3 the sorted logits.

    It does not change when logits are shifted or scaled, so it does not vanish where a softmax saturates
    (Croce & Hein 2020, arXiv:2003.01690, equation 6).

    Args:
        logits: z [B, C] with C >= 3.
        labels: y [B] int.

    Returns [B], at most 1, positive where misclassified. Raises ValueError if C < 3.
    """
    logits, labels = _checked(logits, labels)
    if logits.shape[1] < 3:
        raise ValueError(f"dlr_loss: needs at least three classes, got logits {logits.shape}")
    top = jax.lax.top_k(logits, 3)[0]
    return -margins(logits, labels) / jnp.maximum(top[:, 0] - top[:, 2], SMALLEST_SPREAD)


def targeted_dlr_loss(logits: ArrayLike, labels: ArrayLike, targets: ArrayLike) -> Array:
    """`-(z[y] - z[t]) / (z_1 - (z_3 + z_4) / 2)`: towards class t (arXiv:2003.01690, equation 7).

    Args:
        logits: z [B, C] with C >= 4.
        labels: y [B] int.
        targets: t [B] int.

    Returns [B]. Raises ValueError if C < 4.
    """
    logits, labels = _checked(logits, labels)
    if logits.shape[1] < 4:
        raise ValueError(f"targeted_dlr_loss: needs at least four classes, got logits {logits.shape}")
    top = jax.lax.top_k(logits, 4)[0]
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return -(_at(logits, labels) - _at(logits, jnp.asarray(targets))) / jnp.maximum(spread, SMALLEST_SPREAD)


def _checked(logits: ArrayLike, labels: ArrayLike) -> tuple[Array, Array]:
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    chex.assert_rank([logits, labels], [2, 1])
    chex.assert_equal_shape_prefix([logits, labels], 1)
    return logits, labels


def _at(logits: Array, labels: Array) -> Array:
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def _without(logits: Array, labels: Array) -> Array:
    """The logits [B, C] with -inf in place of each row's own label."""
    own = jnp.arange(logits.shape[1])[None, :] == labels[:, None]
    return jnp.where(own, -jnp.inf, logits)
