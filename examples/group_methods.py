"""GRPO, RLOO, Dr. GRPO and DAPO teach a small transformer to count, four seeds of each as one program.

The reward of a completion is the share of its tokens that are one more than the token before them. What each method
reaches is printed with intervals over seeds, and with how far from the untrained model it went.
Run: python examples/group_methods.py   (about two minutes on two cores; lower STEPS or SEEDS for less)
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign import sweep, train
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.rlhf import Prompts, dapo, dr_grpo, grpo, reward_of, rloo
from jaxalign.statistics import bootstrap_interval, interquartile_mean

SEEDS, STEPS, SAMPLES, NEW_TOKENS, WORDS, LEARNING_RATE = 4, 60, 8, 8, 16, 1e-2
METHODS = {"GRPO": grpo, "RLOO": rloo, "Dr. GRPO": dr_grpo, "DAPO": dapo}

model = transformer(
    TransformerConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        remat="none",
    )
)  # fmt: skip
prompts = Prompts(jnp.arange(1, 9)[:, None], jnp.ones(8, jnp.int32))  # one token each


def counting(prompts, completions):
    """The share of completion tokens that follow the token before them."""
    right = (completions.tokens[:, 1:] == completions.tokens[:, :-1] + 1) & completions.mask[:, 1:]
    return right.sum(axis=1) / completions.mask.sum(axis=1)


def learn(method):
    """Scores and KL [SEEDS, STEPS] of one method."""

    def run(_, key):
        algorithm = method(
            model, optax.adam(LEARNING_RATE), reward_of(counting), samples=SAMPLES, max_new_tokens=NEW_TOKENS,
            kl_coefficient=0.0, chunk_size=64,
        )  # fmt: skip
        batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (STEPS, *x.shape)), prompts._replace(index=jnp.arange(8)))
        _, metrics = train(algorithm, key, batches)
        return metrics["objective/scores"], metrics["objective/kl"]

    return jax.jit(lambda keys: sweep(run, None, keys))(jax.random.split(jax.random.key(0), SEEDS))


if __name__ == "__main__":
    print(f"{'method':10} {'share right at first':>22} {'in the last ten steps':>28} {'nats from the start':>20}")
    for name, method in METHODS.items():
        scores, kl = learn(method)
        reached = scores[:, -10:].mean(axis=1)
        low, high = bootstrap_interval(jax.random.key(1), reached, statistic=lambda x: interquartile_mean(x.T))
        middle = float(interquartile_mean(reached))
        first, far = float(scores[:, 0].mean()), float(kl[:, -1].mean())
        print(f"{name:10} {first:22.3f} {middle:11.3f} [{low:.3f}, {high:.3f}] {far:20.1f}")
