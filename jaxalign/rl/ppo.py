"""Proximal policy optimisation wholly inside jit: acting, advantages, and several epochs of clipped gradient steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm
from jaxalign.environments.protocol import Environment, check_environment
from jaxalign.environments.running_moments import RunningMoments, init_moments, normalize, update_moments
from jaxalign.environments.wrappers import batched, episode_statistics
from jaxalign.rl.actor_critic import ActorCritic, draw
from jaxalign.rl.advantages import generalized_advantage_estimation
from jaxalign.rl.incentives import Incentive
from jaxalign.rl.kl import kl_k3
from jaxalign.rl.policy_losses import ppo_policy_loss, ppo_value_loss
from jaxalign.rl.return_scale import ReturnScale, init_return_scale, scale_rewards
from jaxalign.rl.rollout import Steps, collect
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


@flax.struct.dataclass
class PPOState(TrainState):
    """A TrainState whose `step` counts rollouts, and where the environments stand.

    observations: [N, ...], what the N environments show
    world: their states
    moments: RunningMoments of the observations, or None
    return_scale: the ReturnScale of the rewards, or None
    incentive: the Incentive's state, or None
    """

    observations: Any = None
    world: Any = None
    moments: RunningMoments | None = None
    return_scale: ReturnScale | None = None
    incentive: Any = None


class Batch(NamedTuple):
    """Steps as the gradient sees them, [T, N, ...], or [B, ...] of a minibatch."""

    observations: Array
    actions: Array
    log_probs: Array
    values: Array
    advantages: Array
    targets: Array


class PPOParts(NamedTuple):
    """The pieces of PPO, for algorithms that pay it otherwise (imitation, human feedback) or act otherwise.

    init: key -> PPOState
    collect: (state, key) -> (state, Steps [T, N, ...])
    improve: (state, steps, rewards [T, N], key) -> (state, metrics)
    """

    init: Callable[[Key], PPOState]
    collect: Callable[[PPOState, Key], tuple[PPOState, Steps]]
    improve: Callable[[PPOState, Steps, Array, Key], tuple[PPOState, Metrics]]


def ppo(
    environment: Environment, model: ActorCritic, optimizer: optax.GradientTransformation, *,
    incentive: Incentive | None = None, **options: Any,
) -> Algorithm:  # fmt: skip
    """PPO as an Algorithm that makes its own data: a step is a rollout of T = num_steps in N = num_envs environments.

    It collects Steps [T, N, ...], pays them, and descends num_epochs * num_minibatches times on `surrogate_loss`.

    Args:
        environment: not auto-resetting; see `check_environment`.
        model: `actor_critic(environment)`, or any ActorCritic.
        optimizer: any Optax transformation; `ppo_optimizer` is the customary one. It steps
            num_epochs * num_minibatches times for each rollout.
        incentive: what pays instead of the environment's reward alone.
        options: those of `ppo_parts`.

    State: PPOState. Metrics, each one number a rollout: "loss" and its parts, "gradient_norm", "approx_kl" and
    "clip_fraction" (means over the gradient steps made), "explained_variance" of the returns by the old values,
    "reward" (the environment's, mean per step), "episodes" that ended, and "episode/return" and "episode/length", means
    over those (NaN where none ended, which `runtime.fit` lets pass), and the incentive's own.

    A NaN reward makes "reward" NaN, on which `runtime.fit` stops.
    Schulman et al., arXiv:1707.06347; details after Huang et al. 2022, listed in `jaxalign.rl.ppo_details`.
    """
    return assemble(ppo_parts(environment, model, optimizer, **options), incentive)


def assemble(parts: PPOParts, incentive: Incentive | None) -> Algorithm:
    """The pieces as an Algorithm: collect [T, N] steps, pay (as the environment, if `incentive` is None), improve."""

    def init(key: Key) -> PPOState:
        key, incentive_key = jax.random.split(key)
        state = parts.init(key)
        return state if incentive is None else state.replace(incentive=incentive.init(incentive_key))

    def step(state: PPOState, batch: None) -> tuple[PPOState, Metrics]:
        key, collect_key, incentive_key, improve_key = jax.random.split(state.key, 4)
        state, steps = parts.collect(state.replace(key=key), collect_key)
        rewards, paid = steps.rewards, {}
        if incentive is not None:
            paying, rewards, paid = incentive.apply(state.incentive, steps, incentive_key)
            state = state.replace(incentive=paying)
        state, metrics = parts.improve(state, steps, rewards, improve_key)
        return state, {**metrics, **experience(steps), **paid}

    return Algorithm(jax.jit(init), step)  # eagerly, each layer's initialiser would be compiled by itself


def ppo_parts(
    environment: Environment,
    model: ActorCritic,
    optimizer: optax.GradientTransformation,
    *,
    num_envs: int = 8,
    num_steps: int = 128,
    num_epochs: int = 4,
    num_minibatches: int = 4,
    discount: ArrayLike = 0.99,
    gae_lambda: ArrayLike = 0.95,
    clip_epsilon: ArrayLike = 0.2,
    value_clip_epsilon: ArrayLike | None = None,
    value_coefficient: ArrayLike = 0.5,
    entropy_coefficient: ArrayLike = 0.0,
    normalize_advantages: bool = True,
    normalize_observations: bool = False,
    normalize_rewards: bool = False,
    target_kl: ArrayLike | None = None,
    gae_method: str = "scan",
) -> PPOParts:
    """PPO in pieces; `ppo` puts them together.

    Args:
        num_envs, num_steps: N and T, static. Each gradient step sees T N / num_minibatches steps, drawn anew in each of
            `num_epochs` passes, and descends on `surrogate_loss`, which says what the other numbers are.
        normalize_observations: by running moments, clipped at 10 deviations.
        normalize_rewards: divided by the running deviation of the discounted return, clipped at 10.
        target_kl: no further gradient step once a minibatch's approximate KL from the acting policy (nats) is above
            it; None: all are made.
        gae_method: "scan" or "associative", see `generalized_advantage_estimation`.

    Rewards, values and advantages are [T, N]. Numbers are traced, so they can be swept. Values of successors are those
    of the true next observation: a time limit is bootstrapped through, a terminal state is worth 0.
    Raises ValueError naming the sizes if T N does not split into the minibatches, and as `check_environment`.
    """
    check_environment(environment)
    _check_model(environment, model)
    _check_sizes(num_envs, num_steps, num_minibatches)
    worlds = batched(episode_statistics(environment), num_envs)

    def objective(params: Params, batch: Batch, key: Key) -> tuple[Array, Metrics]:
        return surrogate_loss(
            model.policy(params, batch.observations), model.value(params, batch.observations), batch,
            clip_epsilon=clip_epsilon, value_clip_epsilon=value_clip_epsilon, value_coefficient=value_coefficient,
            entropy_coefficient=entropy_coefficient, normalize_advantages=normalize_advantages,
        )  # fmt: skip

    learner = gradient_algorithm(Network(model.init, model.policy), objective, optimizer)

    def init(key: Key) -> PPOState:
        key, reset_key = jax.random.split(key)
        start = learner.init(key)
        observations, world = worlds.reset(reset_key)
        moments = init_moments(environment.observation_space.shape) if normalize_observations else None
        scale = init_return_scale(num_envs) if normalize_rewards else None
        return PPOState(
            start.step, start.params, start.opt_state, start.key,
            observations=observations, world=world, moments=moments, return_scale=scale,
        )  # fmt: skip

    def take_steps(state: PPOState, key: Key) -> tuple[PPOState, Steps]:
        def act(key: Key, observations: Array) -> tuple[Array, Array]:
            return draw(key, model.policy(state.params, see(state, observations)))

        (observations, world), steps = collect(
            key, worlds, act, state.observations, state.world, num_steps=num_steps
        )
        return state.replace(observations=observations, world=world), steps

    def improve(state: PPOState, steps: Steps, rewards: Array, key: Key) -> tuple[PPOState, Metrics]:
        key, learn_key = jax.random.split(key)
        if normalize_rewards:
            scale, rewards = scale_rewards(state.return_scale, rewards, steps.done, discount=discount)
            state = state.replace(return_scale=scale)
        batch = _judged(model, state, steps, rewards, discount=discount, gae_lambda=gae_lambda, method=gae_method)
        inner = TrainState(state.step, state.params, state.opt_state, learn_key)
        inner, metrics = epochs(
            learner, inner, flatten(batch), key,
            num_epochs=num_epochs, num_minibatches=num_minibatches, target_kl=target_kl,
        )  # fmt: skip
        metrics["explained_variance"] = explained_variance(batch.values, batch.targets)
        if normalize_observations:
            rows = steps.observations.reshape(-1, *environment.observation_space.shape)
            state = state.replace(moments=update_moments(state.moments, rows))
        return state.replace(step=state.step + 1, params=inner.params, opt_state=inner.opt_state), metrics

    return PPOParts(jax.jit(init), take_steps, improve)


def _judged(model: ActorCritic, state: PPOState, steps: Steps, rewards: Array, **gae_options: Any) -> Batch:
    """The steps [T, N] with values, advantages and targets by the networks as they acted."""
    seen = see(state, steps.observations)
    values = model.value(state.params, seen)
    next_values = model.value(state.params, see(state, steps.next_observations))
    advantages, targets = generalized_advantage_estimation(
        rewards, values, next_values, steps.terminated, steps.done, **gae_options
    )
    return Batch(seen, steps.actions, steps.log_probs, values, advantages, targets)


def surrogate_loss(
    distribution: Any,
    values: Array,
    batch: Batch,
    *,
    clip_epsilon: ArrayLike,
    value_clip_epsilon: ArrayLike | None = None,
    value_coefficient: ArrayLike = 0.5,
    entropy_coefficient: ArrayLike = 0.0,
    normalize_advantages: bool = True,
) -> tuple[Array, Metrics]:
    """What PPO descends on a minibatch, and its parts:

    loss = mean ppo_policy_loss + value_coefficient mean ppo_value_loss - entropy_coefficient mean entropy

    Args:
        distribution, values: the policy (batch shape [...]) and values [...] now, at the batch's observations.
        value_clip_epsilon: clips value changes too, in units of (scaled) return; None: not.
        normalize_advantages: to mean 0 and deviation 1 in the minibatch.
    """
    log_probs, advantages = distribution.log_prob(batch.actions), batch.advantages
    if normalize_advantages:
        advantages = (advantages - jnp.mean(advantages)) / (jnp.std(advantages) + 1e-8)
    policy_loss = jnp.mean(ppo_policy_loss(log_probs, batch.log_probs, advantages, clip_epsilon=clip_epsilon))
    value_loss = jnp.mean(ppo_value_loss(values, batch.values, batch.targets, clip_epsilon=value_clip_epsilon))
    entropy = jnp.mean(distribution.entropy())
    log_ratio = log_probs - batch.log_probs
    metrics = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        # The samples are the acting policy's, so the KL from it has the ratio upside down.
        "approx_kl": jnp.mean(kl_k3(-log_ratio)),
        "clip_fraction": jnp.mean(jnp.abs(jnp.expm1(log_ratio)) > clip_epsilon, dtype=log_ratio.dtype),
    }
    return policy_loss + value_coefficient * value_loss - entropy_coefficient * entropy, metrics


def see(state: PPOState, observations: Array) -> Array:
    """Observations [..., *shape] as the networks get them: normalised, if the state keeps their moments."""
    return observations if state.moments is None else normalize(state.moments, observations)


def observed(model: ActorCritic, state: PPOState) -> ActorCritic:
    """The model as it was trained: with observations [..., *shape] normalised by the moments in `state`."""
    return ActorCritic(
        model.init,
        lambda params, observations: model.policy(params, see(state, observations)),
        lambda params, observations: model.value(params, see(state, observations)),
    )


def flatten(batch: Any) -> Any:
    """Leaves [T, N, ...] as [T N, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def epochs(
    learner: Algorithm,
    state: TrainState,
    rows: Any,
    key: Key,
    *,
    num_epochs: int,
    num_minibatches: int,
    target_kl: ArrayLike | None = None,
) -> tuple[TrainState, Metrics]:
    """`num_epochs` passes over rows [B, ...], each in a new order and in `num_minibatches` gradient steps.

    With `target_kl`, the first minibatch whose "approx_kl" exceeds it ends the learning: neither its step nor any after
    it is made. Returns the state, and metrics averaged over the steps that were made (the first, if none was), with
    "gradient_steps" their number.
    """
    size = jax.tree.leaves(rows)[0].shape[0]

    def one(carry: tuple[TrainState, Array], chosen: Array) -> tuple[tuple[TrainState, Array], tuple[Metrics, Array]]:
        state, going = carry
        new, metrics = learner.step(state, jax.tree.map(lambda x: x[chosen], rows))
        if target_kl is not None:
            going = going & (metrics["approx_kl"] <= target_kl)
            new = jax.tree.map(lambda a, b: jnp.where(going, a, b), new, state)
        return (new, going), (metrics, going)

    orders = jax.vmap(lambda k: jax.random.permutation(k, size))(jax.random.split(key, num_epochs))
    chosen = orders.reshape(num_epochs * num_minibatches, -1)
    (state, _), (metrics, made) = jax.lax.scan(one, (state, jnp.array(True)), chosen)
    count = jnp.sum(made, dtype=jnp.float32)
    counted = made.at[0].set(True)
    averaged = jax.tree.map(lambda x: jnp.sum(jnp.where(counted, x, 0.0)) / jnp.maximum(count, 1.0), metrics)
    return state, {**averaged, "gradient_steps": count}


def experience(steps: Steps) -> Metrics:
    """What a rollout [T, N] of `episode_statistics` says: mean reward, return and length of the episodes that ended."""
    done = steps.done
    ended = jnp.sum(done, dtype=jnp.float32)

    def over_ended(x: Array) -> Array:
        return jnp.where(ended > 0, jnp.sum(jnp.where(done, x, 0.0)) / jnp.maximum(ended, 1.0), jnp.nan)

    return {
        "reward": jnp.mean(steps.rewards),
        "episodes": ended,
        "episode/return": over_ended(steps.info["episode_return"]),
        "episode/length": over_ended(steps.info["episode_length"]),
    }


def explained_variance(values: Array, targets: Array) -> Array:
    """1 - var(targets - values) / var(targets) of [...]: 1 is a perfect value function, 0 a constant one."""
    return 1.0 - jnp.var(targets - values) / (jnp.var(targets) + 1e-8)


def ppo_optimizer(
    learning_rate: ArrayLike, *, max_gradient_norm: ArrayLike = 0.5, anneal_over: int | None = None
) -> optax.GradientTransformation:
    """Adam with epsilon 1e-5 after clipping the gradient's global norm, the rate falling linearly to 0 if asked.

    learning_rate, max_gradient_norm: scalars [], may be traced.
    anneal_over: gradient steps until 0: rollouts * num_epochs * num_minibatches.
    """
    rate = learning_rate if anneal_over is None else optax.linear_schedule(learning_rate, 0.0, anneal_over)
    return optax.chain(optax.clip_by_global_norm(max_gradient_norm), optax.adam(rate, eps=1e-5))


def _check_sizes(num_envs: int, num_steps: int, num_minibatches: int) -> None:
    if (num_envs * num_steps) % num_minibatches:
        raise ValueError(
            f"ppo: num_envs={num_envs} x num_steps={num_steps} steps do not split into {num_minibatches} minibatches"
        )


def _check_model(environment: Environment, model: ActorCritic) -> None:
    """Raise ValueError if the model's outputs are not of the environment's shapes [...]."""
    space = environment.action_space

    def outputs(key: Key) -> tuple[Array, Array, Array]:
        params = model.init(key)
        observation, _ = environment.reset(key)
        actions, log_prob = draw(key, model.policy(params, observation[None]))
        return actions, log_prob, model.value(params, observation[None])

    actions, log_prob, value = jax.eval_shape(outputs, jax.eval_shape(lambda: jax.random.key(0)))
    for name, found, wanted in (
        ("policy's actions", actions.shape, (1, *space.shape)), ("policy's log_probs", log_prob.shape, (1,)),
        ("values", value.shape, (1,)),
    ):  # fmt: skip
        if found != wanted:
            raise ValueError(f"ppo: the {name} for one observation of {environment.name} are {found}, not {wanted}")
