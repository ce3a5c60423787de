"""A policy paid for staying near a reference policy, and how far from it the policy is."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.rl.actor_critic import ActorCritic
from jaxalign.rl.incentives import Incentive
from jaxalign.rl.kl import KLController
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class KLPenaltyState(NamedTuple):
    """The state of `kl_penalty`.

    reference: the reference policy's parameters, never changed
    coefficient: [], what a nat costs, in units of reward
    running: [N], log-ratio of each environment's episode so far
    """

    reference: Params
    coefficient: Array
    running: Array


def kl_penalty(
    model: ActorCritic, reference: Params, *, num_envs: int, beta: ArrayLike | KLController
) -> Incentive:
    """An Incentive that pays rewards - beta (log pi(a | s) - log pi_ref(a | s)), Steps [T, N, ...] -> [T, N].

    In expectation an episode loses beta times KL(pi || pi_ref) of whole episodes (the sum over its steps): the
    objective of RLHF (Ziegler et al., arXiv:1909.08593 sec. 2).

    Args:
        model: its policy gives the reference's distribution too; if PPO normalises observations, wrap it so that the
            reference sees what it saw in its own training.
        reference: parameters of the reference policy; they live in the incentive's state, so a compiled step holds no
            copy of them and a checkpoint keeps them.
        num_envs: N, static.
        beta: units of reward per nat, fixed (may be traced); or an `adaptive_kl`, whose target is then in nats per
            step, and which is told T N samples.

    Metrics: "kl/step", the mean log-ratio (nats, an estimate: `kl_k1`); "kl/coefficient", that of this rollout;
    "kl/penalty", the mean reward lost per step; "episode/kl", the mean summed log-ratio of the episodes that ended in
    the rollout, those begun in an earlier one included (NaN where none ended).
    """
    controller = beta if isinstance(beta, KLController) else None

    def init(key: Key) -> KLPenaltyState:
        coefficient = controller.init() if controller is not None else jnp.asarray(beta, jnp.result_type(float))
        # A copy, because `fit` reuses the memory of a state and the caller may go on using the parameters.
        return KLPenaltyState(jax.tree.map(jnp.copy, reference), coefficient, jnp.zeros(num_envs))

    def apply(state: KLPenaltyState, steps: Steps, key: Key) -> tuple[KLPenaltyState, Array, Metrics]:
        reference_log_probs = model.policy(state.reference, steps.observations).log_prob(steps.actions)
        log_ratio = steps.log_probs - reference_log_probs
        penalty = state.coefficient * log_ratio
        kl = jnp.mean(log_ratio)
        running, totals = _episode_sums(state.running, log_ratio, steps.done)
        ended = jnp.sum(steps.done, dtype=log_ratio.dtype)
        metrics = {
            "kl/step": kl,
            "kl/coefficient": state.coefficient,
            "kl/penalty": jnp.mean(penalty),
            "episode/kl": jnp.where(ended > 0, jnp.sum(totals) / jnp.maximum(ended, 1.0), jnp.nan),
        }
        coefficient = state.coefficient
        if controller is not None:
            coefficient = controller.step(coefficient, kl, log_ratio.size)
        return KLPenaltyState(state.reference, coefficient, running), steps.rewards - penalty, metrics

    return Incentive(init, apply)


def _episode_sums(running: Array, values: Array, done: Array) -> tuple[Array, Array]:
    """Sums of values [T, N] over episodes, the running [N] ones included: (running [N], sums [T, N], 0 but at ends)."""

    def one(running: Array, step: tuple[Array, Array]) -> tuple[Array, Any]:
        value, ended = step
        total = running + value
        return jnp.where(ended, 0.0, total).astype(running.dtype), jnp.where(ended, total, 0.0)

    return jax.lax.scan(one, running, (values, done))
