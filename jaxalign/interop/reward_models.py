"""Reward models on disk: a Hugging Face folder with the language model, and beside it what makes rewards of it."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithm import Network, partition, path_name
from jaxalign.interop.pretrained import Pretrained, load_pretrained, save_pretrained
from jaxalign.interop.safetensor_files import open_safetensors, write_safetensors
from jaxalign.interop.tokenizer import Tokenizer
from jaxalign.networks.lora import is_adapter
from jaxalign.networks.transformer import TransformerConfig
from jaxalign.preferences.reward_ensemble import ensemble_mean, ensemble_rewards
from jaxalign.preferences.reward_networks import language_reward
from jaxalign.types import Array, Params

BESIDE, SETTINGS, FORMAT = "reward", "reward.json", 1


class RewardModel(NamedTuple):
    """A reward model, or an ensemble of E over one language model.

    network: `network.apply(params, tokens[B, T], mask[B, T]) -> rewards[B]`, reduced over the members; the mask marks
        the completion
    params: {"members": each member's own leaves [E, ...] (E = 1 for a single model), "frozen": those they share}
    tokenizer, config: as in `Pretrained`
    member: the network of one member, over its leaves and the shared ones
    """

    network: Network
    params: Params
    tokenizer: Tokenizer | None
    config: TransformerConfig
    member: Network

    @property
    def size(self) -> int:
        """E."""
        return int(jax.tree.leaves(self.params["members"])[0].shape[0])

    def rewards(self, tokens: Array, mask: Array) -> Array:
        """Every member's rewards [E, B]."""
        return _member_rewards(self.member, self.params, tokens, mask)


def _member_rewards(member: Network, params: Params, tokens: Array, mask: Array) -> Array:
    return ensemble_rewards(member, params["members"], tokens, mask, frozen=params["frozen"], mode="map")


def save_reward_model(folder: str | os.PathLike[str], pretrained: Pretrained, params: Params) -> None:
    """Write a reward model so that `load_reward_model` gives it back.

    The folder is a Hugging Face folder of the language model; members' own leaves are in reward/model.safetensors, in
    float32. Of a single model whose weights themselves were trained, those are the folder's.

    Args:
        folder: must not exist, or be empty.
        pretrained: what the members started from, with the configuration (adapters' rank included) and tokenizer.
        params: the trained leaves of `language_reward(pretrained.network)`, [E, ...] each; None where frozen.

    Raises FileExistsError as `save_pretrained` does, and ValueError if the leaves disagree on E.
    """
    folder = Path(folder)
    own = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    members = sorted({leaf.shape[0] for leaf in own.values()})
    if len(members) != 1:
        raise ValueError(f"save_reward_model: trained leaves need one leading axis [E] in common, got {members}")
    base = _without_adapters(pretrained.params)
    if members == [1]:
        tuned = _without_adapters(params["model"])
        base = jax.tree.map(lambda x, y: y if x is None else x[0], tuned, base, is_leaf=lambda x: x is None)
        own = {name: leaf for name, leaf in own.items() if is_adapter(name) or not name.startswith("model/")}
    settings = {
        "format": FORMAT,
        "members": members[0],
        "lora_rank": pretrained.config.lora_rank,
        "lora_alpha": pretrained.config.lora_alpha,
    }
    save_pretrained(folder, (_pruned(base), dataclasses.replace(pretrained.config, lora_rank=0), pretrained.tokenizer))
    (folder / BESIDE).mkdir()
    tensors = [(name, leaf.shape, lambda leaf=leaf: np.asarray(leaf, np.float32)) for name, leaf in own.items()]
    write_safetensors(folder / BESIDE, tensors, dtype="float32", max_shard_bytes=2_000_000_000)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_reward_model(
    folder: str | os.PathLike[str], *, reduce: Callable[[Array], Array] = ensemble_mean, **options: Any
) -> RewardModel:
    """The reward model that `save_reward_model` (or `jaxalign reward`, in model/) wrote.

    Args:
        reduce: members' rewards [E, B] -> [B], such as `worst_case`.
        **options: those of `load_pretrained`, such as `dtype="bfloat16"`.

    Raises FileNotFoundError for a folder without one, and ValueError naming file and tensor if one is missing, unknown
    or of another shape.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise FileNotFoundError(f"{folder / SETTINGS} is missing: not the folder of a reward model")
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if settings.get("format") != FORMAT:
        raise ValueError(f"{folder / SETTINGS}: format {settings.get('format')!r}, this release reads {FORMAT}")
    sizes = {"lora_rank": settings["lora_rank"], "lora_alpha": settings["lora_alpha"]}
    pretrained = load_pretrained(folder, **{**options, **sizes})
    member = language_reward(pretrained.network)
    expected = jax.eval_shape(member.init, jax.random.key(0))
    source = open_safetensors(folder / BESIDE)
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(expected)}
    needed = {name for name in shapes if is_adapter(name) or name.startswith("head/")}
    if missing := sorted(needed - source.shapes.keys()):
        raise ValueError(f"{source.where(missing[0])}: no tensor {missing[0]!r} ({len(missing)} missing)")
    for name, shape in source.shapes.items():
        if name not in shapes:
            raise ValueError(f"{source.where(name)}: tensor {name!r} has no place in this reward model")
        if shape != (settings["members"], *shapes[name]):
            wanted = (settings["members"], *shapes[name])
            raise ValueError(f"{source.where(name)}: tensor {name!r} is {shape}, the settings say {wanted}")

    def own(path: Any, _: Any) -> Array | None:
        return jnp.asarray(source.read(path_name(path))) if path_name(path) in source.shapes else None

    members = jax.tree.map_with_path(own, expected)
    shared = {"model": pretrained.params, "head": {"kernel": None}}
    frozen = jax.tree.map(lambda x, y: y if x is None else None, members, shared, is_leaf=lambda x: x is None)
    params = {"members": members, "frozen": frozen}
    network = Network(lambda key: params, lambda p, tokens, mask: reduce(_member_rewards(member, p, tokens, mask)))
    return RewardModel(network, params, pretrained.tokenizer, pretrained.config, member)


def _without_adapters(params: Params) -> Params:
    return partition(params, lambda name: not is_adapter(name))[0]


def _pruned(params: Params) -> Params:
    """Dictionaries without the entries that are None."""
    if not isinstance(params, dict):
        return params
    return {name: _pruned(child) for name, child in params.items() if child is not None}
