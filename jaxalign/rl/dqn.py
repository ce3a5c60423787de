"""Deep Q-learning wholly inside jit: the replay buffer is arrays in the state, written in place where it is donated."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, Objective, TrainState, gradient_algorithm
from jaxalign.environments.protocol import Discrete, Environment, check_environment, flat_size
from jaxalign.environments.wrappers import batched, episode_statistics
from jaxalign.networks import MLP
from jaxalign.preferences.bradley_terry import as_float
from jaxalign.rl.actor_critic import encode
from jaxalign.rl.ppo import experience, flatten
from jaxalign.rl.rollout import Steps, collect
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class Transitions(NamedTuple):
    """Steps without their order, [B, ...] each."""

    observations: Array
    actions: Array
    rewards: Array
    next_observations: Array
    terminated: Array


class Replay(NamedTuple):
    """A ring of transitions, [C, ...]: new ones go over the oldest.

    written: [] int32, how many there have been, less whole rounds after the second; the first min(written, C) rows are
        filled and the next goes to written % C
    """

    rows: Transitions
    written: Array


def empty_replay(like: Transitions, size: int) -> Replay:
    """Room for `size` transitions of the shapes and dtypes of `like` [B, ...]."""
    rows = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), like)
    return Replay(rows, jnp.zeros((), jnp.int32))


def remember(replay: Replay, new: Transitions) -> Replay:
    """Write new transitions [B, ...] as one slice: with B dividing C they never reach over the end."""
    size = len(replay.rows.rewards)
    place = replay.written % size
    rows = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, place, 0), replay.rows, new)
    written = replay.written + len(new.rewards)
    # A count that only grew would pass int32 in a long run.
    return Replay(rows, jnp.where(written >= 2 * size, written - size, written))


def recall(key: Key, replay: Replay, num: int) -> Transitions:
    """`num` of the filled rows, uniformly and with replacement, [num, ...]."""
    filled = jnp.minimum(replay.written, len(replay.rows.rewards))
    chosen = jax.random.randint(key, (num,), 0, filled)
    return jax.tree.map(lambda x: x[chosen], replay.rows)


@flax.struct.dataclass
class DQNState(TrainState):
    """A TrainState whose `step` counts calls, with what DQN keeps beside it.

    target: the slowly following parameters, as `params`
    replay: the Replay
    observations, world: where the N environments stand
    """

    target: Params = None
    replay: Replay | None = None
    observations: Any = None
    world: Any = None


def double_q_targets(
    rewards: ArrayLike, terminated: ArrayLike, next_q: ArrayLike, next_target_q: ArrayLike, *, discount: ArrayLike
) -> Array:
    """rewards + discount (1 - terminated) next_target_q[argmax_a next_q], [...].

    rewards, terminated: [...]; next_q, next_target_q: [..., A] at the true successors, by the parameters that learn,
    which choose the action, and by the target's, which value it; give one twice for plain Q-learning. After a truncated
    step the successor keeps its value. van Hasselt et al., arXiv:1509.06461 eq. 4.

    >>> double_q_targets(jnp.ones(1), jnp.zeros(1), jnp.array([[0.0, 1.0]]), jnp.array([[9.0, 4.0]]), discount=0.5)
    Array([3.], dtype=float32)
    """
    next_q, next_target_q = as_float(next_q, next_target_q)
    (rewards,) = as_float(rewards)
    best = jnp.argmax(next_q, axis=-1, keepdims=True)
    value = jnp.take_along_axis(next_target_q, best, axis=-1)[..., 0]
    return rewards + discount * jnp.where(jnp.asarray(terminated).astype(bool), 0.0, value)


def q_network(environment: Environment, *, hidden: Sequence[int] = (64, 64)) -> Network:
    """A multilayer perceptron: apply(params, observations [..., *observation]) -> action values [..., A].

    Raises ValueError for actions that are not Discrete.
    """
    space, outputs = environment.observation_space, _num_actions("q_network", environment)
    mlp = Network.from_linen(MLP((*hidden, outputs)), jnp.zeros((1, flat_size(space))))
    return Network(mlp.init, lambda params, observations: mlp.apply(params, encode(space, observations)))


def q_objective(network: Network, *, discount: ArrayLike) -> Objective:
    """The mean Huber loss of Q(s, a) against `double_q_targets`; its batch is (Transitions [B, ...], target params)."""

    def objective(params: Params, batch: tuple[Transitions, Params], key: Key) -> tuple[Array, Metrics]:
        seen, target = batch
        q = jnp.take_along_axis(network.apply(params, seen.observations), seen.actions[:, None], axis=1)[:, 0]
        next_q, next_target_q = (network.apply(p, seen.next_observations) for p in (params, target))
        targets = double_q_targets(seen.rewards, seen.terminated, next_q, next_target_q, discount=discount)
        return jnp.mean(optax.huber_loss(q, jax.lax.stop_gradient(targets))), {"q": jnp.mean(q)}

    return objective


def _num_actions(caller: str, environment: Environment) -> int:
    if not isinstance(environment.action_space, Discrete):
        raise ValueError(f"{caller}: {environment.name} must have Discrete actions, not {environment.action_space}")
    return environment.action_space.size


def epsilon_greedy(
    network: Network, params: Params, *, epsilon: ArrayLike, num_actions: int
) -> Callable[[Key, Array], tuple[Array, Array]]:
    """(key, observations [N, ...]) -> (actions [N], log-probabilities [N]), for `collect`.

    With probability epsilon an action is drawn uniformly from all A, otherwise it is the one of the highest value.
    """

    def act(key: Key, observations: Array) -> tuple[Array, Array]:
        explore_key, action_key = jax.random.split(key)
        best = jnp.argmax(network.apply(params, observations), axis=-1)
        drawn = jax.random.randint(action_key, best.shape, 0, num_actions, best.dtype)
        actions = jnp.where(jax.random.bernoulli(explore_key, epsilon, best.shape), drawn, best)
        return actions, jnp.log(epsilon / num_actions + (1.0 - epsilon) * (actions == best))

    return act


def greedy(network: Network, params: Params) -> Callable[[Key, Array], Array]:
    """(key, observation [...]) -> the action of the highest value, [], for `evaluate`; the key is not used."""
    return lambda key, observation: jnp.argmax(network.apply(params, observation[None])[0])


def dqn(
    environment: Environment,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    num_envs: int = 8,
    num_steps: int = 16,
    num_updates: int = 32,
    batch_size: int = 128,
    replay_size: int = 16_384,
    warmup: int = 1_024,
    discount: ArrayLike = 0.99,
    epsilon_start: ArrayLike = 1.0,
    epsilon_end: ArrayLike = 0.05,
    epsilon_steps: ArrayLike = 10_000,
    target_rate: ArrayLike = 0.01,
) -> Algorithm:
    """Double DQN as an Algorithm that makes its own data: each step acts T times in N environments, then learns.

    loss = mean huber( Q(s, a) - double_q_targets )
    target <- target + target_rate (params - target), after each of the `num_updates` gradient steps

    Args:
        environment: with Discrete actions, not auto-resetting; see `check_environment`.
        network: apply(params, observations [B, ...]) -> [B, A], such as `q_network(environment)`.
        num_envs, num_steps: N and T, static.
        batch_size: rows drawn uniformly, with replacement, for each gradient step.
        replay_size, warmup: rows kept, and rows of uniformly random actions that `init` fills in; multiples of N T.
        epsilon_start, epsilon_end, epsilon_steps: the share of random actions falls linearly from one to the other over
            so many environment steps, warmup not counted.

    Jit the step with `donate_argnums=0` and the buffer is written in place. State: DQNState. Metrics: "loss",
    "gradient_norm" and "q" (of the actions replayed), means over the gradient steps, "epsilon", and what `ppo` says of
    episodes. Raises ValueError naming sizes that do not divide, and as `check_environment`.
    Mnih et al., Nature 518 (2015); van Hasselt et al., arXiv:1509.06461.
    """
    check_environment(environment)
    num_actions, rows = _num_actions("dqn", environment), num_envs * num_steps
    _check_sizes(rows, replay_size, warmup)
    worlds = batched(episode_statistics(environment), num_envs)
    learner = gradient_algorithm(network, q_objective(network, discount=discount), optimizer)

    def act(params: Params, epsilon: ArrayLike) -> Callable[[Key, Array], tuple[Array, Array]]:
        return epsilon_greedy(network, params, epsilon=epsilon, num_actions=num_actions)

    def init(key: Key) -> DQNState:
        key, reset_key, act_key = jax.random.split(key, 3)
        start = learner.init(key)
        (observations, world), steps = collect(
            act_key, worlds, act(start.params, 1.0), *worlds.reset(reset_key), num_steps=warmup // num_envs
        )
        seen = _transitions(steps)
        replay = remember(empty_replay(seen, replay_size), seen)
        target = jax.tree.map(jnp.copy, start.params)  # so that both can be donated
        return DQNState(
            start.step, start.params, start.opt_state, start.key,
            target=target, replay=replay, observations=observations, world=world,
        )  # fmt: skip

    def step(state: DQNState, batch: None) -> tuple[DQNState, Metrics]:
        key, act_key, learn_key, replay_key = jax.random.split(state.key, 4)
        epsilon = _linear(epsilon_start, epsilon_end, state.step * (rows / epsilon_steps))
        (observations, world), steps = collect(
            act_key, worlds, act(state.params, epsilon), state.observations, state.world, num_steps=num_steps
        )
        replay = remember(state.replay, _transitions(steps))

        def update(carry: tuple[TrainState, Params], key: Key) -> tuple[tuple[TrainState, Params], Metrics]:
            inner, target = carry
            inner, metrics = learner.step(inner, (recall(key, replay, batch_size), target))
            return (inner, optax.incremental_update(inner.params, target, target_rate)), metrics

        start = (TrainState(state.step, state.params, state.opt_state, learn_key), state.target)
        (inner, target), metrics = jax.lax.scan(update, start, jax.random.split(replay_key, num_updates))
        state = state.replace(
            step=state.step + 1, params=inner.params, opt_state=inner.opt_state, key=key,
            target=target, replay=replay, observations=observations, world=world,
        )  # fmt: skip
        return state, {**jax.tree.map(jnp.mean, metrics), "epsilon": epsilon, **experience(steps)}

    return Algorithm(init, step)


def _check_sizes(rows: int, replay_size: int, warmup: int) -> None:
    if replay_size % rows or warmup % rows or not 0 < warmup <= replay_size:
        raise ValueError(
            f"dqn: replay_size={replay_size} and warmup={warmup} must be multiples of num_envs * num_steps = {rows}, "
            "and 0 < warmup <= replay_size"
        )


def _linear(start: ArrayLike, end: ArrayLike, progress: Array) -> Array:
    return start + jnp.minimum(progress, 1.0) * (end - start)


def _transitions(steps: Steps) -> Transitions:
    """Steps [T, N, ...] as rows [T N, ...]."""
    return flatten(
        Transitions(steps.observations, steps.actions, steps.rewards, steps.next_observations, steps.terminated)
    )
