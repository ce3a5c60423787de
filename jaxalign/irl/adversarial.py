"""Adversarial IRL, the discriminator's side: losses, and the rewards of GAIL and AIRL that a discriminator learns.

Logits are log-odds that a transition is the expert's: D = sigmoid(logits), positive for the expert.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithm import Algorithm, Network, gradient_algorithm
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params


class Transitions(NamedTuple):
    """B steps in any order, of one policy or of the expert.

    states, next_states: what the networks take: state numbers [B] of a tabular MDP, or observations [B, ...]
    actions: [B] int, or [B, D] float
    terminated: bool [B], True where next_states is terminal; a step cut off by a time limit is not
    log_probs: [B], log pi(a | s) of the policy being trained (whoever took the step), or None where nothing needs it
    weights: [B] >= 0, how much each step counts in means (discount^t, or exact occupancies); None: all the same
    resting: bool [B], True where nothing is chosen, after an episode's end (`rl.absorbing_transitions`); None: nowhere
    """

    states: Array
    actions: Array
    next_states: Array
    terminated: Array
    log_probs: Array | None = None
    weights: Array | None = None
    resting: Array | None = None


class AdversarialReward(NamedTuple):
    """A reward learned by telling the expert's steps from the policy's.

    init: key -> params
    logits: (params, Transitions) -> [B], log-odds of being the expert's
    reward: (params, Transitions) -> [B], what the policy earns before its entropy: it maximises
        E sum_t discount^t (reward_t - temperature log pi(a_t | s_t)), the temperature being the policy learner's
    """

    init: Callable[[Key], Params]
    logits: Callable[[Params, Transitions], Array]
    reward: Callable[[Params, Transitions], Array]


def discriminator_loss(expert_logits: ArrayLike, policy_logits: ArrayLike) -> Array:
    """Binary cross-entropy of one expert and one policy step: -log D(expert) - log(1 - D(policy)), D = sigmoid(logits).

    loss = softplus(-expert_logits) + softplus(policy_logits), [B] each -> [B], nats, not reduced.

    Its mean is at least 2 ln 2 - 2 JSD(expert, policy), reached by logits = log d_expert - log d_policy. Batches of
    different sizes have no per-example sum: `discriminator` adds the two means. Raises AssertionError, showing the
    shapes, if they differ. Goodfellow et al., arXiv:1406.2661 eq. 1; Ho and Ermon, arXiv:1606.03476 eq. 14.

    >>> float(discriminator_loss(0.0, 0.0))
    1.3862943649291992
    """
    expert_logits, policy_logits = _same_shape(expert_logits, policy_logits)
    return jax.nn.softplus(-expert_logits) + jax.nn.softplus(policy_logits)


def airl_logits(f: ArrayLike, log_prob: ArrayLike) -> Array:
    """f - log_prob: the log-odds of D = exp(f) / (exp(f) + pi(a | s)), [B] each -> [B].

    It is also the reward of AIRL's policy, log D - log(1 - D). Raises AssertionError if the shapes differ.
    Fu, Luo and Levine, arXiv:1710.11248, section 4.
    """
    f, log_prob = _same_shape(f, log_prob)
    return f - log_prob


def gail_reward(network: Network, *, reward: Callable[[Array], Array] = jax.nn.softplus) -> AdversarialReward:
    """GAIL: the network's output is the logit itself, and the policy earns reward(logits).

    The default -log(1 - D) = softplus(logits) is the paper's and never negative, so where episodes can end it pays for
    staying alive; `jax.nn.log_sigmoid` (log D) pays for ending, and `lambda x: x` (their sum) does neither by sign.

    `network.apply(params, states)` may return [B] or [B, 1] (states alone), or [B, A], of which the action taken is
    read; with float actions it is called as `apply(params, states, actions)`. Ho and Ermon, arXiv:1606.03476, alg. 1.
    """

    def logits(params: Params, steps: Transitions) -> Array:
        return _score(network, params, steps)

    return AdversarialReward(network.init, logits, lambda params, steps: reward(logits(params, steps)))


def airl_reward(reward_network: Network, potential_network: Network, *, discount: ArrayLike) -> AdversarialReward:
    """AIRL: a reward g apart from a shaping term, so that g can be carried to other dynamics.

    f(s, a, s') = g(s[, a]) + discount (1 - terminated) h(s') - h(s);  logits = f - log pi(a | s)

    The policy earns f at entropy temperature 1, which is the paper's reward f - log pi with the logarithm left to the
    learner, whose policy changes while it learns. At the optimum f is the expert's soft advantage; then, if g is of
    states alone, the dynamics are deterministic and any two states are linked by shared predecessors, g is the true
    reward up to a constant (exactly, if an episode can end). At another temperature it is not.

    Args:
        reward_network: g, called as in `gail_reward`; [B] or [B, 1] is state-only, [B, A] state-action.
        potential_network: h, `apply(params, states) -> [B]` or [B, 1].
        discount: the MDP's.

    Params: {"reward": g's, "potential": h's}. Fu, Luo and Levine, arXiv:1710.11248 eq. 4 and theorem 5.1.
    """

    def init(key: Key) -> Params:
        reward_key, potential_key = jax.random.split(key)
        return {"reward": reward_network.init(reward_key), "potential": potential_network.init(potential_key)}

    def f(params: Params, steps: Transitions) -> Array:
        rows = steps.terminated.shape[0]
        now, after = (
            potential_network.apply(params["potential"], x).reshape(rows) for x in (steps.states, steps.next_states)
        )
        after = jnp.where(steps.terminated, 0.0, after)
        return _score(reward_network, params["reward"], steps) + discount * after - now

    def logits(params: Params, steps: Transitions) -> Array:
        if steps.log_probs is None:
            raise ValueError("airl_reward: the transitions need log_probs, log pi(a | s) of the policy being trained")
        return airl_logits(f(params, steps), steps.log_probs)

    return AdversarialReward(init, logits, f)


def discriminator(
    adversary: AdversarialReward,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int | None = None,
    gradient_penalty: ArrayLike | None = None,
) -> Algorithm:
    """Logistic regression of expert against policy steps, from any environment, as an Algorithm over TrainState.

    objective = mean_expert softplus(-logits) + mean_policy softplus(logits) + gradient_penalty steepness
    steepness = the squared slope of the logits in states and next_states, mean of mean_expert and mean_policy

    Means are weighted by `weights`. A batch is (expert Transitions [B], policy Transitions [B']).

    Args:
        batch_size: rows drawn of each side, by `draw_transitions`; None: all.
        gradient_penalty: keeps a discriminator that could tell the sides apart at once from saying so too surely, where
            nothing is left to learn from. Slopes are per standard deviation of the expert's states [B, ...], which must
            be real numbers. None: no penalty. R1 and R2 of Mescheder, Geiger & Nowozin, arXiv:1801.04406, together.

    Metrics: "loss", "accuracy/expert" and "accuracy/policy" (shares told rightly, 0.5 each for a logit of 0),
    "gradient_norm".
    """

    def objective(params: Params, batch: tuple[Transitions, Transitions], key: Key) -> tuple[Array, Metrics]:
        expert, policy = batch
        if batch_size is not None:
            keys = jax.random.split(key)
            expert, policy = (draw_transitions(k, x, batch_size) for k, x in zip(keys, batch, strict=True))
        expert_logits, policy_logits = adversary.logits(params, expert), adversary.logits(params, policy)
        loss = weighted_mean(jax.nn.softplus(-expert_logits), expert) + weighted_mean(
            jax.nn.softplus(policy_logits), policy
        )
        right = lambda logits: 0.5 * (jnp.sign(logits) + 1.0)  # noqa: E731
        if gradient_penalty is not None:
            loss += gradient_penalty * _steepness(adversary, params, expert, policy)
        metrics = {
            "accuracy/expert": weighted_mean(right(expert_logits), expert),
            "accuracy/policy": weighted_mean(right(-policy_logits), policy),
        }
        return loss, metrics

    return gradient_algorithm(Network(adversary.init, lambda *_: None), objective, optimizer)


def draw_transitions(key: Key, steps: Transitions, size: int) -> Transitions:
    """`size` of the steps [B], drawn with replacement in proportion to their weights, so that they weigh the same."""
    rows = steps.terminated.shape[0]
    shares = None if steps.weights is None else steps.weights / jnp.sum(steps.weights)
    chosen = jax.random.choice(key, rows, (size,), p=shares)
    return jax.tree.map(lambda x: x[chosen], steps._replace(weights=None))


def weighted_mean(values: Array, steps: Transitions) -> Array:
    """sum(weights * values) / sum(weights) over the steps, [B] -> scalar."""
    if steps.weights is None:
        return jnp.mean(values)
    # A step that does not count may hold anything: 0 * inf is NaN.
    values = jnp.where(steps.weights > 0, values, 0.0)
    return jnp.sum(steps.weights * values) / jnp.sum(steps.weights)


def _steepness(adversary: AdversarialReward, params: Params, expert: Transitions, policy: Transitions) -> Array:
    """Mean over both sides' steps of |d logits / d states|^2 + |d logits / d next_states|^2, states in deviations."""
    if not jnp.issubdtype(expert.states.dtype, jnp.floating):
        raise ValueError(f"gradient_penalty: states must be real to have slopes in them, got {expert.states.dtype}")

    def average(x: Array) -> Array:
        return jax.vmap(lambda column: weighted_mean(column, expert), in_axes=1)(x.reshape(len(x), -1))[None, :]

    rows = expert.states.reshape(len(expert.states), -1)
    deviation = jnp.sqrt(average(jnp.square(rows - average(rows))))

    def of(steps: Transitions) -> Array:
        def total(states: Array, next_states: Array) -> Array:
            return jnp.sum(adversary.logits(params, steps._replace(states=states, next_states=next_states)))

        slopes = jax.grad(total, argnums=(0, 1))(steps.states, steps.next_states)
        per_deviation = jnp.concatenate([deviation * x.reshape(len(x), -1) for x in slopes], axis=1)
        return weighted_mean(jnp.sum(jnp.square(per_deviation), axis=1), steps)

    return 0.5 * (of(expert) + of(policy))


def _score(network: Network, params: Params, steps: Transitions) -> Array:
    """The network's output for each step, [B]; see `gail_reward` for the shapes it may return."""
    rows = steps.terminated.shape[0]
    discrete = jnp.issubdtype(steps.actions.dtype, jnp.integer)
    out: Any = network.apply(params, steps.states, *(() if discrete else (steps.actions,)))
    if out.size == rows:
        return out.reshape(rows)
    if not discrete or out.ndim != 2 or out.shape[0] != rows:
        raise ValueError(f"the network returned {out.shape} for {rows} steps: it must be [B], [B, 1] or [B, A]")
    return jnp.take_along_axis(out, steps.actions[:, None], axis=1)[:, 0]


def _same_shape(*values: ArrayLike) -> list[Array]:
    arrays = [jnp.asarray(value) for value in values]
    chex.assert_equal_shape(arrays)
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in arrays]
