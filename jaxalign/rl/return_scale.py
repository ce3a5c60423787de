"""Rewards brought to one scale: divided by the running deviation of the discounted return."""

import flax.struct
import jax
import jax.numpy as jnp

from jaxalign.environments.running_moments import RunningMoments, init_moments, update_moments
from jaxalign.types import Array, ArrayLike


@flax.struct.dataclass
class ReturnScale:
    """What is known of the returns so far.

    moments: RunningMoments [] of the discounted return
    returns: [N], each environment's, up to its last step
    """

    moments: RunningMoments
    returns: Array


def init_return_scale(num_envs: int) -> ReturnScale:
    """Nothing known, for N = num_envs environments; returns [N] are 0."""
    return ReturnScale(init_moments(()), jnp.zeros(num_envs))


def scale_rewards(
    scale: ReturnScale, rewards: Array, done: Array, *, discount: ArrayLike, clip: ArrayLike = 10.0
) -> tuple[ReturnScale, Array]:
    """rewards [T, N] / sqrt(var(G)), clipped to [-clip, clip], G the discounted return up to each step.

    G_t = rewards_t + discount G_(t-1), begun anew after a step that is `done` (bool [T, N])

    G runs forward in time, as it is not known what is still to come. Rewards are not centred: that would change what
    is optimal. The moments take in the G of these steps first. Returns (scale, rewards [T, N]).
    """

    def one(carried: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        reward, ended = step
        total = reward + discount * carried
        return jnp.where(ended, 0.0, total), total

    carried, totals = jax.lax.scan(one, scale.returns, (rewards, done))
    moments = update_moments(scale.moments, totals.reshape(-1))
    deviation = jnp.sqrt(moments.variance + 1e-8)
    return ReturnScale(moments, carried), jnp.clip(rewards / deviation, -clip, clip)
