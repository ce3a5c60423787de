"""Randomised smoothing: what a classifier says under Gaussian noise, and how far the input may move before it changes.

After Cohen, Rosenfeld & Kolter 2019, "Certified Adversarial Robustness via Randomized Smoothing" (arXiv:1902.02918).
The smoothed classifier is g(x) = argmax_c P(argmax apply(x + noise) = c), noise ~ N(0, sigma^2 I). Train for it with
`gaussian_augmentation` or `smooth_adversarial_training` of `jaxalign.robustness.smooth_adversarial_training`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.certification.clopper_pearson import clopper_pearson_upper, fair_coin_p_value
from jaxalign.robustness.attack_program import as_function, check_logits, compiled, tracing
from jaxalign.robustness.traced_classifier import traced_classifier
from jaxalign.statistics import wilson_interval
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[[Array], Array]


class SmoothingCertificate(NamedTuple):
    """What is known of the smoothed classifier g at B inputs, each by itself with probability 1 - alpha or more.

    prediction: [B] int32, g(x), and at every x + delta with |delta|_2 < radius; -1 where it abstains
    radius: [B], L2, in the units of x; 0 where it abstains
    abstained: [B] bool, whether no class could be shown to have more than half of the probability
    """

    prediction: Array
    radius: Array
    abstained: Array


class CertifiedAccuracy(NamedTuple):
    """The share of examples certified right at each of R radii, and Wilson's interval of it over examples; each [R]."""

    accuracy: Array
    low: Array
    high: Array


def smoothed_certify(
    key: Key,
    apply: Apply,
    x: ArrayLike,
    *,
    sigma: ArrayLike,
    n0: int = 100,
    n: int = 100_000,
    alpha: ArrayLike = 0.001,
    batch_size: int = 1000,
) -> SmoothingCertificate:
    """Certify the smoothed classifier at each input: radius = sigma Phi^-1(p), p the probability of the top class.

    n0 noisy copies choose the class; n others, drawn independently, bound its probability from below by p =
    clopper_pearson_lower(count, n, alpha). It abstains where p <= 1/2 (Cohen et al. 2019, section 3.2.2, CERTIFY, and
    theorem 1). alpha is spent once for each example: of B certificates, alpha B may be expected to fail.

    Args:
        apply: x[b, ...] -> logits [b, C], called with b = batch_size. A row of logits with NaN counts for no class.
        x: [B, ...] floating point; no box is assumed, noisy copies leave it.
        sigma: > 0, deviation of the noise in the units of x; may be traced, as alpha may.
        batch_size: noisy copies of an example that are alive at a time: memory depends on it, n does not matter. Copy
            i of example b depends on (key, b, i) alone (with JAX's default keys), so counts are the same for any
            batch_size, up to logits that tie within rounding.

    Called outside jit it is compiled once for each `apply` object and shape, and inputs are checked: ValueError names
    a sigma <= 0, an alpha outside (0, 1), n, n0 or batch_size below 1, x that is not floating point or has NaN, logits
    that are not [b, C], and NaN from `apply`.
    """
    _check("smoothed_certify", x, sigma, alpha, n0=n0, n=n, batch_size=batch_size)
    counts = _run("smoothed_certify", jax.random.split(key), apply, x, sigma, (n0, n), batch_size)
    return _certificate(counts[:, 0], counts[:, 1], n, sigma, alpha)


def smoothed_predict(
    key: Key,
    apply: Apply,
    x: ArrayLike,
    *,
    sigma: ArrayLike,
    n: int = 1000,
    alpha: ArrayLike = 0.001,
    batch_size: int = 1000,
) -> Array:
    """The smoothed classifier's class at each input, or -1 where the two most frequent ones cannot be told apart.

    A class is returned if fair_coin_p_value(count of the first, of the first two) <= alpha; it is another than g(x)
    with probability at most alpha (Cohen et al. 2019, section 3.2.1, PREDICT, and proposition 1). Arguments and errors
    as in `smoothed_certify`. Returns [B] int32.
    """
    _check("smoothed_predict", x, sigma, alpha, n=n, batch_size=batch_size)
    return _prediction(_run("smoothed_predict", key[None], apply, x, sigma, (n,), batch_size)[:, 0], alpha)


def smoothed_counts(key: Key, apply: Apply, x: ArrayLike, *, sigma: ArrayLike, n: int, batch_size: int = 1000) -> Array:
    """How many of n noisy copies of each input `apply` puts in each class: [B, C] int32, with sum n over C.

    counts[b, c] = sum_i [argmax apply(x_b + sigma noise_bi) = c], the first class of several that tie exactly.
    Arguments and errors as in `smoothed_certify`.
    """
    _check("smoothed_counts", x, sigma, 0.5, n=n, batch_size=batch_size)
    return _run("smoothed_counts", key[None], apply, x, sigma, (n,), batch_size)[:, 0]


