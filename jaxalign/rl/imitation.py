"""Imitation in unknown dynamics: demonstrations, behavioural cloning, and PPO as the learner of GAIL and AIRL."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm
from jaxalign.environments.protocol import Discrete, Environment, flat_size
from jaxalign.environments.running_moments import init_moments, normalize, update_moments
from jaxalign.irl.adversarial import Transitions, draw_transitions, weighted_mean
from jaxalign.irl.adversarial_training import PolicyLearner, Reward
from jaxalign.networks import MLP
from jaxalign.rl.actor_critic import ActorCritic, encode
from jaxalign.rl.ppo import PPOState, experience, flatten, ppo_parts, see
from jaxalign.rl.rollout import Steps
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


@flax.struct.dataclass
class ImitatorState(PPOState):
    """A PPOState, and the Steps [T, N, ...] it last took, which are yet to be paid."""

    steps: Any = None


def ppo_learner(
    environment: Environment,
    model: ActorCritic,
    optimizer: optax.GradientTransformation,
    *,
    temperature: ArrayLike = 0.0,
    absorbing: bool = False,
    discount: ArrayLike = 0.99,
    **options: Any,
) -> PolicyLearner:
    """PPO as the policy learner of `irl.gail`, `irl.airl` or any `adversarial_imitation`; it never reads the reward.

    Each step of those is a rollout of T = num_steps in N = num_envs environments, T N Transitions in time order (row
    t N + n is environment n at time t), paid

    rewards[t, n] = reward(transitions)[t N + n] - temperature log pi(a | s)

    Args:
        temperature: what each nat of surprise at the policy's own actions earns, so that PPO, which maximises plain
            returns, maximises E sum_t discount^t (reward_t - temperature log pi(a_t | s_t)). `airl` needs 1, where this
            reward is `airl_logits(f, log_probs)`; for `gail` it is lambda, the weight of the causal entropy.
            PPO's own `entropy_coefficient` is something else: it does not look ahead.
        absorbing: whether to rest for ever where an episode ended (`absorbing_transitions`), which the discriminator
            learns to judge: a step that terminates also earns discount / (1 - discount) reward(rest). Without, ending
            earns 0 for ever, so a reward that is never negative (GAIL's) pays for staying alive whatever the expert
            does, and one that is mostly negative (AIRL's, until the policy resembles the expert) for ending at once.
            An expert whose own episodes terminate needs the same. Kostrikov et al., arXiv:1809.02925.
        discount: PPO's; for `airl` the same as its own.
        options: the others of `ppo_parts`.

    The policy is an ImitatorState: `act_with(model, state.policy.params)` acts (on observations normalised by
    `see(state.policy, ...)`, if that is asked for). Metrics: PPO's as "policy/loss", "policy/entropy", ..., and what
    the environment itself says of episodes that ended: "episodes", "episode/return", "episode/length".
    Raises ValueError as `ppo_parts`.
    """
    parts = ppo_parts(environment, model, optimizer, discount=discount, **options)

    def init(key: Key) -> ImitatorState:
        start = parts.init(key)
        _, steps = jax.eval_shape(parts.collect, start, key)
        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), steps)
        return ImitatorState(**{f.name: getattr(start, f.name) for f in dataclasses.fields(start)}, steps=nothing)

    def rollout(state: ImitatorState, key: Key) -> tuple[ImitatorState, Transitions]:
        after, steps = parts.collect(state, key)
        # A reward that is a Python number is weakly typed, and a state must keep its types.
        steps = jax.tree.map(lambda x: x.astype(x.dtype), steps)
        rows = as_transitions(steps)
        return after.replace(steps=steps), absorbing_transitions(rows, discount=discount) if absorbing else rows

    def log_prob(state: ImitatorState, rows: Transitions) -> Array:
        found = model.policy(state.params, see(state, rows.states)).log_prob(rows.actions)
        return found if rows.resting is None else jnp.where(rows.resting, 0.0, found)

    def improve(state: ImitatorState, reward: Reward, rows: Transitions, key: Key) -> tuple[ImitatorState, Metrics]:
        paid = reward(rows) - temperature * rows.log_probs
        if absorbing:
            now, after = jnp.split(paid, 2)
            paid = now + jnp.where(state.steps.terminated.reshape(-1), discount / (1.0 - discount) * after, 0.0)
        new, metrics = parts.improve(state, state.steps, paid.reshape(state.steps.rewards.shape), key)
        metrics = {f"policy/{name}": value for name, value in metrics.items()}
        said = experience(state.steps)
        return new, {**metrics, **{name: said[name] for name in ("episodes", "episode/return", "episode/length")}}

    return PolicyLearner(init, rollout, log_prob, improve)


def as_transitions(steps: Steps) -> Transitions:
    """Steps [T, N, ...] as Transitions [T N, ...] without their rewards; row t N + n is environment n at time t.

    next_states are the true successors, and `terminated` leaves out what a time limit cut off.
    """
    flat = flatten(steps)
    return Transitions(flat.observations, flat.actions, flat.next_observations, flat.terminated, flat.log_probs)


def absorbing_transitions(rows: Transitions, *, discount: ArrayLike) -> Transitions:
    """The steps [B] where an ended episode rests in its last state for ever: [2 B], the steps and then the rests.

    A rest leads from next_states to itself; it weighs discount / (1 - discount) times its step where that terminated,
    else 0, and its log_probs are 0 (nothing is chosen there). No step is terminated any more.
    """
    weights = jnp.ones(rows.terminated.shape) if rows.weights is None else rows.weights
    rests = rows._replace(
        states=rows.next_states, log_probs=None if rows.log_probs is None else jnp.zeros_like(rows.log_probs),
        weights=jnp.where(rows.terminated, weights * discount / (1.0 - discount), 0.0),
    )  # fmt: skip
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), rows._replace(weights=weights), rests)
    resting = jnp.arange(both.terminated.size) >= rows.terminated.size
    return both._replace(terminated=jnp.zeros_like(both.terminated), resting=resting)


def demonstrations(
    key: Key,
    environment: Environment,
    act: Callable[[Key, Array], Array],
    *,
    episodes: int,
    max_steps: int,
    every: int = 1,
) -> Transitions:
    """What a policy shows in whole episodes, of which every `every`-th step is kept, beginning with one of the first.

    Args:
        environment: not auto-resetting.
        act: (key, observation) -> action, of one environment, as for `evaluate`: `act_with(model, params)`.
        max_steps: no episode goes on longer; being cut off here is not termination.

    Returns Transitions [B], B = episodes * ceil(max_steps / every), episode by episode, with weights 1, or 0 for rows
    after an episode's end; log_probs is None. Subsampling as Ho and Ermon (arXiv:1606.03476, section 6) did it
    makes the steps nearly independent, and behavioural cloning harder.
    Raises ValueError if `every` is not in 1..max_steps.
    """
    if not 1 <= every <= max_steps:
        raise ValueError(f"demonstrations: every={every} must be in 1..max_steps={max_steps}")

    def episode(key: Key) -> Transitions:
        reset_key, run_key, first_key = jax.random.split(key, 3)
        observation, world = environment.reset(reset_key)

        def one(carry: Any, key: Key) -> tuple[Any, Transitions]:
            seen, world, going = carry
            act_key, step_key = jax.random.split(key)
            action = act(act_key, seen)
            step = environment.step(step_key, world, action)
            row = Transitions(
                seen, action, step.observation, step.terminated & going, weights=going.astype(jnp.float32)
            )
            return (step.observation, step.state, going & ~step.terminated & ~step.truncated), row

        _, rows = jax.lax.scan(one, (observation, world, jnp.array(True)), jax.random.split(run_key, max_steps))
        first = jax.random.randint(first_key, (), 0, every)
        chosen = first + every * jnp.arange(-(-max_steps // every))
        kept = jax.tree.map(lambda x: x[jnp.minimum(chosen, max_steps - 1)], rows)
        return kept._replace(weights=jnp.where(chosen < max_steps, kept.weights, 0.0))

    return flatten(jax.vmap(episode)(jax.random.split(key, episodes)))


def behavioural_cloning(
    model: ActorCritic,
    optimizer: optax.GradientTransformation,
    *,
    expert: Transitions | None = None,
    batch_size: int | None = None,
    entropy_coefficient: ArrayLike = 0.0,
) -> Algorithm:
    """Supervised learning of the expert's actions, as an Algorithm over TrainState: what imitation is compared with.

    objective = mean -log pi(a | s) - entropy_coefficient mean entropy, means weighted by `weights`

    Args:
        model: its policy is trained, its value function stays as it was drawn.
        expert: the demonstrations [B], used when the step's batch is None; else the batch is Transitions [B].
        batch_size: rows drawn for each step, in proportion to their weights; None: all.

    Metrics: "loss", "log_prob" and "entropy" (nats), "gradient_norm". To go on from there,
    `ppo_learner(environment, model._replace(init=lambda key: state.params), ...)`.
    Raises ValueError at trace time if there are no demonstrations. Pomerleau (1991), Neural Computation 3(1).
    """

    def objective(params: Params, batch: Transitions | None, key: Key) -> tuple[Array, Metrics]:
        rows = expert if batch is None else batch
        if rows is None:
            raise ValueError("behavioural_cloning: no demonstrations: give `expert`, or Transitions as the batch")
        if batch_size is not None:
            rows = draw_transitions(key, rows, batch_size)
        distribution = model.policy(params, rows.states)
        log_prob = weighted_mean(distribution.log_prob(rows.actions), rows)
        entropy = weighted_mean(distribution.entropy(), rows)
        return -log_prob - entropy_coefficient * entropy, {"log_prob": log_prob, "entropy": entropy}

    return gradient_algorithm(Network(model.init, model.policy), objective, optimizer)


def discriminator_network(
    environment: Environment,
    expert: Transitions,
    *,
    hidden: Sequence[int] = (32, 32),
    activation: Callable[[Array], Array] = jnp.tanh,
    of_actions: bool = True,
) -> Network:
    """A multilayer perceptron for `gail`, and `airl`'s reward and potential, on observations in the expert's scale.

    apply(params, states[, actions]) -> [B, A] for discrete actions, [B, 1] for real ones or where not `of_actions`

    States and real actions enter less the mean of the demonstrations [B], over their deviation, cut at 10 deviations:
    else a pole's angle, in hundredths, would hardly be told beside its speed. Discrete observations enter one-hot.
    """
    seen, done = environment.observation_space, environment.action_space
    discrete = isinstance(done, Discrete)
    with_actions = of_actions and not discrete
    outputs = done.size if isinstance(done, Discrete) and of_actions else 1
    inputs = flat_size(seen) + (flat_size(done) if with_actions else 0)
    network = Network.from_linen(MLP((*hidden, outputs), activation, final_scale=0.1), jnp.zeros((1, inputs)))

    def rows(states: Array, *actions: Array) -> Array:
        parts = [encode(seen, states), *(encode(done, x) for x in actions if with_actions)]
        return jnp.concatenate(parts, axis=-1)

    shown = rows(expert.states, *(() if discrete else (expert.actions,)))
    counted = None if expert.weights is None else expert.weights > 0
    moments = update_moments(init_moments((inputs,)), shown, counted)
    return Network(network.init, lambda params, *x: network.apply(params, normalize(moments, rows(*x))))
