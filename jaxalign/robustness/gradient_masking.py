"""Signs that a classifier only hides its gradients from attacks, and is not robust.

A defence may make gradient attacks fail by making gradients useless: saturated, shattered or random. Others still
succeed, and the first-order attack shows symptoms by which it can be told (Athalye, Carlini & Wagner 2018,
arXiv:1802.00420, section 3.1; Carlini et al. 2019, arXiv:1902.06705).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.robustness.attack_losses import cross_entropy, margins
from jaxalign.robustness.attack_program import as_function, attack_program
from jaxalign.robustness.attack_result import AttackResult, attacker_margins, checked_result
from jaxalign.robustness.pgd import fgsm, pgd
from jaxalign.robustness.square import square
from jaxalign.robustness.threat_model import (
    clip_to_box,
    flatten_rows,
    norms,
    project_onto,
    random_in_ball,
    steepest_direction,
)
from jaxalign.robustness.traced_classifier import traced_classifier
from jaxalign.types import Array, ArrayLike, Key

Apply = Callable[[Any], Array]

BEYOND = 100.0  # times epsilon, what stands for no bound at all where there is no box
CURVED = 0.9  # a linearity error above this: the gradient says next to nothing about a step of size epsilon
UNRELATED = 0.05  # a cosine below this: the gradient at a neighbour points anywhere

EXPECTED = {
    "one_step_advantage": "0: many small steps break what one large step breaks",
    "black_box_advantage": "0: an attack with gradients breaks what one without breaks",
    "noise_advantage": "0: an attack with gradients breaks what random points break",
    "unbounded_success": "1: in an unbounded ball every example can be moved to another class",
    "accuracy_rise": "0: a larger ball holds the smaller one",
    "zero_gradient": "0: the loss has a slope at every example",
    "linearity_error": "well below 1: the gradient predicts what a step along it does",
    "gradient_cosine": "well above 0: the gradient at a neighbour is like the gradient at the example",
}


class MaskingSigns(NamedTuple):
    """Which numbers of a GradientMaskingReport are not what they should be; bool scalars of the same names."""

    one_step_advantage: Array
    black_box_advantage: Array
    noise_advantage: Array
    unbounded_success: Array
    accuracy_rise: Array
    zero_gradient: Array
    linearity_error: Array
    gradient_cosine: Array


class GradientMaskingReport(NamedTuple):
    """Symptoms over the examples that are right as they are; EXPECTED says what each should be. NaN if there are none.

    one_step_advantage: share that `fgsm` breaks and `pgd` does not
    black_box_advantage: share that the black box breaks and `pgd` does not
    noise_advantage: share that `noise_search` breaks and `pgd` does not
    unbounded_success: share that `pgd` breaks in a ball that holds the whole box
    accuracy_rise: the most that accuracy under `pgd` grows from one radius to the next larger one, or 0
    zero_gradient: share whose cross-entropy has a gradient in x that is exactly 0
    linearity_error: sum |change - predicted| / sum (|change| + |predicted|), in [0, 1], of the margin after the
        steepest step of size epsilon; 0 for a linear classifier, 1 where nothing is predicted
    gradient_cosine: mean cosine between the margin's gradients at x and at a random point of the ball around it
    radii: [M]; robust_accuracy: [M], the share of all examples right under `pgd` at each radius alone
    suspicious: MaskingSigns
    """

    one_step_advantage: Array
    black_box_advantage: Array
    noise_advantage: Array
    unbounded_success: Array
    accuracy_rise: Array
    zero_gradient: Array
    linearity_error: Array
    gradient_cosine: Array
    radii: Array
    robust_accuracy: Array
    suspicious: MaskingSigns


def gradient_masking(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    bounds: Any = (0.0, 1.0),
    steps: int = 40,
    queries: int = 200,
    multiples: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    black_box: Callable[..., AttackResult] | None = None,
    tolerance: ArrayLike = 0.02,
) -> GradientMaskingReport:
    """Look for signs of masked gradients in attacks on B examples; a hundred or so will do.

    No sign is proof, and their absence proves nothing either: an attack made for the classifier does. Some are usual in
    honest classifiers too: one that is very sure of itself has a cross-entropy of exactly 0 in float32, and so a zero
    gradient, which the losses of `apgd` see through.

    Args:
        apply: x [B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box; y: [B] int.
        epsilon: scalar, in the units of x.
        norm, bounds, steps: as in `pgd`, whose attack on the cross-entropy is the one examined.
        queries: how many points the attacks without gradients ask about.
        multiples: increasing, 1 among them; the curve of accuracy is taken at these multiples of epsilon.
        black_box: `(key, apply, x, y, epsilon) -> AttackResult` without gradients; None is `square`,
            and for "l1", where there is no such thing, `noise_search`.
        tolerance: shares that differ by no more than this from what they should be are let pass.

    Raises ValueError if 1 is not among `multiples`, and what the attacks raise.
    """
    if 1.0 not in multiples or list(multiples) != sorted(multiples):
        raise ValueError(f"gradient_masking: multiples must increase and hold 1, got {multiples}")
    x, y = jax.tree.map(jnp.asarray, (x, y))
    black_key, key = jax.random.split(key)
    if black_box is None:
        guess = noise_search if norm == "l1" else square
        black_box = functools.partial(guess, norm=norm, queries=queries, bounds=bounds)
    # First, for outside jit it names bad input.
    outside = black_box(black_key, apply, x, y, epsilon).success
    program = traced_classifier(apply, x)
    given = {"x": x, "y": y, "epsilon": epsilon, "bounds": bounds, "outside": outside, "tolerance": tolerance}
    fixed = {"norm": norm, "steps": steps, "queries": queries, "multiples": tuple(multiples)}
    # One program for all of it; the arrays that `apply` closes over are arguments, not constants of it.
    return jax.jit(lambda consts, key, given: _report(key, as_function(program, consts), **given, **fixed))(
        program.consts, key, given
    )


def _report(
    key: Key,
    apply: Apply,
    x: Any,
    y: Array,
    epsilon: Array,
    *,
    bounds: Any,
    outside: Array,
    tolerance: Array,
    norm: str,
    steps: int,
    queries: int,
    multiples: tuple[float, ...],
) -> GradientMaskingReport:
    noise_key, slope_key, *keys = jax.random.split(key, len(multiples) + 3)
    right = margins(apply(x), y) > 0

    def share(rows: Array) -> Array:
        return jnp.sum(rows & right) / jnp.sum(right)

    def climbed(key_and_radius: tuple[Key, Array]) -> Array:
        key, radius = key_and_radius
        return pgd(key, apply, x, y, radius, norm=norm, steps=steps, bounds=bounds).success

    radii = jnp.asarray(multiples) * epsilon
    everywhere = jnp.broadcast_to(_whole_box(x, epsilon, norm, bounds), y.shape)
    balls = jnp.concatenate([jnp.broadcast_to(radii[:, None], (len(multiples), *y.shape)), everywhere[None]])
    *curve, unbounded = jax.lax.map(climbed, (jnp.stack(keys), balls))
    accuracies = jnp.stack([jnp.mean(right & ~broken) for broken in curve])
    missed = ~curve[multiples.index(1.0)]
    one_step = margins(apply(fgsm(apply, x, y, epsilon, norm=norm, bounds=bounds)), y) < 0
    noise = noise_search(noise_key, apply, x, y, epsilon, norm=norm, bounds=bounds, queries=queries)
    numbers = {
        "one_step_advantage": share(one_step & missed),
        "black_box_advantage": share(outside & missed),
        "noise_advantage": share(noise.success & missed),
        "unbounded_success": share(unbounded),
        "accuracy_rise": jnp.max(jnp.diff(accuracies), initial=0.0),
        **_slopes(slope_key, apply, x, y, epsilon, right, norm=norm, bounds=bounds),
    }
    signs = {name: value > tolerance for name, value in numbers.items()} | {
        "unbounded_success": numbers["unbounded_success"] < 1.0 - tolerance,
        "linearity_error": numbers["linearity_error"] > CURVED,
        "gradient_cosine": numbers["gradient_cosine"] < UNRELATED,
    }
    return GradientMaskingReport(**numbers, radii=radii, robust_accuracy=accuracies, suspicious=MaskingSigns(**signs))


@attack_program(static=("norm", "queries"))
def noise_search(
    key: Key,
    apply: Apply,
    x: Any,
    y: ArrayLike,
    epsilon: ArrayLike,
    *,
    norm: str = "linf",
    queries: int = 200,
    bounds: Any = (0.0, 1.0),
) -> AttackResult:
    """The point of smallest margin among `queries` drawn uniformly from the ball: the attack that knows least.

    Args:
        apply: x [B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box; y: [B] int; epsilon: scalar or [B].

    Returns an AttackResult.
    """

    def draw(best: tuple[Any, Array], key: Key) -> tuple[tuple[Any, Array], None]:
        delta = project_onto(x, random_in_ball(key, x, epsilon, norm), epsilon, norm, bounds)
        margin = attacker_margins(apply(jax.tree.map(jnp.add, x, delta)), y, targeted=False)
        better = margin < best[1]
        delta = jax.tree.map(lambda d, b: jnp.where(better.reshape(-1, *[1] * (d.ndim - 1)), d, b), delta, best[0])
        return (delta, jnp.where(better, margin, best[1])), None

    start = (jax.tree.map(jnp.zeros_like, x), attacker_margins(apply(x), y, targeted=False))
    (delta, _), _ = jax.lax.scan(draw, start, jax.random.split(key, queries))
    x_adv = clip_to_box(jax.tree.map(jnp.add, x, delta), bounds)
    return checked_result(apply, x, x_adv, y, epsilon, norm=norm, bounds=bounds)


def _whole_box(x: Any, epsilon: ArrayLike, norm: str, bounds: Any) -> Array:
    """[B], the distance of each row to the farthest corner of the box; without a box, far beyond epsilon."""
    if bounds is None:
        return BEYOND * jnp.asarray(epsilon)
    low, high = (clip_to_box(jax.tree.map(lambda leaf, far=far: leaf + far, x), bounds) for far in (-jnp.inf, jnp.inf))
    return norms(jax.tree.map(lambda leaf, a, b: jnp.maximum(leaf - a, b - leaf), x, low, high), norm)


def _slopes(
    key: Key, apply: Apply, x: Any, y: Array, epsilon: ArrayLike, right: Array, *, norm: str, bounds: Any
) -> dict[str, Array]:
    """The numbers that come from gradients alone, over the rows that are `right` [B]."""

    def moved(delta: Any) -> tuple[Any, Any]:
        delta = project_onto(x, delta, epsilon, norm, bounds)
        return delta, jax.tree.map(jnp.add, x, delta)

    def gradient(loss: Callable[[Array, Array], Array], x: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(loss(apply(x), y)))(x)

    def mean(values: Array) -> Array:
        return jnp.sum(jnp.where(right, values, 0.0)) / jnp.sum(right)

    slope = gradient(margins, x)
    step, end = moved(jax.tree.map(lambda d: -epsilon * d, steepest_direction(slope, norm)))
    change = margins(apply(end), y) - margins(apply(x), y)
    here = flatten_rows(slope)
    predicted = jnp.sum(here * flatten_rows(step), axis=1)
    total = mean(jnp.abs(change) + jnp.abs(predicted))
    error = mean(jnp.abs(change - predicted)) / jnp.where(total == 0.0, 1.0, total)

    there = flatten_rows(gradient(margins, moved(random_in_ball(key, x, epsilon, norm))[1]))
    directions = [flatten_rows(steepest_direction(rows, "l2")) for rows in (here, there)]
    return {
        "zero_gradient": mean(jnp.all(flatten_rows(gradient(cross_entropy, x)) == 0.0, axis=1)),
        # Where all gradients are 0 nothing is predicted, and nothing can be measured along them.
        "linearity_error": jnp.where(total == 0.0, 1.0, error),
        "gradient_cosine": mean(jnp.sum(directions[0] * directions[1], axis=1)),
    }
