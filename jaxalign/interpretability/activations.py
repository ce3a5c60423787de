"""Reading and changing the named values inside any function: `capture`, `patch`, and the gradient at every site.

A site is the name that `jaxalign.networks.site` (JAX's `checkpoint_name`) gave a value. One that occurs L times, in a
scan of L layers or in L calls, has values [L, ...]; `"resid_post[15]"` is one of them, and `"resid_post[-1]"` the last.
Everything is a rewriting of the traced program: no hooks, no state, and the result can be jitted, vmapped,
differentiated, and captured or patched again.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithm import LanguageModel, Network
from jaxalign.interpretability.site_rewriting import Found, Occurrence, Taps, occurrences, out_of_reach, run, scanned
from jaxalign.types import Array

SITE = re.compile(r"(?P<name>.+?)(?:\[(?P<index>-?\d+)\])?")
Edit = Callable[[Array], Array]
NOTHING = Taps()


class PerLayer(NamedTuple):
    """A change that differs from layer to layer; see `per_layer`."""

    fn: Callable[[Array, Any], Array]
    values: Any


def per_layer(fn: Callable[[Array, Any], Array], values: Any) -> PerLayer:
    """A change for `patch`, x -> fn(x, value), where occurrence l of the site gets values[l].

    `values` is a pytree of leaves [L, ...], one entry for each of the site's L occurrences; at a site that occurs once
    and outside any scan it is passed whole. Layers stay scanned, and gradients flow to `values`.
    """
    return PerLayer(fn, values)


class _Program(NamedTuple):
    """A traced call. counts: how often each site occurs; stacked: those whose values have an axis of occurrences."""

    jaxpr: Any
    arguments: list[Any]
    output: Any
    counts: Counter[str]
    stacked: set[str]

    def outputs(self, taps: Taps) -> tuple[Any, Found]:
        out, found = run(self.jaxpr, self.arguments, taps)
        return jax.tree.structure(self.output).unflatten(out), found

    def parse(self, text: str) -> tuple[str, int | None]:
        """"resid_post[-1]" as ("resid_post", 29); raises ValueError if there is no such site."""
        match = SITE.fullmatch(text)
        name, index = (match["name"], match["index"]) if match else (text, None)
        count = self.counts[name]
        if not count:
            listed = ", ".join(f"{n} ({c})" if n in self.stacked else n for n, c in sorted(self.counts.items()))
            around = out_of_reach(self.jaxpr).get(name)
            why = f"; {name!r} stands inside a `{around}`, where it cannot be reached" if around else ""
            raise ValueError(f"no site {text!r}; the sites (and how often each occurs) are: {listed or 'none'}{why}")
        if index is None:
            return name, None
        if not -count <= int(index) < count:
            raise ValueError(f"site {text!r}: {name} occurs {count} times")
        return name, int(index) % count


def _trace(fn: Callable[..., Any], *args: Any) -> _Program:
    jaxpr, output = jax.make_jaxpr(lambda *given: fn(*given), return_shape=True)(*args)
    counts = occurrences(jaxpr)
    stacked = scanned(jaxpr) | {name for name, n in counts.items() if n > 1}
    return _Program(jaxpr, jax.tree.leaves(args), output, counts, stacked)


def sites(fn: Callable[..., Any], *args: Any) -> dict[str, tuple[int, ...]]:
    """The sites of fn(*args) and the shapes of their values; `args` may be arrays [...] or ShapeDtypeStructs.

    A site that occurs L times, in scanned layers or otherwise, is shown as [L, ...].
    """

    def every(*args: Any) -> dict[str, Array]:
        program = _trace(fn, *args)
        return _captured(program, program.counts)[1]

    return {name: x.shape for name, x in jax.eval_shape(every, *args).items()}


def _captured(program: _Program, wanted: Iterable[str], taps: Taps = NOTHING) -> tuple[Any, dict[str, Array]]:
    parsed = {text: program.parse(text) for text in wanted}
    reads = frozenset(name for name, index in parsed.values() if index is None)
    picks: frozenset[Occurrence] = frozenset((n, i) for n, i in parsed.values() if i is not None)
    output, found = program.outputs(taps._replace(reads=reads, picks=picks))

    def value(name: str, index: int | None) -> Array:
        if index is not None:
            return found.picked[name, index]
        return found.every[name] if name in program.stacked else found.every[name][0]

    return output, {text: value(*place) for text, place in parsed.items()}


def capture_function(
    fn: Callable[..., Any], wanted: Iterable[str], *, keep_names: bool = True
) -> Callable[..., tuple[Any, dict[str, Array]]]:
    """`fn` returning (output, {site: value}); what each value [...] is, see `capture`.

    With `keep_names` the result has the sites of `fn`; without, none: for a function that runs `fn` once more.
    """
    wanted = _names("capture", wanted)
    return lambda *args: _captured(_trace(fn, *args), wanted, Taps(keep_names=keep_names))


def _names(caller: str, wanted: Iterable[str]) -> tuple[str, ...]:
    if isinstance(wanted, str):
        raise ValueError(f"{caller}: sites must be a sequence of names, got the string {wanted!r}")
    return tuple(wanted)


def patch_function(fn: Callable[..., Any], patches: Mapping[str, Edit | PerLayer]) -> Callable[..., Any]:
    """`fn` computed with the value at each site replaced: x becomes patches[site](x); see `patch`."""

    def patched(*args: Any) -> Any:
        program = _trace(fn, *args)
        return program.outputs(_taps(program, patches))[0]

    return patched


def _taps(program: _Program, patches: Mapping[str, Edit | PerLayer]) -> Taps:
    edits: dict[str, Callable[[Array, Any], Array]] = {}
    values: dict[str, Any] = {}
    single: dict[Occurrence, Edit] = {}
    for text, change in patches.items():
        name, index = program.parse(text)
        if index is not None:
            single[name, index] = _at_one(text, change)
        elif isinstance(change, PerLayer):
            edits[name], values[name] = change.fn, _values_of(program, name, change.values)
        else:
            edits[name] = lambda x, _, change=change: change(x)
    return Taps(edits=edits, values=values, pick_edits=single)


def _at_one(text: str, change: Edit | PerLayer) -> Edit:
    if isinstance(change, PerLayer):
        raise ValueError(f"patch: {text!r} is one occurrence of its site; give it a function x -> x, not per_layer")
    return change


def _values_of(program: _Program, name: str, values: Any) -> Any:
    if name not in program.stacked:
        return jax.tree.map(lambda v: jnp.asarray(v)[None], values)
    count = program.counts[name]
    for leaf in jax.tree.leaves(values):
        if jnp.shape(leaf)[:1] != (count,):
            raise ValueError(f"per_layer: {name!r} occurs {count} times; a leaf of `values` is {jnp.shape(leaf)}")
    return jax.tree.map(jnp.asarray, values)


def capture(network: Network, wanted: Iterable[str]) -> Network:
    """A network whose apply returns (output, {site: value}).

    Args:
        wanted: names such as "post_0" (value [B, ...]), "resid_post" (every layer, [L, B, T, D]) or "resid_post[15]"
            (one layer, [B, T, D]). With one layer the scan of layers is cut there, so under jit what comes after
            it is not computed unless the output is used.

    Raises ValueError from apply if there is no such site, with the list of sites.
    """
    return Network(init=network.init, apply=capture_function(network.apply, wanted))


def patch(network: Network, patches: Mapping[str, Edit | PerLayer]) -> Network:
    """A network computed with the value at each site replaced: x becomes patches[site](x).

    Args:
        patches: site -> a function of x returning x's shape (its dtype is cast to x's). Under a name such as
            "resid_post" it is applied in every layer, and may be `per_layer(fn, values)`; under "resid_post[15]" in
            that one.

    Of a LanguageModel `hidden` and `decode` are patched too, so that generation feels the change; in `decode` T is the
    number of new positions.

    Raises ValueError from apply if there is no such site (with the list of sites), or if a function changes the shape.
    """
    if not isinstance(network, LanguageModel):
        return dataclasses.replace(network, apply=patch_function(network.apply, patches))
    return dataclasses.replace(
        network,
        apply=patch_function(network.apply, patches),
        hidden=patch_function(network.hidden, patches),
        decode=patch_function(network.decode, patches),
    )


def site_gradients(
    fn: Callable[..., Array], wanted: Iterable[str]
) -> Callable[..., tuple[Array, dict[str, Array], dict[str, Array]]]:
    """The gradient of a scalar function with respect to the value at every site, in one backward pass.

    Returns g with g(*args) = (fn(*args), activations, gradients): both dicts from site to [...] as `capture` shapes
    them, gradients[s] = d fn / d s, with everything downstream of the site responding. At a site of several layers,
    gradients[s][l] is the total derivative with respect to layer l's value.
    """
    wanted = _names("site_gradients", wanted)

    def value_and_gradients(*args: Any) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        program = _trace(fn, *args)
        parsed = {text: program.parse(text) for text in wanted}
        shapes = jax.eval_shape(lambda *args: _captured(_trace(fn, *args), wanted)[1], *args)

        def shifted(shifts: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
            patches: dict[str, Edit | PerLayer] = {
                text: per_layer(jnp.add, shifts[text]) if index is None else lambda x, text=text: x + shifts[text]
                for text, (_, index) in parsed.items()
            }
            return _captured(program, wanted, _taps(program, patches))

        zeros = {text: jnp.zeros(s.shape, s.dtype) for text, s in shapes.items()}
        (value, activations), gradients = jax.value_and_grad(shifted, has_aux=True)(zeros)
        return value, activations, gradients

    return value_and_gradients
