"""The tour's stops in interpretability."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import jaxalign as ja
from jaxalign.cli.attack_report import draw
from jaxalign.cli.circuits import Circuits
from jaxalign.cli.circuits_run import run as run_circuits
from jaxalign.interpretability.feature_recovery import feature_recovery
from jaxalign.interpretability.sparse_autoencoder import (
    SAEConfig,
    SAEState,
    sae_decode,
    sae_encode,
    sparse_autoencoder,
)
from jaxalign.interpretability.synthetic_features import SyntheticFeatures, sample_features, synthetic_features
from jaxalign.runtime.report import Report, estimate
from jaxalign.runtime.sae_figures import l0_frontier
from jaxalign.statistics import bootstrap_interval
from jaxalign.types import Array, ArrayLike, Key, Params

SEEDS, STEPS, BATCH, SAMPLES = 4, 1000, 256, 8192
KS = (2, 3, 4)
FEATURES, DIM = 40, 24


def superposed_features(report: Report, console: Console, out: Path) -> None:
    """Features that share too few dimensions are found again by sparse autoencoders."""
    console.print(f"{len(KS)} sparsities x {SEEDS} seeds, {STEPS:,} steps each, in one program ...")
    world = synthetic_features(
        jax.random.key(0), num_features=FEATURES, dim=DIM, roots=1, branching=1, depth=0, rank=4,
        max_probability=0.2, min_probability=0.03,
    )  # fmt: skip
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, STEPS)))

    def run(k: Array, key: Key) -> tuple[Params, Params]:
        algorithm = sparse_autoencoder(_config(k), optimizer)
        start_key, data_key = jax.random.split(key)

        def step(state: SAEState, step_key: Key) -> tuple[SAEState, None]:
            return algorithm.step(state, sample_features(world, step_key, BATCH)[0])[0], None

        start = algorithm.init(start_key)
        state, _ = jax.lax.scan(step, start, jax.random.split(data_key, STEPS))
        return start.params, state.params

    untrained, params = ja.sweep(run, jnp.array(KS, jnp.float32), jax.random.split(jax.random.key(1), SEEDS))
    lanes = [(untrained, 0), *((params, i) for i in range(len(KS)))]
    numbers = np.array([[_measured(*lane, seed, world) for seed in range(SEEDS)] for lane in lanes])  # [1 + K, S, 4]
    low, high = bootstrap_interval(jax.random.key(2), numbers.swapaxes(0, 1))
    middle = numbers.mean(axis=1)
    report.text(
        f"A world of {FEATURES} directions in {DIM} dimensions. {len(KS)} sparsities and {SEEDS} seeds of BatchTopK "
        f"autoencoders train in one compiled program, {STEPS:,} steps of {BATCH} samples. "
        "Because the directions are known, one can count what is found: MCC is the mean cosine after the best matching "
        "of latents to features, F1 how well a latent tells that its feature is there."
    )
    rows = [
        [name, *(estimate(*ends) for ends in zip(middle[i], np.asarray(low)[i], np.asarray(high)[i], strict=True))]
        for i, name in enumerate(("untrained", *map(str, KS)))
    ]
    caption = f"95% bootstrap intervals over {SEEDS} seeds; the world's own L0 is {float(world.probability.sum()):.2f}."
    report.table(["k", "L0", "explained variance", "MCC", "F1"], rows, caption=caption)
    ends = np.stack([middle[:, 1], np.asarray(low)[:, 1], np.asarray(high)[:, 1]], axis=1)
    figure = l0_frontier([f"k={k}" for k in KS], middle[1:, 0], ends[1:])
    draw(report, figure, out / "frontier.png", "What sparsity costs: L0 against explained variance.")


def _config(k: ArrayLike) -> SAEConfig:
    return SAEConfig(DIM, FEATURES, "batchtopk", k=k)


def _encode(params: Params, x: Array) -> Array:
    return sae_encode(params, x, _config(KS[0]))  # by the tracked threshold, whatever k was


def _decode(params: Params, f: Array) -> Array:
    return sae_decode(params, f, _config(KS[0]))


def _measured(params: Params, setting: int, seed: int, world: SyntheticFeatures) -> list[float]:
    """L0, explained variance, MCC and F1 of one autoencoder of the sweep."""
    one = jax.tree.map(lambda leaf: leaf[setting, seed], params)
    functions = jax.tree_util.Partial(_encode, one), jax.tree_util.Partial(_decode, one)
    result = feature_recovery(
        jax.random.key(3), *functions, one["W_dec"], world, samples=SAMPLES, batch=2048
    )
    return [result.l0, result.explained_variance, result.mcc, result.f1]


def circuit(report: Report, console: Console, out: Path) -> None:
    """The part of a network that does a task is found, and the rest can be cut."""
    job = Circuits(out=out / "circuits")
    found = run_circuits(job, console)
    report.text(
        "A small network learns several logical functions; the first output is the exclusive or of inputs 0 and 1. "
        "Edges between neurons are scored by gradients on the way from corrupted to clean inputs (EAP-IG), and the "
        "smallest circuit that keeps the behaviour is held against inputs it was not chosen on."
    )
    whole, pruned = found["circuit"], found["acdc"]
    report.table(
        ["", "edges", "inputs heard", "share of the behaviour kept"],
        [
            ["the network", whole["of_edges"], "all", "1"],
            ["circuit by EAP-IG", whole["edges"], _inputs(whole["nodes"]), estimate(*whole["faithfulness"])],
            ["after ACDC", pruned["edges"], _inputs(pruned["nodes"]), estimate(*pruned["faithfulness"])],
            ["the network without the circuit", whole["of_edges"] - whole["edges"], "all", estimate(*whole["rest"])],
        ],
        caption="95% bootstrap intervals over held-out inputs. A cut edge carries what a corrupted input gives it.",
    )
    report.text(f"The run's own page is {job.out / 'report.html'}")


def _inputs(nodes: list[str]) -> str:
    """Which inputs are among a circuit's nodes."""
    return ", ".join(name.removeprefix("input ") for name in nodes if name.startswith("input")) or "none"
