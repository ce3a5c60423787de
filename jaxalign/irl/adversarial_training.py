"""Adversarial IRL, the whole loop: a policy learner that can be exchanged, and GAIL and AIRL around it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, TrainState
from jaxalign.irl.adversarial import (
    AdversarialReward,
    Transitions,
    airl_reward,
    discriminator,
    gail_reward,
    weighted_mean,
)
from jaxalign.irl.trajectories import Trajectories, check_trajectories, sample_trajectories
from jaxalign.mdp import (
    GridTransition,
    SparseTransition,
    TabularMDP,
    bellman_q,
    occupancy_measure,
    policy_evaluation,
    soft_value_iteration,
    sparse_transition,
)
from jaxalign.types import Array, ArrayLike, Key, Metrics

Rollout = Callable[[Key, Array], Transitions]
Reward = Callable[[Transitions], Array]


class PolicyLearner(NamedTuple):
    """A policy that acts and gets better at a reward that it is given anew each time.

    init: key -> policy, any pytree of arrays (with the environment's state in it, if there is one)
    rollout: (policy, key) -> (policy, Transitions with log_probs), steps of the policy
    log_prob: (policy, Transitions) -> [B], log pi(a | s) at given steps, the expert's for one
    improve: (policy, reward, Transitions, key) -> (policy, metrics): raise
        E sum_t discount^t (reward_t - temperature log pi(a_t | s_t)), where reward maps Transitions [B] to [B], and the
        Transitions are the rollout's. AIRL needs temperature 1: a learner of plain returns (PPO without an entropy
        bonus) gets there with the reward `airl_logits(reward(steps), steps.log_probs)`, as `rl.ppo_learner` can.
    """

    init: Callable[[Key], Any]
    rollout: Callable[[Any, Key], tuple[Any, Transitions]]
    log_prob: Callable[[Any, Transitions], Array]
    improve: Callable[[Any, Reward, Transitions, Key], tuple[Any, Metrics]]


@flax.struct.dataclass
class AdversarialState(TrainState):
    """The discriminator's TrainState, and the policy learner's state in `policy`."""

    policy: Any = None


def adversarial_imitation(
    learner: PolicyLearner,
    adversary: AdversarialReward,
    optimizer: optax.GradientTransformation,
    *,
    expert: Transitions | None = None,
    discriminator_steps: int = 1,
    discriminator_batch: int | None = None,
    gradient_penalty: ArrayLike | None = None,
) -> Algorithm:
    """Each step: the policy acts, the discriminator learns to tell its steps from the expert's, the policy improves.

    Args:
        learner: anything that can act and improve, see PolicyLearner.
        adversary: `gail_reward` or `airl_reward`.
        expert: the demonstrations [B], used when the step's batch is None; else the batch is Transitions [B].
        discriminator_steps: gradient steps on the same transitions before the policy improves.
        discriminator_batch, gradient_penalty: `batch_size` and `gradient_penalty` of `discriminator`.

    State: AdversarialState. Metrics: those of `discriminator` at its last gradient step, "reward/expert" and
    "reward/policy" (means of the learned reward per step, after it), "entropy" (mean of -log pi over the policy's
    steps, nats), and the learner's own. Raises ValueError at trace time if there are no demonstrations.
    """
    inner = discriminator(adversary, optimizer, batch_size=discriminator_batch, gradient_penalty=gradient_penalty)

    def init(key: Key) -> AdversarialState:
        key, policy_key = jax.random.split(key)
        start = inner.init(key)
        return AdversarialState(start.step, start.params, start.opt_state, start.key, policy=learner.init(policy_key))

    def step(state: AdversarialState, batch: Transitions | None) -> tuple[AdversarialState, Metrics]:
        demonstrations = expert if batch is None else batch
        if demonstrations is None:
            raise ValueError("adversarial_imitation: no demonstrations: give `expert`, or Transitions as the batch")
        key, rollout_key, improve_key = jax.random.split(state.key, 3)
        policy, steps = learner.rollout(state.policy, rollout_key)
        demonstrations = demonstrations._replace(log_probs=learner.log_prob(policy, demonstrations))

        def descend(inner_state: AdversarialState, _: None) -> tuple[AdversarialState, Metrics]:
            return inner.step(inner_state, (demonstrations, steps))

        trained, metrics = jax.lax.scan(descend, state.replace(key=key), None, length=discriminator_steps)
        reward = lambda rows: adversary.reward(trained.params, rows)  # noqa: E731
        policy, learned = learner.improve(policy, reward, steps, improve_key)
        metrics = {
            **jax.tree.map(lambda x: x[-1], metrics),
            "reward/expert": weighted_mean(reward(demonstrations), demonstrations),
            "reward/policy": weighted_mean(reward(steps), steps),
            "entropy": -weighted_mean(steps.log_probs, steps),
            **learned,
        }
        return trained.replace(step=state.step + 1, policy=policy), metrics

    return Algorithm(init, step)


def gail(
    learner: PolicyLearner,
    network: Network,
    optimizer: optax.GradientTransformation,
    *,
    reward: Callable[[Array], Array] = jax.nn.softplus,
    **options: Any,
) -> Algorithm:
    """Generative adversarial imitation: `adversarial_imitation`, same options, with `gail_reward(network, reward=...)`.

    With a discriminator [B, A] of enough capacity, a learner at temperature t and episodes that do not end, the policy
    minimises 2 JSD(d_expert, d_policy) - t H(policy), d normalised occupancies [S, A] and H the entropy per step in
    nats: at t = 0 its occupancy is the expert's, else a more random one.
    Ho and Ermon, arXiv:1606.03476.
    """
    return adversarial_imitation(learner, gail_reward(network, reward=reward), optimizer, **options)


def airl(
    learner: PolicyLearner,
    reward_network: Network,
    potential_network: Network,
    optimizer: optax.GradientTransformation,
    *,
    discount: ArrayLike,
    **options: Any,
) -> Algorithm:
    """Adversarial IRL: `adversarial_imitation` with `airl_reward`, same options; the learner's temperature must be 1.

    The recovered reward is `reward_network` at `state.params["reward"]`: [S] for state-only, [S, A] for state-action.
    Fu, Luo and Levine, arXiv:1710.11248.
    """
    adversary = airl_reward(reward_network, potential_network, discount=discount)
    return adversarial_imitation(learner, adversary, optimizer, **options)


def soft_planner(
    mdp: TabularMDP, *, temperature: ArrayLike = 1.0, rollout: Rollout | None = None, tolerance: ArrayLike = 1e-6
) -> PolicyLearner:
    """The learner that solves known dynamics for the given reward at each step, by `soft_value_iteration`.

    Its policy is log_policy [S, A], uniform at first. `rollout` is `exact_rollout(mdp)` (the default: no sampling
    noise) or `sampled_rollout(mdp, ...)`. Metrics: "soft_return", entropy included, under the given reward.
    """

    def improve(log_policy: Array, reward: Reward, steps: Transitions, key: Key) -> tuple[Array, Metrics]:
        plan = soft_value_iteration(mdp, _expected_reward(mdp, reward), temperature=temperature, tolerance=tolerance)
        return plan.log_policy.astype(log_policy.dtype), {"soft_return": mdp.initial @ plan.value}

    return _tabular_learner(mdp, rollout, improve)


def policy_mirror_descent(
    mdp: TabularMDP, *, step_size: ArrayLike, temperature: ArrayLike = 1.0, rollout: Rollout | None = None
) -> PolicyLearner:
    """The learner that takes one natural policy gradient step on known dynamics, tabular softmax policy.

    log pi <- (1 - step_size temperature) log pi + step_size q - log Z, with q the soft action values of the old policy:
    q = r + discount E v, v[s] = sum_a pi (q - temperature log pi)

    step_size = 1 / temperature is soft policy iteration; temperature 0 maximises the plain return. Policy [S, A],
    `rollout` and metrics as in `soft_planner` ("soft_return" is the old policy's). Cen et al., arXiv:2007.06558 eq. 18,
    whose step size is step_size (1 - discount).
    """

    def improve(log_policy: Array, reward: Reward, steps: Transitions, key: Key) -> tuple[Array, Metrics]:
        earned = _expected_reward(mdp, reward)
        value = policy_evaluation(mdp, log_policy, earned - temperature * log_policy)
        q = bellman_q(mdp, earned, value)
        new = jax.nn.log_softmax((1.0 - step_size * temperature) * log_policy + step_size * q, axis=-1)
        return new.astype(log_policy.dtype), {"soft_return": mdp.initial @ value}

    return _tabular_learner(mdp, rollout, improve)


def on_states(network: Network, features: Array) -> Network:
    """The network on a tabular MDP's state numbers: apply(params, states[B]) = network(features)[states].

    features: [S, F]; the network sees each state once however many steps there are, B or more.
    """
    return Network(network.init, lambda params, states: network.apply(params, features)[states])


def state_table(*shape: int, scale: float = 0.01) -> Network:
    """A number (or row of numbers) of its own for each state: apply(params, states[B]) = params[states].

    shape: (S,) or (S, A), drawn from N(0, scale^2).
    """
    return Network(lambda key: scale * jax.random.normal(key, shape), lambda params, states: params[states])


def occupancy_transitions(mdp: TabularMDP, occupancy: Array) -> Transitions:
    """Every step (s, a, s') that can be, weighted by occupancy[s, a] P(s' | s, a); occupancy [S, A], B = S A K rows.

    `occupancy` is exact (`occupancy_measure`), or counted from demonstrations (`visit_counts` at the MDP's discount).
    """
    rows = _successors(mdp)
    weights = jnp.where(mdp.terminal[:, None], 0.0, occupancy)[:, :, None] * rows.probability
    shape = weights.shape
    states, actions = (jax.lax.broadcasted_iota(jnp.int32, shape, axis).reshape(-1) for axis in (0, 1))
    next_states = rows.next_state.reshape(-1)
    return Transitions(states, actions, next_states, mdp.terminal[next_states], None, weights.reshape(-1))


def trajectory_transitions(mdp: TabularMDP, trajectories: Trajectories) -> Transitions:
    """Demonstrations [N, T] as B = N (T - 1) steps weighted by discount^t, 0 for padding.

    A step counts if the state after it is known, so the last of each trajectory does not, unless the arrival in a
    terminal state is recorded as one further step (whose action is ignored).
    Raises ValueError as `check_trajectories`, and outside jit if no step has a successor.
    """
    check_trajectories(mdp, trajectories)
    states, actions, mask = trajectories
    known = mask[:, :-1] & mask[:, 1:] & ~mdp.terminal[states[:, :-1]]
    if not isinstance(known, jax.core.Tracer) and not known.any():
        raise ValueError("trajectories: no step is followed by another, so no transition is known")
    weights = known * mdp.discount ** jnp.arange(known.shape[1], dtype=mdp.discount.dtype)[None, :]
    now, taken, after, weights = (x.reshape(-1) for x in (states[:, :-1], actions[:, :-1], states[:, 1:], weights))
    return Transitions(now, taken, after, mdp.terminal[after], None, weights)


def exact_rollout(mdp: TabularMDP) -> Rollout:
    """All steps weighted by the policy's exact discounted occupancy: (key, log_policy[S, A]) -> Transitions."""
    return lambda key, log_policy: occupancy_transitions(mdp, occupancy_measure(mdp, log_policy))


def sampled_rollout(mdp: TabularMDP, *, num: int, length: int) -> Rollout:
    """`num` trajectories of up to `length` steps: (key, log_policy[S, A]) -> Transitions [num * length]."""

    def rollout(key: Key, log_policy: Array) -> Transitions:
        sampled = sample_trajectories(key, mdp, log_policy, num=num, length=length + 1)
        # A state is real if a step led to it, the terminal ones too.
        arrived = jnp.concatenate([sampled.mask[:, :1], sampled.mask[:, :-1]], axis=1)
        return trajectory_transitions(mdp, sampled._replace(mask=arrived))

    return rollout


def _tabular_learner(mdp: TabularMDP, rollout: Rollout | None, improve: Callable[..., Any]) -> PolicyLearner:
    act = exact_rollout(mdp) if rollout is None else rollout

    def init(key: Key) -> Array:
        return jnp.full((mdp.num_states, mdp.num_actions), -jnp.log(mdp.num_actions), mdp.initial.dtype)

    def log_prob(log_policy: Array, steps: Transitions) -> Array:
        return log_policy[steps.states, steps.actions]

    def take_steps(log_policy: Array, key: Key) -> tuple[Array, Transitions]:
        steps = act(key, log_policy)
        return log_policy, steps._replace(log_probs=log_prob(log_policy, steps))

    return PolicyLearner(init, take_steps, log_prob, improve)


def _expected_reward(mdp: TabularMDP, reward: Reward) -> Array:
    """r(s, a) = sum_{s'} P(s' | s, a) reward(s, a, s'), [S, A]; 0 in terminal states."""
    shape = (mdp.num_states, mdp.num_actions)
    steps = occupancy_transitions(mdp, jnp.ones(shape, mdp.initial.dtype))
    return jnp.sum((steps.weights * reward(steps)).reshape(*shape, -1), axis=-1)


def _successors(mdp: TabularMDP) -> SparseTransition:
    transition = mdp.transition
    if isinstance(transition, SparseTransition):
        return transition
    if isinstance(transition, GridTransition):
        return sparse_transition(transition)
    return SparseTransition(jax.lax.broadcasted_iota(jnp.int32, transition.shape, 2), transition)
