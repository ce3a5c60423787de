"""A reward recovered from demonstrations, drawn beside the truth with its posterior spread.

Nine seeds of an Objectworld at once: each draws its demonstrations, fits a reward by maximum causal entropy, and one of
them also samples the posterior over rewards. Run: python examples/recover_reward.py
(needs the extras viz and bayes; about a minute on two cores; reward.png is the picture)
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxalign
from jaxalign.irl import (
    boltzmann_policy,
    chain_samples,
    expected_value_difference,
    gaussian_prior,
    linear_reward,
    max_causal_entropy_irl,
    posterior_chains,
    sample_trajectories,
    visit_counts,
)
from jaxalign.mdp import objectworld, value_iteration
from jaxalign.runtime import maps
from jaxalign.statistics import bootstrap_interval

SIZE, SEEDS, DEMONSTRATIONS, LENGTH, BETA, STEPS, SAMPLES = 6, 9, 40, 20, 2.0, 200, 300

world = objectworld(jax.random.key(1), SIZE, SIZE, num_objects=5)
mdp, truth = world.mdp, world.reward
demonstrator = boltzmann_policy(mdp, truth, beta=BETA)


def demonstrate(key):
    """Visits [S, A] summed over one seed's demonstrations."""
    drawn = sample_trajectories(key, mdp, demonstrator, num=DEMONSTRATIONS, length=LENGTH)
    return DEMONSTRATIONS * visit_counts(mdp, drawn)


@jax.jit
def maximum_entropy(key):
    """The reward [S] that explains one seed's demonstrations, and the value lost by planning with it."""
    draw_key, run_key = jax.random.split(key)
    algorithm = max_causal_entropy_irl(
        mdp, linear_reward(SIZE**2), optax.adam(0.1), demonstrate(draw_key), temperature=1.0 / BETA
    )
    state, _ = jaxalign.train(algorithm, run_key, None, length=STEPS)
    reward = state.params["weights"]
    return reward, expected_value_difference(mdp, truth, jnp.log(value_iteration(mdp, reward).policy))


@jax.jit
def posterior(key):
    """Rewards [4 chains, SAMPLES, S] from the posterior given one seed's demonstrations."""
    draw_key, run_key = jax.random.split(key)
    counts, prior = demonstrate(draw_key), gaussian_prior(SIZE**2)

    def log_posterior(reward, _):
        return prior.log_prob(reward) + jnp.sum(counts * boltzmann_policy(mdp, reward, beta=BETA, tolerance=1e-4))

    algorithm = posterior_chains(log_posterior, prior, num_chains=4, num_samples=SAMPLES, num_warmup=SAMPLES)
    state, _ = jaxalign.train(algorithm, run_key, None, length=2 * SAMPLES)
    return chain_samples(state, prior)


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(0), SEEDS)
    rewards, lost = jaxalign.sweep(lambda _, key: maximum_entropy(key), None, keys)
    random_policy = jnp.full((SIZE**2, mdp.num_actions), -np.log(mdp.num_actions))
    at_random = float(expected_value_difference(mdp, truth, random_policy))
    low, high = bootstrap_interval(jax.random.key(1), lost)
    interval = f"[{float(low):.3f}, {float(high):.3f}]"
    print(f"value lost by planning with the learned reward: {float(lost.mean()):.3f} {interval}")
    print(f"(mean over {SEEDS} seeds; acting at random loses {at_random:.3f})")

    draws = np.asarray(posterior(keys[0]))
    draws = (draws - draws.mean(axis=-1, keepdims=True)).reshape(-1, SIZE**2)
    true = np.asarray(truth - truth.mean())
    inside = np.mean((np.quantile(draws, 0.05, axis=0) <= true) & (true <= np.quantile(draws, 0.95, axis=0)))
    print(f"states whose true reward lies in the posterior's central 90%: {inside:.2f}")
    learned = np.asarray(rewards[0] - rewards[0].mean())
    pictures = {"true": true, "maximum entropy": learned, "posterior mean": draws.mean(0), "posterior sd": draws.std(0)}
    maps({name: image.reshape(SIZE, SIZE) for name, image in pictures.items()}).savefig("reward.png")
