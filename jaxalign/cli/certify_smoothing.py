"""What `jaxalign certify --smoothing` does: certify a vote over noisy copies of each image, attack it, report."""

import functools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxalign.certification.smoothing import (
    SmoothingCertificate,
    smoothed_accuracy_curve,
    smoothed_certify,
    smoothed_predict,
)
from jaxalign.cli.attack_report import INTERVAL, draw
from jaxalign.cli.certify import Certify
from jaxalign.cli.classifiers import Classifier, Description, network_of, save_classifier
from jaxalign.cli.image_certificates import kept_chunks
from jaxalign.cli.robust_train import RobustTrain
from jaxalign.cli.robust_train_run import described
from jaxalign.interop.images import Images, batches
from jaxalign.robustness.attack_result import AttackResult
from jaxalign.robustness.pgd import pgd
from jaxalign.robustness.smooth_adversarial_training import gaussian_augmentation
from jaxalign.runtime import fit
from jaxalign.runtime.certificate_check import check_certificates
from jaxalign.runtime.certification_figures import radius_curve, radius_histogram
from jaxalign.runtime.report import Report, estimate
from jaxalign.types import Array, Params

CHOICE = 100  # noisy copies that choose the class
COPIES = 1000  # alive at a time
CHECK_COPIES, CHECK_NOISES, CHECK_STEPS = 1000, 16, 20  # of the self-check's votes and attack


def train_on_noise(plan: RobustTrain, sigma: float, images: Images, console: Console) -> tuple[Description, Params]:
    """The network of `plan`, trained on noisy copies; parameters with leaves [1, ...]."""
    description = described(plan, images)
    console.print(f"{images.name}: {plan.steps:,} batches of {plan.batch_size} with noise of deviation {sigma:g}")
    algorithm = gaussian_augmentation(network_of(description), optax.adam(2e-3), sigma=sigma)
    state, _ = fit(
        algorithm, jax.random.key(plan.seed), batches(images, batch_size=plan.batch_size, seed=plan.seed),
        steps=plan.steps, directory=plan.out, resume=plan.resume, fingerprint={"sigma": sigma}, progress=console,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], state.params)
    save_classifier(plan.out, description, params)
    return description, params


