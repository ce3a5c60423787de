"""Interval bound propagation: the range of every value of a program, step by step."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from jaxalign.certification.bound_program import bounds_of
from jaxalign.certification.bounds import Abstract, Bounds
from jaxalign.certification.elementwise import elementwise_of
from jaxalign.certification.flat_program import Step, flatten
from jaxalign.certification.interpreter import bind, evaluate, known_branch, loop_parts, unsupported
from jaxalign.types import Array

Widen = Callable[[Step, Sequence[Any], list[Bounds]], list[Bounds]]

ALL = None
MOVES = (
    *("broadcast_in_dim", "concatenate", "convert_element_type", "expand_dims", "pad", "reduce_precision", "reshape"),
    *("rev", "slice", "split", "squeeze", "stack", "tile", "transpose", "unstack"),
)
INDEXED = {"dynamic_slice": (0,), "gather": (0,), "dynamic_update_slice": (0, 1)}
INDEXED |= {"scatter": (0, 2), "scatter-add": (0, 2)}
RISING = {  # primitives that rise in these operands (ALL: in every one) and need the others known
    **dict.fromkeys((*MOVES, "add", "add_any", "clamp", "max", "min"), ALL),
    **dict.fromkeys(("cummax", "cummin", "cumsum", "cumlogsumexp"), ALL),
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_sum", "reduce_and", "reduce_or", "and", "or"), ALL),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), ALL),
    **INDEXED,
}
LOGIC = {"and", "or", "not", "reduce_and", "reduce_or"}
BILINEAR = {"mul", "dot_general", "conv_general_dilated"}
COMPARISONS = {"lt": (0, 1), "le": (0, 1), "gt": (1, 0), "ge": (1, 0)}  # rises in the second named, falls in the first


def interval_bounds(fn: Callable[[Any], Any], lower: Any, upper: Any, *, sound: bool = False) -> Bounds:
    """lower <= fn(x) <= upper for every x between `lower` and `upper`: arrays [...] or pytrees, as the result is.

    Each step of `fn` is bounded from the bounds of its operands alone: a linear one as |W| r around W c, c and r the
    centre and radius, a rising one by its ends, any other function of one number by its exact range (Gowal et al.
    2018, "On the Effectiveness of Interval Bound Propagation"). Loops with a fixed number of turns (`scan`) stay loops.
    A bound that would be NaN (infinity minus infinity) is infinite. With `sound`, every step is rounded outward:
    the bounds then hold for `fn` in exact arithmetic with the same parameters.

    Raises ValueError for a box with lower above upper, an infinite side, or sides that disagree in shape;
    UnsupportedPrimitive for a step without a rule, naming it and its place.
    """

    def method(program: ClosedJaxpr, lows: list[Array], highs: list[Array]) -> Bounds:
        domain = functools.partial(interval_step, widen=rounded_outward(sound))
        boxes = [Bounds(low, high) for low, high in zip(lows, highs, strict=True)]
        found = [as_bounds(v) for v in evaluate(flatten(program), boxes, domain)]
        return Bounds([b.lower for b in found], [b.upper for b in found])

    return bounds_of("interval_bounds", fn, lower, upper, method, sound)


def rounded_outward(sound: bool) -> Widen | None:
    """What widens the bounds [...] of a step for rounding, if they are to be sound."""
    if not sound:
        return None
    from jaxalign.certification.rounding import widen

    return widen


def as_bounds(value: Any) -> Bounds:
    """Bounds as they are; a known array [...] as bounds of itself."""
    return value if isinstance(value, Bounds) else Bounds(jnp.asarray(value), jnp.asarray(value))


def interval_step(step: Step, operands: list[Any], *, widen: Widen | None = None) -> list[Any]:
    """The bounds of a step's results [...] from operands of which at least one is `Bounds`."""
    domain = functools.partial(interval_step, widen=widen)
    if step.name == "scan":
        return _scan(step, operands, domain)
    if step.name == "cond":
        program, arguments = known_branch(step, operands)
        return evaluate(program, arguments, domain)
    outputs = _rule(step, operands)
    if widen is not None:
        outputs = widen(step, operands, outputs)
    return [_without_nan(v) for v in outputs]


