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
from jaxalign.environments.point_mass import point_mass
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
    "point_mass": lambda: point_mass(horizon=5, max_force=2.0),
    "randomized": lambda: randomized(lambda p: pendulum(mass=p), jax.random.uniform),
    "tabular_environment": lambda: tabular_environment(gridworld(2, 2, goal=3), jnp.ones(4), max_steps=5),
    "token_mdp": lambda: token_mdp(lambda tokens, mask: mask.sum(), **LENGTHS),
}
KEY = jax.random.key(0)
WRAPPERS = {"auto_reset", "clip_actions", "episode_statistics", "rescale_actions", "time_limit"}  # test_wrappers.py
OTHERS = {"from_gymnax"}  # test_gymnax_adapter.py


@pytest.fixture(scope="module", params=FACTORIES)
def environment(request) -> Environment:
    return FACTORIES[request.param]()


@pytest.fixture(scope="module")
def run(environment):
    """key, actions [T, ...] -> TimeSteps [T], jitted, without resets."""

    @jax.jit
    def run(key, actions):
        first, state = environment.reset(key)

        def advance(state, action):
            new = environment.step(key, state, action)
            return new.state, (new._replace(state=None), environment.observation_space.contains(new.observation))

        return environment.observation_space.contains(first), jax.lax.scan(advance, state, actions)[1]

    return run


def test_keeps_the_protocol_also_in_a_batch(environment):
    check_environment(environment)
    observation, state = jax.eval_shape(environment.reset, KEY)
    action = jax.eval_shape(environment.action_space.sample, KEY)
    new = jax.eval_shape(environment.step, KEY, state, action)
    assert not [x for x in jax.tree.leaves((state, new.state, new.reward, observation)) if x.weak_type]
    assert observation.dtype == new.observation.dtype == environment.observation_space.dtype

    batch = batched(episode_statistics(environment), 3)
    observation, state = jax.eval_shape(batch.reset, KEY)
    actions = jax.ShapeDtypeStruct((3, *action.shape), action.dtype)
    new = jax.eval_shape(batch.step, KEY, state, actions)
    assert observation.shape == new.observation.shape == (3, *environment.observation_space.shape)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), new.state)


def test_observations_stay_in_their_space_and_keys_decide_all(environment, run):
    space, draw = environment.action_space, np.random.default_rng(0)
    if isinstance(space, Discrete):
        actions = draw.integers(0, space.size, 3).astype(np.int32)
    else:
        actions = draw.uniform(space.low, space.high, (3, *space.shape)).astype(np.float32)
    first, (steps, inside) = run(KEY, actions)
    assert first
    assert inside.all()
    assert np.isfinite(steps.reward).all()
    jax.tree.map(np.testing.assert_array_equal, run(KEY, actions)[1][0], steps)


def test_an_action_that_is_none_is_named_and_under_jit_pays_nan(environment, run):
    space = environment.action_space
    wrong = np.int32(space.size) if isinstance(space, Discrete) else np.full(space.shape, np.nan, np.float32)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(environment.reset, KEY)[1])
    for action, message in ((wrong, r"action .* is not in"), (np.zeros((2, 2), np.int32), "an action must have shape")):
        with pytest.raises(ValueError, match=message):
            environment.step(KEY, state, action)
    assert np.isnan(run(KEY, np.stack([wrong] * 3))[1][0].reward).all()


def test_no_factory_is_left_out():
    found = set()
    for module in pkgutil.iter_modules(environments.__path__):
        home = importlib.import_module(f"{environments.__name__}.{module.name}")
        for name, value in inspect.getmembers(home, inspect.isfunction):
            if value.__module__ == home.__name__ and inspect.get_annotations(value).get("return") is Environment:
                found |= {name} if not name.startswith("_") else set()
    assert found - WRAPPERS - OTHERS == FACTORIES.keys()
