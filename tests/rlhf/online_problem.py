"""A tiny language model, prompts of unequal length, and a reward: shared by the tests of online learning."""

import jax.numpy as jnp
import numpy as np

from jaxalign.networks import TransformerConfig, transformer
from jaxalign.rlhf.language_rollout import Prompts, reward_of
from jaxalign.rlhf.token_steps import TokenSteps, sequence_mean

WORDS, WISHED, STOP = 7, 3, 0
SIZES = {
    "vocab_size": WORDS, "hidden_size": 8, "intermediate_size": 12, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
    "head_dim": 4, "remat": "none",
}  # fmt: skip
MODEL = transformer(TransformerConfig(**SIZES))
PROMPTS = Prompts(jnp.array([[1, 2, 3], [4, 5, 0]]), jnp.array([3, 2]), jnp.array([0, 1]))


def share_of_wished(prompts, completions):
    """The share of a completion's tokens that are WISHED."""
    hits = jnp.sum((completions.tokens == WISHED) & completions.mask, axis=1, dtype=jnp.float32)
    return hits / jnp.sum(completions.mask, axis=1)


REWARD = reward_of(share_of_wished)


def random_steps(seed=0, rows=4, length=9, aggregation=sequence_mean, dtype=np.float32):
    """Rows with prompts and completions of different lengths, and random numbers in every other field."""
    rng = np.random.default_rng(seed)
    starts = 1 + np.arange(rows) % 3
    ends = length - (np.arange(rows) * 2) % 5
    place = np.arange(length)
    mask = jnp.asarray((place >= starts[:, None]) & (place < ends[:, None]))
    numbers = [jnp.asarray(rng.normal(size=(rows, length)).astype(dtype)) for _ in range(4)]
    log_probs, advantages, reference, targets = numbers
    weights, share = aggregation(mask)
    tokens = jnp.asarray(rng.integers(1, WORDS, (rows, length)))
    return TokenSteps(
        tokens, mask, -2 + 0.1 * log_probs, advantages, weights.astype(dtype), share.astype(dtype),
        -2 + 0.1 * reference, values=0.5 * targets, targets=targets,
    ), ends  # fmt: skip
