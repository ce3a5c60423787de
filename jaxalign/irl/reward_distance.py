"""Distances between rewards that see through what does not change behaviour: shaping, positive scaling, constants.

Each brings both rewards to a canonical form c, weighs states, actions and successors by a coverage w that sums to 1,
and returns half the distance of the unit vectors, with |x|^2 = sum w x^2:

    d = |c_a / |c_a| - c_b / |c_b|| / 2, in [0, 1]

0 for equivalent rewards, 1 for a reward and its negative. A reward whose canonical form vanishes (constant, or nothing
but shaping; to within rounding) prefers nothing: it is at 0 from its like and at 1/2 from every other, as in Skalse et
al. (2024), section 3. All three are pseudometrics, differentiable except where they are 0 (the gradient there is 0).

Terminal states. EPIC and DARD compare reward tables, so the rows of a terminal state count as they are written, and
shaping by potential, reward + discount potential[s'] - potential[s], has to be written there too. STARC compares what
is earned: nothing in a terminal state, whose potential has to be 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.mdp import TabularMDP, action_reward, bellman_q, dense_transition, policy_evaluation
from jaxalign.types import Array, ArrayLike


def epic_distance(
    reward_a: ArrayLike, reward_b: ArrayLike, mdp: TabularMDP, *, coverage: ArrayLike | None = None
) -> Array:
    """Equivalent-policy invariant comparison, which uses the MDP's sizes and discount but not its transitions.

    c(s, a, s') = R(s, a, s') + E[discount R(s', A, S') - R(s, A, S') - discount R(S, A, S')], less its mean,
    with S, A and S' independent and distributed as the coverage's marginals. Then d = sqrt((1 - rho) / 2), rho the
    Pearson correlation of the two forms; with rewards [S] and uniform coverage that of the rewards themselves.

    Args:
        reward_a, reward_b: [S], [S, A] or [S, A, S].
        coverage: weights >= 0 of each (s, a, s'), [S, A, S], of any sum; None is uniform.

    Returns a scalar in [0, 1]. Holds arrays [S, A, S].
    Raises ValueError naming the argument whose shape or sign is wrong.
    Gleave et al. (2021), arXiv:2006.13900, section 4 and eq. 1.
    """
    weights = _weights(mdp, coverage)
    action, after = jnp.sum(weights, (0, 2)), jnp.sum(weights, (0, 1))

    def canonical(reward: Array) -> Array:
        mean = jnp.einsum("saz,a,z->s", reward, action, after)
        return reward + mdp.discount * mean[None, None, :] - mean[:, None, None]

    return _table_distance(canonical, mdp, reward_a, reward_b, weights)


def dard_distance(
    reward_a: ArrayLike, reward_b: ArrayLike, mdp: TabularMDP, *, coverage: ArrayLike | None = None
) -> Array:
    """Dynamics-aware reward distance: EPIC's idea with successors that the transitions allow.

    c(s, a, s') = R(s, a, s') + E[discount R(s', A, S'') - R(s, A, S') - discount R(S', A, S'')], less its mean,
    with A distributed as the coverage's actions, S' ~ P(. | s, A), S'' ~ P(. | s', A). One A stands in all three
    terms, as in the paper's equation. Terminal states lead to themselves.

    Args:
        reward_a, reward_b: [S], [S, A] or [S, A, S].
        coverage: weights >= 0 of each (s, a, s'), [S, A, S], of any sum; None is uniform. Transitions of
            probability 0, those out of terminal states among them, weigh nothing whatever it says.

    Returns a scalar in [0, 1]. Makes sparse and grid transitions dense, [S, A, S]; takes O(A S^3) operations.
    Raises ValueError naming the argument whose shape or sign is wrong, or if no possible transition is covered.
    Wulfe et al. (2022), arXiv:2201.10081, eq. 3.
    """
    ends, itself = mdp.terminal[:, None, None], jnp.eye(mdp.num_states, dtype=mdp.initial.dtype)[:, None, :]
    transition = jnp.where(ends, itself, dense_transition(mdp.transition))
    weights = _weights(mdp, coverage, (transition > 0.0) & ~ends)
    action = jnp.sum(_weights(mdp, coverage), (0, 2))

    def canonical(reward: Array) -> Array:
        mean = jnp.einsum("saz,saz,a->s", transition, reward, action)
        onward = jnp.einsum("xaz,yaz->axy", reward, transition)  # from S' = x to the successors of s' = y
        onward = jnp.einsum("sax,axy,a->sy", transition, onward, action)
        return reward + mdp.discount * (mean[None, None, :] - onward[:, None, :]) - mean[:, None, None]

    return _table_distance(canonical, mdp, reward_a, reward_b, weights)


def starc_distance(
    reward_a: ArrayLike,
    reward_b: ArrayLike,
    mdp: TabularMDP,
    *,
    coverage: ArrayLike | None = None,
    log_policy: Array | None = None,
) -> Array:
    """Standardised reward comparison with value-adjusted levelling: the distance of two policy advantages.

    c(s, a) = E_{s'}[R(s, a, s') - V(s) + discount V(s')], V the value of `log_policy` under R.

    With full coverage it is 0 just where the two rewards order all policies alike, and it bounds from both sides the
    regret of optimising one for the other. A constant is shaping unless episodes end.

    Args:
        reward_a, reward_b: [S], [S, A] or [S, A, S].
        coverage: weights >= 0 of each (s, a, s'), [S, A, S], of any sum; None is uniform. Terminal states weigh
            nothing whatever it says.
        log_policy: [S, A]; None is the uniform policy.

    Returns a scalar in [0, 1]. Holds no more than [S, A] beside what `policy_evaluation` does.
    Raises ValueError naming the argument whose shape or sign is wrong, and as `policy_evaluation`.
    Skalse et al. (2024), arXiv:2309.15257, section 3, with the L2 norm.
    """
    shape = (mdp.num_states, mdp.num_actions)
    if log_policy is None:
        log_policy = jnp.full(shape, -np.log(mdp.num_actions), mdp.initial.dtype)
    weights = jnp.ones(shape, mdp.initial.dtype) if coverage is None else jnp.sum(_weights(mdp, coverage), -1)
    weights = jnp.where(mdp.terminal[:, None], 0.0, weights)

    def unit(name: str, reward: ArrayLike) -> Array:
        earned = action_reward(mdp, _checked(mdp, name, reward))
        value = policy_evaluation(mdp, log_policy, earned)
        advantage = bellman_q(mdp, earned, value) - value[:, None]
        return _unit(advantage, weights, jnp.max(jnp.abs(earned)) + jnp.max(jnp.abs(value)))

    weights = weights / jnp.sum(weights)
    return 0.5 * _norm(unit("reward_a", reward_a) - unit("reward_b", reward_b), weights)


def _table_distance(
    canonical: Callable[[Array], Array], mdp: TabularMDP, reward_a: ArrayLike, reward_b: ArrayLike, weights: Array
) -> Array:
    """Half the distance of the unit vectors of two canonical forms [S, A, S] less their means."""

    def unit(name: str, reward: ArrayLike) -> Array:
        reward = _checked(mdp, name, reward)
        reward = reward.reshape(reward.shape + (1,) * (3 - reward.ndim))
        form = canonical(jnp.broadcast_to(reward, weights.shape))
        return _unit(form - jnp.sum(weights * form), weights, jnp.max(jnp.abs(reward)))

    return 0.5 * _norm(unit("reward_a", reward_a) - unit("reward_b", reward_b), weights)


def _unit(form: Array, weights: Array, scale: Array) -> Array:
    """form / |form|, or 0 where |form| is no more than rounding of numbers of size `scale`."""
    size = _norm(form, weights)
    rounding = 100.0 * jnp.finfo(form.dtype).eps * scale
    some = size > jax.lax.stop_gradient(rounding)
    return jnp.where(some, form / jnp.where(some, size, 1.0), 0.0)


def _norm(x: Array, weights: Array) -> Array:
    square = jnp.sum(weights * x**2)
    # The root of 0 has no slope; the outer choice alone would still multiply 0 by infinity.
    return jnp.where(square > 0.0, jnp.sqrt(jnp.where(square > 0.0, square, 1.0)), 0.0)


def _checked(mdp: TabularMDP, name: str, reward: ArrayLike) -> Array:
    reward, (states, actions) = jnp.asarray(reward), (mdp.num_states, mdp.num_actions)
    if reward.ndim not in (1, 2, 3) or reward.shape != (states, actions, states)[: reward.ndim]:
        raise ValueError(f"{name} must be [S], [S, A] or [S, A, S] with S={states}, A={actions}, got {reward.shape}")
    return reward.astype(jnp.promote_types(reward.dtype, mdp.initial.dtype))


def _weights(mdp: TabularMDP, coverage: ArrayLike | None, possible: Array | None = None) -> Array:
    """The coverage as probabilities [S, A, S], 0 where a transition is not `possible`."""
    shape = (mdp.num_states, mdp.num_actions, mdp.num_states)
    weights = jnp.ones(shape, mdp.initial.dtype) if coverage is None else jnp.asarray(coverage, mdp.initial.dtype)
    if weights.shape != shape:
        raise ValueError(f"coverage must be [S, A, S] = {shape}, got {weights.shape}")
    if possible is not None:
        weights = jnp.where(possible, weights, 0.0)
    if not isinstance(weights, jax.core.Tracer) and not ((weights >= 0.0).all() and weights.sum() > 0.0):
        raise ValueError("coverage must be at least 0 everywhere and positive on some possible transition")
    return weights / jnp.sum(weights)
