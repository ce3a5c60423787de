"""Who finds a treasure that pays only at the end of one long path: PPO alone, or PPO paid for what is new?

In the "deep sea" one of the 2^10 ways down a 10 x 10 grid ends at the treasure, and every move towards it costs a
little, so plain PPO learns to stay away. Paid besides for rare moves (counts), for what a network cannot yet tell of a
random one (RND), or for where a model of its own moves is wrong (ICM), it gets there. The four settings and all seeds
are one compiled program: a bonus's coefficient is swept like any other number. Each seed has a world of its own.
Prints, for each setting, in how many seeds the learned policy takes the treasure, with exact 95% intervals; its mean
return; and the rollout that found the treasure first. Draws learning curves if matplotlib is installed.
Run: python examples/curiosity.py   (about half a minute on two idle cores)
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import binomtest

from jaxalign.algorithm import train
from jaxalign.environments.sparse_reward import deep_sea
from jaxalign.rl.actor_critic import act_with, actor_critic
from jaxalign.rl.incentives import chain
from jaxalign.rl.intrinsic_curiosity import intrinsic_curiosity
from jaxalign.rl.ppo import ppo, ppo_optimizer
from jaxalign.rl.random_network_distillation import random_network_distillation
from jaxalign.rl.rollout import evaluate
from jaxalign.rl.visit_counts import visit_counts
from jaxalign.statistics import bootstrap_interval
from jaxalign.sweeps import sweep

SIZE, SEEDS, ROLLOUTS, ENVS, PICTURE = 10, 8, 200, 16, "curiosity.png"
SETTINGS = {  # the coefficients of counts, RND and ICM
    "PPO alone": (0.0, 0.0, 0.0),
    "with counts": (0.1, 0.0, 0.0),
    "with RND": (0.0, 1.0, 0.0),
    "with ICM": (0.0, 0.0, 0.3),
}


def cell_and_action(steps):
    """What is counted: the cell the diver was in, and the move it made there."""
    cell = jnp.argmax(steps.observations.reshape(*steps.rewards.shape, -1), axis=-1)
    return 2 * cell + steps.actions


def learn(coefficients, key):
    """(the learned greedy policy's return, mean episode return of each rollout [ROLLOUTS], the one that found it)."""
    world_key, train_key, evaluation_key = jax.random.split(key, 3)
    world = deep_sea(SIZE, right=jax.random.bernoulli(world_key, shape=(SIZE, SIZE)))
    model, bonus_optimizer = actor_critic(world, hidden=(64,)), optax.adam(3e-3)
    spaces = world.observation_space, world.action_space
    incentive = chain(
        visit_counts(cell_and_action, num_keys=2 * SIZE**2, coefficient=coefficients[0]),
        random_network_distillation(spaces[0], bonus_optimizer, num_envs=ENVS, coefficient=coefficients[1]),
        intrinsic_curiosity(*spaces, bonus_optimizer, coefficient=coefficients[2]),
    )
    algorithm = ppo(
        world, model, ppo_optimizer(1e-3), incentive=incentive, num_envs=ENVS, num_steps=2 * SIZE, num_minibatches=1
    )
    state, metrics = train(algorithm, train_key, None, length=ROLLOUTS)
    act = act_with(model, state.params, greedy=True)
    final = evaluate(evaluation_key, world, act, episodes=1, max_steps=SIZE).returns[0]
    returns = metrics["episode/return"]
    # Without the treasure no episode has a return above 0.
    found = returns * metrics["episodes"] > 0.5
    return final, returns, jnp.where(found.any(), jnp.argmax(found), ROLLOUTS)


def print_table(final, found):
    print(f"deep sea {SIZE} x {SIZE}, {SEEDS} seeds, {ROLLOUTS} rollouts of {ENVS * 2 * SIZE} steps")
    print(f"{'':12} {'solved':>7} {'95% interval':>14} {'return':>7} {'95% interval':>15}  found in rollout (median)")
    for name, returns, first in zip(SETTINGS, final, found, strict=True):
        solved = int((returns > 0.9).sum())
        interval = binomtest(solved, SEEDS).proportion_ci()
        low, high = bootstrap_interval(jax.random.key(1), returns)
        middle = f"{np.median(first):.0f}" if np.median(first) < ROLLOUTS else "never"
        print(
            f"{name:12} {solved:3} / {SEEDS} [{interval.low:5.2f}, {interval.high:4.2f}] {returns.mean():8.2f} "
            f" [{float(low):5.2f}, {float(high):5.2f}]  {middle:>25}"
        )


def draw(curves):
    """Mean episode return of each setting over rollouts [settings, seeds, ROLLOUTS], with bootstrap bands."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6.0, 3.6), layout="constrained").subplots()
    for name, curve in zip(SETTINGS, curves, strict=True):
        low, high = bootstrap_interval(jax.random.key(1), curve, resamples=500)
        axes.plot(curve.mean(axis=0), label=name)
        axes.fill_between(range(ROLLOUTS), low, high, alpha=0.2)
    axes.set(xlabel="rollout", ylabel="mean episode return", title=f"Deep sea of size {SIZE}, {SEEDS} seeds")
    axes.legend(frameon=False)
    axes.figure.savefig(PICTURE, dpi=150)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    settings = jnp.array(list(SETTINGS.values()))
    final, curves, found = map(np.asarray, sweep(learn, settings, jax.random.split(jax.random.key(0), SEEDS)))
    print_table(final, found)
    if importlib.util.find_spec("matplotlib"):
        draw(curves)
    else:
        print('no picture: pip install "jaxalign[viz]"')
