"""What `jaxalign reward` does: load, split, train until the validation loss stops falling, test, report, export."""

import math
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxalign import Algorithm, Network
from jaxalign.algorithm import partition
from jaxalign.cli.dpo_run import batches_of, collect, fingerprint, optimizer_of, pad_id_of, read_pairs
from jaxalign.cli.reward import Reward
from jaxalign.cli.reward_report import PairRewards, write_report
from jaxalign.early_stopping import EarlyStoppingState, with_early_stopping
from jaxalign.interop import PreferenceData, Pretrained, load_pretrained, split_pairs
from jaxalign.interop.reward_models import save_reward_model
from jaxalign.networks import is_adapter
from jaxalign.preferences import PreferenceBatch
from jaxalign.preferences.comparisons import Comparisons, reward_batch
from jaxalign.preferences.reward_ensemble import ensemble_rewards, reward_ensemble
from jaxalign.preferences.reward_model import comparison_loss, reward_model
from jaxalign.preferences.reward_networks import is_adapter_or_head, language_reward
from jaxalign.runtime import fit
from jaxalign.runtime.early_stopping import stop_when_all_stopped
from jaxalign.types import Array, Params


class Prepared(NamedTuple):
    """Pairs to train on, to validate on and to test on, a line about each thing left out, and a digest of them."""

    train: PreferenceData
    validation: PreferenceData
    held_out: PreferenceData
    notes: list[str]
    digest: str


