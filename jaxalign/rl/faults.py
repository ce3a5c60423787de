"""Faults in a finite MDP: actions that are replaced and transitions that go wrong, as MDPs to plan and evaluate in.

A fault of rate f strikes each step by itself with probability f; every rate may be traced, so a curve over rates is
one `vmap`.
"""

import jax
import jax.numpy as jnp

from jaxalign.mdp.tabular import TabularMDP, action_reward
from jaxalign.mdp.transitions import (
    GridTransition,
    SparseTransition,
    Transition,
    dense_transition,
    num_states_and_actions,
    sparse_transition,
)
from jaxalign.mdp.worst_case import check_number
from jaxalign.types import Array, ArrayLike


def executed_actions(mdp: TabularMDP, *, rate: ArrayLike, replacement: ArrayLike | None = None) -> Array:
    """Which action b is executed where a was chosen: channel[s, a, b] = (1 - rate) 1[a = b] + rate replacement[s, b].

    Args:
        rate: in [0, 1].
        replacement: [A] or [S, A], probabilities of what is executed instead; an integer: stuck at that action; None:
            any action, uniformly (the chosen one too).

    Returns [S, A, A], or [A, A] where the replacement is the same in every state.
    Raises ValueError on a replacement of another shape and, outside jit, a rate outside [0, 1].
    """
    states, actions = mdp.num_states, mdp.num_actions
    rate = checked_rate("action_faults", rate)
    if replacement is None:
        replacement = jnp.full(actions, 1.0 / actions, mdp.initial.dtype)
    replacement = jnp.asarray(replacement)
    if replacement.ndim == 0 and jnp.issubdtype(replacement.dtype, jnp.integer):
        if not isinstance(replacement, jax.core.Tracer) and not 0 <= int(replacement) < actions:
            raise ValueError(f"action_faults: replacement {int(replacement)} is not an action in 0..{actions - 1}")
        replacement = jax.nn.one_hot(replacement, actions, dtype=mdp.initial.dtype)
    if replacement.shape not in ((actions,), (states, actions)):
        raise ValueError(
            f"action_faults: replacement must be an action, [A] or [S, A] with S={states}, A={actions}, "
            f"got {replacement.shape}"
        )
    kept = jnp.broadcast_to((1.0 - rate) * jnp.eye(actions), (*replacement.shape, actions))
    return kept + rate * replacement[..., None, :]


def action_faults(mdp: TabularMDP, *, rate: ArrayLike, replacement: ArrayLike | None = None) -> TabularMDP:
    """The MDP in which another action may be executed: P'(z | s, a) = sum_b channel[s, a, b] P(z | s, b).

    `channel`, `rate` and `replacement` as in `executed_actions`. A reward for actions has to follow what is executed:
    `action_fault_reward`. A grid stays one unless the replacement is [S, A], and is sparse then; a sparse transition
    stays sparse, with A K places for K.
    Raises ValueError as `executed_actions`, or where the replacement is no distribution (outside jit).
    """
    channel, transition = executed_actions(mdp, rate=rate, replacement=replacement), mdp.transition
    if isinstance(transition, GridTransition) and channel.ndim == 2:
        return mdp.replace(transition=transition.replace(probability=channel @ transition.probability))
    channel = jnp.broadcast_to(channel, (mdp.num_states, *channel.shape[-2:]))
    if isinstance(transition, GridTransition):
        next_state, probability = sparse_transition(transition)
        # Every action of a grid leads to the same few places, so their number does not grow.
        return mdp.replace(transition=SparseTransition(next_state, jnp.einsum("sab,sbk->sak", channel, probability)))
    if isinstance(transition, SparseTransition):
        next_state, probability = transition
        probability = (channel[..., None] * probability[:, None]).reshape(*channel.shape[:2], -1)
        next_state = jnp.broadcast_to(next_state.reshape(mdp.num_states, 1, -1), probability.shape)
        return mdp.replace(transition=SparseTransition(next_state, probability))
    return mdp.replace(transition=jnp.einsum("sab,sbz->saz", channel, transition))


def action_fault_reward(
    mdp: TabularMDP, reward: ArrayLike, *, rate: ArrayLike, replacement: ArrayLike | None = None
) -> Array:
    """What choosing a earns when the executed action is paid: r'(s, a) = sum_b channel[s, a, b] r(s, b), [S, A].

    mdp: without the fault; reward: [S], [S, A] or [S, A, S]; the rest as in `executed_actions`.
    """
    channel = executed_actions(mdp, rate=rate, replacement=replacement)
    channel = jnp.broadcast_to(channel, (mdp.num_states, *channel.shape[-2:]))
    return jnp.einsum("sab,sb->sa", channel, action_reward(mdp, reward))


def transition_faults(mdp: TabularMDP, *, rate: ArrayLike, fault: Transition) -> TabularMDP:
    """The MDP whose steps go wrong with probability `rate`: P' = (1 - rate) P + rate fault.

    Args:
        rate: in [0, 1].
        fault: the dynamics of a step gone wrong: a transition in any form, for instance `frozen_transition(mdp)`; or
            [S], where one is thrown to from anywhere (all 1 / S: to any state).

    Two transitions that are sparse or grids give a sparse one, any other pair a dense one.
    Raises ValueError on another shape and, outside jit, a rate outside [0, 1] or a result that is no distribution.
    """
    rate = checked_rate("transition_faults", rate)
    states, actions = mdp.num_states, mdp.num_actions
    if not isinstance(fault, SparseTransition | GridTransition):
        fault = jnp.asarray(fault)
        if fault.shape == (states,):
            fault = jnp.broadcast_to(fault, (states, actions, states))
        if fault.ndim != 3:
            raise ValueError(f"transition_faults: fault must be a transition or [S] with S={states}, got {fault.shape}")
    if num_states_and_actions(fault) != (states, actions):
        raise ValueError(
            f"transition_faults: fault has (S, A) = {num_states_and_actions(fault)}, the MDP {(states, actions)}"
        )
    forms = (mdp.transition, fault)
    if all(isinstance(form, SparseTransition | GridTransition) for form in forms):
        right, wrong = map(sparse_transition, forms)
        next_state = jnp.concatenate([right.next_state, wrong.next_state], axis=-1)
        probability = jnp.concatenate([(1.0 - rate) * right.probability, rate * wrong.probability], axis=-1)
        return mdp.replace(transition=SparseTransition(next_state, probability))
    right, wrong = map(dense_transition, forms)
    return mdp.replace(transition=(1.0 - rate) * right + rate * wrong)


def frozen_transition(mdp: TabularMDP) -> SparseTransition:
    """Nothing moves: P(z | s, a) = 1[z = s], with one successor [S, A, 1]."""
    states, actions = mdp.num_states, mdp.num_actions
    here = jnp.broadcast_to(jnp.arange(states, dtype=jnp.int32)[:, None, None], (states, actions, 1))
    return SparseTransition(here, jnp.ones(here.shape, mdp.initial.dtype))


def checked_rate(name: str, rate: ArrayLike) -> Array:
    """A probability [] as an array. Raises ValueError on another shape or, outside jit, a number outside [0, 1]."""
    if jnp.shape(rate) != ():
        raise ValueError(f"{name}: rate must be a scalar (vmap over rates), got {jnp.shape(rate)}")
    check_number(f"{name}: rate", rate, 1.0)
    return jnp.asarray(rate, jnp.result_type(rate, float))