def _rule(step: Step, operands: list[Any]) -> list[Bounds]:
    _check_types(step, operands)
    elementwise = elementwise_of(step, operands)
    abstract = [i for i, v in enumerate(operands) if isinstance(v, Abstract)]
    if elementwise is not None:
        x = operands[abstract[0]]
        return [Bounds(*elementwise.image(x.lower, x.upper))]
    if getattr(step.primitive, "image", None) is not None:
        return [Bounds(*step.primitive.image(operands[0].lower, operands[0].upper, **step.params))]
    rising = step.name in RISING and (RISING[step.name] is ALL or set(abstract) <= set(RISING[step.name]))
    if rising or (step.name == "sort" and len(operands) == 1):
        return _by_ends(step, operands)
    if step.name == "select_n":
        return _select(step, operands)
    if step.name in BILINEAR:
        return [bilinear(step, *operands)]
    if step.name in RULES:
        return [RULES[step.name](step, *operands)]
    raise unsupported(step, "its indices depend on the bounded input" if step.name in RISING else "it has no rule")


def _check_types(step: Step, operands: list[Any]) -> None:
    """Bounds of numbers do not survive truncation to integers [...], nor bits the logic of whole words."""
    bounded = [v.lower.dtype for v in operands if isinstance(v, Bounds)]
    real = jnp.issubdtype(bounded[0], jnp.floating)
    if real and step.name == "convert_element_type" and not jnp.issubdtype(step.params["new_dtype"], jnp.floating):
        raise unsupported(step, f"it makes {step.params['new_dtype']} of bounded real numbers")
    if step.name in LOGIC and any(dtype != jnp.bool_ for dtype in bounded):
        raise unsupported(step, "it works on the bits of bounded integers")


def _by_ends(step: Step, operands: list[Any]) -> list[Bounds]:
    lows, highs = ([getattr(v, side) if isinstance(v, Bounds) else v for v in operands] for side in ("lower", "upper"))
    return [Bounds(low, high) for low, high in zip(bind(step, lows), bind(step, highs), strict=True)]


def _without_nan(bounds: Bounds) -> Bounds:
    if not jnp.issubdtype(jnp.result_type(bounds.lower), jnp.floating):
        return bounds
    lower = jnp.where(jnp.isnan(bounds.lower), -jnp.inf, bounds.lower)
    return Bounds(lower, jnp.where(jnp.isnan(bounds.upper), jnp.inf, bounds.upper))


def bilinear(step: Step, a: Any, b: Any) -> Bounds:
    """The range of a product step (mul, dot, convolution) of values [...], one of them or both bounded."""
    if step.name == "mul":
        corners = [_corner(step, x, y) for x in _ends(a) for y in _ends(b)]
        return Bounds(functools.reduce(jnp.minimum, corners), functools.reduce(jnp.maximum, corners))
    if not isinstance(a, Bounds) or not isinstance(b, Bounds):
        x = a if isinstance(a, Bounds) else b
        centre, radius = (x.lower + x.upper) / 2, (x.upper - x.lower) / 2
        pair = (lambda v, w: [v, w]) if x is a else (lambda v, w: [w, v])
        weights = b if x is a else a
        middle, spread = bind(step, pair(centre, weights))[0], bind(step, pair(radius, jnp.abs(weights)))[0]
        return Bounds(middle - spread, middle + spread)
    (ca, ra), (cb, rb) = (((v.lower + v.upper) / 2, (v.upper - v.lower) / 2) for v in (a, b))
    middle = bind(step, [ca, cb])[0]
    spread = bind(step, [jnp.abs(ca) + ra, rb])[0] + bind(step, [ra, jnp.abs(cb)])[0]
    return Bounds(middle - spread, middle + spread)


def _corner(step: Step, x: Array, y: Array) -> Array:
    """x y, 0 where one is 0 and the other infinite: only a bound is infinite, no value; NaN of a parameter stays."""
    product = bind(step, [x, y])[0]
    return jnp.where(jnp.isnan(product) & ~jnp.isnan(x) & ~jnp.isnan(y), 0, product)


def _ends(value: Any) -> tuple[Array, ...]:
    return (value.lower, value.upper) if isinstance(value, Bounds) else (value,)


def _subtract(step: Step, a: Any, b: Any) -> Bounds:
    a, b = as_bounds(a), as_bounds(b)
    return Bounds(bind(step, [a.lower, b.upper])[0], bind(step, [a.upper, b.lower])[0])


def _negate(step: Step, a: Any) -> Bounds:
    return Bounds(bind(step, [a.upper])[0], bind(step, [a.lower])[0])


