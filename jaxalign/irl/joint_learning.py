"""Learning a reward from demonstrations and a model of the human from comparisons, each held to the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm
from jaxalign.irl.rewards import evaluate_reward
from jaxalign.irl.trajectories import Trajectories, check_trajectories, visit_counts
from jaxalign.mdp import TabularMDP, action_reward, soft_value_iteration
from jaxalign.preferences.bradley_terry import bradley_terry_loss
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class ComparedVisits(NamedTuple):
    """B pairs of trajectories by what they visited, and which of the two the human preferred.

    first, second: [B, S, A], sum_t discount^t 1[s_t = s, a_t = a] (see `trajectory_visits`)
    first_preferred: [B], bool, or the probability that the first was preferred
    """

    first: Array
    second: Array
    first_preferred: Array


def trajectory_visits(mdp: TabularMDP, trajectories: Trajectories) -> Array:
    """visits[n, s, a] = sum_t discount^t 1[s_nt = s, a_nt = a, mask_nt], [N, S, A]; terminal states count 0.

    A trajectory's return is sum(visits[n] * reward). Raises ValueError as `check_trajectories`.
    """
    check_trajectories(mdp, trajectories)
    rows = jax.tree.map(lambda x: x[:, None], trajectories)
    return jax.vmap(lambda row: visit_counts(mdp, row, discount=mdp.discount))(rows)


def preference_nll(reward: Array, mdp: TabularMDP, pairs: ComparedVisits, *, beta: ArrayLike = 1.0) -> Array:
    """Each comparison's negative log-likelihood if P(first preferred) = sigmoid(beta (return of first - of second)),
    [B].

    reward: [S], [S, A] or [S, A, S]; beta per unit of reward. Nats. Christiano et al. (2017), arXiv:1706.03741 eq. 1.
    """
    reward = action_reward(mdp, reward)
    first, second = (jnp.einsum("bsa,sa->b", visits, reward) for visits in (pairs.first, pairs.second))
    preferred = pairs.first_preferred.astype(first.dtype)
    won, lost = bradley_terry_loss(beta * first, beta * second), bradley_terry_loss(beta * second, beta * first)
    return preferred * won + (1.0 - preferred) * lost


def policy_coherence(
    reward: Array,
    other_reward: Array,
    mdp: TabularMDP,
    *,
    temperature: ArrayLike = 1.0,
    state_weights: Array | None = None,
) -> Array:
    """How far two rewards disagree on what to do: a scalar >= 0 in nats, 0 if and only if their soft policies agree.

    sum_s w[s] (KL(p(. | s) || q(. | s)) + KL(q(. | s) || p(. | s))) / 2,  p and q of `soft_value_iteration`

    reward, other_reward: [S], [S, A] or [S, A, S]. Blind to what planning cannot see, shaping by potentials (and,
    without terminal states, constants), unlike a difference of the rewards. state_weights: w [S], None: uniform over
    the states that are not terminal.
    """
    plans = (soft_value_iteration(mdp, r, temperature=temperature) for r in (reward, other_reward))
    log_p, log_q = (plan.log_policy for plan in plans)
    return _disagreement(mdp, log_p, log_q, state_weights)


def _disagreement(mdp: TabularMDP, log_p: Array, log_q: Array, state_weights: Array | None) -> Array:
    alive = ~mdp.terminal
    weights = alive / jnp.sum(alive) if state_weights is None else jnp.where(alive, state_weights, 0.0)
    # KL(p || q) + KL(q || p) = sum (p - q) (log p - log q)
    return 0.5 * jnp.sum(weights[:, None] * (jnp.exp(log_p) - jnp.exp(log_q)) * (log_p - log_q))


def joint_reward_learning(
    mdp: TabularMDP,
    reward_network: Network,
    human_network: Network,
    optimizer: optax.GradientTransformation,
    trajectories: Trajectories | Array,
    *,
    coherence: ArrayLike,
    features: Array | None = None,
    demonstration_weight: ArrayLike = 1.0,
    preference_weight: ArrayLike = 1.0,
    temperature: ArrayLike = 1.0,
    learn_beta: bool = False,
    state_weights: Array | None = None,
) -> Algorithm:
    """Learn one reward from what the human does, another from what the human says, and make their policies agree.

    r = reward_network(params["reward"]),  h = human_network(params["human"]),  beta = exp(params["log_beta"])
    loss = demonstration_weight * demonstration_nll(r)            # causal entropy, nats per demonstrated action
         + preference_weight * mean_b preference_nll(h, beta)     # Bradley-Terry, nats per comparison
         + coherence * policy_coherence(r, h)                     # nats per state

    Batches are ComparedVisits. With coherence 0 the two are learnt apart; as it grows they share one soft policy, and
    each source speaks for the states that the other never saw.

    What is identified: demonstrations give r / temperature, up to shaping. Comparisons give beta * h and not beta
    itself, so beta is held at 1 unless `learn_beta`; then it is identified by coherence > 0 alone, which ties h's scale
    to r's. A constant added to h changes no comparison of equally long trajectories.

    Args:
        reward_network, human_network: `apply(params, features)` gives a reward [S] (or [S, 1], or [S, A]).
        trajectories: demonstrations [N, T], or an occupancy [S, A].
        features: [S, F] (or [S, A, F]); None: one-hot states [S, S].
        temperature: of the demonstrator and of the soft policies compared.
        state_weights: [S], where agreement counts; None: everywhere alike.

    Metrics: "loss", "demonstration_nll", "preference_nll", "coherence" (all unweighted but the loss), "beta".
    Raises ValueError as `check_trajectories`, or if an array is of another shape.
    """
    counts = visit_counts(mdp, trajectories) if isinstance(trajectories, Trajectories) else trajectories
    features = jnp.eye(mdp.num_states) if features is None else jnp.asarray(features)
    if features.shape[0] != mdp.num_states:
        raise ValueError(f"joint_reward_learning: features must be [{mdp.num_states}, F], got {features.shape}")
    if counts.shape != (mdp.num_states, mdp.num_actions):
        raise ValueError(f"joint_reward_learning: an occupancy must be [S, A], got {counts.shape}")

    def init(key: Key) -> Params:
        reward_key, human_key = jax.random.split(key)
        params = {"reward": reward_network.init(reward_key), "human": human_network.init(human_key)}
        return {**params, "log_beta": jnp.zeros(())}

    def objective(params: Params, batch: ComparedVisits, key: Key) -> tuple[Array, Metrics]:
        reward = evaluate_reward(reward_network, params["reward"], features)
        human = evaluate_reward(human_network, params["human"], features)
        log_beta = params["log_beta"] if learn_beta else jax.lax.stop_gradient(params["log_beta"])
        plans = (soft_value_iteration(mdp, r, temperature=temperature) for r in (reward, human))
        log_p, log_q = (plan.log_policy for plan in plans)
        # causal_entropy_nll, but its plan, the greater part of the work, serves twice.
        demonstrated = -jnp.sum(counts * log_p) / jnp.sum(counts)
        stated = jnp.mean(preference_nll(human, mdp, batch, beta=jnp.exp(log_beta)))
        apart = _disagreement(mdp, log_p, log_q, state_weights)
        loss = jnp.asarray(demonstration_weight * demonstrated + preference_weight * stated + coherence * apart)
        metrics = {"demonstration_nll": demonstrated, "preference_nll": stated, "coherence": apart}
        return loss, {**metrics, "beta": jnp.exp(log_beta)}

    network = Network(init, lambda params, x: evaluate_reward(reward_network, params["reward"], x))
    return gradient_algorithm(network, objective, optimizer)
