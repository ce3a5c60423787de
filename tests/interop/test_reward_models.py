"""Reward models to disk and back: the same rewards, whatever was trained."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithm import partition
from jaxalign.interop import Pretrained, load_pretrained
from jaxalign.interop.reward_models import load_reward_model, save_reward_model
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.preferences.reward_ensemble import ensemble_rewards
from jaxalign.preferences.reward_networks import is_adapter_or_head, language_reward

TOKENS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 0]], np.int32)
MASK = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]], bool)


@functools.cache
def drawn(members, rank):
    """A model, an ensemble over it with every adapter drawn anew, its frozen part, and its rewards."""
    config = TransformerConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
        lora_rank=rank, lora_alpha=2.0 * rank,
    )  # fmt: skip
    model = transformer(config)
    pretrained = Pretrained(model, jax.jit(model.init)(jax.random.key(0)), None, config)
    network = language_reward(model)
    start = network.starting_from({"model": pretrained.params})

    def member(key):
        params = start.init(key)
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        # Adapters begin at zero, where a mistake in them would not show.
        return treedef.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])

    params, frozen = jax.jit(jax.vmap(member))(jax.random.split(jax.random.key(1), members)), None
    if rank:
        params, _ = partition(params, is_adapter_or_head)
        _, frozen = partition({"model": pretrained.params, "head": {"kernel": jnp.zeros(8)}}, is_adapter_or_head)
    rewards = jax.jit(lambda params: ensemble_rewards(network, params, TOKENS, MASK, frozen=frozen))(params)
    return pretrained, params, rewards


@pytest.mark.parametrize(
    ("members", "rank"),
    [(3, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (1, 2), (2, 0)))],
)
def test_round_trip(tmp_path, members, rank):
    pretrained, params, rewards = drawn(members, rank)
    save_reward_model(tmp_path / "model", pretrained, params)
    loaded = load_reward_model(tmp_path / "model")
    assert loaded.size == members
    assert loaded.tokenizer is None
    np.testing.assert_allclose(jax.jit(loaded.rewards)(TOKENS, MASK), rewards, rtol=1e-5, atol=1e-6)
    mean = jax.jit(loaded.network.apply)(loaded.params, TOKENS, MASK)
    np.testing.assert_allclose(mean, rewards.mean(axis=0), rtol=1e-5, atol=1e-6)
    language = load_pretrained(tmp_path / "model")
    same = np.allclose(language.params["embedding"], pretrained.params["embedding"])
    assert same == ((members, rank) != (1, 0))  # a single model's own weights are the folder's


def test_what_is_wrong_is_named(tmp_path):
    pretrained, params, _ = drawn(3, 2)
    folder = tmp_path / "model"
    save_reward_model(folder, pretrained, params)
    with pytest.raises(FileExistsError, match="model"):
        save_reward_model(folder, pretrained, params)
    with pytest.raises(FileNotFoundError, match=r"nothing/reward\.json"):
        load_reward_model(tmp_path / "nothing")
    settings = json.loads((folder / "reward.json").read_text())
    (folder / "reward.json").write_text(json.dumps({**settings, "members": 2}))
    with pytest.raises(ValueError, match=r"is \(3, .*the settings say \(2, "):
        load_reward_model(folder)
    (folder / "reward.json").write_text(json.dumps({**settings, "format": 9}))
    with pytest.raises(ValueError, match="format 9"):
        load_reward_model(folder)
    (folder / "reward.json").write_text(json.dumps({**settings, "lora_rank": 0}))
    with pytest.raises(ValueError, match="has no place in this reward model"):
        load_reward_model(folder)
    uneven = {**params, "head": {"kernel": jnp.zeros((2, 8))}}
    with pytest.raises(ValueError, match=r"one leading axis \[E\] in common, got \[2, 3\]"):
        save_reward_model(tmp_path / "other", pretrained, uneven)
