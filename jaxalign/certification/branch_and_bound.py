"""Branch and bound: a box that CROWN cannot decide is split, and each half bounded by itself, until all are decided."""

import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.certification.linear_cuts import Examined, Network, Rows, descend, examine
from jaxalign.certification.properties import Property, UnsafeCase
from jaxalign.types import Key

MOST_SPLITS = 3  # of one box at once, while there are too few boxes to fill a batch
MANY_INPUTS = 32  # of a network that is mostly decided at once or not at all: its first box is bounded by itself
ATTACK_STARTS, ATTACK_STEPS = 256, 50
CANDIDATES = 8  # of a batch that are run again
NEARLY = 1e-4  # excess of a point that may still turn out unsafe when it is run

Run = Callable[[np.ndarray], np.ndarray]


class Verdict(NamedTuple):
    """What was found out about a property.

    status: "verified": no input of any case is unsafe; "falsified": `counterexample` is; "unknown": see `reason`.
    counterexample [N], output [K]: an unsafe input and what the network makes of it, else None.
    boxes: how many were bounded. boxes_left: how many were not yet decided.
    lower_bound: no input has a lower excess (`UnsafeCase.excess`) by what was proven: 0 if verified (all have a higher
        one), -inf if nothing was bounded. seconds: compilation included.
    """

    status: Literal["verified", "falsified", "unknown"]
    counterexample: np.ndarray | None
    output: np.ndarray | None
    boxes: int
    boxes_left: int
    lower_bound: float
    seconds: float
    reason: str


