"""Certificates of a classifier: how far every other class stays behind, and the radius up to which that is proved."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.certification.bounds import input_box
from jaxalign.certification.crown import METHODS, specified_lower_bounds
from jaxalign.robustness.attack_program import attack_program
from jaxalign.types import Array

STATIC = ("method", "capacity", "sound", "slope_steps", "optimizer")


def margin_rows(classes: int, label: Array) -> Array:
    """The rows [C-1, C] of z_y - z_j for label y (a scalar), j in class order without y."""
    others = jnp.arange(classes - 1)
    others = others + (others >= label)
    return jax.nn.one_hot(label, classes)[None] - jax.nn.one_hot(others, classes)


@attack_program(static=STATIC, one_row=True)
def margin_lower_bounds(
    apply: Callable[[Any], Array],
    x: Any,
    y: Array,
    epsilon: Any,
    *,
    method: str = "interval",
    bounds: tuple[Any, Any] | None = (0.0, 1.0),
    capacity: int | None = None,
    sound: bool = False,
    slope_steps: int = 20,
    optimizer: optax.GradientTransformation | None = None,
) -> Array:
    """Lower bounds [B, C-1] of z_y - z_j over every x' with |x' - x|_inf <= epsilon inside `bounds`, j != y in order.

    z = apply(x') [B, C]; x has leaves [B, ...], y [B] is the class, epsilon a scalar or [B]. All of a row above 0: no
    such x' is given another class than y. The subtraction is merged into the last linear layers. Methods, from
    fast to tight: "interval" (Gowal et al. 2018), "crown-interval" (CROWN-IBP, Zhang et al. 2020), "crown" (Zhang et
    al. 2018), "alpha-crown" (Xu et al. 2021; `slope_steps` steps of `optimizer`). `capacity` and `sound` as in
    `crown_bounds`; without `capacity` every method can be differentiated. Each row is bounded by itself, as `apply` of
    one row.

    Called outside a trace it compiles once per (apply object, shapes). Raises ValueError naming a bad argument, and
    UnsupportedPrimitive for a step of `apply` without a rule.
    """
    _check_method(method, sound)

    def one(row: Any, label: Array, radius: Array) -> Array:
        box = input_box(row, radius, bounds)
        specification = margin_rows(_classes(apply, x), label)
        fn = _single(apply)
        more = {"method": method, "capacity": capacity, "sound": sound}
        return specified_lower_bounds(fn, box, specification, steps=slope_steps, optimizer=optimizer, **more)

    return jax.vmap(one)(x, y, jnp.broadcast_to(jnp.asarray(epsilon), y.shape))


@attack_program(static=(*STATIC, "steps"), one_row=True)
def certified_radius(
    apply: Callable[[Any], Array],
    x: Any,
    y: Array,
    *,
    method: str = "interval",
    maximum: Any,
    bounds: tuple[Any, Any] | None = (0.0, 1.0),
    steps: int = 12,
    capacity: int | None = 128,
    sound: bool = False,
    slope_steps: int = 20,
    optimizer: optax.GradientTransformation | None = None,
) -> Array:
    """The largest epsilon [B] in [0, maximum] found at which `margin_lower_bounds` are all above 0, by bisection.

    `steps` halvings leave an error of maximum / 2^steps, on the safe side: the radius returned is itself certified.
    It is -1 where even epsilon 0 is not: the row is misclassified as it is.
    """
    _check_method(method, sound)
    more = {"method": method, "bounds": bounds, "capacity": capacity, "sound": sound}

    def certified(epsilon: Array) -> Array:
        margins = margin_lower_bounds(apply, x, y, epsilon, slope_steps=slope_steps, optimizer=optimizer, **more)
        return jnp.all(margins > 0, axis=1)

    top = jnp.broadcast_to(jnp.asarray(maximum, jax.tree.leaves(x)[0].dtype), y.shape)

    def look(turn: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        """First at 0 and at the maximum, then halfway between what is certified and what is not: one trace of all."""
        low, high = ends
        radius = jnp.where(turn == 0, 0.0, jnp.where(turn == 1, top, (low + high) / 2)).astype(top.dtype)
        sure = certified(radius) & ((turn == 0) | (low >= 0))
        return jnp.where(sure, radius, low), jnp.where(sure, high, radius)

    low, _ = jax.lax.fori_loop(0, steps + 2, look, (-jnp.ones_like(top), top))
    return low


@attack_program(static=STATIC, one_row=True)
def certified_accuracy_curve(
    apply: Callable[[Any], Array],
    x: Any,
    y: Array,
    epsilons: Array,
    *,
    method: str = "interval",
    bounds: tuple[Any, Any] | None = (0.0, 1.0),
    capacity: int | None = 128,
    sound: bool = False,
    slope_steps: int = 20,
    optimizer: optax.GradientTransformation | None = None,
) -> Array:
    """Whether each row is certified at each of `epsilons` [E]: bool [E, B], its mean over B the certified accuracy.

    A row certified at one epsilon is so at every smaller one, whatever the bounds there say.
    """
    _check_method(method, sound)
    more = {"method": method, "bounds": bounds, "capacity": capacity, "sound": sound}

    def certified(epsilon: Array) -> Array:
        margins = margin_lower_bounds(apply, x, y, epsilon, slope_steps=slope_steps, optimizer=optimizer, **more)
        return jnp.all(margins > 0, axis=1)

    found = jax.lax.map(certified, jnp.asarray(epsilons))
    covers = jnp.asarray(epsilons)[:, None] <= jnp.asarray(epsilons)[None, :]
    return jnp.any(covers[:, :, None] & found[None], axis=1)


def _check_method(method: str, sound: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if sound and method == "alpha-crown":
        raise ValueError("sound must be False for method 'alpha-crown', whose slopes have no account of their rounding")


def _single(apply: Callable[[Any], Array]) -> Callable[[Any], Array]:
    """`apply` of one example, leaves [...], as `apply` of a batch of one."""
    return lambda row: apply(jax.tree.map(lambda leaf: leaf[None], row))[0]


def _classes(apply: Callable[[Any], Array], x: Any) -> int:
    return jax.eval_shape(_single(apply), jax.tree.map(lambda leaf: leaf[0], x)).shape[0]
