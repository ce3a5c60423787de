"""The walk over a traced program that reads and changes the values its `site`s name; loops stay loops.

A name that occurs several times (in a scan of L layers, or called L times) has its occurrences numbered in the order of
execution. A scan is cut only where one iteration alone is asked for.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from jaxalign.networks.sites import site
from jaxalign.programs import nested, scan_counts
from jaxalign.types import Array

REMAT = ("remat", "remat2", "checkpoint")
BODIES = {  # primitives that are walked into: the parameter that holds what they run
    **dict.fromkeys(("jit", "pjit", "scan", *REMAT), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call"), "call_jaxpr"),
}
Occurrence = tuple[str, int]


class Taps(NamedTuple):
    """What to do at the sites of one (sub)program; occurrences are counted from its beginning.

    reads: names whose every occurrence is wanted
    picks: single occurrences that are wanted
    edits: name -> `(x, value) -> x`, at every occurrence
    values: name -> pytree of leaves [occurrences, ...], the edit's second argument
    pick_edits: single occurrence -> `x -> x`
    keep_names: the result has the same sites again, so that rewriting can be repeated
    """

    reads: frozenset[str] = frozenset()
    picks: frozenset[Occurrence] = frozenset()
    edits: Mapping[str, Callable[[Array, Any], Array]] = {}
    values: Mapping[str, Any] = {}
    pick_edits: Mapping[Occurrence, Callable[[Array], Array]] = {}
    keep_names: bool = True

    def window(self, start: Mapping[str, int], size: Mapping[str, int]) -> "Taps":
        """The taps of a subprogram that begins after `start` occurrences of each name [...] and holds `size`."""

        def inside(at: Occurrence) -> bool:
            return 0 <= at[1] - start[at[0]] < size.get(at[0], 0)

        def local(at: Occurrence) -> Occurrence:
            return at[0], at[1] - start[at[0]]

        return Taps(
            self.reads,
            frozenset(local(at) for at in self.picks if inside(at)),
            self.edits,
            {n: _slice(v, start[n], start[n] + size[n]) for n, v in self.values.items() if n in size},
            {local(at): edit for at, edit in self.pick_edits.items() if inside(at)},
            self.keep_names,
        )

    def touch(self, names: Mapping[str, int]) -> bool:
        """Whether anything is to be done at one of these sites [...]."""
        single = (name for name, _ in (*self.picks, *self.pick_edits))
        return bool(names) and (not self.keep_names or not self.reads.union(self.edits, single).isdisjoint(names))


class Found(NamedTuple):
    """every: name -> every occurrence, [n, ...]; picked: a single occurrence [...]."""

    every: dict[str, Array]
    picked: dict[Occurrence, Array]


def _slice(values: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda v: v[start:stop], values)


def occurrences(jaxpr: Jaxpr) -> Counter[str]:
    """How often each named value [...] is computed when the program runs."""
    return sum((_inside(equation) for equation in _open(jaxpr).eqns), Counter())


def _inside(equation: Any) -> Counter[str]:
    """The named values of one equation."""
    if equation.primitive.name == "name":
        return Counter({equation.params["name"]: 1})
    if equation.primitive.name in BODIES:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        return Counter({name: n * times for name, n in occurrences(_body(equation)).items()})
    return Counter()


def scanned(jaxpr: Jaxpr) -> set[str]:
    """The names that stand inside a scan: their values [n, ...] have an axis of occurrences even if n = 1."""
    found: set[str] = set()
    for equation in _open(jaxpr).eqns:
        if equation.primitive.name == "scan":
            found.update(_inside(equation))
        elif equation.primitive.name in BODIES:
            found.update(scanned(_body(equation)))
    return found


def out_of_reach(jaxpr: Jaxpr) -> dict[str, str]:
    """Sites of shape [...] that stand where no walk goes, and the primitive around them (`while`, `cond`, ...)."""
    hidden: dict[str, str] = {}
    for equation in _open(jaxpr).eqns:
        if equation.primitive.name in BODIES:
            hidden.update(out_of_reach(_body(equation)))
        else:
            names = (e.params["name"] for e in nested(equation) if e.primitive.name == "name")
            hidden.update(dict.fromkeys(names, equation.primitive.name))
    return hidden


def _body(equation: Any) -> Any:
    return equation.params[BODIES[equation.primitive.name]]


def _open(jaxpr: Any) -> Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def run(jaxpr: Any, arguments: Sequence[Any], taps: Taps) -> tuple[list[Any], Found]:
    """The program's outputs on arrays [...], its sites read and changed as `taps` say."""
    program = _open(jaxpr)
    values = dict(zip(program.invars, arguments, strict=True))
    values.update(zip(program.constvars, getattr(jaxpr, "consts", ()), strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    seen: Counter[str] = Counter()
    pieces: dict[str, list[Array]] = {}
    picked: dict[Occurrence, Array] = {}
    for equation in program.eqns:
        operands, inside = [read(v) for v in equation.invars], _inside(equation)
        if taps.touch(inside):
            outputs, found = _tapped(equation, operands, taps.window(seen, inside))
            for name, x in found.every.items():
                pieces.setdefault(name, []).append(x)
            picked.update({(name, i + seen[name]): x for (name, i), x in found.picked.items()})
        else:
            result = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
            outputs = result if equation.primitive.multiple_results else [result]
        seen.update(inside)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(v) for v in program.outvars], Found({n: _join(xs) for n, xs in pieces.items()}, picked)


def _join(pieces: Sequence[Array]) -> Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)


