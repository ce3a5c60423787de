"""Potential-based shaping: advice that changes how soon a good policy is found, and not which policy is good."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.mdp import TabularMDP, action_reward, expected_next
from jaxalign.rl.incentives import Incentive, reward_function
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike


def potential_based_shaping(
    rewards: ArrayLike,
    potentials: ArrayLike,
    next_potentials: ArrayLike,
    terminated: ArrayLike,
    *,
    discount: ArrayLike,
) -> Array:
    """rewards + discount * (1 - terminated) * next_potentials - potentials, elementwise [...].

    The potential of a terminal state counts as 0; where an episode was only cut off, the state after it keeps its own.
    A return is then the old one less the potential of the first state, whatever the policy (Ng, Harada & Russell 1999,
    theorem 1), if `discount` is that of the returns.

    Args:
        rewards, potentials, next_potentials: [...], potential(s) before and potential(s') after each step.
        terminated: [...] bool; s' is the true successor, before any reset.
    """
    kept = discount * jnp.where(jnp.asarray(terminated, bool), 0.0, jnp.asarray(next_potentials))
    return jnp.asarray(rewards) + kept - jnp.asarray(potentials)


def shaped_reward(mdp: TabularMDP, reward: ArrayLike, potential: ArrayLike) -> Array:
    """r(s, a) + discount E_{s'} potential[s'] - potential[s], with potential 0 in terminal states; [S, A].

    Every policy's value becomes value[s] - potential[s], so that optimal and soft-optimal policies stay what they are.

    Args:
        reward: [S], [S, A] or [S, A, S].
        potential: [S]; what it says of terminal states is not used.

    Raises ValueError if `potential` is not [S].
    """
    potential, reward = jnp.asarray(potential), action_reward(mdp, reward)
    if potential.shape != (mdp.num_states,):
        raise ValueError(f"shaped_reward: potential must be [{mdp.num_states}], got {potential.shape}")
    potential = jnp.where(mdp.terminal, 0.0, potential.astype(reward.dtype))
    shaped = reward + mdp.discount * expected_next(mdp.transition, potential) - potential[:, None]
    return jnp.where(mdp.terminal[:, None], 0.0, shaped)


def potential_incentive(potential: Callable[[Array], Array], *, discount: ArrayLike) -> Incentive:
    """`potential_based_shaping` of the rewards [T, N] by a function of one observation [...] -> [].

    `discount` must be the learner's. The state is empty.
    """

    def shape(steps: Steps) -> Array:
        before, after = (jax.vmap(jax.vmap(potential))(seen) for seen in (steps.observations, steps.next_observations))
        return potential_based_shaping(steps.rewards, before, after, steps.terminated, discount=discount)

    return reward_function(shape)
