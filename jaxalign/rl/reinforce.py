"""REINFORCE over whole episodes, with group-relative advantages (RLOO, GRPO) or plain returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm
from jaxalign.environments.protocol import Environment, check_environment
from jaxalign.environments.wrappers import batched
from jaxalign.rl.actor_critic import ActorCritic, draw
from jaxalign.rl.advantages import discounted_returns
from jaxalign.rl.group_relative import rloo_advantages
from jaxalign.rl.masking import masked_mean
from jaxalign.rl.policy_losses import policy_gradient_loss
from jaxalign.rl.rollout import collect
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class EpisodeBatch(NamedTuple):
    """One episode in each of N columns, [T, N, ...]; `mask` is false after its end, and all zeros there are padding."""

    observations: Array
    actions: Array
    advantages: Array
    mask: Array


def reinforce(
    environment: Environment,
    model: ActorCritic,
    optimizer: optax.GradientTransformation,
    *,
    num_steps: int,
    num_starts: int = 4,
    group_size: int = 8,
    discount: ArrayLike = 1.0,
    entropy_coefficient: ArrayLike = 0.0,
    advantages: Callable[[Array], Array] | None = rloo_advantages,
) -> Algorithm:
    """The policy gradient from fresh episodes: each step draws B = num_starts starts and acts G times from each.

    loss = mean over the B G episodes of sum_t -log pi(a_t | s_t) A_t  -  entropy_coefficient mean_t entropy

    Args:
        environment: not auto-resetting; see `check_environment`.
        model: of an ActorCritic only `init` and `policy` are used.
        num_steps: T, static; an episode that has not ended by then is cut there, as if nothing came after.
        discount: of the returns; 1 gives the episode's plain sum.
        advantages: returns [B, G] of whole episodes -> [B, G], one A for every step of an episode:
            `rloo_advantages`, `grpo_advantages`. None: A_t is the return from t on, without a baseline.

    The factor discount^t of the exact gradient of a discounted return is left out, as is customary.
    State: a TrainState. Metrics: "loss", "entropy" (nats a step), "gradient_norm", means over the episodes of
    "episode/return" (undiscounted) and "episode/length", and "episode/finished", the share that ended in time. A NaN
    reward makes "loss" NaN.
    Raises ValueError as `check_environment`, and where `advantages` wants larger groups.
    Williams, Machine Learning 8 (1992); Ahmadian et al., arXiv:2402.14740.
    """
    check_environment(environment)
    worlds = batched(environment, num_starts * group_size)

    def objective(params: Params, batch: EpisodeBatch, key: Key) -> tuple[Array, Metrics]:
        distribution = model.policy(params, batch.observations)
        losses = policy_gradient_loss(distribution.log_prob(batch.actions), batch.advantages)
        entropy = masked_mean(distribution.entropy(), batch.mask)
        per_episode = jnp.sum(jnp.where(batch.mask, losses, 0.0), axis=0)
        return jnp.mean(per_episode) - entropy_coefficient * entropy, {"entropy": entropy}

    learner = gradient_algorithm(Network(model.init, model.policy), objective, optimizer)

    def starts(key: Key) -> tuple[Any, Any]:
        start = jax.vmap(environment.reset)(jax.random.split(key, num_starts))
        return jax.tree.map(lambda x: jnp.repeat(x, group_size, axis=0), start)

    def step(state: TrainState, batch: None) -> tuple[TrainState, Metrics]:
        key, start_key, act_key = jax.random.split(state.key, 3)

        def act(key: Key, observations: Array) -> tuple[Array, Array]:
            return draw(key, model.policy(state.params, observations))

        _, steps = collect(act_key, worlds, act, *starts(start_key), num_steps=num_steps)
        # A column goes on with further episodes, which are not read: they would begin elsewhere and be cut short.
        mask = jnp.cumsum(steps.done, axis=0) - steps.done == 0
        to_go = discounted_returns(steps.rewards, steps.done, discount=discount, mask=mask)
        weights = to_go
        if advantages is not None:
            weights = jnp.broadcast_to(advantages(to_go[0].reshape(num_starts, group_size)).reshape(-1), to_go.shape)
        episodes = EpisodeBatch(steps.observations, steps.actions, weights, mask)
        state, metrics = learner.step(state.replace(key=key), episodes)
        paid = {
            "episode/return": jnp.mean(jnp.sum(jnp.where(mask, steps.rewards, 0.0), axis=0)),
            "episode/length": jnp.mean(jnp.sum(mask, axis=0, dtype=jnp.float32)),
            "episode/finished": jnp.mean(jnp.any(steps.done, axis=0), dtype=jnp.float32),
        }
        return state, {**metrics, **paid}

    return Algorithm(learner.init, step)
