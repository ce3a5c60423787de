"""A penalty for leaving a reference policy: by hand, over episodes that span rollouts, adaptive, and inside PPO."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from jaxalign import mdp
from jaxalign.environments import tabular_environment
from jaxalign.rl.actor_critic import ActorCritic, actor_critic
from jaxalign.rl.kl import adaptive_kl
from jaxalign.rl.policies import diagonal_normal
from jaxalign.rl.ppo import ppo
from jaxalign.rl.rollout import Steps
from jaxalign.rlhf.kl_penalty import kl_penalty

# A policy with a mean for each of two actions, whatever it sees.
GAUSSIAN = ActorCritic(
    lambda key: jnp.zeros(2),
    lambda params, seen: diagonal_normal(jnp.broadcast_to(params, (*seen.shape[:-1], 2)), jnp.ones(2)),
    lambda params, seen: jnp.zeros(seen.shape[:-1]),
)
NOW, REFERENCE = jnp.array([0.5, -1.0]), jnp.array([0.0, 0.0])


def steps_of(key, done, mean=NOW):
    """Steps whose actions are drawn from the policy `mean`; done is [T, N]."""
    done = jnp.asarray(done)
    seen = jnp.zeros((*done.shape, 3))
    policy = GAUSSIAN.policy(mean, seen)
    actions = mean[None, None] + jax.random.normal(key, (*done.shape, 2))
    rewards = jnp.ones(done.shape)
    return Steps(seen, actions, rewards, seen, done, jnp.zeros_like(done), policy.log_prob(actions), {})


def log_ratio(steps):
    """In NumPy float64."""
    actions = np.asarray(steps.actions, np.float64)
    both = [norm.logpdf(actions, np.asarray(mean)).sum(axis=-1) for mean in (NOW, REFERENCE)]
    return both[0] - both[1]


@pytest.fixture(scope="module")
def incentive():
    penalty = kl_penalty(GAUSSIAN, REFERENCE, num_envs=2, beta=0.5)
    return penalty, jax.jit(penalty.apply)


def test_rewards_lose_beta_times_the_log_ratio(incentive):
    penalty, apply = incentive
    steps = steps_of(jax.random.key(0), [[False, False], [False, True], [True, False]])
    state, rewards, metrics = apply(penalty.init(jax.random.key(1)), steps, jax.random.key(2))
    ratio = log_ratio(steps)
    np.testing.assert_allclose(rewards, 1 - 0.5 * ratio, rtol=1e-4)
    np.testing.assert_allclose(metrics["kl/step"], ratio.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl/penalty"], 0.5 * ratio.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["episode/kl"], (ratio[:, 0].sum() + ratio[:2, 1].sum()) / 2, rtol=1e-4)
    np.testing.assert_allclose(state.running, [0, ratio[2, 1]], rtol=1e-4)
    np.testing.assert_array_equal(state.reference, REFERENCE)


def test_an_episode_may_span_rollouts(incentive):
    penalty, apply = incentive
    steps = steps_of(jax.random.key(3), [[False, False]] * 3 + [[True, False]])
    parts = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], steps) for i in (0, 1)]
    state, _, first = apply(penalty.init(jax.random.key(0)), parts[0], jax.random.key(0))
    assert np.isnan(first["episode/kl"])
    _, _, second = apply(state, parts[1], jax.random.key(0))
    np.testing.assert_allclose(second["episode/kl"], log_ratio(steps)[:, 0].sum(), rtol=1e-4)


def test_its_mean_is_the_kl_between_the_policies():
    penalty = kl_penalty(GAUSSIAN, REFERENCE, num_envs=4096, beta=1.0)
    apply = jax.jit(penalty.apply)
    steps = steps_of(jax.random.key(4), jnp.ones((1, 4096), bool))
    _, rewards, metrics = apply(penalty.init(jax.random.key(0)), steps, jax.random.key(0))
    exact = 0.5 * float(NOW @ NOW)  # unit normals: half the squared distance of the means
    assert abs(metrics["episode/kl"] - exact) < 4 * rewards.std() / 64
    nowhere = steps_of(jax.random.key(5), jnp.ones((1, 4096), bool), mean=REFERENCE)
    _, rewards, metrics = apply(penalty.init(jax.random.key(0)), nowhere, jax.random.key(0))
    np.testing.assert_array_equal(rewards, 1)
    assert metrics["kl/step"] == 0


def test_an_adaptive_coefficient_follows_its_target():
    steps = steps_of(jax.random.key(6), jnp.zeros((50, 2), bool))
    kl = log_ratio(steps).mean()

    @jax.jit
    def pay(target):
        controller = adaptive_kl(initial=0.5, target=target, horizon=1000)
        penalty = kl_penalty(GAUSSIAN, REFERENCE, num_envs=2, beta=controller)
        return penalty.apply(penalty.init(jax.random.key(0)), steps, jax.random.key(0))

    for target, error in ((kl / 1.1, 0.1), (kl / 3, 0.2), (kl * 3, -0.2)):
        state, rewards, metrics = pay(target)
        np.testing.assert_allclose(state.coefficient, 0.5 * (1 + error * 100 / 1000), rtol=1e-4)
        np.testing.assert_allclose(rewards, 1 - 0.5 * log_ratio(steps), rtol=1e-3, atol=1e-5)  # the old coefficient
        assert metrics["kl/coefficient"] == 0.5


@pytest.mark.slow
def test_in_ppo_a_strong_penalty_keeps_the_policy_at_its_reference():
    world = tabular_environment(mdp.gridworld(2, 2, goal=3), jnp.arange(4.0), max_steps=4)
    model = actor_critic(world, hidden=(4,))
    reference = model.init(jax.random.key(0))

    @jax.jit
    def run(beta):
        penalty = kl_penalty(model, reference, num_envs=4, beta=beta)
        from_reference = model._replace(init=lambda key: reference)
        algorithm = ppo(
            world, from_reference, optax.adam(3e-2), incentive=penalty, num_envs=4, num_steps=8, num_minibatches=2
        )
        state, history = jax.lax.scan(algorithm.step, algorithm.init(jax.random.key(1)), None, length=12)
        return state.incentive.reference, history["episode/kl"]

    kept, free = run(0.0)
    _, held = run(100.0)
    assert abs(free[0]) < 1e-6
    assert abs(held[-4:].mean()) < 0.2 * free[-4:].mean()
    for before, after in zip(jax.tree.leaves(reference), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(before, after)
