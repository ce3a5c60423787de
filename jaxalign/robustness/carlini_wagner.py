"""Carlini and Wagner's attack: the smallest L2 change that misclassifies, by gradient descent on a penalty."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.robustness.attack_program import attack_program
from jaxalign.robustness.attack_result import AttackResult, attacker_margins, checked_result
from jaxalign.robustness.threat_model import clip_to_box, flatten_rows, norms
from jaxalign.types import Array, ArrayLike

LARGEST_WEIGHT = 1e10  # of the penalty; a row that it does not move is given up
SHRINK = 1 - 1e-6  # keeps arctanh finite for pixels at the edge of the box


class _Search(NamedTuple):
    """Bisection over each row's penalty weight: leaves [B], and the nearest adversarial point found so far."""

    weight: Array
    lower: Array
    upper: Array
    distance: Array
    best: Any


@attack_program(static=("steps", "search_steps", "targeted"))
def carlini_wagner(
    apply: Callable[[Any], Array],
    x: Any,
    y: ArrayLike,
    *,
    bounds: Any = (0.0, 1.0),
    steps: int = 200,
    search_steps: int = 9,
    learning_rate: ArrayLike = 0.05,
    initial_weight: ArrayLike = 1e-2,
    confidence: ArrayLike = 0.0,
    targeted: bool = False,
) -> AttackResult:
    """Minimal-L2 adversarial examples (Carlini & Wagner 2017, arXiv:1608.04644, section V and VI).

    Minimises over w, by Adam, `sum (x' - x)^2 + weight max(margin(x') + confidence, 0)` with
    `x' = (lower + upper) / 2 + (upper - lower) / 2 tanh(w)`, so that x' is in the box whatever w is (without a box
    x' = w), and searches for each row the smallest weight that succeeds: times ten until it does, then bisection.

    Args:
        apply: x[B, ...] -> logits [B, C].
        x: leaves [B, ...] inside the box.
        y: [B] int, the true classes, or with `targeted` the classes wanted.
        bounds: the box (lower, upper), scalars, or None.
        steps: of Adam, for each weight.
        search_steps: weights tried.
        learning_rate: of Adam at first, in the units of w; it falls to 0 over the steps. initial_weight: tried first.
        confidence: how far below 0 the margin must be, in the units of the logits.

    Returns an AttackResult without a ball: `norms(x_adv - x, "l2")` is the size found, an upper bound on the smallest.
    A row that no weight broke comes back as it was.
    """
    x, y = jax.tree.map(jnp.asarray, (x, y))
    to_box, from_box = _change_of_variables(bounds)
    # A step that never shrinks leaps to and fro over the boundary, at a distance of its own size.
    optimizer = optax.adam(lambda count: learning_rate * (1 - count / steps))
    start = jax.tree.map(from_box, x)

    def margin_of(x_adv: Any) -> Array:
        return attacker_margins(apply(x_adv), y, targeted=targeted)

    def penalised(w: Any, weight: Array) -> tuple[Array, tuple[Any, Array]]:
        x_adv = jax.tree.map(to_box, w)
        margin = margin_of(x_adv)
        squared = jnp.sum(flatten_rows(jax.tree.map(jnp.subtract, x_adv, x)) ** 2, axis=1)
        return jnp.sum(squared + weight * jnp.maximum(margin + confidence, 0)), (x_adv, margin)

    def descend(search: _Search) -> tuple[_Search, Array]:
        """One run of Adam at each row's weight: the search with nearer points, and which rows it broke [B]."""

        def body(step: Array, carry: Any) -> Any:
            w, moments, distance, best, broken = carry
            gradient, (x_adv, margin) = jax.grad(penalised, has_aux=True)(w, search.weight)
            distance, best, success = _nearest(x, x_adv, margin + confidence, distance, best)
            updates, moments = optimizer.update(gradient, moments)
            # Adam's first steps are large whatever the weight: what they break says nothing about it.
            broken = broken | (success & (step >= steps // 2))
            return optax.apply_updates(w, updates), moments, distance, best, broken

        broken = jnp.zeros(search.weight.shape, bool)
        first = (start, optimizer.init(start), search.distance, search.best, broken)
        w, _, distance, best, broken = jax.lax.fori_loop(0, steps, body, first)
        x_adv = jax.tree.map(to_box, w)
        distance, best, success = _nearest(x, x_adv, margin_of(x_adv) + confidence, distance, best)
        return search._replace(distance=distance, best=best), broken | success

    def bisect(search: _Search, _: None) -> tuple[_Search, None]:
        search, broken = descend(search)
        lower = jnp.where(broken, search.lower, jnp.maximum(search.lower, search.weight))
        upper = jnp.where(broken, jnp.minimum(search.upper, search.weight), search.upper)
        weight = jnp.where(upper < LARGEST_WEIGHT, (lower + upper) / 2, jnp.minimum(search.weight * 10, LARGEST_WEIGHT))
        return search._replace(weight=weight, lower=lower, upper=upper), None

    zeros = jnp.zeros(y.shape, jax.tree.leaves(x)[0].dtype)
    # A row misclassified as it is has distance 0: nothing is nearer.
    distance = jnp.where(margin_of(x) + confidence < 0, zeros, jnp.inf)
    first = _Search(zeros + initial_weight, zeros, zeros + LARGEST_WEIGHT, distance, x)
    search, _ = jax.lax.scan(bisect, first, length=search_steps)
    x_adv = clip_to_box(search.best, bounds)
    return checked_result(apply, x, x_adv, y, None, norm="l2", bounds=bounds, targeted=targeted)


def _change_of_variables(bounds: Any) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """(w to a point of the box, and back); the identity without a box."""
    if bounds is None:
        return (lambda w: w), (lambda x: x)
    middle, radius = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    return (lambda w: middle + radius * jnp.tanh(w)), (lambda x: jnp.arctanh((x - middle) / radius * SHRINK))


def _nearest(x: Any, x_adv: Any, shortfall: Array, distance: Array, best: Any) -> tuple[Array, Any, Array]:
    """The nearer of `best` [B, ...] and x_adv where that succeeds (shortfall [B] < 0): (distance, best, success)."""
    size = norms(jax.tree.map(jnp.subtract, x_adv, x), "l2")
    success = shortfall < 0
    nearer = success & (size < distance)
    chosen = jax.tree.map(lambda new, old: jnp.where(nearer.reshape(-1, *[1] * (new.ndim - 1)), new, old), x_adv, best)
    return jnp.where(nearer, size, distance), chosen, success
