"""What `jaxalign dpo` does: load, split, score the reference once, train, evaluate, report, export."""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

from jaxalign import Algorithm, preferences, replicate
from jaxalign.algorithm import partition
from jaxalign.cli.dpo import Dpo
from jaxalign.cli.dpo_report import write_report
from jaxalign.interop import (
    PreferenceData,
    PreferencePair,
    Pretrained,
    embedded_preferences,
    load_pretrained,
    read_preferences,
    save_pretrained,
    split_pairs,
    tokenize_pairs,
)
from jaxalign.networks import is_adapter
from jaxalign.preferences import PairLogProbs, pair_log_probs
from jaxalign.runtime import fit
from jaxalign.runtime.checkpoint import digests

LOSSES: dict[str, Callable[..., Any]] = {
    "dpo": preferences.dpo_loss,
    "ipo": preferences.ipo_loss,
    "hinge": preferences.hinge_loss,
    "robust": preferences.robust_dpo_loss,
    "exo": preferences.exo_pair_loss,
    "nca": preferences.nca_pair_loss,
    "bco": preferences.bco_pair_loss,
    "sppo": preferences.sppo_hard_loss,
    "aot": preferences.aot_loss,
    "aot-unpaired": preferences.aot_unpaired_loss,
    "apo-zero": preferences.apo_zero_loss,
    "apo-down": preferences.apo_down_loss,
    "discopop": preferences.discopop_loss,
}
SMOOTHED = ("dpo", "robust", "exo")


class Prepared(NamedTuple):
    """The training and held-out pairs, a line about each thing left out, and a digest of what they are."""

    train: PreferenceData
    held_out: PreferenceData
    notes: list[str]
    digest: str


def run(options: Dpo, console: Console) -> dict[str, dict[str, Any]]:
    """The whole job, in the order a reader would tell it; returns what was measured on the held-out pairs."""
    if not options.resume and (options.out / "checkpoints").exists():
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    _check(options)
    console.print(f"Loading {options.model} ...")
    rank = options.lora_rank if options.lora else 0
    sizes: dict[str, Any] = {"dtype": options.dtype, "lora_rank": rank, "lora_alpha": 2.0 * rank}
    param_dtype = options.dtype if options.lora else "float32"
    pretrained = load_pretrained(options.model, param_dtype=param_dtype, **sizes)
    data = prepare(options, pretrained, pad_id=pad_id_of(pretrained))
    for note in data.notes:
        console.print(note)

    identity = fingerprint(options, pretrained, data.digest)
    score = jax.jit(lambda params, batch: pair_log_probs(pretrained.network, params, batch))
    before = {}
    for name, pairs in (("train", data.train), ("held_out", data.held_out)):
        before[name] = _reference(options.out / f"reference_{name}.npz", identity, pairs, score, pretrained, console)
    train = data.train.with_reference(before["train"].chosen, before["train"].rejected)

    steps = math.ceil(options.epochs * train.steps_per_epoch)
    algorithm = algorithm_of(options, pretrained, steps)
    seeds = range(options.seed, options.seed + options.seeds)
    if options.seeds > 1:
        mode = "map" if jax.default_backend() == "cpu" else "vmap"
        algorithm = replicate(algorithm, options.seeds, mode=mode)
    state, metrics = fit(
        algorithm,
        jax.random.key(options.seed),
        train.batch if options.seeds == 1 else functools.partial(train.lanes, seeds=seeds),
        steps=steps,
        directory=options.out,
        resume=options.resume,
        checkpoint_every=options.checkpoint_every,
        fingerprint=identity,
        tokens_per_step=lambda step: train.tokens(step) * options.seeds,
        progress=console,
    )
    lanes = [_lane(state, i) for i in range(options.seeds)] if options.seeds > 1 else [state]
    title = "Scoring the tuned model, held_out"
    held_out = [collect(data.held_out, score, lane.all_params, title, console) for lane in lanes]
    after = jax.tree.map(lambda *x: np.stack(x), *held_out)
    report, results = write_report(options, data.notes, metrics, before["held_out"], after)
    report.print(console)
    if options.export:
        folder = options.out / "model"
        if folder.exists():
            shutil.rmtree(folder)
        save_pretrained(folder, pretrained._replace(params=lanes[0].all_params))
        console.print(f"The tuned model{' of the first seed' if options.seeds > 1 else ''} is in {folder}")
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def prepare(options: Dpo, pretrained: Pretrained, *, pad_id: int) -> Prepared:
    """Read, split by prompt, tokenize and bucket the pairs."""
    train, held_out, notes, digest = read_pairs(
        options.data, held_out=options.held_out, limit=options.limit, seed=options.seed
    )
    parts = []
    for name, pairs, size in (("training", train, options.batch_size), ("held-out", held_out, options.microbatch)):
        part, said = batches_of(
            name, pairs, pretrained, batch_size=size, max_length=options.max_length, seed=options.seed, pad_id=pad_id
        )
        parts.append(part)
        notes += said
    return Prepared(parts[0], parts[1], notes, digest)


