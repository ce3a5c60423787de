"""Solving assistance games: which robot plan, and which human one, earn the most from the prior.

The robot's problem is a POMDP whose hidden state is the hypothesis and whose observations are the human's actions and
the next state. If the human plans too, the joint problem has one action for each decision rule from hypotheses to human
actions, H^K of them. They are never enumerated: once the robot's plan is fixed, the best human action can be found for
each hypothesis alone (Malik et al. 2018, "An efficient, generalized Bellman update for cooperative inverse
reinforcement learning", arXiv:1806.03820). Letters of the shapes as in `assistance`; also B beliefs.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.irl.alpha_vectors import exact_plan
from jaxalign.irl.assistance import AssistanceGame, AssistancePlan, PedagogicHuman, check_human, respond
from jaxalign.types import Array

# The robot reads human actions that should never come as if a mistake had been made, so that it has an answer to them.
TREMBLE = 1e-4


def solve_assistance(
    game: AssistanceGame,
    *,
    horizon: int,
    human: Array | PedagogicHuman | None = None,
    beliefs: Array | None = None,
    starts: int = 8,
    rounds: int = 4,
    max_vectors: int = 2000,
) -> AssistancePlan:
    """A plan for `horizon` T steps, exact or point-based; for an endless game take T with discount^T small.

    The point-based plan has one node for each of the beliefs [B, K] (PBVI; Pineau et al. 2003). At a belief b, human
    action h and next state s' lead to the node m with the most worth there,
        argmax_m sum_k b[k] policy[k, h] alpha[t+1, s', m, k],
    and the robot takes the action whose q is worth most. For a PedagogicHuman, policy and nodes depend on each other:
    from `starts` policies (uniform, then ones drawn with a fixed seed, which may turn idle actions into a code) they
    answer one another for `rounds` rounds, and the best pair met is kept. Every alpha is what its graph really earns,
    so the value is a lower bound. A backup holds [B, H, S, B] numbers at a time, the plan [T, S, B, H, S].

    Args:
        human: a fixed policy [K, S, H] such as `literal_human` gives: the plan is the robot's best response to it. Or a
            PedagogicHuman, who responds to the robot's plan; None is PedagogicHuman() with beta infinite: both act for
            the best joint return (an optimal equilibrium of the game).
        beliefs: None: the exact optimum by alpha vectors, pruned by linear programs on the host in float64. Its cost
            grows steeply with T, H and the successors of a state; K may be large. Not under jit, and not with a finite
            beta, for which no pruning is exact. Or [B, K]: the point-based plan, under jit and vmap; for a fixed human
            exact at `reachable_beliefs`.
        starts, rounds: of the point-based search for a pedagogic human, static.
        max_vectors: the most alpha vectors the exact solver may consider at once.

    Returns AssistancePlan. Raises ValueError if an argument is of another shape, if the exact solver is traced or given
    a finite beta, or if it would need more than `max_vectors`.
    """
    human = PedagogicHuman() if human is None else human
    check_human(game, human)
    if horizon < 1:
        raise ValueError(f"solve_assistance: horizon must be at least 1, got {horizon}")
    human = human if isinstance(human, PedagogicHuman) else jnp.asarray(human)
    if beliefs is not None:
        beliefs = jnp.asarray(beliefs)
        return _point_based_plan(game, beliefs, human, horizon, starts, rounds)
    return exact_plan(game, horizon=horizon, human=human, max_vectors=max_vectors)


def _point_based_plan(
    game: AssistanceGame, beliefs: Array, human: Array | PedagogicHuman, horizon: int, starts: int, rounds: int
) -> AssistancePlan:
    if beliefs.ndim != 2 or beliefs.shape[1] != game.prior.size:
        raise ValueError(f"beliefs must be [B, K] with K={game.prior.size}, got {beliefs.shape}")
    beliefs = beliefs.astype(game.reward.dtype)
    states = jnp.arange(game.initial.size)

    def earlier(alpha: Array, _: None) -> tuple[Array, tuple[Array, ...]]:
        backup = lambda state: _backup(game, human, beliefs, alpha, state, starts, rounds)  # noqa: E731
        alpha, *choices = jax.lax.map(backup, states)
        return alpha, (alpha, *choices)

    last = jnp.zeros((states.size, *beliefs.shape), beliefs.dtype)
    _, (alpha, action, policy, successor) = jax.lax.scan(earlier, last, None, length=horizon, reverse=True)
    worth = alpha[0] @ game.prior
    start = jnp.argmax(worth, axis=-1).astype(jnp.int32)
    return AssistancePlan(game.initial @ jnp.max(worth, axis=-1), start, alpha, action, policy, successor)


def _backup(
    game: AssistanceGame,
    human: Array | PedagogicHuman,
    beliefs: Array,
    alpha: Array,
    state: Array,
    starts: int,
    rounds: int,
) -> tuple[Array, Array, Array, Array]:
    """(alpha [B, K], robot action [B], human policy [B, K, H], successor [B, H, S]) in one state."""
    chance, earned = game.transition[state], game.reward[:, state]  # [H, R, S], [K, H, R]
    each_state = jnp.arange(alpha.shape[0])[None, None, :]
    shape = (*beliefs.shape, chance.shape[0])

    def nodes_for(policy: Array) -> Array:
        worth = jnp.einsum("bkh,zmk->bhzm", beliefs[:, :, None] * policy, alpha)
        return jnp.argmax(worth, axis=-1).astype(jnp.int32)

    def q_of(nodes: Array, action: Array) -> Array:
        follow = jnp.einsum("hz,bhzk->bkh", chance[:, action], alpha[each_state, nodes])
        return earned[None, :, :, action] + game.discount * follow

    def answer(policy: Array, action: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        trembling = (1.0 - TREMBLE) * policy + TREMBLE / shape[2] if pedagogic else policy
        nodes = nodes_for(trembling)
        q = q_of(nodes, action)
        policy = respond(human, q[None])[0] if pedagogic else policy
        return policy, (jnp.sum(policy * q, axis=-1), policy, nodes)

    def lane(policy: Array, action: Array) -> tuple[Array, Array, Array]:
        return jax.lax.scan(lambda p, _: answer(p, action), policy, None, length=rounds)[1]

    pedagogic = isinstance(human, PedagogicHuman)
    if isinstance(human, PedagogicHuman):
        first = jnp.concatenate([jnp.full((1, *shape[1:]), 1.0 / shape[2]), _codes(starts - 1, *shape[1:])])
    else:
        first, rounds = human[:, state][None], 1
    first = jnp.broadcast_to(first[:, None].astype(alpha.dtype), (first.shape[0], *shape))
    actions = jnp.arange(chance.shape[1])
    across_actions = jax.vmap(lane, in_axes=(None, 0))
    # [starts, R, rounds, B, ...]: starts one after the other, to hold less at a time.
    found = jax.lax.map(lambda policy: across_actions(policy, actions), first)
    found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), found)
    best = jnp.argmax(jnp.einsum("lbk,bk->lb", found[0], beliefs), axis=0)
    alpha, policy, nodes = jax.tree.map(lambda x: x[best, jnp.arange(best.size)], found)
    alpha = jnp.where(game.terminal[state], 0.0, alpha)
    return alpha, (best // rounds % actions.size).astype(jnp.int32), policy, nodes


def _codes(num: int, hypotheses: int, human_actions: int) -> Array:
    """Arbitrary deterministic human policies, [num, K, H]: the same at every call."""
    words = jax.random.randint(jax.random.key(0), (num, hypotheses), 0, human_actions)
    return jax.nn.one_hot(words, human_actions)


def reachable_beliefs(game: AssistanceGame, human: Array, *, horizon: int) -> Array:
    """Every belief that a fixed human's actions can lead to in horizon - 1 steps from the prior, [B, K].

    human: [K, S, H]. A belief depends only on how often each of the S H pairs was seen: B = C(S H + horizon - 1,
    horizon - 1). Histories that cannot happen give the prior. Raises ValueError as `solve_assistance` does.
    """
    check_human(game, human)
    rows = jnp.moveaxis(jnp.asarray(human), 0, 2).reshape(-1, game.prior.size)
    # The last row stands for a step not taken.
    likelihood = jnp.log(jnp.concatenate([rows, jnp.ones_like(rows[:1])]))
    histories = list(itertools.combinations_with_replacement(range(likelihood.shape[0]), horizon - 1))
    seen = np.array(histories, np.int32).reshape(len(histories), horizon - 1)
    log_weights = jnp.log(game.prior)[None, :] + jnp.sum(likelihood[seen], axis=1)
    possible = jnp.any(log_weights > -jnp.inf, axis=1, keepdims=True)
    return jax.nn.softmax(jnp.where(possible, log_weights, jnp.log(game.prior)[None, :]), axis=1)


def subset_beliefs(prior: Array) -> Array:
    """The prior restricted to each non-empty set of hypotheses, [2^K - 1, K]: all that a deterministic human can
    convey.

    Raises ValueError if there are more than 12 hypotheses.
    """
    if prior.size > 12:
        raise ValueError(f"subset_beliefs: {prior.size} hypotheses have too many subsets; at most 12")
    members = np.arange(1, 2**prior.size)[:, None] >> np.arange(prior.size)[None, :] & 1
    weights = jnp.asarray(members, prior.dtype) * prior[None, :]
    total = jnp.sum(weights, axis=1, keepdims=True)
    return jnp.where(total > 0.0, weights / jnp.where(total > 0.0, total, 1.0), prior[None, :])
