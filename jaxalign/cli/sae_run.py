"""What `jaxalign sae` does: pack text, collect activations, train every sparsity and seed at once, evaluate, save."""

import hashlib
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxalign import Algorithm
from jaxalign.cli.dpo_run import fingerprint, pad_id_of
from jaxalign.cli.sae import Sae
from jaxalign.cli.sae_report import Evaluated, Lane, write_report
from jaxalign.interop.activation_store import ActivationStore, collect_activations
from jaxalign.interop.pretrained import Pretrained, load_pretrained
from jaxalign.interop.sae_lens import save_sae_lens
from jaxalign.interop.text_tokens import PackedText, pack_tokens, python_documentation, read_documents
from jaxalign.interpretability.sae_config import SELECTING, SAEConfig
from jaxalign.interpretability.sae_features import sae_decode, sae_encode
from jaxalign.interpretability.sae_metrics import SAEMoments, sae_moments
from jaxalign.interpretability.sae_parameters import fold_input_scale
from jaxalign.interpretability.sparse_autoencoder import sparse_autoencoder
from jaxalign.interpretability.splice import LossRecovered, loss_recovered
from jaxalign.runtime import fit
from jaxalign.types import Params

SPARSITIES = {"relu": (1.0, 2.0, 4.0), "gated": (1.0, 2.0, 4.0), "jumprelu": (0.5, 2.0, 8.0)}
BLOCK = 128  # held-out tokens that are resampled together, about a row of text
SAMPLE = 1 << 16  # activations whose mean b_dec begins as, and whose norm inputs are scaled by
OUTLIER = 10  # medians: longer activations are sinks that a squared error would be spent on
HOOKS = {"attention_z": "attn.hook_z", "attention_out": "hook_attn_out", "mlp_post": "mlp.hook_post"}  # SAELens' names


class Collected(NamedTuple):
    """The activations, which of them are trained on and which are held out, and the held-out rows of text [n, T]."""

    store: ActivationStore
    train: np.ndarray
    held_out: np.ndarray
    rows: np.ndarray
    notes: list[str]


