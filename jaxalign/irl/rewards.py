"""Rewards as networks over features."""

import jax

from jaxalign.algorithm import Network
from jaxalign.types import Array, Key, Params


def linear_reward(num_features: int, *, scale: float = 0.01) -> Network:
    """reward = features @ weights: features [S, F] give [S], [S, A, F] give [S, A].

    params: {"weights": [F]}, drawn from N(0, scale^2). With one-hot features it is a reward per state.
    """

    def init(key: Key) -> Params:
        return {"weights": scale * jax.random.normal(key, (num_features,))}

    return Network(init, lambda params, features: features @ params["weights"])


def evaluate_reward(network: Network, params: Params, features: Array) -> Array:
    """`network.apply(params, features)` as a reward: an output [S, 1] becomes [S]; [S] and [S, A] stay.

    Raises ValueError if the output's leading axis is not that of `features` [S, ...], or it has more than two axes.
    """
    reward = network.apply(params, features)
    if reward.ndim not in (1, 2) or reward.shape[0] != features.shape[0]:
        raise ValueError(f"the reward network gives {reward.shape} for features {features.shape}, not [S] or [S, A]")
    return reward[:, 0] if reward.ndim == 2 and reward.shape[1] == 1 else reward