def read_pairs(
    data: Path | None, *, held_out: float, limit: int | None, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair], list[str], str]:
    """(training pairs, held-out pairs, notes, digest) of a file or the embedded pairs; no prompt is in both parts."""
    notes = []
    if data is None:
        train, kept = embedded_preferences()
        notes.append("Pairs: the embedded right and wrong answers")
        source = b"embedded"
    else:
        file = read_preferences(data, on_bad="skip")
        notes += [f"Left out {count} rows: {reason}" for reason, count in file.reasons.items()]
        train, kept = split_pairs(file.pairs, held_out=held_out, seed=seed)
        source = hashlib.sha256(data.read_bytes()).digest()
    if limit is not None and limit < len(train) + len(kept):
        rng = np.random.default_rng(seed)
        share = limit / (len(train) + len(kept))
        train, kept = (
            [part[i] for i in sorted(rng.permutation(len(part))[: max(1, round(share * len(part)))])]
            for part in (train, kept)
        )
    return train, kept, notes, hashlib.sha256(source).hexdigest()[:16]


def batches_of(
    name: str,
    pairs: list[PreferencePair],
    pretrained: Pretrained,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    pad_id: int,
) -> tuple[PreferenceData, list[str]]:
    """Tokenize and bucket pairs, which messages call `name`; with them a line about each thing left out."""
    tokenized = tokenize_pairs(pairs, pretrained.tokenizer, max_length=max_length)
    if not tokenized.pairs:
        raise ValueError(f"no {name} pairs are left after tokenization with --max-length {max_length}")
    notes = [f"{len(tokenized.pairs)} {name} pairs, {tokenized.truncated} truncated, {len(tokenized.dropped)} dropped"]
    reasons = collections.Counter(reason for _, reason in tokenized.dropped)
    notes += [f"Dropped {count} {name} pairs: {reason}" for reason, count in reasons.most_common()]
    return PreferenceData(tokenized, batch_size=batch_size, seed=seed, pad_id=pad_id), notes


def algorithm_of(options: Dpo, pretrained: Pretrained, steps: int) -> Algorithm:
    """The Algorithm the options ask for, starting from the pretrained weights."""
    peak = options.learning_rate if options.learning_rate is not None else (2e-4 if options.lora else 1e-5)
    optimizer = optimizer_of(peak, steps)
    # Without the adapters that came with the model, so that each seed draws its own; they start without effect.
    base, _ = partition(pretrained.params, lambda name: not is_adapter(name))
    network = pretrained.network.starting_from(base)
    shared: dict[str, Any] = {
        "beta": options.beta,
        "trainable": is_adapter if options.lora else None,
        "microbatches": options.batch_size // options.microbatch,
    }
    if options.loss == "simpo":
        return preferences.simpo(network, optimizer, gamma=options.gamma, **shared)
    if options.loss == "orpo":
        return preferences.orpo(network, optimizer, **shared)
    if options.loss == "cpo":
        return preferences.cpo(network, optimizer, **shared)
    loss = LOSSES[options.loss]
    if options.loss in SMOOTHED:
        loss = functools.partial(loss, label_smoothing=options.label_smoothing)
    return preferences.dpo(network, optimizer, loss=loss, reference="batch", **shared)


