"""Many steps of an Algorithm between two looks of the host: what is compiled and donated, where batches come from."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxalign.algorithm import Algorithm, path_name
from jaxalign.programs import has_primitive, largest_value
from jaxalign.types import Array, Metrics

MODES = ("auto", "scan", "step")
MAX_CHUNK = 1024
BUFFER_BYTES = 64 << 20  # stacked batches waiting on the device

# Inside a loop XLA's CPU backend runs a convolution about thirty times slower than outside it, and large matrix
# products no faster; what a loop saves there is the 50 us of a dispatch, which only small steps notice.
CPU_SCAN_MAX_ELEMENTS = 1 << 15


def split_frozen(state: Any) -> tuple[Any, Any]:
    """(state without its `frozen` leaves, those leaves); (state, None) for a state that has none."""
    frozen = getattr(state, "frozen", None) if dataclasses.is_dataclass(state) else None
    return (state, None) if frozen is None else (dataclasses.replace(state, frozen=None), frozen)


def join_frozen(carried: Any, frozen: Any) -> Any:
    """Undo `split_frozen`."""
    return carried if frozen is None else dataclasses.replace(carried, frozen=frozen)


def owned(tree: Any) -> Any:
    """A copy of every leaf, strongly typed, that may be donated: `init` may have returned its caller's own arrays."""

    def copy(x: Any) -> Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.copy(x)
        x = jnp.asarray(x)
        # Naming the dtype drops weak typing, which would make the second call a second compilation.
        return jnp.array(x, dtype=x.dtype, copy=True)

    return jax.tree.map(copy, tree)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by path ("params/w"); a tree that is one leaf is named "value"."""
    return {path_name(path) or "value": leaf for path, leaf in jax.tree.leaves_with_path(tree)}


class Batches(Protocol):
    """Where the batch of each step comes from."""

    def spec(self, step: int) -> Any:
        """Shapes and dtypes of the batch of `step`."""

    def rows(self, start: int, most: int) -> Iterator[Any]:
        """The batches from `start` on that share its spec, at most `most`."""

    def window(self, start: int, most: int, capacity: int) -> tuple[Any, int, int]:
        """(buffer, offset, count): batch `start + i` is `buffer[offset + i]` for i < count <= most <= capacity."""


class NoBatches:
    """For algorithms that make their own data: every batch is None."""

    def spec(self, step: int) -> None:
        return None

    def rows(self, start: int, most: int) -> Iterator[None]:
        return itertools.repeat(None, most)

    def window(self, start: int, most: int, capacity: int) -> tuple[None, int, int]:
        return None, 0, most


class ArrayBatches:
    """A pytree with a leading step axis [T, ...]; left where it is, on the device or in NumPy (a memory map, say)."""

    def __init__(self, batches: Any, steps: int) -> None:
        lengths = {name: np.shape(leaf)[:1] for name, leaf in named_leaves(batches).items()}
        if not lengths:
            raise ValueError("fit: `batches` has no leaves; give None if the algorithm makes its own data")
        if len(set(lengths.values())) > 1 or () in lengths.values():
            raise ValueError(f"fit: leaves of `batches` need one leading step axis [T] in common, got {lengths}")
        if (length := next(iter(lengths.values()))[0]) < steps:
            raise ValueError(f"fit: `batches` holds {length} steps, fewer than steps={steps}")
        self.on_device = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
        self.batches = jax.tree.map(jnp.asarray if self.on_device else np.asarray, batches)
        self._take = jax.jit(_take)

    def spec(self, step: int) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], _dtype(x)), self.batches)

    def rows(self, start: int, most: int) -> Iterator[Any]:
        for i in range(start, start + most):
            yield self._take(self.batches, i) if self.on_device else jax.tree.map(lambda x, i=i: x[i], self.batches)

    def window(self, start: int, most: int, capacity: int) -> tuple[Any, int, int]:
        if self.on_device:
            return self.batches, start, most
        return _stack(list(self.rows(start, most)), capacity), 0, most


class CalledBatches:
    """`batches(step) -> batch`, a pure function of the step; shapes may differ from step to step."""

    def __init__(self, batches: Callable[[int], Any]) -> None:
        self._call = batches
        self._last: tuple[int, Any] = (-1, None)

    def _batch(self, step: int) -> Any:
        # The batch that ended one run of equal shapes begins the next: kept so that it is made once.
        if self._last[0] != step:
            self._last = (step, self._call(step))
        return self._last[1]

    def spec(self, step: int) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), _dtype(x)), self._batch(step))

    def rows(self, start: int, most: int) -> Iterator[Any]:
        spec = self.spec(start)
        for step in range(start, start + most):
            if step > start and self.spec(step) != spec:
                return
            yield self._batch(step)

    def window(self, start: int, most: int, capacity: int) -> tuple[Any, int, int]:
        rows = list(self.rows(start, most))
        return _stack(rows, capacity), 0, len(rows)


def batches_from(batches: Any, steps: int) -> Batches:
    """The `batches` argument of `fit`: None, a callable, or a pytree with a leading step axis [T, ...]."""
    if batches is None:
        return NoBatches()
    return CalledBatches(batches) if callable(batches) else ArrayBatches(batches, steps)


def _dtype(x: Any) -> Any:
    """The dtype that `x` has inside jit: int32 for NumPy's int64, unless 64-bit numbers are enabled."""
    return x.dtype if isinstance(x, jax.Array) else jnp.result_type(x)


