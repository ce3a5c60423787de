"""How many answers does it take? CartPole from comparisons of its own behaviour, never from its reward.

The task pays 1 - |x - 1| / 2 a step: keep the pole up, and the cart at a mark one metre to the right. On plain CartPole
any positive constant is reward enough; here only the answers can say where the mark is. Two segments of 25 steps at a
time are compared by an annotator who prefers a to b with probability sigmoid(return of a - return of b), those two that
three reward networks disagree about most, or any two. PPO is paid by the networks.
Printed over seeds: the true return of the last policies on fresh episodes, interquartile mean and 95% interval, and the
part of pairs of held-out episodes, from good to random, that the networks put in the right order.
Run: python examples/rlhf_cartpole.py   (about ten minutes on two cores)
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign import Network, sweep, train
from jaxalign.environments import cartpole
from jaxalign.networks import MLP
from jaxalign.preferences import ensemble_rewards, trajectory_reward
from jaxalign.rl import act_with, actor_critic, draw, evaluate, ppo, ppo_optimizer
from jaxalign.rlhf import boltzmann_annotator, graded_segments, preference_rl, segment_returns, step_features
from jaxalign.rlhf.human_feedback import pairwise_agreement
from jaxalign.statistics import bootstrap_interval, interquartile_mean

SEEDS, ROUNDS, ROLLOUTS, EPISODES = 8, 30, 4, 32
QUERIES = ((2, "random"), (2, "disagreement"), (8, "random"), (8, "disagreement"), (32, "disagreement"))
MARK = 1.0
PPO = {"num_envs": 8, "num_steps": 128, "num_epochs": 5, "num_minibatches": 4, "discount": 0.98, "gae_lambda": 0.9}


def at_the_mark():
    world = cartpole()

    def step(key, state, action):
        new = world.step(key, state, action)
        return new._replace(reward=1.0 - 0.5 * jnp.abs(new.observation[0] - MARK))

    return world.replace(step=step)


world = at_the_mark()
model = actor_critic(world)
features = step_features(world)
rewards = trajectory_reward(Network.from_linen(MLP((32, 32, 1), jnp.tanh), jnp.zeros((1, 4 + 2 + 1))))


def optimizer():
    return ppo_optimizer(1e-3, anneal_over=ROUNDS * ROLLOUTS * PPO["num_epochs"] * PPO["num_minibatches"])


def returns(key, params):
    return evaluate(key, world, act_with(model, params), episodes=EPISODES, max_steps=500).returns.mean()


def from_answers(queries, select):
    """One seed: true return at the end, and how well the reward networks order held-out episodes."""
    learner = preference_rl(
        world, model, optimizer(), rewards, optax.adam(3e-3), annotator=boltzmann_annotator(beta=1.0),
        queries_per_round=queries, select=select, rollouts_per_round=ROLLOUTS, capacity=ROUNDS * queries, **PPO,
    )  # fmt: skip

    def run(_, key):
        train_key, score_key, order_key = jax.random.split(key, 3)
        state, _ = train(learner, train_key, None, length=ROUNDS)
        act = lambda key, seen: draw(key, model.policy(state.params, seen))  # noqa: E731
        graded = graded_segments(order_key, world, act, features, count=EPISODES, length=500)
        predicted = ensemble_rewards(rewards, state.reward.params, graded.features, graded.mask).mean(axis=0)
        order = pairwise_agreement(predicted, segment_returns(graded.rewards, graded.mask))
        return returns(score_key, state.params), order

    return run


def from_rewards(paid):
    """One seed of PPO with what `paid` pays, scored by the task."""

    def run(_, key):
        train_key, score_key = jax.random.split(key)
        state, _ = train(ppo(paid, model, optimizer(), **PPO), train_key, None, length=ROUNDS * ROLLOUTS)
        return returns(score_key, state.params), jnp.nan

    return run


def interval(values):
    if jnp.isnan(values).any():
        return ""
    low, high = bootstrap_interval(jax.random.key(2), values, statistic=interquartile_mean)
    return f"{interquartile_mean(values):7.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":
    keys = jax.random.split(jax.random.key(1), SEEDS)
    untrained = sweep(lambda _, key: (returns(key, model.init(key)), jnp.nan), None, keys)
    rows = {"untrained": untrained, "PPO, 1 a step": sweep(from_rewards(cartpole()), None, keys, mode="map")}
    for queries, select in QUERIES:
        found = sweep(from_answers(queries, select), None, keys, mode="map")
        rows[f"{ROUNDS * queries} answers, {select}"] = found
    rows["PPO, true reward"] = sweep(from_rewards(world), None, keys, mode="map")
    print(f"{'':28}{'true return':28}{'pairs in order'}")
    for name, (scores, order) in rows.items():
        print(f"{name:28}{interval(scores):28}{interval(order)}")