def optimizer_of(peak: float, steps: int) -> optax.GradientTransformation:
    """AdamW, gradients clipped at norm 1, at a rate that warms up to `peak` and falls along a cosine to a tenth."""
    # The warm-up's first step is at rate 0, which a run of one step could not afford.
    first = 0.0 if steps > 1 else peak
    schedule = optax.warmup_cosine_decay_schedule(first, peak, max(1, steps // 10), max(2, steps), 0.1 * peak)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))


def _check(options: Dpo) -> None:
    for name in ("beta", "epochs", "batch_size", "microbatch", "seeds", "limit", "lora_rank", "checkpoint_every"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if options.batch_size % options.microbatch:
        raise ValueError(f"--batch-size {options.batch_size} is not a multiple of --microbatch {options.microbatch}")
    if options.label_smoothing and options.loss not in SMOOTHED:
        raise ValueError(f"--label-smoothing is for {', '.join(SMOOTHED)}; --loss {options.loss} has none")
    if options.loss == "exo" and not options.label_smoothing:
        raise ValueError("--loss exo needs --label-smoothing above 0")


def pad_id_of(pretrained: Pretrained) -> int:
    """What fills up short rows. Raises ValueError for a model without a tokenizer."""
    if pretrained.tokenizer is None:
        raise ValueError("the model's folder has no tokenizer.json, without which text cannot be read")
    return pretrained.tokenizer.pad_id or 0


def fingerprint(options: Any, pretrained: Pretrained, digest: str) -> dict[str, Any]:
    """What must be the same when a run is resumed: every option that changes the numbers, the data and the weights."""
    free = {"out", "resume", "checkpoint_every", "export", "data", "model"}
    fixed = {name: value for name, value in dataclasses.asdict(options).items() if name not in free}
    weights = hashlib.sha256(np.asarray(jax.device_get(digests(pretrained.params))).tobytes()).hexdigest()[:16]
    return {**fixed, "data": digest, "model": weights}


def collect(pairs: PreferenceData, score: Callable[..., Any], params: Any, title: str, console: Console) -> Any:
    """Score all pairs under `params`, in NumPy and in the order of the pairs, with a progress bar."""
    if not console.is_terminal:
        console.print(f"{title}: {len(pairs)} pairs ...")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=math.ceil(len(pairs) / pairs.batch_size))

        def one(batch: Any) -> Any:
            scored = jax.block_until_ready(score(params, batch))
            bar.advance(task)
            return scored

        return pairs.collect(one)


def _reference(
    path: Path, identity: dict[str, Any], pairs: PreferenceData, score: Callable[..., Any], pretrained: Pretrained,
    console: Console,
) -> PairLogProbs:  # fmt: skip
    """The untuned model's log-probabilities, kept in the run directory for as long as they are of the same run."""
    text = json.dumps(identity, sort_keys=True)
    if path.exists():
        with np.load(path) as kept:
            if str(kept["identity"]) == text:
                return PairLogProbs(*(kept[name] for name in PairLogProbs._fields))
        console.print(f"{path.name} is of another run; scoring the reference again")
    # Adapters start at zero, so these parameters are the reference with or without them.
    title = f"Scoring the untuned model, {path.stem.removeprefix('reference_')}"
    scored = collect(pairs, score, pretrained.params, title, console)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, identity=text, **scored._asdict())
    partial.replace(path)
    return scored


def _lane(state: Any, index: int) -> Any:
    lane = jax.tree.map(lambda x: x[index], state.replace(frozen=None))
    return lane.replace(frozen=state.frozen)
