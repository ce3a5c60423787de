"""PPO for policies that remember: the gradient flows back through time to where a rollout began."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState, gradient_algorithm
from jaxalign.environments.protocol import Environment, TimeStep, check_environment, flat_size
from jaxalign.environments.wrappers import batched, episode_statistics
from jaxalign.networks import GRU, MLP
from jaxalign.rl.actor_critic import draw, encode, policy_head
from jaxalign.rl.advantages import generalized_advantage_estimation
from jaxalign.rl.incentives import Incentive
from jaxalign.rl.ppo import Batch, PPOParts, PPOState, assemble, epochs, explained_variance, surrogate_loss
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class RecurrentActorCritic(NamedTuple):
    """A policy and a value function of what has been seen so far.

    init: key -> params
    start: number N -> memory, leaves [N, ...]
    remember: (params, memory, observations [N, ...], starts bool [N]) -> (memory, features [N, F]); rows that start an
        episode forget first
    policy, value: of features [..., F], as in ActorCritic
    """

    init: Callable[[Key], Params]
    start: Callable[[int], Any]
    remember: Callable[[Params, Any, Array, Array], tuple[Any, Array]]
    policy: Callable[[Params, Array], Any]
    value: Callable[[Params, Array], Array]


@flax.struct.dataclass
class RecurrentPPOState(PPOState):
    """A PPOState that remembers.

    memory: of the N environments, leaves [N, ...]
    starts: bool [N], whose observation is the first of an episode
    before: the memory before the last rollout, from which its gradient begins
    recorded: what the last rollout kept beside its Steps: RolloutValues [T, N]
    """

    memory: Any = None
    starts: Any = None
    before: Any = None
    recorded: Any = None


class RolloutValues(NamedTuple):
    """Of each step [T, N]: whether it starts an episode, its value, and the value of its true successor."""

    starts: Array
    values: Array
    next_values: Array


class Rows(NamedTuple):
    """A rollout as the gradient sees it, one environment a row [N, T, ...], and the memory [N, ...] at its start."""

    batch: Batch
    starts: Array
    memory: Any


def recurrent_actor_critic(
    environment: Environment,
    *,
    hidden: Sequence[int] = (64,),
    memory: int = 64,
    activation: Callable[[Array], Array] = jnp.tanh,
) -> RecurrentActorCritic:
    """Hidden layers, M = `memory` gated recurrent units, and a linear head each for policy and value.

    The memory is [N, M], and the features are the memory. Distributions as in `actor_critic`. Raises ValueError for the
    same action spaces.
    """
    head = policy_head(environment.action_space, environment.name)
    example = jnp.zeros((1, flat_size(environment.observation_space)))
    encoder = Network.from_linen(MLP(tuple(hidden), activation), example)
    units = Network.from_linen(GRU(memory), jnp.zeros((1, memory)), jnp.zeros((1, hidden[-1])), jnp.zeros(1, bool))
    heads = {
        "actor": Network.from_linen(MLP((head.outputs,), final_scale=0.01), jnp.zeros((1, memory))),
        "critic": Network.from_linen(MLP((1,)), jnp.zeros((1, memory))),
    }
    parts = {"encoder": encoder, "units": units, **heads}

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(parts))
        params = {name: network.init(k) for (name, network), k in zip(parts.items(), keys, strict=True)}
        return params | head.start

    def remember(params: Params, memory: Array, observations: Array, starts: Array) -> tuple[Array, Array]:
        rows = activation(encoder.apply(params["encoder"], encode(environment.observation_space, observations)))
        memory = units.apply(params["units"], memory, rows, starts)
        return memory, memory

    return RecurrentActorCritic(
        init,
        lambda number: jnp.zeros((number, memory)),
        remember,
        lambda params, features: head.distribution(params, heads["actor"].apply(params["actor"], features)),
        lambda params, features: heads["critic"].apply(params["critic"], features)[..., 0],
    )


def recurrent_ppo(
    environment: Environment, model: RecurrentActorCritic, optimizer: optax.GradientTransformation, *,
    incentive: Incentive | None = None, **options: Any,
) -> Algorithm:  # fmt: skip
    """`ppo` for a policy with a memory [N, ...]: the same metrics and incentives, options of `recurrent_ppo_parts`."""
    return assemble(recurrent_ppo_parts(environment, model, optimizer, **options), incentive)


def recurrent_ppo_parts(
    environment: Environment,
    model: RecurrentActorCritic,
    optimizer: optax.GradientTransformation,
    *,
    num_envs: int = 8,
    num_steps: int = 128,
    num_epochs: int = 4,
    num_minibatches: int = 4,
    discount: ArrayLike = 0.99,
    gae_lambda: ArrayLike = 0.95,
    target_kl: ArrayLike | None = None,
    clip_epsilon: ArrayLike = 0.2,
    **loss_options: Any,
) -> PPOParts:
    """Recurrent PPO in pieces, as `ppo_parts`; `loss_options` are those of `surrogate_loss`.

    Minibatches are whole environments, [T] steps in order. Their features are computed anew with the parameters being
    trained, from the memory [N, ...] that the rollout began with, and the gradient runs back to there. Values are those
    the acting policy gave. Raises ValueError if num_envs does not split into the minibatches.
    """
    check_environment(environment)
    if num_envs % num_minibatches:
        raise ValueError(f"recurrent_ppo: num_envs={num_envs} do not split into {num_minibatches} minibatches")
    worlds = batched(episode_statistics(environment), num_envs)

    def objective(params: Params, rows: Rows, key: Key) -> tuple[Array, Metrics]:
        batch, starts = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (rows.batch, rows.starts))

        def remember(memory: Any, step: tuple[Array, Array]) -> tuple[Any, Array]:
            return model.remember(params, memory, *step)

        _, features = jax.lax.scan(remember, rows.memory, (batch.observations, starts))
        policy, values = model.policy(params, features), model.value(params, features)
        return surrogate_loss(policy, values, batch, clip_epsilon=clip_epsilon, **loss_options)

    learner = gradient_algorithm(Network(model.init, model.policy), objective, optimizer)

    def init(key: Key) -> RecurrentPPOState:
        key, reset_key = jax.random.split(key)
        start = learner.init(key)
        observations, world = worlds.reset(reset_key)
        memory = model.start(num_envs)
        nothing = jnp.zeros((num_steps, num_envs))
        return RecurrentPPOState(
            start.step, start.params, start.opt_state, start.key, observations=observations, world=world,
            memory=memory, before=memory, starts=jnp.ones(num_envs, bool),
            recorded=RolloutValues(nothing > 0, nothing, nothing),
        )  # fmt: skip

    def take_steps(state: RecurrentPPOState, key: Key) -> tuple[RecurrentPPOState, Steps]:
        params = state.params

        def one(carry: Any, keys: Array) -> tuple[Any, tuple[Steps, RolloutValues]]:
            seen, world, memory, starts = carry
            memory, features = model.remember(params, memory, seen, starts)
            actions, log_probs = draw(keys[0], model.policy(params, features))
            step = worlds.step(keys[1], world, actions)
            info = dict(step.info)
            after = info.pop("final_observation")
            _, looking_on = model.remember(params, memory, after, jnp.zeros_like(starts))
            taken = Steps(seen, actions, step.reward, after, step.terminated, step.truncated, log_probs, info)
            recorded = RolloutValues(starts, model.value(params, features), model.value(params, looking_on))
            return (step.observation, step.state, memory, taken.done), (taken, recorded)

        start = (state.observations, state.world, state.memory, state.starts)
        keys = jax.random.split(key, (num_steps, 2))
        (seen, world, memory, starts), (steps, recorded) = jax.lax.scan(one, start, keys)
        after = {"observations": seen, "world": world, "memory": memory, "starts": starts}
        return state.replace(**after, before=state.memory, recorded=recorded), steps

    def improve(
        state: RecurrentPPOState, steps: Steps, rewards: Array, key: Key
    ) -> tuple[RecurrentPPOState, Metrics]:
        key, learn_key = jax.random.split(key)
        starts, values, next_values = state.recorded
        advantages, targets = generalized_advantage_estimation(
            rewards, values, next_values, steps.terminated, steps.done, discount=discount, gae_lambda=gae_lambda
        )
        batch = Batch(steps.observations, steps.actions, steps.log_probs, values, advantages, targets)
        batch, starts = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (batch, starts))
        inner, metrics = epochs(
            learner, TrainState(state.step, state.params, state.opt_state, learn_key),
            Rows(batch, starts, state.before), key,
            num_epochs=num_epochs, num_minibatches=num_minibatches, target_kl=target_kl,
        )  # fmt: skip
        metrics["explained_variance"] = explained_variance(values, targets)
        return state.replace(step=state.step + 1, params=inner.params, opt_state=inner.opt_state), metrics

    return PPOParts(jax.jit(init), take_steps, improve)


class _Playing(NamedTuple):
    inner: Any
    memory: Any


def remembering(
    environment: Environment, model: RecurrentActorCritic, params: Params
) -> tuple[Environment, Callable[[Key, Array], Array]]:
    """What `evaluate` takes: the environment, keeping the memory and showing features [F], and act of those.

    Returns (environment, act), act: (key, features [F]) -> action.
    """
    one = jax.tree.map(lambda x: x[0], model.start(1))

    def look(memory: Any, observation: Array, starts: Array) -> tuple[Any, Array]:
        rows = jax.tree.map(lambda x: x[None], (memory, observation, starts))
        memory, features = model.remember(params, *rows)
        return jax.tree.map(lambda x: x[0], memory), features[0]

    def reset(key: Key) -> tuple[Array, _Playing]:
        observation, inner = environment.reset(key)
        memory, features = look(one, observation, jnp.array(True))
        return features, _Playing(inner, memory)

    def step(key: Key, state: _Playing, action: Array) -> TimeStep:
        new = environment.step(key, state.inner, action)
        memory, features = look(state.memory, new.observation, jnp.array(False))
        return new._replace(observation=features, state=_Playing(new.state, memory))

    def act(key: Key, features: Array) -> Array:
        return draw(key, model.policy(params, features))[0]

    return environment.replace(reset=reset, step=step), act
