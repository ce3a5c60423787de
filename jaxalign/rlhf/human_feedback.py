"""From steps to segments, from segments to questions, and from answers to rewards: the pure part of human feedback."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import Network
from jaxalign.environments.protocol import Environment
from jaxalign.environments.wrappers import batched
from jaxalign.irl.active import expected_information_gain
from jaxalign.preferences.comparisons import Comparisons
from jaxalign.preferences.reward_ensemble import ensemble_mean
from jaxalign.rl.actor_critic import encode
from jaxalign.rl.incentives import Incentive
from jaxalign.rl.rollout import Steps, collect
from jaxalign.rlhf.annotators import Scorer
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

Features = Callable[[Steps], Array]
Acquisition = Callable[[Key, Array, Array], Array]


class Segments(NamedTuple):
    """S stretches of behaviour.

    features: [S, L, F], what a reward may depend on
    rewards: [S, L], what the annotator judges by
    mask: bool [S, L], the real steps; always the first n of the L
    """

    features: Array
    rewards: Array
    mask: Array


class Scored(NamedTuple):
    """Q segments and what somebody gave each: features [Q, L, F], mask bool [Q, L], scores [Q]."""

    features: Array
    mask: Array
    scores: Array


def step_features(environment: Environment) -> Features:
    """Steps [T, N] -> [T, N, F]: the observation, the action (one-hot if discrete), and whether the step terminated."""

    def features(steps: Steps) -> Array:
        seen = encode(environment.observation_space, steps.observations)
        done = encode(environment.action_space, steps.actions)
        return jnp.concatenate([seen, done, steps.terminated[..., None]], axis=-1, dtype=seen.dtype)

    return features


def segments(steps: Steps, features: Array, rewards: Array, length: int, *, stride: int | None = None) -> Segments:
    """Windows of `length` steps, beginning every `stride` steps (None: `length`) of each environment.

    A window that an episode's end falls into is real up to the end and masked past it, so that a segment never holds
    steps of two episodes. Whoever compares sums over real steps thus sees that an episode ended early: on CartPole,
    which pays 1 a step, nothing else tells two segments of one length apart.

    Args:
        steps: Steps [T, N], for their ends.
        features: [T, N, F].
        rewards: [T, N], the true ones.

    Returns Segments with S = ((T - length) // stride + 1) N. Raises ValueError unless 1 <= length <= T, stride >= 1.
    """
    stride = length if stride is None else stride
    count = steps.done.shape[0]
    if not 1 <= length <= count or stride < 1:
        raise ValueError(f"segments: needs 1 <= length <= {count} steps and stride >= 1, got {length} and {stride}")
    starts = jnp.arange(0, count - length + 1, stride)
    places = starts[:, None] + jnp.arange(length)[None, :]

    def windows(x: Array) -> Array:
        cut = jnp.swapaxes(x[places], 1, 2)  # [starts, length, N, ...] -> [starts, N, length, ...]
        return cut.reshape(-1, *cut.shape[2:])

    done = windows(steps.done).astype(jnp.int32)
    return Segments(windows(features), windows(rewards), jnp.cumsum(done, axis=1) - done == 0)


def graded_segments(
    key: Key,
    environment: Environment,
    act: Callable[[Key, Array], tuple[Array, Array]],
    features: Features,
    *,
    count: int,
    length: int,
) -> Segments:
    """`count` episodes from good to bad, cut off after `length` steps: to see whether a reward puts them in order.

    In episode i of 0..count-1 each action is drawn uniformly instead with probability i / (count - 1), as Brown et al.
    (arXiv:1907.03976) make behaviour of known order; where random actions do better, the order is the other way round.

    Args:
        act: (key, observations [count, ...]) -> (actions [count, ...], log_probs [count]), the policy.

    Returns Segments [count, length] with the environment's rewards. Raises ValueError as the action space's `sample`.
    """
    worlds = batched(environment, count)
    noise = jnp.linspace(0.0, 1.0, count)

    def sometimes_random(key: Key, observations: Array) -> tuple[Array, Array]:
        act_key, which_key, random_key = jax.random.split(key, 3)
        actions, log_probs = act(act_key, observations)
        drawn = jax.vmap(environment.action_space.sample)(jax.random.split(random_key, count))
        random = jax.random.bernoulli(which_key, noise).reshape(-1, *(1,) * (actions.ndim - 1))
        return jnp.where(random, drawn, actions), log_probs

    reset_key, run_key = jax.random.split(key)
    observations, world = worlds.reset(reset_key)
    _, steps = collect(run_key, worlds, sometimes_random, observations, world, num_steps=length)
    return segments(steps, features(steps), steps.rewards, length)


class FeedbackBuffer(NamedTuple):
    """The latest C rows of feedback, in arrays that keep their shape, so that they can be part of a state.

    rows: leaves [C, ...], zeros where nothing is yet
    count: [] int32, rows ever added; row i of all that were added is at i mod C
    """

    rows: Any
    count: Array


def init_buffer(row: Any, capacity: int) -> FeedbackBuffer:
    """An empty buffer for rows like `row` (leaves [Q, ...], of which only shapes and dtypes are used)."""
    zeros = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape[1:]), x.dtype), row)
    return FeedbackBuffer(zeros, jnp.zeros((), jnp.int32))


def add_rows(buffer: FeedbackBuffer, rows: Any) -> FeedbackBuffer:
    """The buffer with rows (leaves [Q, ...]) added; where it is full the oldest make room.

    Raises ValueError if Q is more than the capacity.
    """
    size, capacity = (jax.tree.leaves(x)[0].shape[0] for x in (rows, buffer.rows))
    if size > capacity:
        raise ValueError(f"add_rows: {size} rows do not fit a buffer of {capacity}")
    places = (buffer.count + jnp.arange(size)) % capacity
    written = jax.tree.map(lambda old, new: old.at[places].set(new), buffer.rows, rows)
    return FeedbackBuffer(written, buffer.count + size)


def draw_rows(key: Key, buffer: FeedbackBuffer, size: int) -> Any:
    """`size` rows drawn uniformly with replacement, leaves [size, ...]; before any was added, zeros."""
    capacity = jax.tree.leaves(buffer.rows)[0].shape[0]
    places = jax.random.randint(key, (size,), 0, jnp.clip(buffer.count, 1, capacity))
    return jax.tree.map(lambda x: x[places], buffer.rows)


def disagreement(key: Key, rewards_a: Array, rewards_b: Array) -> Array:
    """How much the members of an ensemble differ about each answer: var_e sigmoid(rewards_a[e] - rewards_b[e]), [Q].

    rewards_a, rewards_b: [E, Q], returns of the two segments under each member. Christiano et al., arXiv:1706.03741,
    section 2.2.4. The key is not used.
    """
    return jnp.var(jax.nn.sigmoid(rewards_a - rewards_b), axis=0)


def information_gain(key: Key, rewards_a: Array, rewards_b: Array) -> Array:
    """The nats each answer is expected to tell about which member is right, [Q]; shapes as `disagreement`.

    Unlike disagreement it counts out the noise that every member expects. Bıyık et al., arXiv:1910.04365.
    """
    x = rewards_a - rewards_b
    log_likelihood = jnp.stack([jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)], axis=-1)
    return expected_information_gain(log_likelihood, jnp.zeros(x.shape[0]))


def at_random(key: Key, rewards_a: Array, rewards_b: Array) -> Array:
    """Uniform numbers [Q]: any question is as good as another."""
    return jax.random.uniform(key, rewards_a.shape[1:])


def choose_pairs(
    key: Key, rewards: Array, *, queries: int, candidates: int, acquisition: Acquisition = disagreement
) -> tuple[Array, Array]:
    """The `queries` best of `candidates` random pairs of different segments.

    Args:
        rewards: [E, S], each segment's return under each member.
        acquisition: (key, rewards_a [E, M], rewards_b [E, M]) -> how much each pair is worth asking about [M].

    Returns indices of the first and second segment of each pair, both [queries] int32; the best first.
    Raises ValueError unless queries <= candidates and there are two segments.
    """
    size = rewards.shape[1]
    if size < 2 or not 1 <= queries <= candidates:
        raise ValueError(
            f"choose_pairs: needs 1 <= queries <= candidates and 2 segments, got {queries}, {candidates} and {size}"
        )
    first_key, gap_key, worth_key = jax.random.split(key, 3)
    first = jax.random.randint(first_key, (candidates,), 0, size)
    second = (first + jax.random.randint(gap_key, (candidates,), 1, size)) % size
    worth = acquisition(worth_key, rewards[:, first], rewards[:, second])
    best = jax.lax.top_k(worth, queries)[1]
    return first[best], second[best]


def comparisons(pool: Segments, first: Array, second: Array, outcome: Array, index: Array) -> Comparisons:
    """Answered pairs of segments as Comparisons [Q]: `chosen` is always the first, `outcome` says who was preferred.

    first, second: [Q], places in the pool; outcome: [Q] int32, 0, 1 or 2; index: [Q], the label's number of all.
    """
    return Comparisons(
        pool.features[first], pool.mask[first], pool.features[second], pool.mask[second], outcome=outcome, index=index
    )


def learned_reward(
    network: Network,
    features: Features,
    params: Params = None,
    *,
    aggregate: Callable[[Array], Array] = ensemble_mean,
    normalize: bool = True,
) -> Incentive:
    """An Incentive that pays what an ensemble of reward networks gives each step, whatever the environment pays.

    pay[t, n] = aggregate_e(r[e, t, n] / sqrt(mean_tn r[e]^2)),  r[e] = member e's reward of step t alone

    Each member is scaled to root mean square 1 over the steps at hand before they are put together, so that none is
    louder than another. Their mean is left as it is: where episodes differ in length, a constant reward says whether
    to go on, and taking it away (as Christiano et al. do, whose episodes never end) would lose what was learned.

    Args:
        network: a reward network of segments, apply(params, features [B, T, F], mask [B, T]) -> [B].
        params: of the ensemble, leaves [E, ...]; the Incentive's state, which `apply` may be given anew.
        aggregate: [E, T, N] -> [T, N]: `ensemble_mean`, `worst_case`, or `lower_confidence_bound` with a coefficient.
        normalize: False pays the networks' own numbers.

    Metrics: "reward/learned" (mean pay before scaling, over members and steps), "reward/disagreement" (mean over steps
    of the members' standard deviation, after scaling).
    """

    def apply(params: Params, steps: Steps, key: Key) -> tuple[Params, Array, Metrics]:
        rows = features(steps)
        alone = rows.reshape(-1, 1, rows.shape[-1])
        each = jax.vmap(lambda member: network.apply(member, alone, jnp.ones(alone.shape[:2], bool)))(params)
        learned = jnp.mean(each)
        if normalize:
            each = each / (jnp.sqrt(jnp.mean(jnp.square(each), axis=1, keepdims=True)) + 1e-6)
        each = each.reshape(each.shape[0], *rows.shape[:2])
        metrics = {"reward/learned": learned, "reward/disagreement": jnp.mean(jnp.std(each, axis=0))}
        return params, aggregate(each), metrics

    return Incentive(lambda key: params, apply)


def scored_feedback(scorer: Scorer, *, segment_length: int, weight: ArrayLike = 0.1) -> Incentive:
    """An Incentive that adds scores to what is paid already: rewards + weight * score of the segment a step is in.

    The steps [T, N] are cut into T / segment_length windows; each episode's part of a window is scored as a segment of
    its own by `scorer`, (key, rewards [S, L], mask [S, L]) -> [S]. weight: 0.1 is the customary one.

    Metrics: "feedback/score", the mean score over steps. Raises ValueError at trace time if T is no multiple of
    segment_length.
    """

    def apply(state: tuple[()], steps: Steps, key: Key) -> tuple[tuple[()], Array, Metrics]:
        scores = _spread_scores(key, scorer, steps, segment_length)
        return state, steps.rewards + weight * scores, {"feedback/score": jnp.mean(scores)}

    return Incentive(lambda key: (), apply)


def _spread_scores(key: Key, scorer: Scorer, steps: Steps, length: int) -> Array:
    """The score [T, N] of the segment each step is in."""
    count, lanes = steps.rewards.shape
    if count % length:
        raise ValueError(f"scored_feedback: {count} steps are no multiple of segment_length={length}")

    def windows(x: Array) -> Array:
        return x.reshape(count // length, length, lanes).swapaxes(1, 2).reshape(-1, length)

    rewards, done = windows(steps.rewards), windows(steps.done).astype(jnp.int32)
    episode = jnp.cumsum(done, axis=1) - done  # which of the window's episodes a step is of

    def one(key: Key, number: Array) -> Array:
        mask = episode == number
        return jnp.where(mask, scorer(key, rewards, mask)[:, None], 0.0)

    keys = jax.random.split(key, length)
    scores, _ = jax.lax.scan(
        lambda total, x: (total + one(*x), None), jnp.zeros_like(rewards), (keys, jnp.arange(length))
    )
    return scores.reshape(count // length, lanes, length).swapaxes(1, 2).reshape(count, lanes)


def pairwise_agreement(predicted: ArrayLike, true: ArrayLike) -> Array:
    """The part of pairs with different `true` values that `predicted` puts in the same order; equal predictions half.

    predicted, true: [M]. Returns [], NaN if all `true` are equal; (Kendall's tau + 1) / 2 where nothing is equal.
    Holds [M, M].
    """
    predicted, true = jnp.asarray(predicted), jnp.asarray(true)
    wanted = jnp.sign(true[:, None] - true[None, :])
    found = jnp.sign(predicted[:, None] - predicted[None, :])
    told = jnp.sum(wanted != 0.0)
    return jnp.where(told > 0, jnp.sum(jnp.where(wanted != 0.0, (1.0 + wanted * found) / 2.0, 0.0)) / told, jnp.nan)
