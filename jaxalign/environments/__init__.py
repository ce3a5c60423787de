"""Worlds to act in: a small protocol, classic control, bandits, token and tabular worlds, wrappers and adapters."""

from jaxalign.environments.acrobot import acrobot
from jaxalign.environments.bandit import bandit_regret, bernoulli_bandit, linear_bandit
from jaxalign.environments.cartpole import cartpole
from jaxalign.environments.gymnax_adapter import from_gymnax
from jaxalign.environments.pendulum import pendulum
from jaxalign.environments.point_mass import point_mass
from jaxalign.environments.protocol import (
    Box,
    Discrete,
    Environment,
    Space,
    TimeStep,
    check_environment,
    flat_size,
    valid_action,
)
from jaxalign.environments.randomization import randomized
from jaxalign.environments.running_moments import RunningMoments, init_moments, normalize, update_moments
from jaxalign.environments.sparse_reward import deep_sea, key_door
from jaxalign.environments.tabular import tabular_environment
from jaxalign.environments.token_mdp import one_hot_tokens, token_mdp
from jaxalign.environments.wrappers import (
    EnvironmentBatch,
    auto_reset,
    batched,
    clip_actions,
    episode_statistics,
    normalize_observations,
    normalize_rewards,
    rescale_actions,
    time_limit,
)

__all__ = [
    "Box",
    "Discrete",
    "Environment",
    "EnvironmentBatch",
    "RunningMoments",
    "Space",
    "TimeStep",
    "acrobot",
    "auto_reset",
    "bandit_regret",
    "batched",
    "bernoulli_bandit",
    "cartpole",
    "check_environment",
    "clip_actions",
    "deep_sea",
    "episode_statistics",
    "flat_size",
    "from_gymnax",
    "init_moments",
    "key_door",
    "linear_bandit",
    "normalize",
    "normalize_observations",
    "normalize_rewards",
    "one_hot_tokens",
    "pendulum",
    "point_mass",
    "randomized",
    "rescale_actions",
    "tabular_environment",
    "time_limit",
    "token_mdp",
    "update_moments",
    "valid_action",
]
