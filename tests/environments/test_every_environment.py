"""One suite for every built-in factory; `test_no_factory_is_left_out` sees that each has its case."""

import importlib
import inspect
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import environments
from jaxalign.environments.acrobot import acrobot
from jaxalign.environments.bandit import bernoulli_bandit, linear_bandit
from jaxalign.environments.cartpole import cartpole
from jaxalign.environments.pendulum import pendulum
from jaxalign.environments.protocol import Discrete, Environment, check_environment
from jaxalign.environments.randomization import randomized
from jaxalign.environments.sparse_reward import deep_sea, key_door
from jaxalign.environments.tabular import tabular_environment
from jaxalign.environments.token_mdp import one_hot_tokens, token_mdp
from jaxalign.environments.wrappers import batched, episode_statistics
from jaxalign.mdp import gridworld

LENGTHS = {"vocabulary": 4, "length": 3, "eos": 0}
FACTORIES = {
    "acrobot": acrobot,
    "bernoulli_bandit": lambda: bernoulli_bandit([[0.2, 0.9], [0.7, 0.1]]),
    "cartpole": cartpole,
    "deep_sea": lambda: deep_sea(4),
    "key_door": lambda: key_door(4),
    "linear_bandit": lambda: linear_bandit(np.eye(2), np.eye(2)),
    "one_hot_tokens": lambda: one_hot_tokens(token_mdp(lambda tokens, mask: mask.sum(), **LENGTHS)),
    "pendulum": pendulum,
    "randomized": lambda: randomized(lambda p: pendulum(mass=p), jax.random.uniform),
    "tabular_environment": lambda: tabular_environment(gridworld(2, 2, goal=3), jnp.ones(4), max_steps=5),
    "token_mdp": lambda: token_mdp(lambda tokens, mask: mask.sum(), **LENGTHS),
}
WRAPPERS = {"auto_reset", "clip_actions", "episode_statistics", "rescale_actions", "time_limit"}  # test_wrappers.py
OTHERS = {"from_gymnax"}  # test_gymnax_adapter.py


@pytest.fixture(scope="module", params=FACTORIES)
def environment(request) -> Environment:
    return FACTORIES[request.param]()


def test_keeps_the_protocol(environment):
    check_environment(environment)
    observation, state = jax.eval_shape(environment.reset, jax.random.key(0))
    new = jax.eval_shape(environment.step, jax.random.key(0), state, jax.eval_shape(environment.action_space.sample, jax.random.key(0)))
    assert not [x for x in jax.tree.leaves((state, new.state, new.reward, observation)) if x.weak_type]
    assert observation.dtype == new.observation.dtype == environment.observation_space.dtype


def test_random_episodes_stay_in_their_space(environment):
    batch = batched(episode_statistics(environment), 3)

    @jax.jit
    def run(key):
        reset_key, key = jax.random.split(key)

        def advance(state, key):
            action_key, step_key = jax.random.split(key)
            new = batch.step(step_key, state, jax.vmap(batch.action_space.sample)(jax.random.split(action_key, 3)))
            inside = jax.vmap(batch.observation_space.contains)(new.observation)
            return new.state, (new._replace(state=None), inside)

        return jax.lax.scan(advance, batch.reset(reset_key)[1], jax.random.split(key, 60))[1]

    steps, inside = run(jax.random.key(0))
    assert inside.all()
    assert np.isfinite(steps.reward).all()
    again, _ = run(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, steps, again)


def test_an_action_that_is_none_is_named_and_under_jit_pays_nan(environment):
    _, state = environment.reset(jax.random.key(0))
    space = environment.action_space
    wrong = jnp.asarray(space.size, jnp.int32) if isinstance(space, Discrete) else jnp.full(space.shape, jnp.nan)
    with pytest.raises(ValueError, match=r"action .* is not in"):
        environment.step(jax.random.key(0), state, wrong)
    with pytest.raises(ValueError, match="an action must have shape"):
        environment.step(jax.random.key(0), state, jnp.zeros((2, 2), jnp.int32))
    new = jax.jit(environment.step)(jax.random.key(0), state, wrong)
    assert np.isnan(new.reward)


def test_no_factory_is_left_out():
    found = set()
    for module in pkgutil.iter_modules(environments.__path__):
        home = importlib.import_module(f"{environments.__name__}.{module.name}")
        for name, value in inspect.getmembers(home, inspect.isfunction):
            if value.__module__ == home.__name__ and inspect.get_annotations(value).get("return") is Environment:
                found |= {name} if not name.startswith("_") else set()
    assert found - WRAPPERS - OTHERS == FACTORIES.keys()
