"""What a generator and a discriminator minimise, and the penalties on a discriminator's slope.

Logits are the discriminator's outputs: larger where it takes an example for real. Nothing here is reduced.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from jaxalign.robustness.threat_model import norms
from jaxalign.types import Array, ArrayLike, Key


class GanObjective(NamedTuple):
    """The losses of the two players; the GAN trainers take any pair of them.

    discriminator: (real_logits [B], fake_logits [B]) -> [B]
    generator: fake_logits [B] -> [B]
    """

    discriminator: Callable[[Array, Array], Array]
    generator: Callable[[Array], Array]


def non_saturating_discriminator_loss(real_logits: ArrayLike, fake_logits: ArrayLike) -> Array:
    """softplus(-real_logits) + softplus(fake_logits), nats: the logistic loss, as in `irl.discriminator_loss`.

    Its mean is at least 2 ln 2 - 2 JSD(real, fake), and 2 ln 2 where the two distributions are the same
    (Goodfellow et al. 2014, arXiv:1406.2661, theorem 1). [B] each -> [B].

    >>> float(non_saturating_discriminator_loss(0.0, 0.0))
    1.3862943649291992
    """
    # Not called from there: importing all of irl for one line would double the time this package takes to import.
    real_logits, fake_logits = _real_number(real_logits), _real_number(fake_logits)
    chex.assert_equal_shape([real_logits, fake_logits])
    return jax.nn.softplus(-real_logits) + jax.nn.softplus(fake_logits)


def non_saturating_generator_loss(fake_logits: ArrayLike) -> Array:
    """softplus(-fake_logits) = -log D(fake), nats: still steep where the discriminator is sure. [B] -> [B].

    Goodfellow et al. 2014, arXiv:1406.2661, section 3.
    """
    return jax.nn.softplus(-_real_number(fake_logits))


def wasserstein_discriminator_loss(real_logits: ArrayLike, fake_logits: ArrayLike) -> Array:
    """fake_logits - real_logits, in the units of the logits. [B] each -> [B].

    Of a critic with slope at most 1, minus its mean is a lower bound on the distance W_1(real, fake), reached by the
    best such critic (Arjovsky et al. 2017, arXiv:1701.07875, equation 2).
    """
    real_logits, fake_logits = _real_number(real_logits), _real_number(fake_logits)
    chex.assert_equal_shape([real_logits, fake_logits])
    return fake_logits - real_logits


def wasserstein_generator_loss(fake_logits: ArrayLike) -> Array:
    """-fake_logits (arXiv:1701.07875, algorithm 1); the generator's loss of the hinge form too. [B] -> [B]."""
    return -_real_number(fake_logits)


def hinge_discriminator_loss(real_logits: ArrayLike, fake_logits: ArrayLike) -> Array:
    """max(0, 1 - real_logits) + max(0, 1 + fake_logits) (Miyato et al. 2018, arXiv:1802.05957, eq. 16). [B] -> [B]."""
    real_logits, fake_logits = _real_number(real_logits), _real_number(fake_logits)
    chex.assert_equal_shape([real_logits, fake_logits])
    return jax.nn.relu(1.0 - real_logits) + jax.nn.relu(1.0 + fake_logits)


NON_SATURATING = GanObjective(non_saturating_discriminator_loss, non_saturating_generator_loss)
WASSERSTEIN = GanObjective(wasserstein_discriminator_loss, wasserstein_generator_loss)
HINGE = GanObjective(hinge_discriminator_loss, wasserstein_generator_loss)


def gradient_penalty(key: Key, critic: Callable[[Array], Array], real: Array, fake: Array) -> Array:
    """(|slope of the critic at a point between real_i and fake_i|_2 - 1)^2, one uniform point for each pair.

    The point is t real_i + (1 - t) fake_i, t ~ U(0, 1); the penalty is two-sided, and its weight (10 in the paper) is
    the caller's (Gulrajani et al. 2017, arXiv:1704.00028, equation 3).

    Args:
        critic: x [B, ...] -> [B], each output of its own row only (no batch normalisation).
        real, fake: [B, ...], of one shape.

    Returns [B].
    """
    chex.assert_equal_shape([real, fake])
    t = jax.random.uniform(key, (real.shape[0],) + (1,) * (real.ndim - 1), real.dtype)
    return jnp.square(norms(_slopes(critic, t * real + (1.0 - t) * fake), "l2") - 1.0)


def r1_penalty(critic: Callable[[Array], Array], real: Array) -> Array:
    """|slope of the critic at real_i|_2^2, to be weighted by gamma / 2.

    Mescheder et al. 2018, arXiv:1801.04406, equation 9.

    Args:
        critic: x [B, ...] -> [B], as in `gradient_penalty`.
        real: [B, ...].

    Returns [B].
    """
    slopes = _slopes(critic, real)
    return jnp.sum(jnp.square(slopes.reshape(slopes.shape[0], -1)), axis=1)


def _slopes(critic: Callable[[Array], Array], x: Array) -> Array:
    """The gradient of each row's output in that row, [B, ...]."""

    def total(x: Array) -> Array:
        logits = critic(x)
        chex.assert_shape(logits, (x.shape[0],))
        return jnp.sum(logits)

    return jax.grad(total)(x)


def _real_number(logits: ArrayLike) -> Array:
    logits = jnp.asarray(logits)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
