"""The tour's stops in preference learning."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jaxalign as ja
from jaxalign.cli.dpo import Dpo
from jaxalign.cli.dpo_report import MEASURES
from jaxalign.cli.dpo_run import run as run_dpo
from jaxalign.interop import (
    ByteTokenizer,
    PreferenceData,
    PretrainedUnavailable,
    embedded_preferences,
    tokenize_pairs,
)
from jaxalign.interop.embedded_pairs import task_of
from jaxalign.networks import TransformerConfig, transformer
from jaxalign.preferences import PreferenceBatch, dpo, pair_log_probs, score_pairs
from jaxalign.runtime.figures import curves
from jaxalign.runtime.report import Report, estimate
from jaxalign.statistics import bootstrap_interval, interquartile_mean

SEEDS, STEPS, BATCH_SIZE, LENGTH, BETA, LEARNING_RATE = 8, 120, 32, 48, 0.1, 2e-3


def from_scratch(report: Report, console: Console, out: Path) -> None:
    """DPO of a small transformer from scratch, eight seeds as one program."""
    train, held_out = (_as_arrays(pairs) for pairs in embedded_preferences())
    network = transformer(
        TransformerConfig(
            vocab_size=264, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2,
            head_dim=16, remat="none",
        )
    )  # fmt: skip

    console.print(f"{len(train.chosen_tokens)} pairs, {STEPS} steps, {SEEDS} seeds; compiling and running ...")

    # The pairs are arguments of the compiled program: as constants, XLA would try to sort them while compiling.
    @jax.jit
    def seeds(train: PreferenceBatch, held_out: PreferenceBatch) -> dict[str, Any]:
        def run(_: None, key: ja.types.Key) -> dict[str, Any]:
            return _train_from_scratch(network, train, held_out, key)

        return ja.sweep(run, None, jax.random.split(jax.random.key(0), SEEDS))

    result = jax.device_get(seeds(train, held_out))
    right = result["held_out"].reward_accuracy
    tasks = np.array([task_of(pair.prompt) for pair in embedded_preferences()[1]])
    report.text(
        f"A byte-level transformer of 0.1 M parameters, from random weights, on {len(train.chosen_tokens)} pairs of "
        f"right and wrong answers; {SEEDS} seeds trained by one compiled program."
    )
    report.table(
        [f"implicit reward prefers the right answer, {SEEDS} seeds", "held-out pairs", "accuracy (IQM; chance 0.5)"],
        [
            [name, int(chosen.sum()), _over_seeds(right[:, chosen].mean(axis=1))]
            for name, chosen in (("all", tasks != ""), *((task, tasks == task) for task in np.unique(tasks)))
        ],
        caption="95% bootstrap intervals over seeds, on these pairs; small groups of pairs say little.",
    )
    by_step = {name: np.swapaxes(value, 0, 1) for name, value in result["metrics"].items()}
    report.figure(curves(by_step, ["loss", "rewards/accuracies"], title="DPO from scratch"), caption="All seeds.")


def _train_from_scratch(
    network: ja.LanguageModel, train: PreferenceBatch, held_out: PreferenceBatch, key: ja.types.Key
) -> dict[str, Any]:
    """One seed: initialise, score the untrained model as the reference, train, score the held-out pairs."""
    init_key, order_key, run_key = jax.random.split(key, 3)
    start = network.init(init_key)
    reference = pair_log_probs(network, start, train)
    pairs = train._replace(reference_chosen_logps=reference.chosen, reference_rejected_logps=reference.rejected)
    rows = jax.random.choice(order_key, len(pairs.chosen_tokens), (STEPS, BATCH_SIZE))
    algorithm = dpo(network.starting_from(start), optax.adamw(LEARNING_RATE), beta=BETA, reference="batch")
    state, metrics = ja.train(algorithm, run_key, jax.tree.map(lambda x: x[rows], pairs))
    before, after = (pair_log_probs(network, params, held_out) for params in (start, state.params))
    return {"metrics": metrics, "held_out": score_pairs(after, before, beta=BETA)}


def _over_seeds(values: np.ndarray) -> str:
    """Interquartile mean over seeds with its interval."""
    low, high = bootstrap_interval(jax.random.key(1), values, statistic=lambda x: interquartile_mean(x.T))
    return estimate(float(interquartile_mean(jnp.asarray(values))), float(low), float(high))


def language_model(report: Report, console: Console, out: Path) -> None:
    """A few LoRA steps of DPO on SmolLM2-135M, a real language model."""
    job = Dpo(
        out=out / "smollm2", lora=True, lora_rank=8, limit=400, batch_size=16, microbatch=16, max_length=64,
        learning_rate=1e-3, export=False,
    )  # fmt: skip
    try:
        results = run_dpo(job, console)
    except (PretrainedUnavailable, ImportError) as reason:
        report.text(f"Not measured: {reason}")
        return
    rows = []
    for name, label in MEASURES.items():
        found = results[name]
        rows.append([label, *("" if found[k] is None else estimate(*found[k]) for k in ("before", "after", "change"))])
    report.table(
        ["held-out pairs", "before", "after", "change"], rows, caption="95% bootstrap intervals over pairs."
    )
    report.text(f"The run's own page is {job.out / 'report.html'}")


def _as_arrays(pairs: Any) -> PreferenceBatch:
    """All pairs as one batch of NumPy arrays [N, LENGTH]."""
    tokenized = tokenize_pairs(pairs, ByteTokenizer(), max_length=LENGTH)
    data = PreferenceData(
        tokenized, batch_size=len(tokenized.pairs), seed=0, pad_id=ByteTokenizer().pad_id, buckets=(LENGTH,)
    )
    return jax.tree.map(jnp.asarray, data.batch(0))
