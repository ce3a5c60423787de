"""Bonuses against hand numbers and NumPy loops; what they must tend to; and a sparse reward that only they find."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import logsumexp

from jaxalign.algorithm import train
from jaxalign.environments.protocol import Box, Discrete
from jaxalign.environments.sparse_reward import deep_sea
from jaxalign.rl.actor_critic import act_with, actor_critic
from jaxalign.rl.incentives import chain
from jaxalign.rl.intrinsic_curiosity import intrinsic_curiosity
from jaxalign.rl.ppo import ppo, ppo_optimizer
from jaxalign.rl.random_network_distillation import random_network_distillation
from jaxalign.rl.rollout import Steps, evaluate
from jaxalign.rl.visit_counts import earlier_equals, simhash, state_actions, visit_counts
from jaxalign.statistics import bootstrap_interval

T, N, S = 5, 2, 4
BOX, ACTIONS, FORCES = Box(-np.inf, np.inf, (3,)), Discrete(3), Box(-1.0, 1.0, (2,))
ETA = 0.5


def some_steps(seed, *, continuous=True, actions=ACTIONS):
    """T steps of N environments, drawn at random; dones among them."""
    rng = np.random.default_rng(seed)
    seen, after = rng.normal(2.0, 3.0, (2, T, N, 3)) if continuous else rng.integers(0, S, (2, T, N))
    done = rng.uniform(size=(T, N)) < 0.3
    if isinstance(actions, Discrete):
        taken = rng.integers(0, actions.size, (T, N))
    else:
        taken = rng.uniform(-1, 1, (T, N, *actions.shape))
    rewards = rng.normal(size=(T, N))
    arrays = (seen, taken, rewards, after, done, np.zeros_like(done), rewards)
    return Steps(*(jnp.asarray(x, np.int32 if x.dtype == int else None) for x in arrays), {})


def arrivals(steps):
    return steps.next_observations


def counts(coefficient=ETA, count_of=arrivals, num_keys=S):
    return visit_counts(count_of, num_keys=num_keys, coefficient=coefficient)


def distillation(coefficient=ETA, **options):
    options = {"num_envs": N, "discount": 0.9, "features": 4, "hidden": (8,), **options}
    return random_network_distillation(BOX, optax.adam(1e-2), coefficient=coefficient, **options)


def curiosity(coefficient=ETA, actions=ACTIONS, **options):
    options = {"features": 4, "hidden": (8,), **options}
    return intrinsic_curiosity(BOX, actions, optax.adam(1e-2), coefficient=coefficient, **options)


class Case(NamedTuple):
    make: object
    steps: Steps


CASES = {
    "counts": Case(counts, some_steps(0, continuous=False)),
    "distillation": Case(distillation, some_steps(1)),
    "curiosity": Case(curiosity, some_steps(2)),
    "curiosity, real actions": Case(lambda c=ETA: curiosity(c, FORCES), some_steps(3, actions=FORCES)),
}


def array_leaves(tree):
    return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


# ---- every bonus


def test_it_is_an_incentive_that_fits_in_jit_scan_and_vmap(case):
    def pay(coefficient, key):
        incentive = case.make(coefficient)
        steps = jax.tree.map(lambda x: jnp.stack([x] * 2), case.steps)
        start = incentive.init(key)

        def one(state, steps):
            after, rewards, metrics = incentive.apply(state, steps, key)
            return after, (rewards - steps.rewards, metrics)

        state, (paid, metrics) = jax.lax.scan(one, start, steps)  # scan raises if the state changes its type
        return start, state, paid, metrics

    coefficients = jnp.array([0.0, ETA, 2 * ETA])
    start, state, paid, metrics = jax.jit(jax.vmap(pay, in_axes=(0, None)))(coefficients, jax.random.key(0))
    assert not [x for x in jax.tree.leaves(jax.eval_shape(case.make().init, jax.random.key(0))) if x.weak_type]
    assert paid.shape == (3, 2, T, N)
    np.testing.assert_array_equal(paid[0], 0.0)
    np.testing.assert_allclose(paid[2], 2 * paid[1], rtol=1e-4, atol=1e-5)
    assert (np.asarray(paid[1]) > 0).all()
    assert all(name.startswith("intrinsic/") and np.isfinite(x).all() for name, x in metrics.items())
    # The bonus in the metrics is the mean of what was paid, before the coefficient, whatever that is.
    (bonus,) = (x for name, x in metrics.items() if name.endswith("bonus"))
    np.testing.assert_allclose(bonus[1:], paid[1:].mean((2, 3)) / coefficients[1:, None], rtol=1e-4)
    assert any((a != b).any() for a, b in zip(array_leaves(start), array_leaves(state), strict=True))


def test_double_precision_agrees_with_single(case):
    with jax.enable_x64(True):
        steps = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, case.steps)
        incentive = case.make()
        state, double, _ = jax.jit(incentive.apply)(incentive.init(jax.random.key(0)), steps, jax.random.key(1))
        assert double.dtype == np.float64
        again, _, _ = jax.eval_shape(incentive.apply, state, steps, jax.random.key(1))
        assert jax.tree.map(lambda x: x.dtype, again) == jax.tree.map(lambda x: x.dtype, state)
    assert np.isfinite(double).all()
