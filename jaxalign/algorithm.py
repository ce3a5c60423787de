"""The contracts every domain is built on: Network, Algorithm, TrainState, gradient_algorithm, train."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxalign.types import Array, Key, Metrics, Params

Objective = Callable[[Params, Any, Key], tuple[Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class Network:
    """A parametrised function: `init(key) -> params` and `apply(params, *inputs) -> outputs`.

    Any pair of pure functions will do; `from_linen` and `from_nnx` adapt the two Flax module systems.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Any]

    @classmethod
    def from_linen(cls, module: Any, *example_inputs: Any) -> Self:
        """Adapt a Flax Linen module; `params` is its "params" collection.

        Raises ValueError from `init` if the module keeps other collections (running statistics, say):
        they are state, which `apply(params, ...)` has nowhere to return.
        """

        def init(key: Key) -> Params:
            variables = dict(module.init(key, *example_inputs))
            params = variables.pop("params", {})
            if variables:
                raise ValueError(
                    f"Network.from_linen: {type(module).__name__} keeps the collections {sorted(variables)} beside "
                    "'params'; freeze them in a Network(init, apply) of your own"
                )
            return params

        return cls(init=init, apply=lambda params, *inputs: module.apply({"params": params}, *inputs))

    @classmethod
    def from_nnx(cls, build: Callable[[Any], Any]) -> Self:
        """Adapt a Flax NNX model given `build(rngs) -> module`; `params` is its `nnx.Param` state as a dict.

        The module is rebuilt from its graph at each `apply`, so no variable is shared between calls.
        Raises ValueError if the model holds state other than `nnx.Param` (dropout streams, batch statistics).
        """
        from flax import nnx

        graph, _, rest = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param, ...)
        if jax.tree.leaves(rest):
            names = sorted({path_name(path) for path, _ in jax.tree.leaves_with_path(rest)})
            raise ValueError(f"Network.from_nnx: the model holds state other than nnx.Param: {', '.join(names)}")

        def init(key: Key) -> Params:
            return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

        def apply(params: Params, *inputs: Any) -> Any:
            state = nnx.state(nnx.eval_shape(lambda: build(nnx.Rngs(0))), nnx.Param)
            nnx.replace_by_pure_dict(state, params)
            return nnx.merge(graph, state)(*inputs)

        return cls(init=init, apply=apply)

    def starting_from(self, params: Params) -> Self:
        """The same network with `init` returning `params`; leaves that `params` lacks are drawn by the old `init`.

        This is how a pretrained model, or one with fresh adapters beside pretrained weights, enters an Algorithm.
        Raises ValueError naming a leaf of `params` that the network does not have, or whose shape differs.
        """
        given = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}

        def init(key: Key) -> Params:
            expected, treedef = jax.tree.flatten_with_path(jax.eval_shape(self.init, key))
            names = [path_name(path) for path, _ in expected]
            if unknown := sorted(given.keys() - set(names)):
                raise ValueError(f"starting_from: the network has no parameter {unknown[0]!r} ({len(unknown)} unknown)")
            for name, (_, leaf) in zip(names, expected, strict=True):
                if name in given and given[name].shape != leaf.shape:
                    raise ValueError(f"starting_from: {name} is {given[name].shape}, the network's is {leaf.shape}")
            missing = [i for i, name in enumerate(names) if name not in given]
            # Only the missing leaves are outputs, so XLA never draws the others.
            drawn = jax.jit(lambda key: _some(jax.tree.leaves(self.init(key)), missing))(key) if missing else []
            fresh = dict(zip(missing, drawn, strict=True))
            return treedef.unflatten([fresh.get(i, given.get(name)) for i, name in enumerate(names)])

        return dataclasses.replace(self, init=init)


def _some(leaves: list[Array], places: list[int]) -> list[Array]:
    return [leaves[i] for i in places]


@dataclasses.dataclass(frozen=True)
class LanguageModel(Network):
    """A Network from tokens to logits whose last layer is a matrix, so that losses need not hold all logits.

    apply(params, tokens[B, T]) -> logits[B, T, V], equal to `hidden(params, tokens) @ unembedding(params).T`
    hidden(params, tokens[B, T], segments[B, T] | None = None) -> [B, T, D]; position t sees tokens[:, :t+1] only, and
        of those only the ones of its own segment: several sequences packed into one row, each as if it were alone
    unembedding(params) -> [V, D]
    init_cache(batch_size, length) -> cache, an empty key-value cache for `length` positions
    decode(params, tokens[B, T], cache) -> (logits[B, T, V], cache), the next T positions after those cached
    for_decoding(params) -> the same weights as `decode` reads them fastest; it takes either
    """

    hidden: Callable[..., Array]
    unembedding: Callable[[Params], Array]
    init_cache: Callable[[int, int], Any]
    decode: Callable[[Params, Array, Any], tuple[Array, Any]]
    for_decoding: Callable[[Params], Params] = lambda params: params


class Algorithm(NamedTuple):
    """Anything that learns: `init(key) -> state` and `step(state, batch) -> (state, metrics)`, both pure."""

    init: Callable[[Key], Any]
    step: Callable[[Any, Any], tuple[Any, Metrics]]


