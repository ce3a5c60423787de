"""What can be learned from 25 steps of an expert? Behavioural cloning, and GAIL and AIRL with PPO.

The expert balances CartPole's pole and keeps the cart at a mark one metre to the right. Imitators see every 20th step
of one of its episodes and never a reward. That they balance would prove little: GAIL's reward -log(1 - D) is positive,
so it pays for staying alive whatever D says, and PPO paid a constant, the control here, balances as well. Only an
imitator can know where the mark is. (`absorbing=True` takes that bias away, and the opposite one of AIRL's negative
reward.)
Printed over seeds, on fresh episodes: interquartile mean and 95% interval.
Run: python examples/imitate_cartpole.py   (two minutes on two cores)
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign import sweep, train
from jaxalign.environments import cartpole
from jaxalign.irl import airl, gail
from jaxalign.rl import (
    act_with,
    actor_critic,
    behavioural_cloning,
    demonstrations,
    discriminator_network,
    evaluate,
    ppo,
    ppo_learner,
    ppo_optimizer,
)
from jaxalign.statistics import bootstrap_interval, interquartile_mean

SEEDS, ROLLOUTS, CLONING_STEPS, EPISODES = 8, 48, 1000, 32
MARK, DISCOUNT = 1.0, 0.99
METHODS = ("expert", "behavioural cloning", "GAIL", "AIRL", "PPO, constant reward")
PPO = {
    "num_envs": 8, "num_steps": 512, "num_epochs": 4, "num_minibatches": 16, "discount": DISCOUNT,
    "normalize_rewards": True,
}  # fmt: skip


def paying(reward):
    """CartPole that pays reward(observation) on arrival."""
    world = cartpole()

    def step(key, state, action):
        new = world.step(key, state, action)
        return new._replace(reward=reward(new.observation))

    return world.replace(step=step)


def distance(observation):
    return jnp.abs(observation[0] - MARK)


plain = cartpole()
task = paying(lambda observation: 1.0 - 0.5 * distance(observation))
model = actor_critic(plain)


def optimizer():
    return ppo_optimizer(1e-3, anneal_over=ROLLOUTS * PPO["num_epochs"] * PPO["num_minibatches"])


def score(key, params):
    """A policy's steps until the pole fell, its metres from the mark, and its return, which no imitator saw."""
    done = evaluate(key, paying(distance), act_with(model, params), episodes=EPISODES, max_steps=500)
    steps, metres = done.lengths.mean(dtype=jnp.float32), done.returns.mean()
    return {"steps": steps, "metres from mark": metres / steps, "return": steps - 0.5 * metres}


def train_expert(_, key):
    return train(ppo(task, model, optimizer(), **PPO), key, None, length=ROLLOUTS)[0].params


def imitate(expert):
    """One seed: {score: [METHODS]}."""

    def run(_, key):
        show_key, clone_key, gail_key, airl_key, constant_key, score_key = jax.random.split(key, 6)
        shown = demonstrations(show_key, plain, act_with(model, expert), episodes=1, max_steps=500, every=20)
        of_both, of_states = (discriminator_network(plain, shown, hidden=(64, 64), of_actions=x) for x in (True, False))
        options = {"expert": shown, "discriminator_steps": 16, "discriminator_batch": 256}

        def learner(temperature):
            return ppo_learner(plain, model, optimizer(), temperature=temperature, absorbing=True, **PPO)

        cloned = behavioural_cloning(model, optax.adam(1e-3), expert=shown)
        imitator = gail(learner(0.0), of_both, optax.adam(1e-3), gradient_penalty=0.1, **options)
        recoverer = airl(
            learner(1.0), of_both, of_states, optax.adam(1e-3), discount=DISCOUNT, gradient_penalty=2.0, **options
        )
        control = ppo(plain, model, optimizer(), **PPO)
        learned = {
            "expert": expert,
            "behavioural cloning": train(cloned, clone_key, None, length=CLONING_STEPS)[0].params,
            "GAIL": train(imitator, gail_key, None, length=ROLLOUTS)[0].policy.params,
            "AIRL": train(recoverer, airl_key, None, length=ROLLOUTS)[0].policy.params,
            "PPO, constant reward": train(control, constant_key, None, length=ROLLOUTS)[0].params,
        }
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(learned[name] for name in METHODS))
        return jax.lax.map(lambda params: score(score_key, params), together)

    return run


if __name__ == "__main__":
    expert = jax.jit(train_expert)(None, jax.random.key(0))
    scores = sweep(imitate(expert), None, jax.random.split(jax.random.key(1), SEEDS))
    columns = ("steps", "metres from mark", "return")
    print(f"{'':22}" + "".join(f"{name:26}" for name in columns))
    for i, method in enumerate(METHODS):
        cells = []
        for values in (scores[name][:, i] for name in columns):
            low, high = bootstrap_interval(jax.random.key(2), values, statistic=interquartile_mean)
            cells.append(f"{interquartile_mean(values):6.2f} [{low:.2f}, {high:.2f}]")
        print(f"{method:22}" + "".join(f"{cell:26}" for cell in cells))