def certify_by_smoothing(
    options: Certify, classifier: Classifier, x: np.ndarray, y: np.ndarray, about: list[str], console: Console
) -> dict[str, Any]:
    """Certify, attack every certificate at its edge, write report.html and results.json; returns what was measured.

    Raises BrokenCertificateError if an attack wins inside a certificate.
    """
    sigma = options.smoothing
    assert sigma is not None
    settings = {"sigma": sigma, "samples": options.samples, "failure": options.failure, "seed": options.seed}
    certify = functools.partial(
        smoothed_certify, sigma=sigma, n0=CHOICE, n=options.samples, alpha=options.failure, batch_size=COPIES
    )
    key, done = jax.random.key(options.seed), []

    def compute(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
        # Noise of its own for every chunk, the same when it is computed again.
        chunk_key = jax.random.fold_in(key, zlib.crc32(x.tobytes()))
        return {name: np.asarray(v) for name, v in certify(chunk_key, classifier, x)._asdict().items()}

    for chunk in kept_chunks(options, classifier, x, y, settings, compute):
        done.append(chunk)
        count = sum(len(one["radius"]) for one in done)
        console.print(f"{count}/{len(y)} images  {chunk['seconds']:.1f} s", highlight=False)
    joined = (np.concatenate([one[name] for one in done]) for name in SmoothingCertificate._fields)
    certificate = SmoothingCertificate(*(jnp.asarray(leaf) for leaf in joined))
    right = np.asarray((certificate.prediction == y) & ~certificate.abstained)
    attack = attack_the_vote(sigma, classifier, x, y, certificate.radius, options)
    check_certificates(options.out, right, attack, x, y, np.asarray(certificate.radius), norm="l2")
    console.print(f"Self-check: no attack won inside a certificate ({int(right.sum())} attacked)")
    seconds = float(sum(one["seconds"] for one in done))
    report, results = _report(options, about, y, certificate, right, seconds)
    report.print(console)
    console.print(f"Report: {options.out / 'report.html'}")
    return results


def attack_the_vote(
    sigma: float, classifier: Classifier, x: np.ndarray, y: np.ndarray, radius: Array, options: Certify
) -> AttackResult:
    """PGD in L2 on the mean log-probability over a few noises, each image within its own radius, judged by a vote.

    `margin` is -1 where the vote is for another class and 1 otherwise: a vote has no logits.
    """
    key, noise_key, vote_key = jax.random.split(jax.random.fold_in(jax.random.key(options.seed), 1), 3)
    noise = sigma * jax.random.normal(noise_key, (CHECK_NOISES, *x.shape[1:]))

    @jax.jit
    def climb(params: Params, x: Array, y: Array, radius: Array) -> Array:
        def soft(x: Array) -> Array:
            each = jax.vmap(lambda n: jax.nn.log_softmax(classifier.network.apply(params, x + n[None])))(noise)
            return jax.nn.logsumexp(each, axis=0)

        return pgd(key, soft, x, y, radius, norm="l2", steps=CHECK_STEPS, bounds=None).x_adv

    x_adv = climb(classifier.params, jnp.asarray(x), jnp.asarray(y), radius)
    votes = smoothed_predict(
        vote_key, classifier, x_adv, sigma=sigma, n=CHECK_COPIES, alpha=options.failure, batch_size=COPIES
    )
    fallen = (votes != jnp.asarray(y)) & (votes >= 0)
    return AttackResult(x_adv, fallen, jnp.where(fallen, -1.0, 1.0))


def _report(
    options: Certify,
    about: list[str],
    y: np.ndarray,
    certificate: SmoothingCertificate,
    right: np.ndarray,
    seconds: float,
) -> tuple[Report, dict[str, Any]]:
    radius = np.where(right, np.asarray(certificate.radius), 0.0)
    largest = max(float(radius.max()), *options.epsilons)
    radii = np.linspace(0.0, largest, 200)
    curve = np.stack(smoothed_accuracy_curve(certificate, y, radii), axis=1)
    asked = np.array(sorted({0.0, *options.epsilons}))
    shares = np.stack(smoothed_accuracy_curve(certificate, y, asked), axis=1)
    abstained = int(np.asarray(certificate.abstained).sum())
    results = {
        "images": len(y),
        "sigma": options.smoothing,
        "samples": options.samples,
        "certified": {f"{r:g}": triple for r, triple in zip(asked, shares.tolist(), strict=True)},
        "abstained": abstained,
        "median_radius": float(np.median(radius[right])) if right.any() else None,
        "self_check": {"attacked": int(right.sum()), "contradictions": 0},
        "seconds": seconds,
    }
    report = Report(f"Certificates by smoothing of {options.model or 'a network trained on noise'}")
    for paragraph in about:
        report.text(paragraph)
    report.text(
        f"Noise of deviation {options.smoothing:g} is added to an image {options.samples:,} times and the classes seen "
        "are counted. What wins by so much cannot lose while the image moves by less than a radius, as a Euclidean "
        f"length over all pixels; each certificate is wrong with probability {options.failure:g} at most. Of {len(y)} "
        f"images {abstained} had no clear winner, which counts as wrong."
    )
    rows = [[f"{r:g}", estimate(*triple)] for r, triple in zip(asked, shares, strict=True)]
    report.table(["radius (L2)", "certified"], rows, caption=f"Share of {len(y)} images, with {INTERVAL}.")
    draw(report, radius_curve(radii, curve), options.out / "certified.png", f"Accuracy against radius, {INTERVAL}.")
    figure = radius_histogram(radius, maximum=largest, norm="l2")
    draw(report, figure, options.out / "radius.png", "The certified radius of each image; grey: wrong or abstained.")
    report.text(
        f"## Self-check\n\nEach of the {int(right.sum())} certified images was moved by its whole radius against the "
        "votes. None lost."
    )
    report.write(options.out / "report.html")
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return report, results