def run(options: Reward, console: Console) -> dict[str, Any]:
    """The whole job, in the order a reader would tell it; returns what was measured on the held-out pairs."""
    if not options.resume and (options.out / "checkpoints").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    _check(options)
    console.print(f"Loading {options.model} ...")
    rank = options.lora_rank if options.lora else 0
    sizes: dict[str, Any] = {"dtype": options.dtype, "lora_rank": rank, "lora_alpha": 2.0 * rank}
    param_dtype = options.dtype if options.lora else "float32"
    pretrained = load_pretrained(options.model, param_dtype=param_dtype, **sizes)
    data = prepare(options, pretrained)
    for note in data.notes:
        console.print(note)

    network = language_reward(pretrained.network)
    rewards = _rewards(network, ensemble=options.ensemble)
    steps = math.ceil(options.epochs * data.train.steps_per_epoch)
    every = options.check_every or max(1, data.train.steps_per_epoch // 4)
    algorithm = with_early_stopping(
        algorithm_of(options, network, pretrained, steps),
        validation_loss(data.validation, rewards),
        every=every,
        patience=options.patience,
    )
    state, metrics = fit(
        algorithm,
        jax.random.key(options.seed),
        _batches(data.train),
        steps=steps,
        directory=options.out,
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        callbacks=[stop_when_all_stopped],
        fingerprint=fingerprint(options, pretrained, data.digest),
        tokens_per_step=data.train.tokens,
        progress=console,
    )
    best = state.best_params if options.ensemble > 1 else jax.tree.map(lambda x: x[None], state.best_params)
    results = _test(options, data, state, metrics, rewards, console)
    if options.export:
        folder = options.out / "model"
        if folder.exists():
            shutil.rmtree(folder)
        save_reward_model(folder, pretrained, best)
        console.print(f"The reward model is in {folder}")
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def prepare(options: Reward, pretrained: Pretrained) -> Prepared:
    """Read the pairs; split them by prompt into training, validation and held-out ones; tokenize and bucket them."""
    rest, held_out, notes, digest = read_pairs(
        options.data, held_out=options.held_out, limit=options.limit, seed=options.seed
    )
    train, validation = split_pairs(rest, held_out=options.validation, seed=options.seed)
    parts = []
    for name, pairs, size in (
        ("training", train, options.batch_size),
        ("validation", validation, options.microbatch),
        ("held-out", held_out, options.microbatch),
    ):
        part, said = batches_of(
            name,
            pairs,
            pretrained,
            batch_size=size,
            max_length=options.max_length,
            seed=options.seed,
            pad_id=pad_id_of(pretrained),
        )
        parts.append(part)
        notes += said
    return Prepared(parts[0], parts[1], parts[2], notes, digest)


def algorithm_of(options: Reward, network: Network, pretrained: Pretrained, steps: int) -> Algorithm:
    """The Algorithm the options ask for, starting from the pretrained weights; adapters and head are drawn anew."""
    peak = options.learning_rate if options.learning_rate is not None else (2e-4 if options.lora else 1e-5)
    base, _ = partition(pretrained.params, lambda name: not is_adapter(name))
    shared: dict[str, Any] = {
        "label_smoothing": options.label_smoothing,
        "centering": options.centering,
        "trainable": is_adapter_or_head if options.lora else None,
        "microbatches": options.batch_size // options.microbatch,
    }
    start = network.starting_from({"model": base})
    optimizer = optimizer_of(peak, steps)
    if options.ensemble == 1:
        return reward_model(start, optimizer, **shared)
    return reward_ensemble(start, optimizer, size=options.ensemble, mode=_mode(), **shared)


def validation_loss(pairs: PreferenceData, rewards: Callable[..., Any]) -> Callable[[Any], Array]:
    """state -> mean over members and pairs of the negative log-likelihood, nats."""
    by_length: dict[int, list[PreferenceBatch]] = {}
    for _, batch in pairs.in_order():
        by_length.setdefault(batch.chosen_tokens.shape[1], []).append(batch)
    # Batches of one length are scored in a loop, in the memory of one.
    stacked = [jax.tree.map(lambda *x: np.stack(x), *batches) for batches in by_length.values()]

    def total(params: Params, frozen: Params, batch: PreferenceBatch) -> Array:
        chosen, rejected = rewards(params, frozen, batch)
        assert batch.valid is not None
        return jnp.sum(jnp.where(batch.valid[:, None], comparison_loss(chosen, rejected), 0.0)) / chosen.shape[1]

    @jax.jit
    def mean(params: Params, frozen: Params, stacked: list[PreferenceBatch]) -> Array:
        totals = [jax.lax.map(lambda batch: total(params, frozen, batch), batches) for batches in stacked]
        return sum(x.sum() for x in totals) / jnp.float32(len(pairs))

    return lambda state: mean(state.params, state.frozen, stacked)


def _rewards(network: Network, *, ensemble: int) -> Callable[[Params, Params, PreferenceBatch], tuple[Array, Array]]:
    """(params, frozen, pairs) -> both sides' rewards [B, E] by every member."""

    def rewards(params: Params, frozen: Params, batch: PreferenceBatch) -> tuple[Array, Array]:
        tokens = jnp.concatenate([batch.chosen_tokens, batch.rejected_tokens])
        mask = jnp.concatenate([batch.chosen_mask, batch.rejected_mask])
        members = params if ensemble > 1 else jax.tree.map(lambda x: x[None], params)
        both = ensemble_rewards(network, members, tokens, mask, frozen=frozen, mode=_mode())
        chosen, rejected = jnp.split(both.T, 2)
        return chosen, rejected

    return rewards


def _batches(pairs: PreferenceData) -> Callable[[int], Comparisons]:
    """Batch `step` with the pairs' places in the data, by which a bootstrap knows them."""

    def batch(step: int) -> Comparisons:
        comparisons = reward_batch(pairs.batch(step))
        assert isinstance(comparisons, Comparisons)
        return comparisons._replace(index=pairs.rows(step).astype(np.int32))

    return batch


def _test(
    options: Reward,
    data: Prepared,
    state: EarlyStoppingState,
    metrics: dict[str, np.ndarray],
    rewards: Callable[..., Any],
    console: Console,
) -> dict[str, Any]:
    """Score the held-out pairs with the best parameters; report and return what that says."""

    @jax.jit
    def score(params: tuple[Params, Params], batch: PreferenceBatch) -> PairRewards:
        chosen, rejected = rewards(*params, batch)
        lengths = [mask.sum(axis=1) for mask in (batch.chosen_mask, batch.rejected_mask)]
        return PairRewards(chosen, rejected, *lengths)

    best = (state.best_params, state.frozen)
    tested = collect(data.held_out, score, best, "Scoring the held-out pairs", console)
    # `fit` looks only now and then: what came after the stop changed nothing.
    stopped = metrics["validation/stopped"] > 0
    count = int(np.argmax(stopped)) + 1 if stopped.any() else len(stopped)
    history = {name: values[:count] for name, values in metrics.items()}
    report, results = write_report(options, data.notes, history, tested, best_step=int(np.asarray(state.best_step)))
    report.print(console)
    return results


def _mode() -> str:
    return "map" if jax.default_backend() == "cpu" else "vmap"


def _check(options: Reward) -> None:
    positive = ("epochs", "batch_size", "microbatch", "ensemble", "limit", "lora_rank", "checkpoint_every")
    for name in (*positive, "check_every", "patience"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if options.batch_size % options.microbatch:
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of --microbatch {options.microbatch}")
    for name, most in (("label_smoothing", 0.5), ("held_out", 1.0), ("validation", 1.0)):
        value = getattr(options, name)
        if not 0 <= value < most or (most == 1.0 and value == 0):
            raise ValueError(f"--{name.replace('_', '-')} must lie between 0 and {most:g}, got {value}")
    if options.centering < 0:
        raise ValueError(f"--centering must not be negative, got {options.centering}")