def _tapped(equation: Any, operands: list[Any], taps: Taps) -> tuple[list[Any], Found]:
    """One equation in which a site of the taps stands."""
    kind = equation.primitive.name
    if kind == "name":
        return _at_site(equation.params["name"], operands[0], taps)
    if kind == "scan":
        return _scan(equation, operands, taps)
    if kind in REMAT:
        again = jax.checkpoint(
            lambda operands, values: run(_body(equation), operands, taps._replace(values=values)),
            prevent_cse=equation.params["prevent_cse"],
            policy=equation.params["policy"],
        )
        return again(operands, taps.values)
    return run(_body(equation), operands, taps)


def _at_site(name: str, x: Array, taps: Taps) -> tuple[list[Array], Found]:
    """x[...] after the edits."""
    here = (name, 0)
    if name in taps.edits:
        value = jax.tree.map(lambda v: v[0], taps.values.get(name))
        x = _edited(name, x, taps.edits[name](x, value))
    if here in taps.pick_edits:
        x = _edited(name, x, taps.pick_edits[here](x))
    if taps.keep_names:
        x = site(x, name)
    return [x], Found({name: x[None]} if name in taps.reads else {}, {here: x} if here in taps.picks else {})


def _edited(name: str, before: Array, after: Any) -> Array:
    if jnp.shape(after) != before.shape:
        raise ValueError(f"patch: the function at {name!r} returned shape {jnp.shape(after)} for {before.shape}")
    return jnp.asarray(after).astype(before.dtype)


def _scan(equation: Any, operands: list[Any], taps: Taps) -> tuple[list[Any], Found]:
    """A scan as pieces: single iterations where one occurrence alone is touched, scans between them."""
    length, reverse = equation.params["length"], equation.params["reverse"]
    per = occurrences(_body(equation))
    constants, carries = scan_counts(equation)
    fixed, carry, xs = operands[:constants], operands[constants:carries], operands[carries:]
    cuts = sorted({i // per[name] for name, i in (*taps.picks, *taps.pick_edits)})
    edges = sorted({0, length, *cuts, *(c + 1 for c in cuts)})
    pieces: list[tuple[list[Any], dict[str, Array]]] = []
    picked: dict[Occurrence, Array] = {}
    spans = list(itertools.pairwise(edges))
    for start, stop in reversed(spans) if reverse else spans:
        begin = Counter({name: start * n for name, n in per.items()})
        local = taps.window(begin, {name: (stop - start) * n for name, n in per.items()})
        part = [x[start:stop] for x in xs]
        if start in cuts:
            out, found = run(_body(equation), [*fixed, *carry, *(x[0] for x in part)], local)
            picked.update({(name, i + begin[name]): x for (name, i), x in found.picked.items()})
            carry, ys, every = out[: len(carry)], [y[None] for y in out[len(carry) :]], found.every
        else:
            carry, ys, every = _scan_piece(equation, fixed, carry, part, local, per, stop - start)
        pieces.append((ys, every))
    pieces = pieces[::-1] if reverse else pieces
    ys = [_join(parts) for parts in zip(*(ys for ys, _ in pieces), strict=True)]
    return [*carry, *ys], Found({name: _join([every[name] for _, every in pieces]) for name in pieces[0][1]}, picked)


def _scan_piece(
    equation: Any, fixed: list[Any], carry: list[Any], xs: list[Any], taps: Taps, per: Mapping[str, int], length: int
) -> tuple[list[Any], list[Any], dict[str, Array]]:
    """Iterations of which none alone is touched: (carry, ys [length, ...], every occurrence of what is read)."""

    def body(carry: list[Any], scanned: Any) -> tuple[list[Any], Any]:
        xs, values = scanned
        out, found = run(_body(equation), [*fixed, *carry, *xs], taps._replace(values=values))
        return out[: len(carry)], (out[len(carry) :], found.every)

    values = {
        name: jax.tree.map(lambda v, n=per[name]: v.reshape(length, n, *v.shape[1:]), value)
        for name, value in taps.values.items()
    }
    options = {"length": length, "reverse": equation.params["reverse"], "unroll": equation.params["unroll"]}
    carry, (ys, every) = jax.lax.scan(body, carry, (xs, values), **options)
    return carry, ys, {name: x.reshape(-1, *x.shape[2:]) for name, x in every.items()}
