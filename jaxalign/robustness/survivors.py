"""Searches that go on row by row: as one loop inside a trace, and outside one with the rows that fell taken out."""

import concurrent.futures
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from jaxalign.robustness.attack_program import compiled
from jaxalign.robustness.attack_result import AttackResult, checked_result
from jaxalign.robustness.threat_model import clip_to_box, flatten_rows, project, unflatten_rows
from jaxalign.robustness.traced_classifier import traced_classifier
from jaxalign.types import Array, ArrayLike, Key

SMALLEST_BUCKET = 64  # rows below which a smaller program would save less than it takes to compile
AT_ONCE = 4  # batches on a CPU
LOOKS = 20  # times that a search outside a trace stops to take out the rows that are done

Work = Callable[[], Any]


class Rows(NamedTuple):
    """What is attacked, one row per example: all of x side by side, so that rows can be gathered.

    x: [B, D] inside the box
    y: [B] int, the true classes
    target: [B] int, the classes that a targeted search is after
    epsilon: [B]
    lower, upper: the box, scalars or [B, D]
    """

    x: Array
    y: Array
    target: Array
    epsilon: Array
    lower: Array
    upper: Array

    def inside(self, x: Array, norm: str) -> Array:
        """The points [B, D] brought into the ball and then into the box, which leaves no ball around a point of it."""
        return self.in_box(self.x + project(x - self.x, self.epsilon, norm))

    def in_box(self, x: Array) -> Array:
        """The points [B, D] clipped to the box."""
        return clip_to_box(x, (self.lower, self.upper))

    def taken(self, index: np.ndarray) -> Self:
        """The rows of these numbers [n], on the host."""
        return jax.tree.map(lambda v: v if np.ndim(v) == 0 else np.asarray(v)[index], self)


class Search(Protocol):
    """An attack that can be stopped and gone on with; a pytree, so that its hyperparameters may be traced.

    length: iterations in all
    init(key, rows) -> state, without evaluating the classifier. Every leaf of a state is [B, ...], and it has
        `x_adv [B, D]` with the smallest `margin [B]` found in the ball (inf: none yet), and `done [B]` bool.
    step(key, apply, rows, state, i) -> state, iteration i
    """

    @property
    def length(self) -> int: ...
    def init(self, key: Key, rows: Rows) -> Any: ...
    def step(self, key: Key, apply: Callable[..., Array], rows: Rows, state: Any, i: Array) -> Any: ...


def as_rows(x: Any, y: ArrayLike, epsilon: ArrayLike, bounds: Any) -> Rows:
    """Inputs (leaves [B, ...]), labels [B], epsilon (scalar or [B]) and box as Rows; None is no box."""
    rows = flatten_rows(x)
    lower, upper = (-jnp.inf, jnp.inf) if bounds is None else bounds
    if all(jnp.ndim(b) == 0 for b in jax.tree.leaves((lower, upper))) and not isinstance(lower, dict | list | tuple):
        box = [jnp.asarray(b, rows.dtype) for b in (lower, upper)]
    else:
        # What clips everything that is smaller or larger are the bounds themselves, in the shape of x.
        box = [
            flatten_rows(clip_to_box(jax.tree.map(lambda leaf, v=v: jnp.full_like(leaf, v), x), (lower, upper)))
            for v in (-jnp.inf, jnp.inf)
        ]
    y = jnp.asarray(y)
    return Rows(rows, y, y, jnp.broadcast_to(jnp.asarray(epsilon, rows.dtype), y.shape), *box)


def check_norm(name: str, norm: str) -> None:
    """ValueError for "l1", whose ball the steps of a search on rows [B, D] do not fit."""
    if norm == "l1":
        raise ValueError(f"{name}: norm must be 'linf' or 'l2', got 'l1' (pgd, apgd and fab take it)")


def by_row(apply: Callable[..., Array], like: Any) -> Callable[..., Array]:
    """`apply` on leaves [B, ...] in the shapes of `like`, as a function of rows [B, D]."""
    return lambda rows, *key: apply(unflatten_rows(rows, like), *key)


def mean_logits(key: Key, apply: Callable[..., Array], x: Array, draws: int | None) -> Array:
    """`apply(x [B, D])`, or if there are `draws` the mean logits [B, C] over so many keys of `apply(x, key)`."""
    if not draws:
        return apply(x)
    return jnp.mean(jax.lax.map(lambda k: apply(x, k), jax.random.split(key, draws)), axis=0)


def ranked_classes(logits: Array, y: Array, number: int) -> Array:
    """The `number` classes other than y [B] with the largest of logits [B, C], the largest first: [number, B]."""
    others = jnp.where(jnp.arange(logits.shape[1])[None, :] == y[:, None], -jnp.inf, logits)
    return jax.lax.top_k(others, number)[1].T