def _divide(step: Step, a: Any, b: Any) -> Bounds:
    """a / b by its corners; everything where b may be 0."""
    corners = [bind(step, [x, y])[0] for x in _ends(a) for y in _ends(b)]
    b = as_bounds(b)
    unknown = (b.lower <= 0) & (b.upper >= 0)
    least, most = functools.reduce(jnp.minimum, corners), functools.reduce(jnp.maximum, corners)
    return Bounds(jnp.where(unknown, -jnp.inf, least), jnp.where(unknown, jnp.inf, most))


def _power(step: Step, base: Any, exponent: Any) -> Bounds:
    """A known base to a bounded power: rising or falling where the base is positive, unknown elsewhere."""
    if isinstance(base, Bounds):
        raise unsupported(step, "its base is bounded and its exponent not a known scalar")
    ends = [bind(step, [base, v])[0] for v in (exponent.lower, exponent.upper)]
    least, most = jnp.minimum(*ends), jnp.maximum(*ends)
    return Bounds(jnp.where(base > 0, least, -jnp.inf), jnp.where(base > 0, most, jnp.inf))


def _compare(step: Step, a: Any, b: Any) -> Bounds:
    """Truth as bounds: `lower` where it must hold, `upper` where it may."""
    pair = (as_bounds(a), as_bounds(b))
    less, more = (pair[i] for i in COMPARISONS[step.name])
    order = COMPARISONS[step.name] == (0, 1)
    must, may = (less.upper, more.lower), (less.lower, more.upper)
    return Bounds(*(bind(step, list(s if order else s[::-1]))[0] for s in (must, may)))


def _equal(step: Step, a: Any, b: Any) -> Bounds:
    a, b = as_bounds(a), as_bounds(b)
    must = (a.lower == a.upper) & (b.lower == b.upper) & (a.lower == b.lower)
    may = (a.lower <= b.upper) & (b.lower <= a.upper)
    return Bounds(must, may) if step.name == "eq" else Bounds(~may, ~must)


def _finite(step: Step, a: Any) -> Bounds:
    sure = jnp.isfinite(a.lower) & jnp.isfinite(a.upper)
    return Bounds(sure, jnp.ones_like(sure))


RULES: dict[str, Callable[..., Bounds]] = {
    "sub": _subtract,
    "neg": _negate,
    "not": _negate,
    "div": _divide,
    "eq": _equal,
    "ne": _equal,
    "is_finite": _finite,
    "pow": _power,
    **dict.fromkeys(COMPARISONS, _compare),
}


def _select(step: Step, operands: list[Any]) -> list[Bounds]:
    """The chosen case where the choice is known, the hull of both where it is not."""
    which, *cases = operands
    if not isinstance(which, Bounds):
        return _by_ends(step, operands)
    if len(cases) != 2 or which.lower.dtype != jnp.bool_:
        raise unsupported(step, "its choice among several cases depends on the bounded input")
    no, yes = map(as_bounds, cases)
    which = jax.tree.map(lambda v: jnp.broadcast_to(v, no.lower.shape), which)
    lower = jnp.where(which.lower, yes.lower, jnp.where(which.upper, jnp.minimum(no.lower, yes.lower), no.lower))
    upper = jnp.where(which.lower, yes.upper, jnp.where(which.upper, jnp.maximum(no.upper, yes.upper), no.upper))
    return [Bounds(lower, upper)]


def _scan(step: Step, operands: list[Any], domain: Callable[[Step, list[Any]], list[Any]]) -> list[Any]:
    """A loop over bounds. A carry that starts out known becomes bounds if the body makes it so."""
    body, consts, started, xs = loop_parts(step, operands)
    carries = len(started)

    def turn(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        found = evaluate(body, [*consts, *carry, *x], domain)
        kept = [as_bounds(v) if isinstance(c, Bounds) else v for v, c in zip(found[:carries], carry, strict=True)]
        return kept, found[carries:]

    carry = [v if isinstance(v, Bounds) else jnp.asarray(v) for v in started]
    first = jax.tree.map(lambda v: v[0], xs)
    while True:
        after, _ = jax.eval_shape(turn, carry, first)
        wider = [as_bounds(c) if isinstance(v, Bounds) else c for c, v in zip(carry, after, strict=True)]
        if [type(v) for v in wider] == [type(c) for c in carry]:
            break
        carry = wider
    length, reverse = step.params["length"], step.params["reverse"]
    last, stacked = jax.lax.scan(turn, carry, xs, length=length, reverse=reverse)
    return [*last, *stacked]
