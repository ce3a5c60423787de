"""The face of every attack: it names bad input, compiles once, and inside a trace is the pure function it wraps."""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxalign.robustness.threat_model import clip_to_box, flatten_rows, known
from jaxalign.robustness.traced_classifier import shape_signature, traced_classifier
from jaxalign.types import Array

MOST_PROGRAMS = 128  # kept compiled, the least recently used dropped first

_programs: OrderedDict[Any, Callable[..., Any]] = OrderedDict()


def attack_program(
    *, static: Sequence[str], one_row: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an attack `f([key,] apply, x, y[, epsilon], *, ...)` whose arguments named in `static` are not arrays.

    Inside a trace (jit, vmap under jit, scan) the decorated function is `f` itself. Outside one its inputs are checked
    and `f` is compiled once per (apply object, static arguments, shapes). The arrays [...] that `apply` closes over are
    arguments of that program, so new values of them are neither stale nor compiled again; a fresh lambda at each call
    is a fresh program each time, so keep one. Either way `f` gets an `apply` for the shapes of x alone, whose
    convolutions a CPU runs as fast inside a loop as outside. With `eot=n` among the arguments, `apply` takes a key as
    its second argument. With `one_row` it gets an `apply` for x of one row [1, ...], to be mapped over rows.

    Raises ValueError naming the argument: an unknown norm, y that does not match x, an `apply` whose result is not
    [B, C]; and, outside a trace, labels out of range, x outside the box, a negative epsilon, NaN from `apply`.
    """

    def decorate(attack: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(attack)
        name = attack.__name__

        @functools.wraps(attack)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            original = given.pop("apply")
            given["x"], given["y"] = jax.tree.map(jnp.asarray, (given["x"], given["y"]))
            if "norm" in given:
                known(given["norm"])
            rows = check_rows(name, given["x"], given["y"], given.get("epsilon"))
            extra = (given["key"],) if given.get("eot") else ()
            shown = jax.tree.map(lambda leaf: leaf[:1], given["x"]) if one_row else given["x"]
            program = traced_classifier(original, shown, *extra)
            classes = check_logits(name, program, 1 if one_row else rows)
            if tracing(given, program.consts):
                return attack(**given, apply=as_function(program, program.consts))
            check_values(name, given["x"], given["y"], given.get("epsilon"), given.get("bounds"), classes)
            fixed = {argument: given.pop(argument) for argument in static}
            run = compiled(attack, original, program, fixed)
            return check_finite(name, run(program.consts, given))

        return wrapped

    return decorate


def tracing(*values: Any) -> bool:
    """Whether a jit is under way, or a leaf [...] of `values` is a tracer (of vmap or grad): nothing to look at."""
    leaves = jax.tree.leaves((values, jnp.zeros(())))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def as_function(program: ClosedJaxpr, consts: Sequence[Array]) -> Callable[..., Array]:
    """A traced classifier with these closed-over arrays as `apply: x[B, ...] -> logits[B, C]`, for that one B."""
    shapes = [(v.aval.shape, v.aval.dtype) for v in program.jaxpr.invars]
    run = jaxpr_as_fun(ClosedJaxpr(program.jaxpr, consts))

    def apply(x: Any, *key: Any) -> Array:
        leaves = jax.tree.leaves((x, *key))
        if [leaf.shape for leaf in leaves] != [shape for shape, _ in shapes]:
            raise ValueError(f"apply was traced for {shapes}, called with {[leaf.shape for leaf in leaves]}: use vmap")
        return run(*(leaf.astype(dtype) for leaf, (_, dtype) in zip(leaves, shapes, strict=True)))[0]

    return apply


def check_rows(name: str, x: Any, y: Array, epsilon: Any) -> int:
    """B, the rows that x (leaves [B, ...]), y [B] and epsilon (scalar or [B]) agree on; ValueError if they do not."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(f"{name}: x needs leaves [B, ...] with one B, got {shapes}")
    if any(not jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(x)):
        raise ValueError(f"{name}: x must be floating point, got {[str(leaf.dtype) for leaf in jax.tree.leaves(x)]}")
    rows = shapes[0][0]
    if y.shape != (rows,) or not jnp.issubdtype(y.dtype, jnp.integer):
        raise ValueError(f"{name}: y must be integers [{rows}] like the rows of x, got {y.dtype} {y.shape}")
    if epsilon is not None and jnp.shape(epsilon) not in ((), (rows,)):
        raise ValueError(f"{name}: epsilon must be a scalar or [{rows}], got shape {jnp.shape(epsilon)}")
    return rows


def check_logits(name: str, program: ClosedJaxpr, rows: int) -> int:
    """C, the number of classes, if the program gives logits [B, C] with C >= 2; otherwise ValueError."""
    shapes = [v.aval.shape for v in program.jaxpr.outvars]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != rows or shapes[0][1] < 2:
        found = shapes[0] if len(shapes) == 1 else f"{len(shapes)} arrays {shapes}"
        raise ValueError(f"{name}: apply must give logits [{rows}, C] with C >= 2, it gives {found}")
    return shapes[0][1]


def check_values(name: str, x: Any, y: Array, epsilon: Any, bounds: Any, classes: int) -> None:
    """ValueError for labels y [B] outside 0..C-1, a negative or NaN epsilon, leaves of x [B, ...] outside the box."""
    labels = np.asarray(y)
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        worst = int(np.argmax((labels < 0) | (labels >= classes)))
        raise ValueError(f"{name}: y[{worst}] is {labels[worst]}; labels must lie in 0..{classes - 1}")
    if epsilon is not None and not np.all(np.asarray(epsilon) >= 0):
        raise ValueError(f"{name}: epsilon must not be negative or NaN, got {np.asarray(epsilon).min()}")
    outside = np.asarray(flatten_rows(x) != flatten_rows(clip_to_box(x, bounds)))
    if outside.any():  # NaN differs from itself
        row = int(np.argmax(outside.any(axis=1)))
        values = np.asarray(flatten_rows(x))
        detail = f"its values run from {values[row].min()} to {values[row].max()}"
        raise ValueError(f"{name}: x[{row}] is outside the box {_short(bounds)}: {detail} (normalise inside apply)")


def check_finite(name: str, result: Any) -> Any:
    """The result itself. ValueError if `apply` gave NaN: in a margin [B], or in a gradient and so in x_adv [B, ...]."""
    rows = flatten_rows((result.x_adv, result.margin) if hasattr(result, "margin") else result)
    bad = np.isnan(np.asarray(rows)).any(axis=1)
    if bad.any():
        where = f"{bad.sum()} of {bad.size} examples, the first x[{int(np.argmax(bad))}]"
        raise ValueError(f"{name}: apply gives NaN, in its logits or their gradient, for {where}")
    return result


def compiled(
    attack: Callable[..., Any], original: Any, program: ClosedJaxpr, fixed: dict[str, Any]
) -> Callable[..., Any]:
    """The jitted `(consts, arrays) -> result`, leaves [B, ...], for this attack on a program equal to this one."""

    def run(consts: Sequence[Array], given: dict[str, Any]) -> Any:
        return attack(**given, **fixed, apply=as_function(program, consts))

    key = (attack, original, shape_signature(program), tuple(sorted(fixed.items(), key=lambda item: item[0])))
    return jitted_once(key, run)


def jitted_once(key: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` of arrays [...] jitted; the first one with an equal `key`, which is what is already compiled."""
    if key not in _programs:
        _programs[key] = jax.jit(run)
        while len(_programs) > MOST_PROGRAMS:
            _programs.popitem(last=False)
    _programs.move_to_end(key)
    return _programs[key]


def _short(bounds: Any) -> str:
    leaves = jax.tree.leaves(bounds)
    return f"[{leaves[0]}, {leaves[1]}]" if len(leaves) == 2 and all(jnp.ndim(b) == 0 for b in leaves) else "given"
