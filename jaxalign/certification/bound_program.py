"""How every function that bounds another calls it: checked, traced, and compiled once outside a trace."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxalign.certification.bounds import Bounds, check_box
from jaxalign.robustness.attack_program import jitted_once, tracing
from jaxalign.robustness.traced_classifier import shape_signature
from jaxalign.types import Array

# (program, lower leaves, upper leaves, *arrays) -> bounds: arrays, or lists with one array for each output leaf
Method = Callable[..., Bounds]


def bounds_of(
    name: str, fn: Callable[[Any], Any], lower: Any, upper: Any, method: Method, fixed: Any, *arrays: Any
) -> Bounds:
    """`method` on the program of `fn` over the box [...]; `fixed` (hashable) tells one `method` from another.

    Outside a trace it is compiled once per (fn object, `fixed`, shapes), with the real arrays `fn` closes over as
    arguments of the program: new values of them are not compiled again. Inside a trace it is called as it is.
    """
    lows, highs, structure = check_box(name, lower, upper)
    # A lambda of its own: JAX keeps the trace of a function object, with the values it closed over then.
    closed, shapes = jax.make_jaxpr(lambda *leaves: fn(structure.unflatten(leaves)), return_shape=True)(*lows)
    if tracing(lows, highs, arrays, closed.consts):
        found = method(closed, lows, highs, *arrays)
    else:
        real, whole = _split(closed.consts)
        key = (name, fn, fixed, shape_signature(closed), _contents(whole), len(arrays))
        found = jitted_once(key, _over_constants(method, closed, whole))(real, lows, highs, *arrays)
    if isinstance(found.lower, list):
        tree = jax.tree.structure(shapes)
        return Bounds(tree.unflatten(found.lower), tree.unflatten(found.upper))
    return found


def _split(consts: Sequence[Any]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Constants by number: real ones, and the whole numbers and truths that branches and indices may hang on."""
    real = {i: c for i, c in enumerate(consts) if jnp.issubdtype(jnp.result_type(c), jnp.floating)}
    return real, {i: c for i, c in enumerate(consts) if i not in real}


def _contents(constants: dict[int, Any]) -> Any:
    return tuple((i, np.asarray(c).tobytes()) for i, c in constants.items())


def _over_constants(method: Method, closed: ClosedJaxpr, whole: dict[int, Any]) -> Callable[..., Bounds]:
    def run(real: dict[int, Array], *arguments: Any) -> Bounds:
        consts = [real[i] if i in real else whole[i] for i in range(len(closed.consts))]
        return method(ClosedJaxpr(closed.jaxpr, consts), *arguments)

    return run
