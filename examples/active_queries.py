"""Which question about a reward to ask next: the most informative, the one that removes most volume, or any?

A person compares walks through a gridworld, with noise; 400 linear rewards drawn from the prior are weighed by what is
heard. Each of 32 seeds makes another of the 400 the truth, so the posterior is exact. Prints, after so many questions,
what acting on the posterior mean reward loses, how well that mean points along the truth, and what is left to learn;
then how much a batch tells that is chosen as one. Give a file name to draw the curves (needs matplotlib).
Run: python examples/active_queries.py [curves.png]   (about half a minute on two idle cores)
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.irl import (
    all_pairs,
    choice_log_likelihood,
    expected_information_gain,
    hypothesis_entropy,
    joint_information_gain,
    query_loop,
    random_queries,
    sample_trajectories,
    select_queries,
    trajectory_returns,
    volume_removal,
)
from jaxalign.mdp import expected_return, gridworld, soft_value_iteration, value_iteration
from jaxalign.statistics import bootstrap_interval, paired_difference_interval

SIZE, FEATURES, HYPOTHESES, WALKS, STEPS, QUESTIONS, EVERY, SEEDS, BATCH = 6, 6, 400, 32, 12, 20, 5, 32, 4
BETA = 2.0  # the person's rationality: the log-odds of preferring a walk whose return is 1 greater
MEASURES = ("regret", "cosine to the truth", "entropy (nats)")
STRATEGIES = {"random": random_queries, "volume": volume_removal, "information": expected_information_gain}

mdp = gridworld(SIZE, SIZE, discount=0.9)
cell_key, prior_key, other_key, walk_key, truth_key, loop_key = jax.random.split(jax.random.key(0), 6)
features = jax.nn.one_hot(jax.random.randint(cell_key, (SIZE**2,), 0, FEATURES), FEATURES)  # each cell has a colour
theta = jax.random.normal(prior_key, (HYPOTHESES, FEATURES))
theta = theta / jnp.linalg.norm(theta, axis=1, keepdims=True)
uniform = jnp.zeros(HYPOTHESES)


@jax.jit
def comparisons():
    """log P(answer | reward) of every pair of walks, each walk taken for some other reward, [N, Q, 2]."""

    def walk(key, other):
        policy = soft_value_iteration(mdp, features @ other).log_policy
        return jax.tree.map(lambda x: x[0], sample_trajectories(key, mdp, policy, num=1, length=STEPS))

    walks = jax.vmap(walk)(jax.random.split(walk_key, WALKS), jax.random.normal(other_key, (WALKS, FEATURES)))
    returns = trajectory_returns(mdp, theta @ features.T, walks)
    return choice_log_likelihood(returns, all_pairs(WALKS), beta=BETA)


@jax.jit
def quality(log_weights, truth):
    """MEASURES of one posterior [N] when hypothesis `truth` is the truth."""
    mean, reward = jax.nn.softmax(log_weights) @ theta, features @ theta[truth]
    plan = value_iteration(mdp, features @ mean)
    regret = mdp.initial @ value_iteration(mdp, reward).value - expected_return(mdp, jnp.log(plan.policy), reward)
    cosine = mean @ theta[truth] / jnp.maximum(jnp.linalg.norm(mean), 1e-6)
    return jnp.stack([regret, cosine, hypothesis_entropy(log_weights)])


def ask(score, table):
    """MEASURES of every seed after 0, EVERY, 2 EVERY, ... questions: [seeds, checkpoints, measures]."""

    @jax.jit
    def posteriors(table):
        def lane(inputs):
            key, truth = inputs
            return query_loop(key, table, uniform, table[truth], score, num_queries=QUESTIONS).log_weights[::EVERY]

        return jax.lax.map(lane, (jax.random.split(loop_key, SEEDS), truths))

    return jax.vmap(jax.vmap(quality, in_axes=(0, None)))(posteriors(table), truths)


def draw(results, path):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(MEASURES), figsize=(12, 3.5), layout="constrained")
    asked = range(0, QUESTIONS + 1, EVERY)
    intervals = {name: bootstrap_interval(jax.random.key(1), result) for name, result in results.items()}
    for i, (panel, label) in enumerate(zip(panels, MEASURES, strict=True)):
        for name, result in results.items():
            panel.plot(asked, result[:, :, i].mean(axis=0), label=name)
            panel.fill_between(asked, *(bound[:, i] for bound in intervals[name]), alpha=0.2)
        panel.set(xlabel="questions", ylabel=label)
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def with_mean(result):
    """A last row: the mean over all checkpoints but the first, where nothing was asked."""
    return jnp.concatenate([result[:, 1:], result[:, 1:].mean(axis=1, keepdims=True)], axis=1)


if __name__ == "__main__":
    table = comparisons()
    truths = jax.random.choice(truth_key, HYPOTHESES, (SEEDS,), replace=False)
    results = {name: ask(score, table) for name, score in STRATEGIES.items()}
    lines = {}
    for name, result in results.items():
        values, baseline = with_mean(result), with_mean(results["random"])
        low, high = paired_difference_interval(jax.random.key(1), values, baseline)
        for i, j in np.ndindex(low.shape):
            difference = f"[{float(low[i, j]):+.2f}, {float(high[i, j]):+.2f}]" if name != "random" else ""
            lines.setdefault((i, name), []).append(f"{float(values[:, i, j].mean()):5.2f} {difference:18}")
    print(f"Means over {SEEDS} seeds; in brackets 95% intervals of the difference to random questions, paired by seed")
    print(f"{'questions':10} {'strategy':12} " + "  ".join(f"{label:24}" for label in MEASURES).rstrip())
    for i, name in sorted(lines, key=lambda line: line[0]):
        asked = "mean" if (i + 1) * EVERY > QUESTIONS else (i + 1) * EVERY
        print(f"{asked:<10} {name:12} {'  '.join(lines[i, name])}".rstrip())
    best_alone = jnp.argsort(-expected_information_gain(table, uniform))[:BATCH]
    together = select_queries(table, uniform, BATCH)
    nats = [float(joint_information_gain(table, uniform, batch)) for batch in (together, best_alone)]
    print(f"{BATCH} questions at once: {nats[0]:.2f} nats chosen as a batch, {nats[1]:.2f} the {BATCH} best alone")
    if len(sys.argv) > 1:
        draw(results, sys.argv[1])
