"""Which question about a reward to ask next: information gain, batches, volume removal, and the loop that asks.

Hypotheses n are rewards (posterior samples or particles of the prior) with weights w = softmax(log_weights); a query q
has K answers, and log_likelihood[n, q, k] = log P(answer k to query q | reward n), in nats, with exp of it summing to 1
over k. Answers are independent given the reward. Impossible answers (-inf) and hypotheses of weight 0 are allowed.
`jaxalign.irl.queries` makes such tables.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import entr

from jaxalign.types import Array, ArrayLike, Key

EXACT = lax.Precision.HIGHEST  # the default on accelerators rounds factors to 10 bits, more than a small gain

Score = Callable[[Array, Array], Array]


def expected_information_gain(log_likelihood: ArrayLike, log_weights: ArrayLike) -> Array:
    """How many nats the answer to each query is expected to tell about the reward:

    gain[q] = sum_n w[n] sum_k p[n, q, k] log(p[n, q, k] / sum_m w[m] p[m, q, k]),  p = exp(log_likelihood)

    the mutual information of answer and hypothesis, H(answer) - E_n H(answer | n); in [0, min(log K, H(w))].

    Args:
        log_likelihood: [N, Q, K].
        log_weights: [N], normalised here.

    Returns [Q], exact for these hypotheses. 0 log 0 is 0, in the gradient too. Raises ValueError on other shapes.
    Lindley 1956; Bıyık et al., arXiv:1910.04365 (there in bits).

    A question without noise that splits two equally likely rewards is worth log 2:

    >>> round(float(expected_information_gain(jnp.log(jnp.eye(2))[:, None], jnp.zeros(2))[0]), 4)
    0.6931
    """
    log_likelihood, log_weights = _table(log_likelihood, log_weights, "expected_information_gain")
    return _mutual_information(log_likelihood, jax.nn.softmax(log_weights))


def comparison_information_gain(returns: ArrayLike, log_weights: ArrayLike, *, beta: ArrayLike) -> Array:
    """`expected_information_gain` of "do you prefer i or j?" for every pair of M trajectories, [M, M].

    P(i preferred to j | n) = sigmoid(beta (returns[n, i] - returns[n, j])). Symmetric, with a diagonal of 0.
    Exact, each pair once, N M pairs and hypotheses at a time: memory is [N, M] and the result.

    Args:
        returns: [N, M], of each trajectory under each hypothesis.
        log_weights: [N].
        beta: how rational the person is, per unit of return.

    Raises ValueError on other shapes.
    """
    returns, log_weights = _floating(returns, log_weights)
    if returns.ndim != 2 or log_weights.shape != returns.shape[:1]:
        raise ValueError(
            "comparison_information_gain: returns must be [N, M] and log_weights [N], "
            f"got {returns.shape} and {log_weights.shape}"
        )
    count = returns.shape[1]
    if count < 2:
        return jnp.zeros((count, count), returns.dtype)
    weights, index = jax.nn.softmax(log_weights), jnp.arange(count)
    scaled = beta * returns
    twice = jnp.concatenate([scaled, scaled], axis=1)

    @jax.checkpoint  # so that a gradient does not hold N M^2 numbers
    def pairs_at(distance: Array) -> Array:
        """The gain of (i, i + distance) for every i, round the circle of trajectories, [M]."""
        return _binary_information(scaled - lax.dynamic_slice_in_dim(twice, distance, count, axis=1), weights)

    # Distances up to M / 2 meet every pair. One at a time stays in the processor's cache.
    distances = jnp.arange(1, count // 2 + 1)
    gains = lax.map(pairs_at, distances)
    rows = jnp.broadcast_to(index[None, :], gains.shape)
    matrix = jnp.zeros((count, count), gains.dtype).at[rows, (rows + distances[:, None]) % count].set(gains)
    return jnp.maximum(matrix, matrix.T)


def joint_information_gain(log_likelihood: ArrayLike, log_weights: ArrayLike, batch: ArrayLike) -> Array:
    """What the answers to a whole batch tell together, in nats: I(reward; answers to batch[0], ..., batch[k-1]).

    log_likelihood [N, Q, K], log_weights [N], batch int [k] -> scalar. Exact, over all K^k joint answers: holds
    [N, K^k]. Raises ValueError on other shapes.
    """
    log_likelihood, log_weights = _table(log_likelihood, log_weights, "joint_information_gain")
    batch = jnp.asarray(batch)
    if batch.ndim != 1:
        raise ValueError(f"joint_information_gain: batch must be [k], got {batch.shape}")
    joint = jnp.zeros((log_likelihood.shape[0], 1), log_likelihood.dtype)
    for j in range(batch.size):  # the table grows at each
        answers = log_likelihood[:, batch[j]]
        joint = (joint[:, :, None] + answers[:, None, :]).reshape(joint.shape[0], -1)
    return _mutual_information(joint, jax.nn.softmax(log_weights))


def select_queries(
    log_likelihood: ArrayLike,
    log_weights: ArrayLike,
    k: int,
    *,
    key: Key | None = None,
    max_scenarios: int = 1024,
) -> Array:
    """A batch of k queries to ask together, greedily by the information in their joint answers.

    Each pick maximises what its answer adds to those picked before, the mean over their joint answers c of
    I(reward; answer to q | c), so what an earlier question told counts no more. The information of a set is monotone
    and submodular: an exact greedy batch has at least 1 - 1/e of the best one's (Nemhauser et al. 1978).

    The mean over c is exact while the K^(k-1) joint answers are no more than `max_scenarios`. Beyond, the first picks
    (as many as fit) stay enumerated and the later answers are drawn from their predictive distribution, about
    `max_scenarios` draws in all; given the draws the inner information stays exact. After BatchBALD (Kirsch et al.,
    arXiv:1906.08158, section 3).

    Args:
        log_likelihood: [N, Q, K].
        log_weights: [N].
        k: static. No query is picked twice; an equal one elsewhere in the pool counts as asking again.
        key: for the draws, if any; None is `jax.random.key(0)`.
        max_scenarios: static, C; holds [C, Q, K] and [C, N].

    Returns indices [k] int32, the most informative first. Raises ValueError if k is not in 1..Q, or on other shapes.
    """
    log_likelihood, log_weights = _table(log_likelihood, log_weights, "select_queries")
    num, queries, answers = log_likelihood.shape
    if not 1 <= k <= queries:
        raise ValueError(f"select_queries: k must be in 1..{queries}, got {k}")
    if max_scenarios < 1:
        raise ValueError(f"select_queries: max_scenarios must be at least 1, got {max_scenarios}")
    enumerated = 0
    while enumerated < k - 1 and answers ** (enumerated + 1) <= max_scenarios:
        enumerated += 1
    exact = answers**enumerated
    scenarios = exact if enumerated == k - 1 else exact * (max_scenarios // exact)
    # digits[j, c]: the answer to pick j in scenario c. Scenarios alike so far share their probability.
    digits = [np.arange(scenarios) // answers ** min(j, enumerated) % answers for j in range(k)]
    prior, probability = jax.nn.log_softmax(log_weights), jnp.exp(log_likelihood)
    entropy = jnp.sum(entr(probability), axis=-1)  # [N, Q]

    def pick(carry: tuple[Array, Array, Array], inputs: tuple[Array, Array, Key]) -> tuple[tuple, Array]:
        seen, log_share, open_queries = carry  # [C, N] log P(answers | n), [C], [Q]
        step, digit, key = inputs
        joint = prior[None, :] + seen
        evidence = jax.nn.logsumexp(joint, axis=1)
        log_share = jnp.where(step <= enumerated, evidence, log_share)
        # Answers that cannot occur together have share 0, and any posterior will do.
        posterior = jax.nn.softmax(jnp.where(evidence[:, None] == -jnp.inf, prior[None, :], joint), axis=1)
        predicted = jnp.einsum("cn,nqk->cqk", posterior, probability, precision=EXACT)
        known = jnp.einsum("cn,nq->cq", posterior, entropy, precision=EXACT)
        gains = jnp.sum(entr(predicted), axis=-1) - known
        gain = jnp.einsum("c,cq->q", jax.nn.softmax(log_share), gains, precision=EXACT)
        query = jnp.argmax(jnp.where(open_queries, gain, -jnp.inf)).astype(jnp.int32)
        drawn = jax.random.categorical(key, jnp.log(predicted[:, query]))
        answer = jnp.where(step < enumerated, digit, drawn)
        seen = seen + log_likelihood[:, query][:, answer].T
        return (seen, log_share, open_queries.at[query].set(False)), query

    start = (jnp.zeros((scenarios, num), prior.dtype), jnp.zeros(scenarios, prior.dtype), jnp.ones(queries, bool))
    keys = jax.random.split(jax.random.key(0) if key is None else key, k)
    return lax.scan(pick, start, (jnp.arange(k), jnp.asarray(np.stack(digits)), keys))[1]


def volume_removal(log_likelihood: ArrayLike, log_weights: ArrayLike) -> Array:
    """What the least telling answer is expected to remove of the hypotheses' weight:

    removed[q] = min_k sum_n w[n] (1 - P(k | n)) = 1 - max_k sum_n w[n] P(k | n)

    log_likelihood [N, Q, K], log_weights [N] -> [Q], in [0, 1 - 1/K]. A baseline: it sees only how uncertain the answer
    is and not why, so its greatest value is reached by a question between two identical trajectories, which tells
    nothing. Sadigh et al. 2017, "Active Preference-Based Learning of Reward Functions"; the defect: arXiv:1910.04365.
    Raises ValueError on other shapes.
    """
    log_likelihood, log_weights = _table(log_likelihood, log_weights, "volume_removal")
    weights = jax.nn.softmax(log_weights)
    return 1.0 - jnp.max(_mean(weights, jnp.exp(log_likelihood)), axis=-1)


def random_queries(log_likelihood: ArrayLike, log_weights: ArrayLike) -> Array:
    """The score 0 for every query, [N, Q, K] and [N] -> [Q]: `query_loop` breaks ties at random."""
    log_likelihood, _ = _table(log_likelihood, log_weights, "random_queries")
    return jnp.zeros(log_likelihood.shape[1], log_likelihood.dtype)


def update_weights(log_likelihood: ArrayLike, log_weights: ArrayLike, answer: ArrayLike) -> Array:
    """The posterior after an answer to one query: log_softmax(log_weights + log_likelihood[:, answer]), [N].

    Args:
        log_likelihood: [N, K], of that query.
        log_weights: [N].
        answer: int scalar in 0..K-1.

    Raises ValueError on other shapes and, outside jit, if there is no such answer or no hypothesis allows it (under jit
    the weights are then NaN).
    """
    log_likelihood, log_weights = _floating(log_likelihood, log_weights)
    if log_likelihood.ndim != 2 or log_weights.shape != log_likelihood.shape[:1] or jnp.ndim(answer) != 0:
        raise ValueError(
            "update_weights: log_likelihood must be [N, K], log_weights [N] and answer a scalar, "
            f"got {log_likelihood.shape}, {log_weights.shape} and {jnp.shape(answer)}"
        )
    if not isinstance(answer, jax.core.Tracer) and not 0 <= int(answer) < log_likelihood.shape[1]:
        raise ValueError(f"update_weights: answer must be in 0..{log_likelihood.shape[1] - 1}, got {answer}")
    joint = log_weights + log_likelihood[:, answer]
    if not isinstance(joint, jax.core.Tracer) and bool(jnp.max(joint) == -jnp.inf):
        raise ValueError(f"update_weights: no hypothesis of positive weight allows answer {answer}")
    return jax.nn.log_softmax(joint)


def hypothesis_entropy(log_weights: ArrayLike) -> Array:
    """H(w) = -sum_n w[n] log w[n] in nats, log_weights [N] -> scalar: what is left to learn of these hypotheses."""
    return jnp.sum(entr(jax.nn.softmax(*_floating(log_weights))))


def effective_hypotheses(log_weights: ArrayLike) -> Array:
    """1 / sum_n w[n]^2, log_weights [N] -> scalar in [1, N]: few left means the particles are too coarse to go on."""
    return 1.0 / jnp.sum(jax.nn.softmax(*_floating(log_weights)) ** 2)


class QueryHistory(NamedTuple):
    """What was asked, what was heard, and the posterior before each query and after the last.

    queries: [T] int32
    answers: [T] int32
    log_weights: [T+1, N], normalised
    """

    queries: Array
    answers: Array
    log_weights: Array


def query_loop(
    key: Key,
    log_likelihood: ArrayLike,
    log_weights: ArrayLike,
    true_log_likelihood: ArrayLike,
    score: Score,
    *,
    num_queries: int,
) -> QueryHistory:
    """Ask a simulated person `num_queries` questions one by one, each the best by `score` given the answers so far.

    The person's answers are drawn once per query of the pool from `true_log_likelihood`, and no query is asked twice,
    so strategies run with the same key hear the same answers to the same questions. Vmap over keys and truths for
    seeds.

    Args:
        log_likelihood: [N, Q, K].
        log_weights: [N], before any answer.
        true_log_likelihood: [Q, K], of the true reward (a row of `log_likelihood` if the truth is a hypothesis).
        score: (log_likelihood, log_weights) -> [Q]: `expected_information_gain`, `volume_removal`, `random_queries` or
            your own. The greatest is asked; ties are broken at random.
        num_queries: T, static.

    Raises ValueError if num_queries is not in 0..Q, or on other shapes.
    """
    log_likelihood, log_weights = _table(log_likelihood, log_weights, "query_loop")
    (true_log_likelihood,) = _floating(true_log_likelihood)
    queries = log_likelihood.shape[1]
    if true_log_likelihood.shape != log_likelihood.shape[1:]:
        raise ValueError(
            f"query_loop: true_log_likelihood must be {log_likelihood.shape[1:]}, got {true_log_likelihood.shape}"
        )
    if not 0 <= num_queries <= queries:
        raise ValueError(f"query_loop: num_queries must be in 0..{queries}, got {num_queries}")
    answer_key, tie_key = jax.random.split(key)
    answers = jax.random.categorical(answer_key, true_log_likelihood).astype(jnp.int32)

    def ask(carry: tuple[Array, Array], key: Key) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
        weights, asked = carry
        scores = jnp.where(asked, -jnp.inf, score(log_likelihood, weights))
        lots = jax.random.uniform(key, (queries,))
        query = jnp.argmax(jnp.where(scores == jnp.max(scores), lots, -1.0)).astype(jnp.int32)
        weights = update_weights(log_likelihood[:, query], weights, answers[query])
        return (weights, asked.at[query].set(True)), (query, answers[query], weights)

    start = (jax.nn.log_softmax(log_weights), jnp.zeros(queries, bool))
    _, (asked, heard, after) = lax.scan(ask, start, jax.random.split(tie_key, num_queries))
    return QueryHistory(asked, heard, jnp.concatenate([start[0][None], after]))


def _mutual_information(log_p: Array, weights: Array) -> Array:
    """sum_n weights[n] KL(p[n] || mean p) over the last axis; [N, ..., K] and [N] -> [...]."""
    p = jnp.exp(log_p)
    mean = _mean(weights, p)[None]
    # The double where keeps -inf out of the products, and so NaN out of the gradient.
    log_ratio = jnp.where(p > 0.0, log_p, 0.0) - _finite_log(mean)
    # mean - p averages to 0; term by term it makes KL nonnegative and takes out the rounding of the mean.
    divergence = jnp.sum(jnp.where(p > 0.0, p * log_ratio, 0.0) + mean - p, axis=-1)
    return jnp.maximum(_mean(weights, divergence), 0.0)


def _binary_information(logits: Array, weights: Array) -> Array:
    """The same of p = sigmoid(logits) and 1 - p, logits [N, M]: a tenth of the time of the table."""
    yes, no, size = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits), jnp.abs(logits)
    entropy = jnp.log1p(jnp.exp(-size)) + size * jnp.minimum(yes, no)
    mean_yes, mean_no = _mean(weights, yes)[None], _mean(weights, no)[None]
    cross = -yes * _finite_log(mean_yes) - no * _finite_log(mean_no)
    return jnp.maximum(_mean(weights, cross - entropy + (mean_yes - yes) + (mean_no - no)), 0.0)


def _mean(weights: Array, x: Array) -> Array:
    return jnp.einsum("n,n...->...", weights, x, precision=EXACT)


def _finite_log(x: Array) -> Array:
    return jnp.log(jnp.where(x > 0.0, x, 1.0))


def _table(log_likelihood: ArrayLike, log_weights: ArrayLike, name: str) -> tuple[Array, Array]:
    log_likelihood, log_weights = _floating(log_likelihood, log_weights)
    if log_likelihood.ndim != 3 or 0 in log_likelihood.shape or log_weights.shape != log_likelihood.shape[:1]:
        raise ValueError(
            f"{name}: log_likelihood must be [N, Q, K], none of them 0, and log_weights [N], "
            f"got {log_likelihood.shape} and {log_weights.shape}"
        )
    return log_likelihood, log_weights


def _floating(*arrays: ArrayLike) -> tuple[Array, ...]:
    """In one floating dtype, at least float32, in which sums over hypotheses are taken."""
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(jnp.asarray(x, dtype) for x in arrays)