def advance(
    search: Search, key: Key, apply: Callable[..., Array], rows: Rows, state: Any, start: ArrayLike, stop: ArrayLike
) -> Any:
    """Iterations `start` to `stop - 1` of a search over `rows` [B, D], ended when all its rows are done."""

    def body(carry: tuple[Array, Any]) -> tuple[Array, Any]:
        i, state = carry
        return i + 1, search.step(jax.random.fold_in(key, i), apply, rows, state, i)

    unfinished = lambda carry: (carry[0] < stop) & ~jnp.all(carry[1].done)  # noqa: E731
    return jax.lax.while_loop(unfinished, body, (jnp.asarray(start, jnp.int32), state))[1]


class Best(NamedTuple):
    """The point x_adv [B, D] of the smallest margin [B] met by the searches so far."""

    x_adv: Array
    margin: Array


def attempts(search: Search, key: Key, apply: Callable[..., Array], rows: Rows, targets: Array, best: Best) -> Best:
    """One whole search after another, the k-th with the classes `targets[k]` of [K, B], for the rows not yet broken."""

    def attempt(best: Best, inputs: tuple[Array, Key]) -> tuple[Best, None]:
        target, key = inputs
        init_key, run_key = jax.random.split(key)
        aimed = rows._replace(target=target)
        state = search.init(init_key, aimed)._replace(done=best.margin < 0)
        state = advance(search, run_key, apply, aimed, state, 0, search.length)
        better = improves(state.margin, best.margin) & ~(best.margin < 0)
        x_adv = jnp.where(better[:, None], state.x_adv, best.x_adv)
        return Best(x_adv, jnp.where(better, state.margin, best.margin)), None

    return jax.lax.scan(attempt, best, (targets, jax.random.split(key, targets.shape[0])))[0]


def improves(margin: Any, best: Any) -> Any:
    """Where a margin [B] is smaller than the best one, or NaN, which must come to light rather than be passed over."""
    return (margin < best) | (margin != margin)


def bucket(rows: int, smallest: int) -> int:
    """The power of two that holds so many rows [rows, ...], and not less than `smallest`."""
    return max(smallest, 1 << max(rows - 1, 0).bit_length())