def verify_property(
    fn: Network,
    unsafe: Property,
    *,
    time_limit: float = 60.0,
    batch_size: int = 128,
    memory_limit: int = 2**30,
    run: Run | None = None,
    intermediate: Literal["crown", "interval"] = "crown",
    sound: bool = False,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> Verdict:
    """Whether any input of a property's cases makes fn(x [N]) -> y [K] unsafe, by CROWN and input splitting.

    An attack comes first (projected gradient descent on the excess). Then boxes are bounded `batch_size` at a time by
    one compiled program: CROWN's linear lower bounds of the rows decide a box, or cut away the part of it where they
    are positive, or say along which axis it is split in two: the largest |slope| * width (Wang et al. 2018, "Formal
    Security Analysis of Neural Networks using Symbolic Intervals", section 4.2). Boxes with the lowest bounds go first.

    "verified" needs for every box and every conjunction a row whose bound exceeds 0 by more than a few dozen roundings
    of its terms (a bound that is NaN does not), in the dtype JAX has by default: call it under `jax.enable_x64` to make
    those negligible. With `sound` every step of every bound pays for its rounding, so that "verified" is true of fn in
    exact arithmetic; it takes several times as long. "falsified" needs a float32 x inside the box as it stands in
    float64, at which the network `run` (by default `fn`) gives an output that satisfies all rows in float64. An input
    whose bounds have no float32 between them is taken as the nearest one. `time_limit` is in seconds and looked at
    between batches; `memory_limit` in bytes bounds the boxes waiting; where either ends the search, "unknown" and how
    many are left.

    `progress` is called after each batch with the boxes bounded, those left and the lower bound. `intermediate` is as
    in `crown_bounds`. Raises ValueError for a property that `Property.check` refuses or that does not fit fn, and
    UnsupportedPrimitive where CROWN has no rule.
    """
    search = _Search(fn, unsafe, time_limit, batch_size, memory_limit, run, (intermediate, sound), progress)
    for number, group in enumerate(search.groups):
        if found := search.attack(jax.random.fold_in(jax.random.key(seed), number), group):
            return search.verdict("falsified", "an attack met an unsafe input", found)
    reasons = []
    for number in range(len(search.groups)):
        found, reason = search.branch(number)
        if found:
            return search.verdict("falsified", "a box held an unsafe input", found)
        reasons += [reason] if reason else []
    if reasons:
        return search.verdict("unknown", reasons[0])
    return search.verdict("verified", "every box is excluded")


# One program each for a network, whatever its properties: fn is known by its identity.
@functools.partial(jax.jit, static_argnums=0)
def _evaluate(fn: Network, x: Any) -> Any:
    with jax.default_matmul_precision("highest"):
        return fn(x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(fn: Network, bounds: tuple[Any, bool], rows: Rows, lower: Any, upper: Any) -> Examined:
    return jax.vmap(functools.partial(examine, fn, rows, intermediate=bounds[0], sound=bounds[1]))(lower, upper)


@functools.partial(jax.jit, static_argnums=0)
def _attack(fn: Network, key: Key, rows: Rows, lower: Any, upper: Any) -> tuple[Any, Any]:
    starts = jax.random.uniform(key, (ATTACK_STARTS, len(lower)), lower.dtype, lower, upper)
    return jax.vmap(lambda x: descend(fn, rows, x, lower, upper, steps=ATTACK_STEPS))(starts)


class _Group(NamedTuple):
    """The cases that share a box: `lower`, `upper` [N] in float64, and their rows."""

    lower: np.ndarray
    upper: np.ndarray
    rows: Rows

    def outward(self, dtype: Any) -> list[np.ndarray]:
        """The smallest box [N] of this dtype around the box."""
        lower, upper = self.lower.astype(dtype), self.upper.astype(dtype)
        lower = np.where(lower > self.lower, np.nextafter(lower, np.array(-np.inf, dtype)), lower)
        return [lower, np.where(upper < self.upper, np.nextafter(upper, np.array(np.inf, dtype)), upper)]

    def inward(self, x: np.ndarray) -> np.ndarray:
        """The points x [..., N] moved to float32 inside the box, where it holds any."""
        lower, upper = self.lower.astype(np.float32), self.upper.astype(np.float32)
        least = np.where(lower < self.lower, np.nextafter(lower, np.float32(np.inf)), lower)
        most = np.where(upper > self.upper, np.nextafter(upper, np.float32(-np.inf)), upper)
        return np.where(least <= most, np.clip(x.astype(np.float32), least, most), lower)

    def excess(self, y: np.ndarray) -> float:
        """How far an output y [K] is from unsafe, in float64: not above 0 if it is unsafe."""
        weights, offsets = (np.asarray(part, np.float64) for part in self.rows)
        return float((weights @ np.asarray(y, np.float64) - offsets).max(-1).min())


class _Search:
    """One `verify_property`: its programs, its clock and its counters."""

    def __init__(
        self, fn: Network, unsafe: Property, time_limit: float, batch_size: int, memory_limit: int, run: Run | None,
        bounds: tuple[Any, bool], progress: Callable[[int, int, float], None] | None,
    ) -> None:  # fmt: skip
        for name, value in (("time_limit", time_limit), ("batch_size", batch_size), ("memory_limit", memory_limit)):
            if not value > 0:
                raise ValueError(f"verify_property: {name} must be positive, got {value}")
        self._start, self._time_limit, self._progress = time.perf_counter(), time_limit, progress
        self._batch, self._memory, self._dtype = batch_size, memory_limit, jnp.zeros(()).dtype
        made = jax.eval_shape(fn, jax.ShapeDtypeStruct((unsafe.check().num_inputs,), self._dtype))
        if made.shape != (unsafe.num_outputs,):
            raise ValueError(f"verify_property: fn must return [{unsafe.num_outputs}], got {list(made.shape)}")
        self._fn, self._bounds = fn, bounds
        self._run = run or (lambda x: np.asarray(_evaluate(fn, x.astype(self._dtype))))
        self.groups = _groups(unsafe.cases)
        self._boxes = 0
        self._left = [(1, -np.inf) for _ in self.groups]  # boxes not decided and the least bound, by group

    def attack(self, key: Key, group: _Group) -> tuple[np.ndarray, np.ndarray] | None:
        """An unsafe input [N] of the group and its output [K], if descent from random points meets one."""
        x, excess = _attack(self._fn, key, self._rows(group), *group.outward(self._dtype))
        return self._checked(group, np.asarray(x), np.asarray(excess))

    def branch(self, number: int) -> tuple[tuple[np.ndarray, np.ndarray] | None, str]:
        """Bound and split boxes [N] until the group is decided.

        An unsafe input and its output, if there is one; why boxes are left, "" if none are.
        """
        group, rows = self.groups[number], self._rows(self.groups[number])
        lower, upper = (side[None] for side in group.outward(self._dtype))
        bound = np.full(1, -np.inf)
        stuck, least = 0, 0.0  # the boxes that cannot be split, and their least bound
        while len(bound):
            if time.perf_counter() - self._start > self._time_limit:
                return None, f"the time limit of {self._time_limit:g} s is over"
            if lower.nbytes + upper.nbytes > self._memory:
                return None, f"the boxes that wait need more than the memory limit of {self._memory:,} bytes"
            order = np.argpartition(bound, self._batch - 1) if len(bound) > self._batch else np.arange(len(bound))
            now, later = order[: self._batch], order[self._batch :]
            alone = len(bound) == 1 and lower.shape[1] > MANY_INPUTS
            padded = np.resize(now, 1 if alone else self._batch)
            seen = jax.tree.map(np.asarray, _look(self._fn, self._bounds, rows, lower[padded], upper[padded]))
            seen = jax.tree.map(lambda v: v[: len(now)], seen)  # noqa: B023
            self._boxes += len(now)
            if found := self._checked(group, seen.x, seen.excess):
                return found, ""
            halves, failed = _halves(seen, room=self._batch - len(later))
            stuck, least = stuck + len(failed), failed.min(initial=least)
            parts = ((lower[later], upper[later], bound[later]), halves)
            lower, upper, bound = (np.concatenate(pair) for pair in zip(*parts, strict=True))
            self._left[number] = (stuck + len(bound), bound.min(initial=least))
            if self._progress is not None:
                self._progress(self._boxes, self._waiting, self._lower_bound)
        return None, f"{stuck} boxes are too thin to be split" if stuck else ""

    def verdict(self, status: Any, reason: str, found: tuple[np.ndarray, np.ndarray] | None = None) -> Verdict:
        """What there is to say now; `found` is an input [N] and its output [K]."""
        seconds = time.perf_counter() - self._start
        x, y = found or (None, None)
        return Verdict(status, x, y, self._boxes, self._waiting, self._lower_bound, seconds, reason)

    @property
    def _waiting(self) -> int:
        return sum(count for count, _ in self._left)

    @property
    def _lower_bound(self) -> float:
        return float(min(least for _, least in self._left))

    def _rows(self, group: _Group) -> Rows:
        return Rows(*(jnp.asarray(part, self._dtype) for part in group.rows))

    def _checked(self, group: _Group, x: np.ndarray, excess: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The first of the points x [B, N], those of least excess first, that is unsafe when the network is run."""
        for i in np.argsort(excess)[:CANDIDATES]:
            if not excess[i] <= NEARLY:
                break
            point = group.inward(x[i])
            y = np.asarray(self._run(point)).reshape(-1)
            if group.excess(y) <= 0:
                return point, y
        return None


def _groups(cases: tuple[UnsafeCase, ...]) -> list[_Group]:
    """Cases by their box; conjunctions without a row get one that always holds."""
    together: dict[bytes, list[UnsafeCase]] = {}
    for case in cases:
        together.setdefault(case.lower.tobytes() + case.upper.tobytes(), []).append(case)
    groups = []
    for same in together.values():
        most = max(1, *(len(case.offsets) for case in same))
        weights, offsets = np.zeros((len(same), most, same[0].weights.shape[1])), np.zeros((len(same), most))
        for i, case in enumerate(same):
            if len(case.offsets):
                which = np.minimum(np.arange(most), len(case.offsets) - 1)
                weights[i], offsets[i] = case.weights[which], case.offsets[which]
        groups.append(_Group(same[0].lower, same[0].upper, Rows(weights, offsets)))
    return groups


def _halves(seen: Examined, *, room: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """What the open boxes are split into, with their bounds [Q], and the bounds of those that no axis can split.

    Each box is split along its first axes that can be: one, or more while the parts still fit into `room`.
    """
    lower, upper, order = (part[seen.open] for part in (seen.lower, seen.upper, seen.order))
    bound = np.nan_to_num(seen.bound[seen.open], nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    middle = lower + (upper - lower) / 2
    inside = (lower < middle) & (middle < upper)
    failed = bound[~inside.any(1)]
    lower, upper, order, bound, middle, inside = (
        part[inside.any(1)] for part in (lower, upper, order, bound, middle, inside)
    )
    possible = np.take_along_axis(inside, order, 1)
    order = np.take_along_axis(order, np.argsort(~possible, axis=1, kind="stable"), 1)
    splits = int(np.log2(max(2, room / max(1, len(bound)))))
    for j in range(min(splits, MOST_SPLITS, order.shape[1])):
        rows = np.arange(len(bound))
        can = inside[rows, order[:, j]]
        ends, starts = upper.copy(), lower.copy()
        ends[rows[can], order[can, j]] = starts[rows[can], order[can, j]] = middle[rows[can], order[can, j]]
        lower, upper = np.concatenate([lower, starts[can]]), np.concatenate([ends, upper[can]])
        order, bound, middle, inside = (np.concatenate([part, part[can]]) for part in (order, bound, middle, inside))
    return (lower, upper, bound), failed
