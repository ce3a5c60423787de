"""Successive halving: many settings for a short while, the better half for twice as long, and so on.

PPO on Acrobot. All settings left are one compiled program of vmapped lanes; state is arrays only, so picking the better
half is an index, and training goes on from where it stood. Jamieson and Talwalkar, arXiv:1502.07943.
"""

import functools

import jax
import jax.numpy as jnp

from jaxalign.environments import acrobot
from jaxalign.rl import act_with, actor_critic, evaluate, ppo, ppo_optimizer
from jaxalign.statistics import interquartile_mean

SETTINGS, SEEDS, STEPS = 16, 4, 8_192
NUM_ENVS, NUM_STEPS = 8, 64

world = acrobot()
model = actor_critic(world)
rollout = NUM_ENVS * NUM_STEPS


def algorithm(hyper):
    return ppo(
        world, model, ppo_optimizer(hyper["rate"]), entropy_coefficient=hyper["entropy"], gae_lambda=hyper["lambda"],
        num_envs=NUM_ENVS, num_steps=NUM_STEPS,
    )  # fmt: skip


def advance(hyper, state, rollouts):
    """One lane, so many rollouts further; how many is traced, so each size of field is compiled once."""
    state = jax.lax.fori_loop(0, rollouts, lambda _, s: algorithm(hyper).step(s, None)[0], state)
    episodes = evaluate(jax.random.key(9), world, act_with(model, state.params), episodes=8, max_steps=500)
    return state, episodes.returns.mean()


def draw(key):
    keys = jax.random.split(key, 3)
    return {
        "rate": 10 ** jax.random.uniform(keys[0], minval=-4.5, maxval=-2.0),
        "entropy": 10 ** jax.random.uniform(keys[1], minval=-4.0, maxval=-1.0),
        "lambda": jax.random.uniform(keys[2], minval=0.8, maxval=1.0),
    }


over_lanes = jax.jit(jax.vmap(jax.vmap(advance, (None, 0, None)), (0, 0, None)))
hypers = jax.vmap(draw)(jax.random.split(jax.random.key(0), SETTINGS))
start = algorithm(jax.tree.map(lambda x: x[0], hypers)).init  # the same for every setting
states = jax.jit(jax.vmap(jax.vmap(start)))(jax.random.split(jax.random.key(1), (SETTINGS, SEEDS)))

steps, spent = STEPS, 0
while True:
    states, returns = over_lanes(hypers, states, jnp.int32(steps // rollout))
    spent += steps * returns.size
    scores = interquartile_mean(returns)
    order = jnp.argsort(-scores)
    best = {name: float(x[order[0]]) for name, x in hypers.items()}
    text = ", ".join(f"{name} {value:.2g}" for name, value in best.items())
    print(f"{len(scores):3d} settings, {steps:6d} steps more: best {float(scores[order[0]]):7.1f} with {text}")
    if len(scores) == 1:
        break
    better = order[: len(order) // 2]
    hypers, states = jax.tree.map(functools.partial(jnp.take, indices=better, axis=0), (hypers, states))
    steps *= 2
most = SETTINGS * SEEDS * (2 * steps - STEPS)
print(f"{spent:,} environment steps in all; every setting for as long as the best: {most:,}")