def smoothed_accuracy_curve(
    certificate: SmoothingCertificate, y: ArrayLike, radii: ArrayLike, *, confidence: ArrayLike = 0.95
) -> CertifiedAccuracy:
    """The share of examples predicted right with a radius of at least r, for each r of `radii` [R].

    accuracy[r] = mean_b [prediction_b = y_b and radius_b >= radii[r]]; an abstention is wrong at every radius (Cohen et
    al. 2019, section 4). The interval is Wilson's over the B examples at `confidence`; it does not count that each
    certificate itself fails with probability alpha.

    Args:
        y: [B] int, the true classes. radii: [R] in the units of x.

    Raises ValueError if the shapes do not match.
    """
    y, radii = jnp.asarray(y), jnp.asarray(radii)
    if y.shape != certificate.prediction.shape or y.ndim != 1 or radii.ndim != 1:
        shapes = f"y {y.shape}, prediction {certificate.prediction.shape}, radii {radii.shape}"
        raise ValueError(f"smoothed_accuracy_curve: needs y and prediction [B] and radii [R], got {shapes}")
    right = (certificate.prediction == y) & ~certificate.abstained
    reached = right[None, :] & (certificate.radius[None, :] >= radii[:, None])
    count = jnp.sum(reached, axis=1)
    low, high = wilson_interval(count, y.size, confidence=confidence)
    return CertifiedAccuracy(count / y.size, low, high)


@jax.jit  # compiled once for all classifiers
def _certificate(
    selection: Array, counts: Array, n: ArrayLike, sigma: ArrayLike, alpha: ArrayLike
) -> SmoothingCertificate:
    choice = jnp.argmax(selection, axis=1)
    count = jnp.take_along_axis(counts, choice[:, None], axis=1)[:, 0]
    # By way of 1 - p, which has all its digits where p is close to 1.
    others = clopper_pearson_upper(n - count, n, alpha)
    abstained = others >= 0.5
    radius = -sigma * jax.scipy.special.ndtri(jnp.where(abstained, 0.5, others))
    radius = jnp.where(abstained, 0.0, radius * (1 - 4 * jnp.finfo(others.dtype).eps))  # ndtri is within 3
    return SmoothingCertificate(jnp.where(abstained, -1, choice), radius, abstained)


@jax.jit
def _prediction(counts: Array, alpha: ArrayLike) -> Array:
    top, classes = jax.lax.top_k(counts, 2)
    sure = fair_coin_p_value(top[:, 0], top[:, 0] + top[:, 1]) <= alpha
    return jnp.where(sure, classes[:, 0], -1)


def _run(
    name: str, keys: Key, apply: Apply, x: ArrayLike, sigma: ArrayLike, sizes: tuple[int, ...], batch_size: int
) -> Array:
    """`_counts` [B, S, C] of checked arguments, compiled once for each `apply` object outside a trace."""
    x = jnp.asarray(x)
    program = traced_classifier(apply, jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype))
    fixed = {"sizes": sizes, "batch_size": batch_size, "classes": check_logits(name, program, batch_size)}
    given = {"keys": keys, "x": x, "sigma": jnp.asarray(sigma, jnp.promote_types(x.dtype, jnp.float32))}
    if tracing(given, program.consts):
        return _counts(**given, **fixed, apply=as_function(program, program.consts))
    counts = compiled(_counts, apply, program, fixed)(program.consts, given)
    uncounted = (np.array(sizes) - np.asarray(counts).sum(axis=2)).sum(axis=1)
    if uncounted.any():
        row = int(np.argmax(uncounted > 0))
        raise ValueError(f"{name}: apply gives NaN for {uncounted[row]} of the noisy copies of x[{row}]")
    return counts


def _counts(
    *, keys: Key, x: Array, sigma: Array, sizes: Sequence[int], batch_size: int, classes: int, apply: Apply
) -> Array:
    """The counts of S stages, sizes[s] copies from keys[s] each: [B, S, C].

    One example after another, each in chunks of `batch_size` copies, the surplus of a stage's last chunk not counted.
    """
    chunks = [(stage, start) for stage, n in enumerate(sizes) for start in range(0, n, batch_size)]

    def one(example: tuple[Array, Array]) -> Array:
        centre, number = example

        def chunk(counts: Array, part: Array) -> tuple[Array, None]:
            stage, index = part[0], part[1] + jnp.arange(batch_size)
            example_key = jax.random.fold_in(keys[stage], number)
            draw = lambda i: jax.random.normal(jax.random.fold_in(example_key, i), centre.shape, sigma.dtype)  # noqa: E731
            # Summed in float32 at least: in half precision the noise itself would be another.
            logits = apply((centre[None] + sigma * jax.vmap(draw)(index)).astype(x.dtype))
            counted = (index < jnp.array(sizes)[stage]) & ~jnp.any(jnp.isnan(logits), axis=1)
            # What is not counted goes to a class that does not exist, which the scatter drops.
            place = jnp.where(counted, jnp.argmax(logits, axis=1), classes)
            return counts.at[stage, place].add(1, mode="drop"), None

        return jax.lax.scan(chunk, jnp.zeros((len(sizes), classes), jnp.int32), jnp.array(chunks))[0]

    return jax.lax.map(one, (x, jnp.arange(len(x))))


def _check(name: str, x: ArrayLike, sigma: ArrayLike, alpha: ArrayLike, **sizes: int) -> None:
    x = jnp.asarray(x)
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: x must be floating point [B, ...], got {x.dtype} {x.shape}")
    for argument, size in sizes.items():
        if not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}: {argument} must be a whole number of at least 1, got {size!r}")
    for argument, value, end in (("sigma", sigma, np.inf), ("alpha", alpha, 1.0)):
        if jnp.ndim(value):
            raise ValueError(f"{name}: {argument} must be a scalar (vmap for several), got shape {jnp.shape(value)}")
        if not isinstance(value, jax.core.Tracer) and not 0 < float(value) < end:
            raise ValueError(f"{name}: {argument} must lie in (0, {end}), got {value}")
    if not tracing(x) and not np.isfinite(np.asarray(x)).all():
        row = int(np.argmax(~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(axis=1)))
        raise ValueError(f"{name}: x[{row}] has values that are not finite")