def _take(batches: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)


def _stack(rows: list[Any], capacity: int) -> Any:
    """[capacity, ...] leaves whose first len(rows) entries are the rows; the rest are never read."""

    def stack(*leaves: Any) -> Any:
        if isinstance(leaves[0], jax.Array):
            return jnp.stack([*leaves, *[leaves[-1]] * (capacity - len(leaves))])
        buffer = np.empty((capacity, *np.shape(leaves[0])), _dtype(leaves[0]))
        buffer[: len(leaves)] = leaves
        return buffer

    return jax.tree.map(stack, *rows)


class _Plan(NamedTuple):
    scan: bool
    capacity: int


class Chunks:
    """Runs consecutive steps with the state donated, one compilation per batch shape.

    There are two programs, and which one runs depends on the backend and on the step's own operations, never on the
    clock or on how many steps are asked for. So a run that was cut anywhere and resumed executes what an uninterrupted
    one executes, bit for bit.

    "scan": one call for up to `capacity` steps, a loop whose trip count is an argument.
    "step": one call per step, dispatched without waiting for the one before.
    """

    def __init__(self, algorithm: Algorithm, mode: str, most: int) -> None:
        if mode not in MODES:
            raise ValueError(f"fit: mode must be one of {MODES}, got {mode!r}")

        def one(carried: Any, frozen: Any, batch: Any) -> tuple[Any, Metrics]:
            state, metrics = algorithm.step(join_frozen(carried, frozen), batch)
            return split_frozen(state)[0], metrics

        self._mode, self._most = mode, most
        self._one = jax.jit(one)
        self._step = jax.jit(one, donate_argnums=0)
        self._scan = jax.jit(self._loop, donate_argnums=0, static_argnums=5)
        self._plans: dict[Any, _Plan] = {}

    def run(
        self, carried: Any, frozen: Any, batches: Batches, start: int, most: int
    ) -> tuple[Any, dict[str, np.ndarray], int]:
        """Steps `start`, `start + 1`, ... until `most` of them or the next batch shape, at least one.

        Returns the new state (the old one is donated), metrics as NumPy arrays [count, ...] by name, and count.
        """
        plan = self._plan(carried, frozen, batches.spec(start))
        most = min(most, plan.capacity)
        if plan.scan:
            buffer, offset, count = batches.window(start, most, plan.capacity)
            numbers = np.int32(offset), np.int32(count)
            carried, records = self._scan(carried, frozen, buffer, *numbers, plan.capacity)
            return carried, {name: np.asarray(leaf)[:count] for name, leaf in named_leaves(records).items()}, count
        records = []
        for batch in batches.rows(start, most):
            carried, metrics = self._step(carried, frozen, batch)
            records.append(metrics)
        fetched = [named_leaves(record) for record in jax.device_get(records)]
        by_name = {name: np.stack([record[name] for record in fetched]) for name in fetched[0]}
        return carried, by_name, len(fetched)

    def _plan(self, carried: Any, frozen: Any, batch: Any) -> _Plan:
        leaves, treedef = jax.tree.flatten(batch)
        signature = (treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if signature not in self._plans:
            scan = self._mode == "scan"
            if self._mode == "auto":
                scan = _suits_a_loop(self._one.trace(carried, frozen, batch).jaxpr)
            bytes_per_step = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            fits = max(1, BUFFER_BYTES // max(1, bytes_per_step))
            self._plans[signature] = _Plan(scan, min(self._most, fits) if scan else self._most)
        return self._plans[signature]

    def _loop(self, carried: Any, frozen: Any, buffer: Any, offset: Any, count: Any, capacity: int) -> tuple[Any, Any]:
        shapes = jax.eval_shape(lambda: self._one(carried, frozen, _take(buffer, offset))[1])
        records = jax.tree.map(lambda s: jnp.zeros((capacity, *s.shape), s.dtype), shapes)

        def body(i: Array, loop: tuple[Any, Any]) -> tuple[Any, Any]:
            carried, records = loop
            carried, metrics = self._one(carried, frozen, _take(buffer, offset + i))
            put = jax.lax.dynamic_update_index_in_dim
            return carried, jax.tree.map(lambda record, x: put(record, x, i, 0), records, metrics)

        # The trip count is traced, so one compilation serves every number of steps.
        return jax.lax.fori_loop(0, count, body, (carried, records))


def _suits_a_loop(jaxpr: ClosedJaxpr) -> bool:
    if jax.default_backend() != "cpu":
        return True
    return largest_value(jaxpr) <= CPU_SCAN_MAX_ELEMENTS and not has_primitive(jaxpr, "conv_general_dilated")
