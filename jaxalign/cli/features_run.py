"""What `jaxalign features` does: two passes of an autoencoder over a run's activations, and the page made of them."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from jaxalign.cli.features import Features
from jaxalign.interop.activation_store import ActivationStore
from jaxalign.interop.pretrained import Pretrained, load_pretrained
from jaxalign.interop.sae_lens import load_sae_lens
from jaxalign.interpretability.feature_examples import (
    Examples,
    merge_sample,
    merge_top,
    no_examples,
    no_sample,
    quantile_groups,
    row_peaks,
)
from jaxalign.interpretability.feature_statistics import (
    FeatureStatistics,
    correlations,
    logit_effects,
    merge_histogram,
    merge_statistics,
    most_correlated,
    no_statistics,
)
from jaxalign.interpretability.sae_features import sae_encode
from jaxalign.runtime.feature_dashboard import FeaturePage, write_dashboard
from jaxalign.types import Array, Params

BLOCK_TOKENS = 2048
BEFORE, AFTER = 16, 7  # tokens of context
BINS, RELATED, QUARTERS = 24, 6, 4
SAMPLED = 16  # firings drawn for each quarter, of which some are shown
CORRELATED_BLOCKS = 16  # over which features are correlated: 32,768 tokens
WRITES = ("resid_pre", "resid_mid", "resid_post", "attention_out", "mlp_out", "embedding")  # to the residual stream
LABELS = ("Strongest quarter", "Second quarter", "Third quarter", "Weakest quarter")


class Block(NamedTuple):
    """R rows of text: x [R, T, D] with zeros where there is no activation, kept [R, T], number [R, T] of the tokens."""

    x: np.ndarray
    kept: np.ndarray
    number: np.ndarray


class Autoencoder(NamedTuple):
    """Its parameters, and encode(params, block) -> [R, T, F], zero where there is no activation."""

    params: Params
    encode: Callable[[Params, Block], Array]


def run(options: Features, console: Console) -> FeaturePage:
    """The whole job; returns what the page shows."""
    began = time.monotonic()
    for name in ("tokens", "features", "top", "per_quarter", "logits"):
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    results = read_results(options)
    name = chosen_sae(options, results)
    params, config = load_sae_lens(options.run_directory / "saes" / name)
    store = ActivationStore(options.run_directory / "activations")
    console.print(f"Loading {results['model']} ...")
    pretrained = load_pretrained(results["model"])
    rows = spread_rows(store, options.tokens)

    def encode(params: Params, block: Block) -> Array:
        return jnp.where(block.kept[:, :, None], sae_encode(params, block.x, config), 0.0)

    sae = Autoencoder(params, encode)
    examples, statistics = gather(options, sae, store, rows, config.d_sae, console)
    fired = np.asarray(statistics.fired)
    shown = np.sort(np.argsort(-fired, kind="stable")[: options.features])
    index = np.asarray(examples.index)[shown]
    activations, histogram, related = second_pass(sae, store, rows, index, shown, statistics, console)
    effects = None
    if results["site"].partition("[")[0] in WRITES:
        norm = pretrained.params["final_norm"]["scale"]
        unembedding = pretrained.network.unembedding(pretrained.params)
        find = jax.jit(lambda *vectors: logit_effects(*vectors, count=options.logits))
        effects = jax.device_get(find(params["W_dec"][shown], unembedding, norm))
    tokens = store.tokens[rows]
    page = FeaturePage(
        title=f"Features of {results['site']} in {results['model']}, {name}",
        name=name,
        facts=facts_of(results, name, statistics, shown, tokens),
        tokens=tokens,
        texts=texts_of(pretrained, tokens, effects),
        density=np.asarray(statistics.density),
        maximum=np.asarray(statistics.maximum),
        mean=np.asarray(statistics.mean_when_firing),
        shown=shown,
        groups=[("Strongest", options.top), *((label, options.per_quarter) for label in LABELS)],
        places=index,
        activations=activations,
        before=BEFORE,
        histogram=histogram,
        top=None if effects is None else (effects.top, effects.top_tokens),
        bottom=None if effects is None else (effects.bottom, effects.bottom_tokens),
        related=related,
        frontier=frontier_of(results),
    )
    path = write_dashboard(options.out or options.run_directory / f"features-{name}.html", page)
    console.print(
        f"{len(shown):,} features over {tokens.size:,} tokens in {time.monotonic() - began:.0f} s: {path} "
        f"({path.stat().st_size / 1e6:.1f} MB)"
    )
    return page


def read_results(options: Features) -> dict[str, Any]:
    """results.json of the run. Raises FileNotFoundError if there is none."""
    path = options.run_directory / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {options.run_directory} is no finished run of `jaxalign sae`")
    return json.loads(path.read_text())


def chosen_sae(options: Features, results: dict[str, Any]) -> str:
    """The name asked for, or the one in the middle of the L0s. Raises ValueError for one that is not there."""
    names = list(results["saes"])
    if options.sae is None:
        return sorted(names, key=lambda name: results["saes"][name]["l0"][0])[len(names) // 2]
    if options.sae not in names:
        raise ValueError(f"--sae {options.sae!r} is not in {options.run_directory}; there are {', '.join(names)}")
    return options.sae


def spread_rows(store: ActivationStore, tokens: int) -> np.ndarray:
    """The numbers of rows of text, evenly spread, that hold at most so many tokens (at least one row)."""
    total, length = store.tokens.shape
    count = max(1, min(total, tokens // length))
    return np.unique(np.linspace(0, total - 1, count).round().astype(int))


def blocks_of(store: ActivationStore, rows: np.ndarray) -> Iterator[Block]:
    """The rows in blocks of one shape; `number` counts the tokens of these rows, and the last block is filled up."""
    length, size = store.tokens.shape[1], store.sizes[0]
    at_once = min(len(rows), max(1, BLOCK_TOKENS // length))
    bounds = np.searchsorted(store.place, np.stack([rows, rows + 1]) * length)
    for start in range(0, len(rows), at_once):
        x = np.zeros((at_once, length, size), np.float32)
        kept = np.zeros((at_once, length), bool)
        some = [np.arange(*bounds[:, i]) for i in range(start, min(start + at_once, len(rows)))]
        which, numbers = np.repeat(np.arange(len(some)), [len(n) for n in some]), np.concatenate(some)
        x[which, store.place[numbers] % length] = store.read(numbers)
        kept[which, store.place[numbers] % length] = True
        index = start * length + np.arange(at_once * length, dtype=np.int32).reshape(at_once, length)
        yield Block(x, kept, index)


def count_blocks(store: ActivationStore, rows: np.ndarray) -> int:
    """How many `blocks_of` gives."""
    return -(-len(rows) // min(len(rows), max(1, BLOCK_TOKENS // store.tokens.shape[1])))


def gather(
    options: Features, sae: Autoencoder, store: ActivationStore, rows: np.ndarray, features: int, console: Console
) -> tuple[Examples, FeatureStatistics]:  # fmt: skip
    """The first pass: the strongest examples and those of each quarter [F, E], and the statistics."""

    @jax.jit
    def update(carry: Any, params: Params, key: Array, block: Block) -> Any:
        top, sample, statistics = carry
        f = sae.encode(params, block)
        flat = f.reshape(-1, features)
        return (
            merge_top(top, *row_peaks(f, block.number)),
            merge_sample(key, sample, flat, block.number.reshape(-1)),
            merge_statistics(statistics, flat, block.kept.reshape(-1)),
        )

    carry = (no_examples(features, options.top), no_sample(features, QUARTERS * SAMPLED), no_statistics(features))
    total = count_blocks(store, rows)
    keys = jax.random.split(jax.random.key(options.seed), total)
    for key, block in track(zip(keys, blocks_of(store, rows), strict=True), "Examples", total, console=console):
        carry = update(carry, sae.params, key, block)
    top, sample, statistics = carry
    quarters = jax.jit(lambda sample: quantile_groups(sample, QUARTERS, count=options.per_quarter))(sample)
    joined = [jnp.concatenate([a, b.reshape(features, -1)], axis=1) for a, b in zip(top, quarters, strict=True)]
    return Examples(*joined), statistics


def second_pass(
    sae: Autoencoder, store: ActivationStore, rows: np.ndarray, index: np.ndarray, shown: np.ndarray,
    statistics: FeatureStatistics, console: Console,
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Activations around each example [S, E, W], histograms [S, bins], and the most correlated ([S, m], [S, m])."""
    count, maximum = len(shown), statistics.maximum[shown]

    @jax.jit
    def update(histogram: Array, params: Params, block: Block) -> tuple[Array, Array]:
        f = sae.encode(params, block)[:, :, shown]
        return f, merge_histogram(histogram, f.reshape(-1, count), maximum)

    @jax.jit
    def together(products: Array, seen: FeatureStatistics, f: Array, kept: Array) -> tuple[Array, FeatureStatistics]:
        flat = f.reshape(-1, count)
        return products + flat.T @ flat, merge_statistics(seen, flat, kept.reshape(-1))

    windows = np.zeros((*index.shape, BEFORE + 1 + AFTER), np.float32)
    histogram, products = jnp.zeros((count, BINS), jnp.int32), jnp.zeros((count, count), jnp.float32)
    seen, total = no_statistics(count), count_blocks(store, rows)
    every = max(1, total // CORRELATED_BLOCKS)
    for i, block in track(enumerate(blocks_of(store, rows)), "Contexts", total, console=console):
        f, histogram = update(histogram, sae.params, block)
        if i % every == 0:
            products, seen = together(products, seen, f, block.kept)
        fill_windows(windows, np.asarray(f), index, int(block.number[0, 0]))
    numbers = np.arange(count)
    found = correlations(products, numbers, seen)
    value, which = most_correlated(found, numbers, min(RELATED, count - 1))
    return windows, np.asarray(histogram), (np.asarray(value), shown[np.asarray(which)])


def fill_windows(windows: np.ndarray, f: np.ndarray, index: np.ndarray, first: int) -> None:
    """Put into windows[S, E, W] what is around the examples in a block f[R, T, S] that begins at token `first`."""
    length = f.shape[1]
    s, e = np.nonzero((index >= first) & (index < first + f.shape[0] * length))
    row, place = np.divmod(index[s, e] - first, length)
    at = place[:, None] + np.arange(-BEFORE, AFTER + 1)[None, :]
    found = f[row[:, None], np.clip(at, 0, length - 1), s[:, None]]
    windows[s, e] = np.where((at >= 0) & (at < length), found, 0.0)


def facts_of(
    results: dict[str, Any], name: str, statistics: FeatureStatistics, shown: np.ndarray, tokens: np.ndarray
) -> list[str]:
    """What the overview says."""
    found, fired = results["saes"][name], np.asarray(statistics.fired)
    dead = int((fired == 0).sum())
    lines = [
        f"{len(fired):,} features ({results['activation']}) of {results['site']} in {results['model']}",
        f"Looked at: {tokens.size:,} tokens, of which {int(statistics.tokens):,} have an activation",
        f"Held out: {found['l0'][0]:.1f} features a token explain {found['explained_variance'][0]:.1%} of the variance "
        f"and recover {found['loss_recovered'][0]:.1%} of the model's loss",
        f"{dead:,} features never fire here; {int((fired > 0.1 * int(statistics.tokens)).sum()):,} fire on over 10%",
    ]
    if len(shown) < len(fired):
        lines.append(f"Examples are of the {len(shown):,} that fire most (--features)")
    return lines


def texts_of(pretrained: Pretrained, tokens: np.ndarray, effects: Any) -> dict[int, str]:
    """The text of every token that the page may show."""
    ids = [tokens.ravel(), *([] if effects is None else [effects.top_tokens.ravel(), effects.bottom_tokens.ravel()])]
    tokenizer: Any = pretrained.tokenizer
    unique = (int(i) for i in np.unique(np.concatenate(ids)))
    return {i: tokenizer.decode([i], skip_special_tokens=False) or f"<{i}>" for i in unique}


def frontier_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's autoencoders as the page draws them."""
    return [
        {"name": name, "l0": found["l0"][0], "explained_variance": found["explained_variance"]}
        for name, found in results["saes"].items()
    ]
