"""The graph that CROWN walks backward: nodes with interval bounds, and how a row of coefficients passes each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.certification.bounds import Abstract, Bounds
from jaxalign.types import Array

UNIT_MARGIN = 1.1  # rounding is at most eps / 2 for each operation; the rest covers the rounding of this account itself

# (coefficients of one row [...], alpha or None) -> (the parents' coefficients, the constant left over)
Pull = Callable[[Array, Any], tuple[list[Array], Array]]


@dataclasses.dataclass(eq=False)
class Node(Abstract):
    """A value [...] of the program: its bounds so far and how coefficients on it become coefficients on its parents.

    A node without `pull` (an input; a value of which nothing but bounds is known) is bounded where it stands.
    `free` [...] is the default alpha of a node whose lower line can move, else None. `error` [...] is what rounding may
    cost in passing it, for each unit of coefficient (None: exact, or nobody asks).
    """

    index: int
    bounds: Bounds
    parents: tuple["Node", ...] = ()
    pull: Pull | None = None
    linear: bool = True
    free: Array | None = None
    error: Array | None = None
    tight: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape [...] of the value."""
        return self.bounds.lower.shape

    @property
    def dtype(self) -> Any:
        """The type of its numbers, of any shape [...]."""
        return self.bounds.lower.dtype


    def sharpen(self, bounds: Bounds) -> Bounds:
        """Both what was known and these bounds [...]: the node keeps, and this returns, the tighter of each side."""
        least, most = jnp.maximum(self.bounds.lower, bounds.lower), jnp.minimum(self.bounds.upper, bounds.upper)
        # Rounding can make two bounds of one number cross by a hair: both orders are then true of it.
        self.bounds = Bounds(jnp.minimum(least, most), jnp.maximum(least, most))
        return self.bounds


@dataclasses.dataclass(eq=False)
class Graph:
    """The nodes in the order they were computed. `intermediate`, `capacity`, `sound` are as in `crown_bounds`."""

    intermediate: str
    capacity: int | None
    sound: bool = False
    nodes: list[Node] = dataclasses.field(default_factory=list)

    def add(self, bounds: Bounds, parents: Sequence[Node] = (), pull: Pull | None = None, **more: Any) -> Node:
        """A new node of values [...]."""
        self.nodes.append(Node(len(self.nodes), bounds, tuple(parents), pull, **more))
        return self.nodes[-1]

    def lower_bounds(self, rows: dict[int, Array], alphas: dict[int, Array], *, linear_only: bool = False) -> Array:
        """The least value [S] of sum_n sum(rows[n][s] * n) over the input box, as far as linear bounds tell.

        `rows` holds coefficients [S, *shape] by node, `alphas` the free slopes [S, *shape] of some nonlinear nodes.
        With `linear_only` the walk stops at the first nonlinear nodes, at their interval bounds.
        """
        rows = dict(rows)
        total: Any = 0.0
        mass: Any = 0.0  # what rounding may have cost, in units of eps
        for node in reversed(self.nodes):
            if node.index not in rows:
                continue
            row = rows.pop(node.index)
            if node.pull is None or (linear_only and not node.linear):
                total = total + least_over_box(row, node.bounds)
                mass = mass + self._cost(row, magnitude(node.bounds)) * (row[0].size + len(self.nodes))
                continue
            pull, alpha = node.pull, alphas.get(node.index)
            if alpha is None:
                parts, constant = jax.vmap(lambda r, pull=pull: pull(r, None))(row)
            else:
                parts, constant = jax.vmap(pull)(row, alpha)
            total = total + constant
            mass = mass + jnp.abs(constant) * len(self.nodes) + self._cost(row, node.error)
            for parent, part in zip(node.parents, parts, strict=True):
                if parent.index in rows:
                    part = rows[parent.index] + part
                    mass = mass + self._cost(part, magnitude(parent.bounds))
                rows[parent.index] = part
        if self.sound:
            total = total - UNIT_MARGIN * jnp.finfo(total.dtype).eps * mass
        return jnp.where(jnp.isnan(total), -jnp.inf, total)

    def _cost(self, row: Array, scale: Array | None) -> Any:
        """sum(|row| * scale) [S], which rounding can cost rows [S, ...] in units of eps; 0 if nobody asks."""
        if not self.sound or scale is None:
            return 0.0
        flat, weight = jnp.abs(row.reshape(len(row), -1)), scale.reshape(1, -1)
        return jnp.sum(jnp.where(flat > 0, flat * weight, 0.0), axis=1)

    def tighten(self, node: Node, unstable: Callable[[Array, Array], Array] | None = None) -> Bounds:
        """The node's bounds [...], improved once by walking back from it if `intermediate` says so.

        `unstable(lower, upper)` tells which elements are worth it; the others keep their interval bounds.
        """
        if self.intermediate == "interval" or node.tight or not node.parents:
            return node.bounds
        node.tight = True
        lower, upper = (v.reshape(-1) for v in (node.bounds.lower, node.bounds.upper))
        wanted = jnp.ones(lower.shape, bool) if unstable is None else unstable(lower, upper)
        if self.capacity is None or self.capacity >= lower.size:
            every = jnp.arange(lower.size)
            found = self._elements(node, every)
            least, most = (jnp.where(wanted, new, old) for new, old in zip(found, (lower, upper), strict=True))
        else:
            least, most = self._few_at_a_time(node, wanted, self.capacity, lower, upper)
        return node.sharpen(Bounds(least.reshape(node.shape), most.reshape(node.shape)))

    def _elements(self, node: Node, which: Array) -> tuple[Array, Array]:
        size = node.bounds.lower.size
        rows = jax.nn.one_hot(which, size, dtype=node.bounds.lower.dtype).reshape(-1, *node.shape)
        found = self.lower_bounds({node.index: jnp.concatenate([rows, -rows])}, {})
        return found[: len(which)], -found[len(which) :]

    def _few_at_a_time(
        self, node: Node, wanted: Array, capacity: int, lower: Array, upper: Array
    ) -> tuple[Array, Array]:
        """Only the wanted elements [n], `capacity` of them a turn: as many turns as it takes."""
        order = jnp.argsort(~wanted, stable=True)
        order = jnp.concatenate([order, jnp.full(capacity, order[-1])])
        count = jnp.sum(wanted)

        def turn(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            done, least, most = carry
            which = jax.lax.dynamic_slice_in_dim(order, done, capacity)
            low, high = self._elements(node, which)
            return done + capacity, least.at[which].set(low), most.at[which].set(high)

        start = (jnp.zeros((), count.dtype), lower, upper)
        _, least, most = jax.lax.while_loop(lambda carry: carry[0] < count, turn, start)
        return least, most


def magnitude(bounds: Bounds) -> Array:
    """The largest absolute value [...] within bounds."""
    return jnp.maximum(jnp.abs(bounds.lower), jnp.abs(bounds.upper))


def least_over_box(row: Array, bounds: Bounds) -> Array:
    """min over the box of sum(row * x) [S] = row . c - |row| . r for rows [S, ...]: each x at its lower side."""
    flat = row.reshape(len(row), -1)
    lower, upper = bounds.lower.reshape(1, -1), bounds.upper.reshape(1, -1)
    sides = jnp.where(flat > 0, flat * lower, jnp.where(flat < 0, flat * upper, flat * 0))  # NaN stays NaN
    return jnp.sum(sides, axis=1)
