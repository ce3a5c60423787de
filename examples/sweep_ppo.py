"""Learning rate x entropy x seed for PPO on CartPole: one compilation, and a stopped sweep goes on where it was.

Each of the lanes is kept in runs/sweep_ppo as it is done. Run it twice: the second time there is nothing left to do.
"""

import itertools

import jax
import jax.numpy as jnp

from jaxalign import train
from jaxalign.environments import cartpole
from jaxalign.rl import act_with, actor_critic, evaluate, ppo, ppo_optimizer
from jaxalign.runtime import estimate, resumable_sweep
from jaxalign.statistics import bootstrap_interval, interquartile_mean

SEEDS, STEPS = 8, 60_000
RATES, ENTROPIES = (3e-4, 1e-3, 3e-3), (0.0, 0.01)
NUM_ENVS, NUM_STEPS = 8, 64

world = cartpole()
model = actor_critic(world)
rollouts = STEPS // (NUM_ENVS * NUM_STEPS)


def run(hyper, key):
    """The mean return of the policy learned with this setting and key."""
    train_key, key = jax.random.split(key)
    optimizer = ppo_optimizer(hyper["rate"], anneal_over=rollouts * 16)
    algorithm = ppo(
        world, model, optimizer, entropy_coefficient=hyper["entropy"], num_envs=NUM_ENVS, num_steps=NUM_STEPS
    )
    state, _ = train(algorithm, train_key, None, length=rollouts)
    return evaluate(key, world, act_with(model, state.params), episodes=32, max_steps=500).returns.mean()


grid = list(itertools.product(RATES, ENTROPIES))
hypers = {"rate": jnp.array([rate for rate, _ in grid]), "entropy": jnp.array([entropy for _, entropy in grid])}
fingerprint = {"steps": STEPS, "num_envs": NUM_ENVS, "num_steps": NUM_STEPS}
keys = jax.random.split(jax.random.key(0), SEEDS)
returns = resumable_sweep(run, hypers, keys, directory="runs/sweep_ppo", lanes=8, fingerprint=fingerprint)

print(f"Return of {SEEDS} seeds after {STEPS} steps each: interquartile mean with its 95% bootstrap interval")
print("learning rate  entropy  return")
for (rate, entropy), scores in zip(grid, returns, strict=True):
    low, high = bootstrap_interval(jax.random.key(1), scores, statistic=interquartile_mean)
    print(f"{rate:<13g}  {entropy:<7g}  {estimate(interquartile_mean(scores), low, high)}")