def run(options: Sae, console: Console) -> dict[str, Any]:
    """The whole job, in the order a reader would tell it; returns what results.json holds."""
    if not options.resume and any((options.out / name).exists() for name in ("activations", "checkpoints")):
        raise FileExistsError(f"{options.out} holds a run: add --resume to go on with it, or choose another --out")
    lanes = lanes_of(options)
    check(options)
    console.print(f"Loading {options.model} ...")
    pretrained = load_pretrained(options.model, dtype=options.dtype)
    site = site_of(options, pretrained)
    packed, notes = read_text(options, pretrained)
    identity = fingerprint(options, pretrained, hashlib.sha256(packed.tokens.tobytes()).hexdigest()[:16])
    identity = {name: value for name, value in identity.items() if name not in ("text", "evaluated_rows")}
    collected = collect(options, pretrained, site, packed, identity, console)
    store = collected.store
    batch = store.batches(batch_size=options.batch_size, seed=options.seed, among=collected.train)
    some = store.read(collected.train[:: max(1, len(collected.train) // SAMPLE)])
    scale = math.sqrt(store.sizes[0]) / float(np.linalg.norm(some, axis=1).mean())
    algorithm = swept(options, store.sizes[0], lanes, scale * some.mean(axis=0))
    state, metrics = fit(
        algorithm, jax.random.key(options.seed), lambda step: np.float32(scale) * batch(step), steps=options.steps,
        directory=options.out, resume=options.resume, checkpoint_every=options.checkpoint_every, fingerprint=identity,
        tokens_per_step=options.batch_size * len(lanes), progress=console,
    )  # fmt: skip
    console.print(f"Evaluating {len(lanes)} autoencoders on {len(collected.held_out):,} held-out activations ...")
    evaluate = evaluator(options, pretrained, site, collected)
    evaluated = []
    for i, lane in enumerate(lanes):
        config = config_of(options, store.sizes[0], lane.k, lane.sparsity)
        params = fold_input_scale(jax.tree.map(lambda x, i=i: x[i], state.params), scale, config)
        save_sae_lens(
            options.out / "saes" / lane.name, params, config, model_name=options.model, hook_name=hook_name(site)
        )
        evaluated.append(evaluate(params, lane))
    about = {"model": options.model, "site": site, "text": str(options.text or ""), "input_scale": scale}
    report, results = write_report(options, lanes, [*notes, *collected.notes], metrics, evaluated, about)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}; the features: jaxalign features {options.out}")
    return results


def lanes_of(options: Sae) -> list[Lane]:
    """One for each k (or lambda) and seed."""
    selects = options.activation in SELECTING
    if selects and options.sparsity:
        raise ValueError(f"--sparsity has no meaning for {options.activation}, which keeps --k features a token")
    values: tuple[float, ...] = options.k if selects else options.sparsity or SPARSITIES[options.activation]
    lanes = []
    for value, seed in itertools.product(values, range(options.seed, options.seed + options.seeds)):
        name = f"{'k' if selects else 'lambda'}={value:g}" + (f"-seed={seed}" if options.seeds > 1 else "")
        lanes.append(Lane(name, int(value) if selects else 1, 0.0 if selects else float(value), seed))
    return lanes


def check(options: Sae) -> None:
    """Raises ValueError naming the option that makes no sense."""
    for name in (
        "tokens", "d_sae", "seeds", "steps", "batch_size", "learning_rate", "dead_after", "evaluated_rows",
        "checkpoint_every",
    ):  # fmt: skip
        if not getattr(options, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    if not 0 < options.held_out < 1:
        raise ValueError(f"--held-out is a share in (0, 1), got {options.held_out}")
    if options.seed < 0:
        raise ValueError(f"--seed must not be negative, got {options.seed}")
    values = options.k if options.activation in SELECTING else options.sparsity
    if len(set(values)) < len(values) or any(value <= 0 for value in values):
        raise ValueError(f"--k and --sparsity must be positive and differ, got {values}")
    if options.activation in SELECTING and (not values or max(values) > options.d_sae):
        raise ValueError(f"--k must lie in 1..d_sae = {options.d_sae}, got {values}")


def site_of(options: Sae, pretrained: Pretrained) -> str:
    """The site with its layer, by which `capture` knows it."""
    layers = pretrained.config.num_layers
    layer = layers // 2 if options.layer is None else options.layer
    if not 0 <= layer < layers:
        raise ValueError(f"--layer must lie in 0..{layers - 1}, the layers of {options.model}; got {layer}")
    return f"{options.site}[{layer}]"


def hook_name(site: str) -> str:
    """What TransformerLens calls the site, so that SAELens finds it: "blocks.15.hook_resid_post"."""
    name, _, layer = site.rstrip("]").partition("[")
    return f"blocks.{layer}.{HOOKS.get(name, f'hook_{name}')}"


def read_text(options: Sae, pretrained: Pretrained) -> tuple[PackedText, list[str]]:
    """The rows of text, and a line about them. Raises ValueError if there are too few to train and evaluate on."""
    pad_id_of(pretrained)  # refuses a model without a tokenizer
    documents = python_documentation() if options.text is None else read_documents(options.text, pretrained.tokenizer)
    packed = pack_tokens(documents, pretrained.tokenizer, length=options.length, limit=options.tokens)
    if len(packed.tokens) < 2:
        raise ValueError(f"the text gives {len(packed.tokens)} row of {options.length} tokens; at least 2 are needed")
    source = options.text.name if options.text else "Python's language reference"
    return packed, [f"Text: {packed.documents:,} documents of {source}, {packed.tokens.size:,} tokens."]


def collect(
    options: Sae, pretrained: Pretrained, site: str, packed: PackedText, identity: dict[str, Any], console: Console
) -> Collected:
    """Run the model over the rows, or what is left of them."""
    rows = len(packed.tokens)
    console.print(f"Collecting {site} over {packed.tokens.size:,} tokens ...")
    store = collect_activations(
        options.out / "activations", pretrained.network, pretrained.params, packed.tokens, sites=(site,),
        dtype=options.stored_as, skip=options.skip, fingerprint={"model": identity["model"]}, progress=console,
    )  # fmt: skip
    usual = store.norms()
    usual = usual <= OUTLIER * np.median(usual)
    kept = max(1, min(rows - 1, round(options.held_out * rows)))
    first = int(np.searchsorted(store.place, (rows - kept) * options.length))
    train, held_out = np.flatnonzero(usual[:first]), first + np.flatnonzero(usual[first:])
    if len(train) < options.batch_size or not len(held_out):
        raise ValueError(f"{len(train)} activations to train on are too few for --batch-size {options.batch_size}")
    notes = [f"Activations of {store.sizes[0]} numbers: {len(train):,} to learn from, {len(held_out):,} held out."]
    if left_out := int((~usual).sum()):
        notes.append(f"Left out: {left_out:,} activations of over {OUTLIER} times the median norm (attention sinks).")
    return Collected(store, train, held_out, packed.tokens[rows - kept :], notes)


def config_of(options: Sae, d_in: int, k: Any, sparsity: Any) -> SAEConfig:
    """One lane's configuration; k and sparsity may be traced."""
    f = options.d_sae
    nested = sorted({max(1, f // part) for part in (8, 4, 2, 1)})
    return SAEConfig(
        d_in=d_in, d_sae=f, activation=options.activation, k=k, sparsity=sparsity, dead_after=options.dead_after,
        widths=tuple(nested) if options.activation == "matryoshka" else (), dtype=options.dtype,
        sparsity_warm_up=options.steps // 10,
    )  # fmt: skip


def swept(options: Sae, d_in: int, lanes: list[Lane], b_dec: np.ndarray) -> Algorithm:
    """All lanes as one Algorithm on one batch; equal seeds begin alike whatever their k."""
    ks = jnp.asarray([lane.k for lane in lanes], jnp.int32)
    sparsities = jnp.asarray([lane.sparsity for lane in lanes], jnp.float32)
    seeds = jnp.asarray([lane.seed - options.seed for lane in lanes])
    peak, steps = options.learning_rate, options.steps
    warm_up, fall = max(1, steps // 20), max(1, steps // 5)
    schedule = optax.join_schedules(
        [optax.linear_schedule(peak / warm_up, peak, warm_up), optax.linear_schedule(peak, 0.0, fall)], [steps - fall]
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def algorithm(k: Any, sparsity: Any) -> Algorithm:
        return sparse_autoencoder(config_of(options, d_in, k, sparsity), optimizer, b_dec=b_dec)

    def init(key: Any) -> Any:
        keys = jax.random.split(key, options.seeds)[seeds]
        return jax.vmap(lambda k, sparsity, key: algorithm(k, sparsity).init(key))(ks, sparsities, keys)

    def step(state: Any, batch: Any) -> Any:
        def one(lane: Any) -> Any:
            k, sparsity, lane_state = lane
            return algorithm(k, sparsity).step(lane_state, batch)

        # Side by side the lanes' matrices outgrow a CPU's caches.
        over: Callable[..., Any] = jax.lax.map if jax.default_backend() == "cpu" else lambda f, xs: jax.vmap(f)(xs)
        return over(one, (ks, sparsities, state))

    return Algorithm(jax.jit(init), step)


def evaluator(options: Sae, pretrained: Pretrained, site: str, collected: Collected) -> Callable[..., Evaluated]:
    """(params, lane) -> what an autoencoder does on the held-out text; compiled once for all lanes."""
    d_in, held_out = collected.store.sizes[0], collected.held_out
    size = min(BLOCK, len(held_out))
    rows = collected.rows[: options.evaluated_rows]

    @jax.jit
    def moments(params: Params, x: Any, k: Any, sparsity: Any) -> SAEMoments:
        config = config_of(options, d_in, k, sparsity)
        features = sae_encode(params, x, config)
        return sae_moments(x, sae_decode(params, features, config), features)

    @jax.jit
    def losses(model: Params, params: Params, k: Any, sparsity: Any) -> LossRecovered:
        config = config_of(options, d_in, k, sparsity)
        # The first positions, on which nothing was learned, stay as they are.
        return loss_recovered(pretrained.network, model, rows, site, params, config, keep_first=options.skip)

    def evaluate(params: Params, lane: Lane) -> Evaluated:
        hyper = jnp.asarray(lane.k, jnp.int32), jnp.asarray(lane.sparsity, jnp.float32)
        blocks = [
            jax.device_get(moments(params, collected.store.read(held_out[start : start + size]), *hyper))
            for start in range(0, len(held_out) - size + 1, size)
        ]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
        return Evaluated(stacked, jax.device_get(losses(pretrained.params, params, *hyper)))

    return evaluate