def parts(rows: int, batch_size: int, smallest: int) -> Iterator[int]:
    """Sizes of batches that hold `rows` rows [rows, ...] between them: whole batches, then powers of two.

    Only the last one has room to spare, an eighth of it or less unless it is the smallest. There are few different
    sizes, since each is a program to compile.
    """
    while rows > 0:
        size = min(batch_size, bucket(rows, smallest))
        if rows < size - size // 8 and size > smallest:
            size = bucket(size // 2, smallest)
        yield size
        rows -= size


class Survivors:
    """The examples of an attack outside a trace, of which each search gets only those not yet broken.

    They are gathered into batches of a few sizes, rows repeated and ignored where a batch has room to spare, and a
    batch is halved in the course of a search once half of it is done. In between the arrays stay on the host, so that
    the device never holds more than one batch, or on a CPU four.

    Args:
        apply: the classifier of leaves [B, ...]; with `draws` it takes a key too.
        x: leaves [N, ...], y: [N], epsilon: scalar or [N], norm and bounds: as attacks have them.
        batch_size: rows at a time.
        draws: as in `mean_logits`.
    """

    def __init__(
        self, key: Key, apply: Callable[..., Array], x: Any, y: Array, epsilon: ArrayLike, *,
        norm: str, bounds: Any, batch_size: int, draws: int | None = None,
    ):  # fmt: skip
        self._apply, self._like, self._norm, self._draws = apply, x, norm, draws
        self._extra = (key,) if draws else ()
        self._programs: dict[int, ClosedJaxpr] = {}
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._rows: Rows = jax.tree.map(np.asarray, as_rows(x, y, epsilon, bounds))
        self._batch_size = batch_size
        self._smallest = min(SMALLEST_BUCKET, bucket(len(self._rows.y), 1), batch_size)
        self._best = Best(np.array(self._rows.x), np.full(self._rows.y.shape, np.inf, self._rows.x.dtype))
        self.clean, self.logits = self._inspect(key)
        self._best.margin[:] = self.clean.margin

    @property
    def alive(self) -> np.ndarray:
        """The numbers [n] of the examples not yet broken."""
        return np.flatnonzero(~(self._best.margin < 0))

    def attempt(self, search: Search, key: Key, targets: np.ndarray | None = None) -> None:
        """One search over the survivors, with the classes `targets` [N] if it is a targeted one."""
        rows = self._rows if targets is None else self._rows._replace(target=np.asarray(targets))
        batches = enumerate(self._batches(self.alive))
        _side_by_side(
            self._chase(search, jax.random.fold_in(key, number), rows, index, size) for number, (index, size) in batches
        )

    def result(self, key: Key) -> AttackResult:
        """What has been found, checked by evaluating the classifier once more: x_adv with leaves [N, ...]."""
        checked, _ = self._inspect(key)
        x_adv = unflatten_rows(jnp.asarray(self._best.x_adv), self._like)
        return AttackResult(x_adv, jnp.asarray(checked.success), jnp.asarray(checked.margin))

    def _batches(self, index: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        start = 0
        for size in parts(len(index), self._batch_size, self._smallest):
            yield index[start : start + size], size
            start += size

    def _program(self, function: Callable[..., Any], size: int, fixed: dict[str, Any], **given: Any) -> Work:
        """`function(apply=..., **fixed, **given)` compiled for batches of `size` rows, to be run by whoever may."""
        if size not in self._programs:
            like = jax.ShapeDtypeStruct((size, self._rows.x.shape[1]), self._rows.x.dtype)
            self._programs[size] = traced_classifier(by_row(self._apply, self._like), like, *self._extra)
        program, given = self._programs[size], jax.tree.map(jnp.asarray, given)
        name = (function, size, jax.tree.structure(given))
        if name not in self._compiled:
            run = compiled(function, self._apply, program, fixed)
            self._compiled[name] = run.lower(program.consts, given).compile()
        return lambda: jax.block_until_ready(self._compiled[name](program.consts, given))

    def _inspect(self, key: Key) -> tuple[AttackResult, np.ndarray]:
        """The checked result [N] and the logits [N, C] of the best points so far."""
        found = []
        for number, (index, size) in enumerate(self._batches(np.arange(len(self._best.margin)))):
            padded = np.resize(index, size)
            batch_key = jax.random.fold_in(key, number)
            given = {"key": batch_key, "rows": self._rows.taken(padded), "x_adv": self._best.x_adv[padded]}
            checked = self._program(_inspected, size, {"norm": self._norm, "draws": self._draws}, **given)()
            found.append(jax.tree.map(lambda v, n=index.size: np.asarray(v)[:n], checked))
        return jax.tree.map(lambda *v: np.concatenate(v), *found)

    def _chase(self, search: Search, key: Key, rows: Rows, index: np.ndarray, size: int) -> Generator[Work, Any, None]:
        """One search over the examples `index` [n], n <= size, in a batch that shrinks as they fall.

        Yields the programs to run and is sent their results.
        """
        init_key, run_key = jax.random.split(key)
        some = rows.taken(np.resize(index, size))
        state = _begin(search, init_key, some)._replace(done=np.arange(size) >= len(index))
        stride = max(1, -(-search.length // LOOKS))
        for start in range(0, search.length, stride):
            stop = min(start + stride, search.length)
            given = {"search": search, "key": run_key, "rows": some, "start": start, "stop": stop}
            state = yield self._program(advance, size, {}, state=state, **given)
            left = np.flatnonzero(~np.asarray(state.done)[: len(index)])
            if bucket(len(left), self._smallest) < size or not len(left):
                self._keep(index, state)
                if not len(left):
                    return
                size = bucket(len(left), self._smallest)
                padded = np.resize(left, size)
                index, some = index[left], some.taken(padded)
                state = jax.tree.map(lambda v, p=padded: np.asarray(v)[p], state)
                state = state._replace(done=np.arange(size) >= len(left))
        self._keep(index, state)

    def _keep(self, index: np.ndarray, state: Any) -> None:
        """Write down what a state [B, ...] whose first rows are the examples `index` [n] has found."""
        margin = np.asarray(state.margin)[: len(index)]
        better = np.flatnonzero(improves(margin, self._best.margin[index]))
        self._best.margin[index[better]] = margin[better]
        self._best.x_adv[index[better]] = np.asarray(state.x_adv)[better]


def _side_by_side(jobs: Iterator[Generator[Work, Any, None]]) -> None:
    """Run jobs, each a sequence of programs over leaves [B, ...], on a CPU several at a time.

    A program's loop keeps one core busy and little more. Only compiled programs run in the threads: what JAX traces
    depends on settings of the thread.
    """
    workers = AT_ONCE if jax.default_backend() == "cpu" else 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running: dict[concurrent.futures.Future[Any], Generator[Work, Any, None]] = {}
        for job in jobs:
            running[pool.submit(next(job))] = job
            while len(running) >= workers:
                _go_on(pool, running)
        while running:
            _go_on(pool, running)


def _go_on(pool: concurrent.futures.Executor, running: dict[Any, Generator[Work, Any, None]]) -> None:
    """Wait for a program and submit the next one of its job."""
    for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
        job = running.pop(future)
        try:
            work = job.send(future.result())
        except StopIteration:
            continue
        running[pool.submit(work)] = job


def _inspected(
    key: Key, apply: Callable[..., Array], rows: Rows, x_adv: Array, norm: str, draws: int | None
) -> tuple[AttackResult, Array]:
    """The checked result of points x_adv [B, D] and their logits [B, C], from one evaluation."""
    logits = mean_logits(key, apply, x_adv, draws)
    box = (rows.lower, rows.upper)
    return checked_result(lambda _: logits, rows.x, x_adv, rows.y, rows.epsilon, norm=norm, bounds=box), logits


@jax.jit
def _begin(search: Search, key: Key, rows: Rows) -> Any:
    return search.init(key, rows)
