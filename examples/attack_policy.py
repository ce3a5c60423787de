"""What a policy does when an attacker shifts what it sees: CartPole by PPO, four sizes of disturbance, eight seeds.

The image attacks work on observations as they are: the policy's logits are the classifier, the action it would have
taken is the label. Every observation of every step is attacked by PGD, or disturbed at random in the same ball.
Run: python examples/attack_policy.py   (two minutes on two cores)
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign import train
from jaxalign.environments import cartpole
from jaxalign.rl import actor_critic, evaluate, ppo
from jaxalign.robustness import pgd, random_in_ball
from jaxalign.statistics import bootstrap_interval

UPDATES, SEEDS, EPISODES, STEPS = 60, 8, 16, 5
epsilons = jnp.array([0.0, 0.05, 0.1, 0.2])
environment = cartpole()
model = actor_critic(environment, hidden=(64, 64))


def trained(key):
    """A policy after UPDATES rollouts of 8 x 128 steps."""
    return train(ppo(environment, model, optax.adam(1e-3)), key, None, length=UPDATES)[0].params


def returns(params, key, epsilon, disturb):
    """Mean return of EPISODES episodes in which every observation is disturbed."""

    def act(key, observation):
        apply = lambda rows: model.policy(params, rows).logits  # noqa: E731
        seen = disturb(key, apply, observation[None], epsilon)
        return jnp.argmax(apply(seen)[0])

    return evaluate(key, environment, act, episodes=EPISODES, max_steps=500).returns.mean()


def attacked(key, apply, rows, epsilon):
    meant = jnp.argmax(apply(rows), axis=1)
    return pgd(key, apply, rows, meant, epsilon, steps=STEPS, bounds=None).x_adv


def at_random(key, apply, rows, epsilon):
    return rows + random_in_ball(key, rows, epsilon, "linf")


@jax.jit
def measured(keys):
    params = jax.lax.map(trained, keys)
    over = lambda disturb: jax.lax.map(  # noqa: E731
        lambda lane: jax.lax.map(lambda e: returns(lane[0], lane[1], e, disturb), epsilons), (params, keys)
    )
    return over(at_random), over(attacked)


print("mean return of 500 at most, 95% interval over seeds")
for name, values in zip(("at random", "PGD"), measured(jax.random.split(jax.random.key(0), SEEDS)), strict=True):
    for epsilon, lanes in zip(epsilons, values.T, strict=True):
        low, high = bootstrap_interval(jax.random.key(1), lanes)
        print(f"{name:>10}, epsilon {epsilon:.2f}: {lanes.mean():6.1f} [{low:.1f}, {high:.1f}]")
