"""The experiment of over-optimisation where the true return is known: proxies learned from preferences, then pursued.

A reference policy moves a point mass; a Boltzmann annotator compares pairs of its trajectories by their true return
(the gold reward); a reward model, the proxy, is fitted to the answers; and the proxy is optimised, by taking the best
of n trajectories of the reference policy and by PPO that starts from it. What the proxy gets wrong comes of the number
of preferences, the noise of the answers, its width, and where the reference policy went; nothing else is put in.
(Gao et al., arXiv:2210.10760, with a true return for their gold model.)

All rewards are in standard deviations of the reference policy's returns, 0 at their mean.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import train
from jaxalign.environments.point_mass import point_mass
from jaxalign.environments.protocol import Environment
from jaxalign.environments.wrappers import batched
from jaxalign.preferences.comparisons import Comparisons
from jaxalign.preferences.reward_ensemble import ensemble_mean, lower_confidence_bound, worst_case
from jaxalign.rl.actor_critic import ActorCritic, actor_critic, draw
from jaxalign.rl.incentives import chain, reward_function
from jaxalign.rl.learning_curve import with_evaluation
from jaxalign.rl.ppo import PPOState, ppo, ppo_optimizer
from jaxalign.rl.rollout import Steps, collect
from jaxalign.rlhf.annotators import Annotator, boltzmann_annotator
from jaxalign.rlhf.kl_penalty import kl_penalty
from jaxalign.rlhf.overoptimization import best_of_n
from jaxalign.rlhf.proxy_rewards import fit_proxy, masked_mlp, member_rewards, standardized
from jaxalign.types import Array, ArrayLike, Key, Metrics, Params

NUM_ENVS = 32


class Setting(NamedTuple):
    """One proxy, and the A ways in which PPO optimises it. Every number is traced.

    width: [] int, hidden units of the proxy's two layers
    preferences: [] int, how many the proxy learns from
    caution: [A], c of mean - c * std over the ensemble
    worst: bool [A], the least member's reward instead
    kl_coefficient: [A], cost of a nat of KL from the reference policy
    """

    width: Array
    preferences: Array
    caution: Array
    worst: Array
    kl_coefficient: Array


class Curves(NamedTuple):
    """What optimising a proxy brought, A ways of optimising it.

    accuracy: [], share of pairs of fresh reference trajectories that the ensemble's mean orders as their returns
    best_proxy, best_gold: [A, K], of the best of ns[k] trajectories, chosen by mean, bound or worst case
    proxy, gold: [A, C+1], mean returns at the start and at C checks of PPO, by the mean, bound or worst case of the
        members' returns and in truth
    cautious: [A, C+1], the mean of mean - std over the members' returns
    kl: [A, C+1], KL of episodes from the reference policy, nats
    """

    accuracy: Array
    best_proxy: Array
    best_gold: Array
    proxy: Array
    gold: Array
    cautious: Array
    kl: Array


class Trajectories(NamedTuple):
    """features: [E, T, F], what a reward model sees; rewards: [E, T], the true ones; kl: [E, T], of each step, nats."""

    features: Array
    rewards: Array
    kl: Array


class Stage(NamedTuple):
    """What optimising a proxy starts from.

    roll: (key, params, episodes) -> Trajectories of a policy
    rewards: features [..., F] -> each member's standardised rewards [M, ...]
    reference: parameters of the reference policy
    returns, gold: [M, E] and [E], of fresh trajectories of the reference, by each member and in truth
    """

    world: Environment
    model: ActorCritic
    roll: Callable[[Key, Params, int], Trajectories]
    rewards: Callable[[Array], Array]
    reference: Params
    returns: Array
    gold: Array

    def standard(self, gold: Array) -> Array:
        """True returns [...] in deviations of the reference's."""
        return (gold - self.gold.mean()) / self.gold.std()


