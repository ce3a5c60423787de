"""Recurrent PPO: memory that starts anew with an episode, the policy that acted found again, a task to remember."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import Network, train
from jaxalign.environments import Box, Discrete, Environment, TimeStep
from jaxalign.networks import GRU
from jaxalign.rl.ppo import ppo_optimizer
from jaxalign.rl.recurrent_ppo import recurrent_actor_critic, recurrent_ppo, recurrent_ppo_parts, remembering
from jaxalign.rl.rollout import evaluate

KEY = jax.random.key(0)


def recall(length: int) -> Environment:
    """A cue is seen at the start only; the last action earns 1 if it repeats it."""

    def show(cue, t):
        return jnp.stack([jnp.where(t == 0, 2.0 * cue - 1.0, 0.0), (t == length - 1).astype(jnp.float32)])

    def reset(key):
        cue = jax.random.bernoulli(key).astype(jnp.int32)
        return show(cue, jnp.int32(0)), (cue, jnp.int32(0))

    def step(key, state, action):
        cue, t = state
        last = t == length - 1
        reward = jnp.where(last & (action == cue), 1.0, 0.0)
        return TimeStep(show(cue, t + 1), (cue, t + 1), reward, last, jnp.array(False), {})

    return Environment(reset, step, Box(-1.0, 1.0, (2,)), Discrete(2), "recall")


WORLD = recall(3)
MODEL = recurrent_actor_critic(WORLD, hidden=(8,), memory=8)


def test_units_are_those_of_the_equations():
    network = Network.from_linen(GRU(2), jnp.zeros((1, 2)), jnp.zeros((1, 3)), jnp.zeros(1, bool))
    params = network.init(KEY)["GRUCell_0"]
    h, x = np.array([[0.3, -0.7]]), np.array([[1.0, 2.0, -1.0]])
    new = network.apply({"GRUCell_0": params}, jnp.asarray(h), jnp.asarray(x), jnp.array([False]))

    def dense(name, rows):
        layer = params[name]
        return rows @ np.float64(layer["kernel"]) + np.float64(layer.get("bias", np.zeros(2)))

    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    r, z = (sigmoid(dense(f"i{gate}", x) + dense(f"h{gate}", h)) for gate in "rz")
    n = np.tanh(dense("in", x) + r * dense("hn", h))
    np.testing.assert_allclose(new, (1 - z) * n + z * h, rtol=1e-5)
    forgot = network.apply({"GRUCell_0": params}, jnp.asarray(h), jnp.asarray(x), jnp.array([True]))
    fresh = network.apply({"GRUCell_0": params}, jnp.zeros((1, 2)), jnp.asarray(x), jnp.array([False]))
    np.testing.assert_allclose(forgot, fresh)


@pytest.mark.slow
def test_the_gradient_sees_the_policy_that_acted():
    """At the first gradient step nothing has moved, so the ratio is 1 in every step, episodes' ends included."""
    parts = recurrent_ppo_parts(
        WORLD, MODEL, optax.sgd(0.0), num_envs=4, num_steps=7, num_epochs=1, num_minibatches=2
    )

    def twice(key):
        state = parts.init(key)
        for _ in range(2):  # the second rollout begins in the midst of episodes
            state, steps = parts.collect(state, key)
        return parts.improve(state, steps, steps.rewards, key)[1], steps

    metrics, steps = jax.jit(twice)(KEY)
    assert float(metrics["approx_kl"]) == pytest.approx(0.0, abs=1e-6)
    assert float(metrics["clip_fraction"]) == 0.0
    assert 0 < int(steps.done.sum()) < 28


@pytest.mark.slow
def test_what_was_seen_once_is_remembered():
    algorithm = recurrent_ppo(
        WORLD, MODEL, ppo_optimizer(0.02), num_envs=8, num_steps=12, num_epochs=4, num_minibatches=1,
        discount=0.95, entropy_coefficient=0.01,
    )  # fmt: skip

    def run(key):
        train_key, key = jax.random.split(key)
        state, _ = train(algorithm, train_key, None, length=60)
        return evaluate(key, *remembering(WORLD, MODEL, state.params), episodes=64, max_steps=5).returns.mean()

    returns = jax.jit(jax.vmap(run))(jax.random.split(KEY, 2))
    assert (returns > 0.9).all()  # 0.5 without a memory


def test_sizes_that_do_not_split_are_named():
    with pytest.raises(ValueError, match="num_envs=4 do not split into 3"):
        recurrent_ppo(WORLD, MODEL, optax.sgd(0.1), num_envs=4, num_minibatches=3)
