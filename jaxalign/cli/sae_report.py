"""The tables, pictures and files in which `jaxalign sae` says what it found."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.cli.sae import Sae
from jaxalign.interpretability.sae_metrics import SAEMoments, add_moments, metrics_of
from jaxalign.interpretability.splice import LossRecovered
from jaxalign.runtime.figures import curves
from jaxalign.runtime.report import Report, estimate
from jaxalign.runtime.sae_figures import density_histogram, l0_frontier
from jaxalign.statistics import bootstrap_interval
from jaxalign.types import Array

METRICS = ("cosine_similarity", "l2_ratio", "dead_fraction", "dense_fraction_1", "dense_fraction_10")


class Lane(NamedTuple):
    """One autoencoder of the run: its name, the k or lambda it was trained with, and its seed."""

    name: str
    k: int
    sparsity: float
    seed: int


class Evaluated(NamedTuple):
    """What one autoencoder did on held-out text.

    moments: leaves [N, ...], of N blocks of tokens
    losses: fields [R], of R rows of text
    """

    moments: SAEMoments
    losses: LossRecovered


def measure(evaluated: Evaluated, *, seed: int) -> dict[str, Any]:
    """The metrics of all blocks together, and with 95% bootstrap intervals, over blocks or rows, as [value, low, high]:
    l0, explained_variance, loss_recovered, kl (nats a token, of the model with the autoencoder from the model)."""
    metrics, intervals, losses = jax.device_get(_measured(jax.random.key(seed), evaluated))
    return {
        **{name: [float(x) for x in interval] for name, interval in intervals.items()},
        "losses": {name: float(value) for name, value in losses.items()},
        **{name: float(metrics[name]) for name in METRICS},
    }


@jax.jit  # once for all lanes
def _measured(key: Array, evaluated: Evaluated) -> tuple[Any, Any, Any]:
    """(metrics, values with their intervals, mean losses)."""
    total, scores = _total(evaluated.moments)
    metrics, losses = metrics_of(total), evaluated.losses
    keys = jax.random.split(key, 3)
    low, high = bootstrap_interval(keys[0], scores, statistic=_l0_and_explained_variance)
    intervals = {
        "l0": (metrics["l0"], low[0], high[0]),
        "explained_variance": (metrics["explained_variance"], low[1], high[1]),
        "loss_recovered": (losses.recovered, *losses.interval(keys[1])),
        "kl": (losses.kl_spliced.mean(), *bootstrap_interval(keys[2], losses.kl_spliced)),
    }
    return metrics, intervals, {name: getattr(losses, name).mean() for name in ("clean", "spliced", "ablated")}


def _total(moments: SAEMoments) -> tuple[SAEMoments, Array]:
    """All blocks' moments together, and of each [N, 4]: firings, rows, errors, spread about the common mean."""
    first, rest = (jax.tree.map(lambda x, part=part: jnp.asarray(x)[part], moments) for part in (0, slice(1, None)))
    total, _ = jax.lax.scan(lambda sum_, block: (add_moments(sum_, block), None), first, rest)
    away = jnp.square(moments.mean - total.mean[None]).sum(axis=1)
    spread = moments.spread + moments.rows * away
    return total, jnp.stack([moments.fired.sum(axis=1), moments.rows, moments.errors, spread], axis=1)


def _l0_and_explained_variance(scores: Array) -> Array:
    fired, rows, errors, spread = scores.sum(axis=0)
    return jnp.stack([fired / rows, 1 - errors / spread])


def density(evaluated: Evaluated) -> np.ndarray:
    """[F], the share of held-out tokens on which each feature fires."""
    return np.asarray(evaluated.moments.fired).sum(axis=0) / np.asarray(evaluated.moments.rows).sum()


def write_report(
    options: Sae, lanes: list[Lane], notes: list[str], metrics: dict[str, np.ndarray], evaluated: list[Evaluated],
    about: dict[str, Any],
) -> tuple[Report, dict[str, Any]]:  # fmt: skip
    """Write results.json, report.html and PNGs; return the Report, to be printed, and the results."""
    found = {lane.name: measure(e, seed=options.seed) for lane, e in zip(lanes, evaluated, strict=True)}
    results = {**about, "activation": options.activation, "d_sae": options.d_sae, "saes": found}
    report = Report(f"Sparse autoencoders of {about['site']} in {options.model}")
    report.text(
        f"{len(lanes)} autoencoders ({options.activation}) of {options.d_sae:,} features, {options.steps:,} steps of "
        f"{options.batch_size:,} activations each, in one program."
    )
    report.text("\n".join(f"- {note}" for note in notes))
    _quality_table(report, found)
    report.text(
        "**Loss recovered** is what the model keeps when the reconstruction stands in for the activation: 1 if its "
        "loss does not change, 0 if zeros would do as well. **KL** is how far its predictions move, in nats a token."
    )
    l0 = np.array([f["l0"][0] for f in found.values()])
    figure = l0_frontier(list(found), l0, np.array([f["explained_variance"] for f in found.values()]))
    caption = "Explained variance of held-out activations against features a token, with 95% bootstrap intervals."
    _draw(report, options, "frontier.png", figure, caption)
    recovered = np.array([f["loss_recovered"] for f in found.values()])
    figure = l0_frontier(list(found), l0, recovered, label="loss recovered")
    _draw(report, options, "loss_recovered.png", figure, "Loss recovered against features a token.")
    report.text("## Features")
    shares = ("dead_fraction", "dense_fraction_1", "dense_fraction_10")
    report.table(
        ["", "never fired", "on over 1% of tokens", "on over 10%"],
        [[name, *(f[share] for share in shares)] for name, f in found.items()],
        f"Shares of the {options.d_sae:,} features, on held-out text.",
    )
    densities = {lane.name: density(e) for lane, e in zip(lanes, evaluated, strict=True)}
    caption = "How often features fire on held-out text. Few very dense features and few dead ones are a good sign."
    _draw(report, options, "density.png", density_histogram(densities), caption)
    names = [name for name in ("explained_variance", "l0", "dead_fraction") if name in metrics]
    _draw(report, options, "training.png", curves(metrics, names, band="range"), "Training, over all autoencoders.")
    report.text(f"To see what the features stand for: `jaxalign features {options.out}`.")
    report.write(options.out / "report.html")
    np.savez_compressed(options.out / "density.npz", **densities)  # type: ignore[arg-type]
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return report, results


def _quality_table(report: Report, found: dict[str, dict[str, Any]]) -> None:
    digits = {"l0": 3, "explained_variance": 3, "loss_recovered": 4, "kl": 3}
    rows = [
        [name, *(estimate(*f[m], digits=n) for m, n in digits.items()), f["cosine_similarity"], f["l2_ratio"]]
        for name, f in found.items()
    ]
    losses = next(iter(found.values()))["losses"]
    report.table(
        ["", "L0", "explained variance", "loss recovered", "KL", "cosine", "length"], rows,
        "On held-out text, with 95% bootstrap intervals; length is |x_hat| / |x|. The model's own loss is "
        f"{losses['clean']:.3f} nats a token, with zeros at the site {losses['ablated']:.3f}.",
    )  # fmt: skip


def _draw(report: Report, options: Sae, file: str, figure: Any, caption: str) -> None:
    figure.savefig(options.out / file, dpi=120, facecolor="white")
    report.figure((options.out / file).read_bytes(), caption=caption)