@flax.struct.dataclass
class TrainState:
    """The state of a gradient method: arrays only, so it can be vmapped, sharded and checkpointed as it is.

    step: int32 scalar, steps taken
    params: what the optimiser updates; None where a leaf is frozen
    opt_state: the Optax state over `params`
    key: typed PRNG key, split at each step
    frozen: the leaves never updated (None elsewhere), or None; kept apart so that lanes share one copy
    reference: parameters of a reference policy in the shape of `params`, or None
    """

    step: Array
    params: Params
    opt_state: Any
    key: Key
    frozen: Params = None
    reference: Params = None

    @property
    def all_params(self) -> Params:
        """`params` with the frozen leaves put back: what `network.apply` takes."""
        return merge(self.params, self.frozen)


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's place in a pytree (the leaf [...] itself does not matter) as text: "layers/attention/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(params: Params, trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """Split `params` into (trained, frozen) by leaf name; each has None where the other has the leaf [...]."""
    keep = jax.tree.map_with_path(lambda path, _: bool(trainable(path_name(path))), params)
    trained = jax.tree.map(lambda k, x: x if k else None, keep, params)
    frozen = jax.tree.map(lambda k, x: None if k else x, keep, params)
    return trained, frozen


def merge(params: Params, frozen: Params) -> Params:
    """Undo `partition`: the leaves [...] of `params`, and those of `frozen` where `params` has None."""
    if frozen is None:
        return params
    return jax.tree.map(lambda x, y: y if x is None else x, params, frozen, is_leaf=lambda x: x is None)


def gradient_algorithm(
    network: Network,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    trainable: Callable[[str], bool] | None = None,
    microbatches: int = 1,
    weight: Callable[[Any], Array] | None = None,
) -> Algorithm:
    """One optimiser step on the gradient of an objective, as an Algorithm over TrainState.

    Args:
        network: only `network.init` is used; the objective applies it.
        objective: `(params, batch, key) -> (scalar, metrics)`.
        optimizer: any Optax transformation.
        trainable: which leaves to train, by name ("layers/attention/q/kernel"); the others go to `state.frozen`
            and get no gradient. None trains all.
        microbatches: M > 1 splits each batch leaf [B, ...] into M parts of B/M and sums their gradients in a scan,
            g = sum_m w_m g_m / sum_m w_m, so that one part's activations are alive at a time.
        weight: `batch -> scalar` w_m, the denominator of the objective's mean on a part (how many valid rows or
            tokens), so that accumulated equals full batch whatever the masks. None: all parts weigh the same.

    Metrics: the objective's own, "loss", and "gradient_norm" (L2 over all trained leaves, before the optimiser).
    Raises ValueError at trace time if B is not a multiple of M, or if no leaf is trainable.
    """

    def init(key: Key) -> TrainState:
        init_key, run_key = jax.random.split(key)
        params, frozen = network.init(init_key), None
        if trainable is not None:
            params, frozen = partition(params, trainable)
            if not jax.tree.leaves(params):
                raise ValueError("gradient_algorithm: `trainable` selects no parameter of the network")
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), run_key, frozen)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key, objective_key = jax.random.split(state.key)

        def gradient(part: Any, part_key: Key) -> tuple[Params, Metrics]:
            def scalar(params: Params) -> tuple[Array, Metrics]:
                loss, metrics = objective(merge(params, state.frozen), part, part_key)
                return loss, {"loss": loss, **metrics}

            return jax.grad(scalar, has_aux=True)(state.params)

        if microbatches == 1:
            grads, metrics = gradient(batch, objective_key)
        else:
            grads, metrics = _accumulate(gradient, batch, objective_key, microbatches, weight)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, key=key), metrics

    return Algorithm(init, step)


def split_batch(batch: Any, parts: int) -> Any:
    """A batch of leaves [B, ...] as microbatches [parts, B / parts, ...]. Raises ValueError if B does not divide."""
    rows = sorted({leaf.shape[0] for leaf in jax.tree.leaves(batch)})
    if len(rows) != 1 or rows[0] % parts:
        raise ValueError(f"a batch of leading axes {rows} does not split into {parts} microbatches")
    return jax.tree.map(lambda x: x.reshape(parts, rows[0] // parts, *x.shape[1:]), batch)


def map_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """`function` of each of `parts` equal parts of a batch of leaves [B, ...], one after another, results joined."""
    if parts == 1:
        return function(batch)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(function, split_batch(batch, parts)))


def _accumulate(
    gradient: Callable[[Any, Key], tuple[Params, Metrics]],
    batch: Any,
    key: Key,
    parts: int,
    weight: Callable[[Any], Array] | None,
) -> tuple[Params, Metrics]:
    """The weighted mean over `parts` equal parts of the batch of what `gradient` returns."""
    split = split_batch(batch, parts)
    keys = jax.random.split(key, parts)

    def add(total: Any, part_and_key: Any) -> tuple[Any, None]:
        part, part_key = part_and_key
        w = jnp.asarray(1.0 if weight is None else weight(part), jnp.float32)
        new = (gradient(part, part_key), jnp.ones(()))
        return jax.tree.map(lambda t, x: t + (w * x).astype(t.dtype), total, new), None

    first = jax.tree.map(lambda x: x[0], (split, keys))
    shapes = jax.eval_shape(lambda part, k: (gradient(part, k), jnp.ones(())), *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (summed, total_weight), _ = jax.lax.scan(add, zeros, (split, keys))
    return jax.tree.map(lambda x: x / total_weight.astype(x.dtype), summed)


def train(algorithm: Algorithm, key: Key, batches: Any, *, length: int | None = None) -> tuple[Any, Metrics]:
    """Run an Algorithm from `init(key)` over every batch: `lax.scan(algorithm.step, algorithm.init(key), batches)`.

    Args:
        batches: pytree whose leaves have a leading step axis [T, ...], or None for algorithms that make their own data.
        length: the number of steps T when `batches` is None.

    Returns the final state and metrics with leaves [T, ...]. Not jitted: jit the outermost composition.
    """
    if batches is None and length is None:
        raise ValueError("train: give `length` when `batches` is None")
    return jax.lax.scan(algorithm.step, algorithm.init(key), batches, length=length)
