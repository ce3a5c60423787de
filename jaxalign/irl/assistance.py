"""Assistance games: a human who knows the reward and a robot who does not, acting for the same return.

Letters of the shapes: K hypotheses about the reward, S states, H human actions, R robot actions, T steps, N plan nodes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.mdp import TabularMDP, value_iteration
from jaxalign.mdp.checked_record import CheckedRecord, check_rows, traced
from jaxalign.types import Array, ArrayLike, Key


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False, eq=False)
class AssistanceGame(CheckedRecord):
    """A cooperative inverse reinforcement learning game with a finite set of hypotheses. A pytree.

    Nature draws the hypothesis and the first state independently; the human sees both, the robot only the state. At
    each step they act at the same time, see each other's action, and both earn reward[hypothesis, s, human, robot]. To
    let them take turns, give states in which one of the actions changes nothing.

    transition: P(s' | s, human, robot), [S, H, R, S]
    reward: [K, S, H, R], one for each hypothesis
    prior: [K], the robot's belief about the hypothesis at the start
    initial: [S], probabilities of the first state
    terminal: bool [S]; an episode ends on entering a terminal state, where nothing is earned
    discount: scalar in [0, 1]

    Hadfield-Menell et al. (2016), arXiv:1606.03137; Shah et al. (2020), "Benefits of assistance over
    reward learning". Raises ValueError naming the argument where shapes disagree and, outside jit, where probabilities
    are negative or do not sum to 1, a reward is not finite, or `discount` is outside [0, 1].
    """

    transition: Array
    reward: Array
    prior: Array
    initial: Array
    terminal: Array
    discount: Array

    def __init__(
        self,
        transition: ArrayLike,
        reward: ArrayLike,
        prior: ArrayLike,
        initial: ArrayLike,
        terminal: ArrayLike,
        discount: ArrayLike,
    ) -> None:
        given = [jnp.asarray(x) for x in (transition, reward, prior, initial, discount)]
        dtype = jnp.result_type(*given, jnp.zeros((), jnp.result_type(float)))
        transition, reward, prior, initial, discount = (x.astype(dtype) for x in given)
        self._set(transition, reward, prior, initial, jnp.asarray(terminal), discount)
        _check(self)


class PedagogicHuman(NamedTuple):
    """A human who knows how the robot will respond and acts so as to inform it.

    policy(h | k) ~ exp(beta q[k, h]) with q the return to come given the robot's plan; beta >= 0, per unit of reward;
    infinity is the human's best response.
    """

    beta: ArrayLike = jnp.inf


class AssistancePlan(NamedTuple):
    """A joint plan as a graph: at time t in state s the robot is at a node n of N, and an observation moves it on.

    value: scalar, expected return at the prior and the initial states
    start: [S] int32, the node at time 0
    alpha: [T, S, N, K], expected return to come if the hypothesis is k; the plan is worth belief @ alpha[t, s, n]
    robot_action: [T, S, N] int32
    human_policy: [T, S, N, K, H], probability of each human action if the hypothesis is k
    successor: [T, S, N, H, S] int32, the next node after human action h and next state s'
    """

    value: Array
    start: Array
    alpha: Array
    robot_action: Array
    human_policy: Array
    successor: Array


class Episodes(NamedTuple):
    """Simulated episodes, E of them; what stands where `mask` is False is padding.

    hypothesis: [E] int32; states, human_actions, robot_actions: [E, T] int32; mask: [E, T] bool
    rewards: [E, T], 0 where masked
    beliefs: [E, T, K], about the hypothesis before each step, by Bayes' rule with the plan's human policy
    """

    hypothesis: Array
    states: Array
    human_actions: Array
    robot_actions: Array
    mask: Array
    rewards: Array
    beliefs: Array


def literal_human(game: AssistanceGame, *, beta: ArrayLike, robot_policy: Array | None = None) -> Array:
    """A noisily optimal human who does not reckon with being watched: policy[k, s, h] ~ exp(beta Q_k[s, h]), [K, S, H].

    Q_k is optimal for hypothesis k if the robot keeps to robot_policy [S, R] (None: acts uniformly at random) over an
    infinite horizon. beta >= 0, per unit of reward; infinity takes the first best action.
    Raises ValueError if discount is 1 and no state terminal, or on a policy of another shape.
    """
    states, _, robot_actions, _ = game.transition.shape
    if robot_policy is None:
        robot_policy = jnp.full((states, robot_actions), 1.0 / robot_actions, game.reward.dtype)
    if robot_policy.shape != (states, robot_actions):
        raise ValueError(f"literal_human: robot_policy must be {(states, robot_actions)}, got {robot_policy.shape}")
    transition = jnp.einsum("shrz,sr->shz", game.transition, robot_policy)
    mdp = TabularMDP(transition, game.initial, game.terminal, game.discount)
    rewards = jnp.einsum("kshr,sr->ksh", game.reward, robot_policy)
    return boltzmann_choice(jax.vmap(lambda reward: value_iteration(mdp, reward).q)(rewards), beta=beta)


def boltzmann_choice(q: Array, *, beta: ArrayLike) -> Array:
    """policy[..., h] ~ exp(beta q[..., h]), [..., H]; with beta infinite all on the first best action."""
    finite = jax.nn.softmax(jnp.where(jnp.isinf(beta), 1.0, beta) * q, axis=-1)
    best = jax.nn.one_hot(jnp.argmax(q, axis=-1), q.shape[-1], dtype=q.dtype)
    return jnp.where(jnp.isinf(beta), best, finite)


def posterior(belief: Array, human_policy: Array, human_action: ArrayLike) -> Array:
    """Bayes' rule: belief'[k] ~ belief[k] human_policy[k, human_action], [K] and [K, H] -> [K].

    An action of probability 0 leaves the belief as it was.
    """
    joint = belief * human_policy[:, human_action]
    total = jnp.sum(joint)
    return jnp.where(total > 0.0, joint / jnp.where(total > 0.0, total, 1.0), belief)


def human_response(game: AssistanceGame, plan: AssistancePlan, human: Array | PedagogicHuman) -> AssistancePlan:
    """The robot's part of a plan played with another human: `value`, `alpha` and `human_policy` are theirs, exactly.

    human: a fixed policy [K, S, H], or a PedagogicHuman, who responds to the robot's graph:
        q[t, s, n, k, h] = r[k, s, h, a] + discount E_{s'} alpha[t+1, s', successor[t, s, n, h, s'], k],
        a = robot_action[t, s, n];  alpha = sum_h policy q,  policy = boltzmann_choice(q, beta=human.beta)

    The robot starts where it would have started: it does not know that the human is another.
    """
    check_human(game, human)
    index = jnp.arange(game.initial.size)

    def earlier(alpha: Array, step: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        action, successor = step
        follow = alpha[index[None, None, None, :], successor]  # [S, N, H, S', K]
        chance = jnp.take_along_axis(game.transition, action[:, None, :, None], axis=2)  # [S, H, N, S']
        earned = jnp.take_along_axis(game.reward, action[None, :, None, :], axis=3)  # [K, S, H, N]
        q = jnp.einsum("kshn->snkh", earned) + game.discount * jnp.einsum("shnz,snhzk->snkh", chance, follow)
        policy = respond(human, q)
        alpha = jnp.where(game.terminal[:, None, None], 0.0, jnp.sum(policy * q, axis=-1))
        return alpha, (alpha, policy)

    steps = (plan.robot_action, plan.successor)
    _, (alpha, policy) = jax.lax.scan(earlier, jnp.zeros_like(plan.alpha[0]), steps, reverse=True)
    worth = jnp.take_along_axis(alpha[0] @ game.prior, plan.start[:, None], axis=1)[:, 0]
    return plan._replace(value=game.initial @ worth, alpha=alpha, human_policy=policy)


def respond(human: Array | PedagogicHuman, q: Array) -> Array:
    """What a human does in every state and node, given q [S, N, K, H]; a fixed policy is [K, S, H]. [S, N, K, H]."""
    if isinstance(human, PedagogicHuman):
        return boltzmann_choice(q, beta=human.beta)
    return jnp.broadcast_to(jnp.swapaxes(human, 0, 1)[:, None].astype(q.dtype), q.shape)


def best_node(plan: AssistancePlan, time: ArrayLike, state: ArrayLike, belief: Array) -> tuple[Array, Array, Array]:
    """(node, robot action, value) of the plan's best node at a belief [K]: the robot's policy as one of beliefs."""
    worth = plan.alpha[time, state] @ belief
    node = jnp.argmax(worth)
    return node, plan.robot_action[time, state, node], worth[node]


def simulate_assistance(key: Key, game: AssistanceGame, plan: AssistancePlan, *, num: int) -> Episodes:
    """Play a plan `num` times from the prior, for as many steps as it has: Episodes [E, T]. `num` is static."""

    def one(key: Key) -> Episodes:
        hypothesis_key, start_key, step_key = jax.random.split(key, 3)
        hypothesis = _draw(hypothesis_key, game.prior)
        state = _draw(start_key, game.initial)

        def step(carry: tuple[Array, Array, Array], inputs: tuple[Array, ...]) -> tuple[Any, Episodes]:
            state, node, belief = carry
            robot_action, human_policy, successor, key = inputs
            human_key, next_key = jax.random.split(key)
            policy, robot = human_policy[state, node], robot_action[state, node]
            human = _draw(human_key, policy[hypothesis])
            alive = ~game.terminal[state]
            after = _draw(next_key, game.transition[state, human, robot])
            moved = (after, successor[state, node, human, after], posterior(belief, policy, human))
            earned = jnp.where(alive, game.reward[hypothesis, state, human, robot], 0.0)
            seen = Episodes(hypothesis, state, human, robot, alive, earned, belief)
            return jax.tree.map(lambda new, old: jnp.where(alive, new, old), moved, carry), seen

        keys = jax.random.split(step_key, plan.alpha.shape[0])
        carry = (state, plan.start[state], game.prior)
        _, seen = jax.lax.scan(step, carry, (plan.robot_action, plan.human_policy, plan.successor, keys))
        return seen._replace(hypothesis=hypothesis)

    return jax.vmap(one)(jax.random.split(key, num))


def check_human(game: AssistanceGame, human: Array | PedagogicHuman) -> None:
    """Raise ValueError if a fixed policy is not [K, S, H] or, outside jit, its rows are not probabilities."""
    if isinstance(human, PedagogicHuman):
        if not traced(human.beta) and not np.all(np.asarray(human.beta) >= 0.0):
            raise ValueError(f"PedagogicHuman: beta must be at least 0, got {human.beta}")
        return
    shape = game.reward.shape[:3]
    if jnp.shape(human) != shape:
        raise ValueError(f"human: a fixed policy must be [K, S, H] = {list(shape)}, got {jnp.shape(human)}")
    check_rows("human", human)


def _draw(key: Key, probability: Array) -> Array:
    return jax.random.categorical(key, jnp.log(probability)).astype(jnp.int32)


def _check(game: AssistanceGame) -> None:
    if game.transition.ndim != 4 or game.transition.shape[0] != game.transition.shape[3]:
        raise ValueError(f"AssistanceGame: transition must be [S, H, R, S], got {game.transition.shape}")
    states, human_actions, robot_actions, _ = game.transition.shape
    if game.prior.ndim != 1 or not game.prior.size:
        raise ValueError(f"AssistanceGame: prior must be [K], got {game.prior.shape}")
    wanted = {
        "reward": (game.prior.size, states, human_actions, robot_actions),
        "initial": (states,),
        "terminal": (states,),
        "discount": (),
    }
    for name, shape in wanted.items():
        if getattr(game, name).shape != shape:
            raise ValueError(f"AssistanceGame: {name} must be {list(shape)}, got {getattr(game, name).shape}")
    if game.terminal.dtype != bool:
        raise ValueError(f"AssistanceGame: terminal must be bool, got {game.terminal.dtype}")
    for name in ("transition", "prior", "initial"):
        check_rows(f"AssistanceGame: {name}", getattr(game, name))
    if not traced(game.reward) and not np.isfinite(game.reward).all():
        raise ValueError("AssistanceGame: reward is not finite everywhere")
    if not traced(game.discount) and not 0.0 <= float(game.discount) <= 1.0:
        raise ValueError(f"AssistanceGame: discount must be in [0, 1], got {float(game.discount)}")
