"""Beta, learning rate and seeds swept in one compilation: how far does DPO push the chosen answer's log-probability?

Trains 3 x 2 x 8 small transformers on the embedded pairs and prints held-out accuracy and displacement with intervals.
Run: python examples/sweep_beta.py   (a few minutes on two cores; lower STEPS or SEEDS for less)
"""

import itertools

import jax
import jax.numpy as jnp
import optax

from jaxalign import sweep, train
from jaxalign.interop import ByteTokenizer, PreferenceData, embedded_preferences, tokenize_pairs
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.preferences import dpo, pair_log_probs, score_pairs
from jaxalign.statistics import bootstrap_interval

BETAS, LEARNING_RATES, SEEDS, STEPS, BATCH_SIZE, LENGTH = (0.05, 0.1, 0.5), (1e-3, 3e-3), 8, 60, 16, 48

network = transformer(
    TransformerConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        remat="none",
    )
)  # fmt: skip


def as_arrays(pairs):
    """All pairs as one batch of arrays [N, LENGTH]."""
    tokenizer = ByteTokenizer()
    tokenized = tokenize_pairs(pairs, tokenizer, max_length=LENGTH)
    rows, pad_id = len(tokenized.pairs), tokenizer.pad_id
    data = PreferenceData(tokenized, batch_size=rows, seed=0, pad_id=pad_id, buckets=(LENGTH,))
    return jax.tree.map(jnp.asarray, data.batch(0))


@jax.jit
def run_all(hypers, pairs, held_out):
    """Every setting and seed; the pairs are arguments so that the compiler does not treat them as constants."""

    def run(hyper, key):
        init_key, order_key, run_key = jax.random.split(key, 3)
        start = network.init(init_key)
        rows = jax.random.choice(order_key, pairs.chosen_tokens.shape[0], (STEPS, BATCH_SIZE))
        algorithm = dpo(network.starting_from(start), optax.adam(hyper["learning_rate"]), beta=hyper["beta"])
        state, _ = train(algorithm, run_key, jax.tree.map(lambda x: x[rows], pairs))
        before, after = (pair_log_probs(network, params, held_out) for params in (start, state.params))
        return jax.tree.map(jnp.mean, score_pairs(after, before, beta=hyper["beta"]))

    return sweep(run, hypers, jax.random.split(jax.random.key(0), SEEDS))


if __name__ == "__main__":
    settings = list(itertools.product(BETAS, LEARNING_RATES))
    hypers = {"beta": jnp.array([b for b, _ in settings]), "learning_rate": jnp.array([r for _, r in settings])}
    train_pairs, held_out_pairs = embedded_preferences()
    scores = run_all(hypers, as_arrays(train_pairs), as_arrays(held_out_pairs))
    print("beta  learning rate   held-out accuracy        change of chosen log-prob (nats)")
    for i, (beta, rate) in enumerate(settings):
        cells = []
        for values in (scores.reward_accuracy[i], scores.chosen_displacement[i]):
            low, high = bootstrap_interval(jax.random.key(1), values)
            cells.append(f"{float(values.mean()):6.3f} [{float(low):.3f}, {float(high):.3f}]")
        print(f"{beta:<5} {rate:<15} {cells[0]}   {cells[1]}")
