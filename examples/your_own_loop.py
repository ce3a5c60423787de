"""A pure loss in a training loop that knows nothing of jaxalign's trainers: DPO on pairs you can check by eye.

A bigram model over five words learns to prefer "good" to "bad" after any word. Run: python examples/your_own_loop.py
"""

import jax
import jax.numpy as jnp
import optax

from jaxalign.preferences import dpo_loss, sequence_log_probs

WORDS = ("the", "food", "was", "good", "bad")
STEPS, LEARNING_RATE, BETA = 100, 0.1, 0.5

prompt = jnp.array([[0, 1, 2], [1, 2, 0], [2, 2, 1]])
chosen = jnp.concatenate([prompt, jnp.full((3, 1), WORDS.index("good"))], axis=1)
rejected = jnp.concatenate([prompt, jnp.full((3, 1), WORDS.index("bad"))], axis=1)
mask = jnp.arange(4)[None, :] >= jnp.full((3, 1), 3)  # only the last word is the answer


def model(table, tokens):
    """Logits [B, T, V] of the next word: row `tokens` of a [V, V] table."""
    return table[tokens]


def answer_log_probs(table):
    """Log-probability of each pair's two answers, ([B], [B])."""
    return tuple(sequence_log_probs(model(table, tokens), tokens, mask) for tokens in (chosen, rejected))


table = jnp.zeros((len(WORDS), len(WORDS)))
reference = answer_log_probs(table)
optimizer = optax.adam(LEARNING_RATE)


@jax.jit
def step(table, opt_state):
    """One gradient step on the mean DPO loss."""

    def loss(table):
        return dpo_loss(*answer_log_probs(table), *reference, beta=BETA).mean()

    value, gradient = jax.value_and_grad(loss)(table)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(table, updates), opt_state, value


if __name__ == "__main__":
    opt_state = optimizer.init(table)
    for i in range(STEPS):
        table, opt_state, value = step(table, opt_state)
        if i % 20 == 0 or i == STEPS - 1:
            print(f"step {i:3d}  loss {float(value):.4f}")
    good, bad = (float(jnp.exp(x[0])) for x in answer_log_probs(table))
    print(f'P(good | "the food was") = {good:.3f}, P(bad | ...) = {bad:.3f}; both were {1 / len(WORDS):.3f}')
