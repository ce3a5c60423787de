"""Reward networks: a scalar head on a language model, and a sum over the steps of a trajectory."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithm import LanguageModel, Network
from jaxalign.networks.lora import is_adapter
from jaxalign.types import Array, Key, Params


def language_reward(model: LanguageModel) -> Network:
    """A language model with a scalar head in place of its vocabulary: apply(params, tokens [B, T], mask [B, T]) -> [B].

    reward = hidden(params["model"], tokens)[last] . params["head"]["kernel"], `last` the last position that the mask
    marks; a row whose mask is empty has reward 0, and what stands after `last` never matters. The head's kernel [D]
    starts as normal noise of standard deviation 1 / (D + 1): small, and different in each member of an ensemble over
    one frozen model. (Stiennon et al. 2020, arXiv:2009.01325, section 3.4.)

    To start from pretrained weights: `language_reward(model).starting_from({"model": params})`.
    """

    def init(key: Key) -> Params:
        model_key, head_key = jax.random.split(key)
        params = model.init(model_key)
        width = jax.eval_shape(model.unembedding, params).shape[1]
        return {"model": params, "head": {"kernel": jax.random.normal(head_key, (width,)) / (width + 1)}}

    def apply(params: Params, tokens: Array, mask: Array) -> Array:
        marked = jnp.asarray(mask) != 0
        last = jnp.max(jnp.where(marked, jnp.arange(marked.shape[1])[None, :], 0), axis=1)
        hidden = model.hidden(params["model"], tokens)
        states = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        rewards = states @ params["head"]["kernel"].astype(states.dtype)
        return jnp.where(marked.any(axis=1), rewards, 0.0)

    return Network(init, apply)


def is_adapter_or_head(name: str) -> bool:
    """Whether a leaf [...] of a `language_reward` is an adapter's or the head's: what LoRA trains."""
    return is_adapter(name) or name.startswith("head/")


def trajectory_reward(network: Network) -> Network:
    """The sum over real steps of a per-step network: apply(params, features [B, T, ...], mask [B, T]) -> [B].

    reward = sum_t mask[:, t] network.apply(params, features)[:, t], where the network returns [B, T] or [B, T, 1]. So
    trajectories of unequal length may be padded with anything, and what is learned is a reward per step
    (Christiano et al. 2017, arXiv:1706.03741, equation 1).

    Raises ValueError if the network returns another shape.
    """

    def apply(params: Params, features: Any, mask: Array) -> Array:
        real = jnp.asarray(mask) != 0

        def cleared(x: Array) -> Array:
            # Padding may hold NaN, and NaN times a gradient of 0 is NaN.
            return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

        rewards = network.apply(params, jax.tree.map(cleared, features))
        if rewards.shape == (*real.shape, 1):
            rewards = rewards[..., 0]
        if rewards.shape != real.shape:
            raise ValueError(f"trajectory_reward: the network returned {rewards.shape} for mask {real.shape}")
        return jnp.sum(jnp.where(real, rewards, 0.0), axis=1)

    return Network(network.init, apply)