def over_optimization(
    setting: Setting,
    key: Key,
    *,
    ns: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    members: int = 1,
    max_width: int = 32,
    max_preferences: int = 4096,
    samples: int = 4096,
    reward_steps: int = 600,
    checks: int = 15,
    rollouts_per_check: int = 4,
    horizon: int = 24,
    beta: ArrayLike = 0.1,
    learning_rate: ArrayLike = 3e-4,
) -> Curves:
    """The whole experiment for one setting and seed, pure; made for `sweep`.

    Args:
        setting: Setting; widths and counts above the maxima count as the maxima.
        ns: n of best-of-n [K]; none above `samples`, the reference trajectories they are estimated from.
        members: M; above 1 each member has a bootstrap resample of the same preferences.
        beta: the annotator's, per unit of true return.
        learning_rate: PPO's.
        horizon, reward_steps, checks, rollouts_per_check: steps of an episode, gradient steps of the reward models,
            and rollouts of 32 episodes.

    The same key gives the same reference policy, trajectories and answers at every setting, so differences are paired.
    Raises ValueError if an n is not in 1..samples, or `samples` is odd.
    """
    if not 1 <= min(ns) <= max(ns) <= samples or samples % 2:
        raise ValueError(f"over_optimization: needs an even number of samples, and ns in 1..{samples}; got {ns}")
    world = point_mass(horizon=horizon)
    model = actor_critic(world, hidden=(32, 32))
    policy_key, pool_key, label_key, proxy_key, ppo_key = jax.random.split(key, 5)
    reference = model.init(policy_key)

    def roll(key: Key, params: Params, episodes: int) -> Trajectories:
        return roll_out(key, world, model, params, reference, episodes=episodes, num_steps=horizon)

    first = 2 * max_preferences
    both = roll(pool_key, reference, first + samples)
    pool, fresh = jax.tree.map(lambda x: x[:first], both), jax.tree.map(lambda x: x[first:], both)
    data = compare(label_key, pool, boltzmann_annotator(beta=beta))
    network = masked_mlp(data.chosen.shape[-1], setting.width, max_width=max_width)
    params = fit_proxy(proxy_key, network, data, setting.preferences, members=members, steps=reward_steps)
    proxy = standardized(network, params, fresh.features)
    rewards = functools.partial(member_rewards, network, proxy)
    returns, gold = rewards(fresh.features).sum(axis=-1), fresh.rewards.sum(axis=1)
    stage = Stage(world, model, roll, rewards, reference, returns, gold)

    def pursue(way: tuple[Array, Array, Array]) -> tuple[Array, Array, Metrics]:
        caution, worst, kl_coefficient = way

        def aggregate(rewards: Array) -> Array:
            return jnp.where(worst, worst_case(rewards), lower_confidence_bound(rewards, coefficient=caution))

        best = best_of_n(aggregate(returns), stage.standard(gold), jnp.array(ns))
        history = pursue_with_ppo(
            ppo_key, stage, aggregate, kl_coefficient=kl_coefficient, learning_rate=learning_rate, checks=checks,
            rollouts_per_check=rollouts_per_check, horizon=horizon,
        )  # fmt: skip
        return *best, history

    best_proxy, best_gold, history = jax.lax.map(pursue, (setting.caution, setting.worst, setting.kl_coefficient))
    (mean_a, mean_b), (gold_a, gold_b) = ensemble_mean(returns).reshape(2, -1), gold.reshape(2, -1)
    accuracy = jnp.mean((mean_a > mean_b) == (gold_a > gold_b), dtype=gold.dtype)
    return Curves(accuracy, best_proxy, best_gold, **history)


def pursue_with_ppo(
    key: Key,
    stage: Stage,
    aggregate: Callable[[Array], Array],
    *,
    kl_coefficient: ArrayLike,
    learning_rate: ArrayLike,
    checks: int,
    rollouts_per_check: int,
    horizon: int,
) -> Metrics:
    """PPO from the reference policy, paid by aggregate(members' rewards [M, ...]) -> [...] of each step.

    Returns "proxy", "gold", "cautious" and "kl", [C+1] each, as in Curves.
    """

    def pay(steps: Steps) -> Array:
        return aggregate(stage.rewards(features(steps)))

    def judge(returns: Array) -> Metrics:
        bound = lower_confidence_bound(returns, coefficient=1.0)
        return {"proxy": aggregate(returns).mean(), "cautious": bound.mean()}

    def measure(state: PPOState, key: Key) -> Metrics:
        seen = stage.roll(key, state.params, 4 * NUM_ENVS)
        gold, kl = stage.standard(seen.rewards.sum(axis=1)), seen.kl.sum(axis=1)
        return {**judge(stage.rewards(seen.features).sum(axis=-1)), "gold": gold.mean(), "kl": kl.mean()}

    penalty = kl_penalty(stage.model, stage.reference, num_envs=NUM_ENVS, beta=kl_coefficient)
    algorithm = ppo(
        stage.world, stage.model._replace(init=lambda key: stage.reference), ppo_optimizer(learning_rate),
        incentive=chain(reward_function(pay), penalty), num_envs=NUM_ENVS, num_steps=horizon, discount=1.0,
    )  # fmt: skip
    checked = with_evaluation(algorithm, measure, every=rollouts_per_check)
    _, history = train(checked, key, None, length=checks)
    # At the start the policy is the reference, and its fresh trajectories say what that is worth.
    start = {**judge(stage.returns), "gold": jnp.zeros(()), "kl": jnp.zeros(())}
    return {name: jnp.concatenate([x[None], history[name]]) for name, x in start.items()}


def roll_out(
    key: Key,
    world: Environment,
    model: ActorCritic,
    params: Params,
    reference: Params,
    *,
    episodes: int,
    num_steps: int,
) -> Trajectories:
    """Whole episodes of a policy, E = `episodes` of exactly T = `num_steps` steps: Trajectories, leaves [E, T, ...].

    kl is exact at each state the policy came to: its sum over steps has the KL of episodes as its mean.
    """
    reset_key, run_key = jax.random.split(key)
    worlds = batched(world, episodes)
    observations, state = worlds.reset(reset_key)

    def act(key: Key, seen: Array) -> tuple[Array, Array]:
        return draw(key, model.policy(params, seen))

    _, steps = collect(run_key, worlds, act, observations, state, num_steps=num_steps)
    kl = model.policy(params, steps.observations).kl_divergence(model.policy(reference, steps.observations))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), Trajectories(features(steps), steps.rewards, kl))


def features(steps: Steps) -> Array:
    """What the reward models see of steps [T, N]: position and velocity after the step, and the force, [T, N, 6]."""
    return jnp.concatenate([steps.next_observations[..., :4], steps.actions], axis=-1)


def compare(key: Key, trajectories: Trajectories, annotator: Annotator) -> Comparisons:
    """The first half of 2P trajectories [2P, T, ...] against the second: P Comparisons with the annotator's answers."""
    (first, second), rewards = (jnp.split(x, 2) for x in (trajectories.features, trajectories.rewards))
    mask = jnp.ones(rewards[0].shape, bool)
    outcome = annotator(key, rewards[0], mask, rewards[1], mask)
    return Comparisons(first, mask, second, mask, outcome=outcome, index=jnp.arange(len(first)))
