"""The host loop of training: jitted chunks of steps, with progress, metrics files, checkpoints and exact resume."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxalign.algorithm import Algorithm
from jaxalign.runtime.checkpoint import Checkpoints
from jaxalign.runtime.chunks import MAX_CHUNK, Chunks, batches_from, join_frozen, named_leaves, owned, split_frozen
from jaxalign.runtime.metrics import FILE, MetricsLog, read_metrics
from jaxalign.runtime.preemption import Preempted, StopRequest
from jaxalign.runtime.progress import Tokens, TrainingProgress
from jaxalign.types import EPISODE, Key

CHUNK_SECONDS = 1.0
CHECKPOINT_SECONDS = 300.0
Callback = Callable[[int, Any, dict[str, np.ndarray]], object]


class StopTraining(Exception):
    """Raised by a callback to end a run early: `fit` checkpoints and returns what there is."""


class NonFiniteError(FloatingPointError):
    """A metric or parameter is NaN or infinite.

    step: the step (from 0) whose metric it is, or for a parameter the last step of the chunk after which it was seen
    name: the metric, or the parameter's path
    """

    def __init__(self, message: str, *, step: int, name: str) -> None:
        super().__init__(message)
        self.step, self.name = step, name


def fit(
    algorithm: Algorithm,
    key: Key,
    batches: Any,
    *,
    steps: int,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    chunk: int | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint_every: int | None = None,
    keep: int = 3,
    fingerprint: Mapping[str, Any] | None = None,
    nan_ok: Collection[str] = (),
    tokens_per_step: Tokens | None = None,
    progress: bool | Console = True,
    tensorboard: bool = True,
    mode: str = "auto",
) -> tuple[Any, dict[str, np.ndarray]]:
    """Run `steps` steps of an Algorithm from `algorithm.init(key)`, as `train` does, from the host.

    Args:
        batches: a pytree whose leaves have a leading step axis [T, ...], T >= steps; or `batches(step) -> batch`, a
            pure function of the step whose shapes may vary from step to step (each shape is compiled once); or None
            for algorithms that make their own data.
        directory: where `checkpoints/`, `metrics.jsonl` and `tensorboard/` go; None keeps nothing.
        resume: go on from the newest good checkpoint in `directory`, or begin if there is none. The result equals
            that of an uninterrupted run bit for bit, wherever the run was cut.
        chunk: the host looks at the run (checks for NaN, writes metrics, calls the callbacks) every `chunk` steps,
            counted from step 0. None: about once a second, at least every 1024 steps. The result does not depend on it.
        callbacks: each called as `callback(step, state, metrics)` after each chunk, with the number of steps done, the
            state, and the chunk's metrics [count, ...]. The next chunk reuses the state's memory: copy what you keep.
        checkpoint_every: steps between checkpoints; None: five minutes. There is always one at the end.
        keep: how many checkpoints stay on disk.
        fingerprint: JSON values that say what is run (the configuration); on resume they must equal the run's.
        nan_ok: names of metrics or parameters ("params/mask") that may be NaN or infinite. Metrics whose names begin
            with "episode/" always may: they are means over the episodes that ended in a step.
        tokens_per_step: tokens in a step, or a function of the step, for the tokens per second shown.
        progress: show progress on stderr, or on the rich Console given.
        tensorboard: write TensorBoard event files too.
        mode: "scan" runs a chunk as one call, "step" as one call per step; "auto" is "scan", save for large steps and
            convolutions on a CPU, which are slow inside a loop. The two may differ in the last bit.

    Returns the final state, and metrics as NumPy arrays [steps, ...] by name, from step 0: those of steps before a
    resume are read back from `metrics.jsonl`, where numbers are exact.

    Steps reuse the state's memory, beginning with a copy, so arrays that `init` returned stay valid. `state.frozen`
    is neither copied nor checkpointed: on resume `init` gives it again, and it must be what it was.

    Raises FileExistsError if `directory` holds a run and `resume` is False; ValueError if what is resumed is another
    algorithm or configuration (naming what differs); NonFiniteError at the first chunk with a NaN or infinity, which is
    never checkpointed; Preempted (a SystemExit, code 143) after a SIGTERM or Ctrl-C, with everything saved.
    """
    _check_arguments(steps=steps, chunk=chunk, checkpoint_every=checkpoint_every, directory=directory, resume=resume)
    source = batches_from(batches, steps)
    program = Chunks(algorithm, mode, chunk or MAX_CHUNK)
    run = _Run(None if directory is None else Path(directory), frozenset(nan_ok))
    pace = _Pace(chunk, checkpoint_every)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest(active=directory is not None))
        carried, frozen = split_frozen(algorithm.init(key))
        carried = owned(carried)
        if run.directory is not None:
            store = Checkpoints(run.directory, keep=keep, fingerprint=fingerprint, frozen=frozen)
            carried = run.resume(stack.enter_context(store), carried, steps)
            run.open_log(stack, tensorboard)
        console = _console(progress) if run.step < steps else None
        bar = stack.enter_context(TrainingProgress(console, steps=steps, start=run.step, tokens=tokens_per_step))
        while run.step < steps and stop.received is None:
            carried, metrics, count = program.run(carried, frozen, source, run.step, pace.most(run.step, steps))
            run.record(carried, metrics, count)
            pace.done(count)
            bar.update(run.step, metrics)
            if pace.checkpoint_due(run.step):
                run.save(carried)
            if _told_to_stop(callbacks, run.step, join_frozen(carried, frozen), metrics):
                break
        run.finish(carried)
        if stop.received is not None:
            raise Preempted(run.preempted_message(stop.received.name, steps))
    return join_frozen(carried, frozen), run.metrics()


def _told_to_stop(callbacks: Sequence[Callback], step: int, state: Any, metrics: dict[str, np.ndarray]) -> bool:
    try:
        for callback in callbacks:
            callback(step, state, metrics)
    except StopTraining:
        return True
    return False


class _Pace:
    """How many steps until the host looks again, and when a checkpoint is due."""

    def __init__(self, chunk: int | None, checkpoint_every: int | None) -> None:
        self._chunk, self._every = chunk, checkpoint_every
        self._guess, self._measured = 1, False
        self._clock = self._saved = time.monotonic()

    def most(self, step: int, steps: int) -> int:
        ends = [steps, *((step // n + 1) * n for n in (self._chunk, self._every) if n is not None)]
        most = min(ends) - step
        return most if self._chunk is not None else min(most, self._guess)

    def done(self, count: int) -> None:
        now = time.monotonic()
        per_step, self._clock = (now - self._clock) / count, now
        # The first chunk is one step, and mostly compilation.
        if self._measured:
            wanted = int(CHUNK_SECONDS / max(per_step, 1e-9))
            self._guess = max(1, min(wanted, 8 * self._guess, MAX_CHUNK))
        self._measured = True

    def checkpoint_due(self, step: int) -> bool:
        if self._every is not None:
            return step % self._every == 0
        now = time.monotonic()
        due = now - self._saved >= CHECKPOINT_SECONDS
        self._saved = now if due else self._saved
        return due


class _Run:
    """What a run has done so far, and where it is kept."""

    def __init__(self, directory: Path | None, nan_ok: frozenset[str]) -> None:
        self.directory, self.step = directory, 0
        self._nan_ok = nan_ok
        self._history: list[dict[str, np.ndarray]] = []
        self._store: Checkpoints | None = None
        self._log: MetricsLog | None = None
        self._dtypes: dict[str, str] = {}
        self._finite = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(x)) for x in leaves])

    def resume(self, store: Checkpoints, state: Any, steps: int) -> Any:
        """The state of the newest good checkpoint, or `state` if there is none."""
        self._store = store
        if (restored := store.restore(state)) is None:
            return state
        if restored.step > steps:
            raise ValueError(f"fit: {self.directory} holds a run of {restored.step} steps, more than steps={steps}")
        self.step, self._dtypes = restored.step, restored.metrics
        return restored.state

    def open_log(self, stack: contextlib.ExitStack, tensorboard: bool) -> None:
        """Cut the metrics files back to the step resumed from, and read what they hold."""
        assert self.directory is not None
        if jax.process_index() == 0:
            self._log = stack.enter_context(MetricsLog(self.directory, steps=self.step, tensorboard=tensorboard))
        if self.step:
            past = read_metrics(self.directory)
            self._history.append({name: past[name].astype(jnp.dtype(dtype)) for name, dtype in self._dtypes.items()})

    def record(self, state: Any, metrics: dict[str, np.ndarray], count: int) -> None:
        """Take in a chunk; raises NonFiniteError, after writing the metrics up to the step that has one."""
        if self._history and (shapes := _shapes(self._history[0])) != _shapes(metrics):
            raise ValueError(f"fit: metrics changed from {shapes} to {_shapes(metrics)} at step {self.step}")
        first = self.step
        if bad := _first_non_finite(metrics, self._nan_ok):
            at, name, value = bad
            if self._log is not None:
                self._log.write(first, metrics, at + 1)
            rest = [n for n, x in metrics.items() if n != name and _first_non_finite({n: x[at : at + 1]}, self._nan_ok)]
            others = f" (so {'is' if len(rest) == 1 else 'are'} {', '.join(rest)})" if rest else ""
            raise self._non_finite(f"metric {name!r} is {value} at step {first + at}{others}", first + at, name)
        if self._log is not None:
            self._log.write(first, metrics, count)
        if parameter := self._non_finite_parameter(state):
            last, what = first + count - 1, f"{parameter} is not finite"
            raise self._non_finite(f"{what} after step {last} (finite before {first})", last, parameter)
        self.step += count
        self._history.append(metrics)

    def save(self, state: Any) -> None:
        if self._store is not None:
            if self._log is not None:
                self._log.sync()
            self._store.save(self.step, state, self._history[-1] if self._history else {})

    def finish(self, state: Any) -> None:
        """Checkpoint the last step, and return when it is on disk."""
        if self._store is not None and self.step:
            self.save(state)
            self._store.wait()

    def metrics(self) -> dict[str, np.ndarray]:
        names = self._history[0] if self._history else {}
        return {name: np.concatenate([chunk[name] for chunk in self._history]) for name in names}

    def preempted_message(self, signal_name: str, steps: int) -> str:
        return (
            f"{signal_name} received: stopped after {self.step} of {steps} steps, saved in {self.directory}; "
            "to go on, run it again with resume=True (--resume)"
        )

    def _non_finite_parameter(self, state: Any) -> str | None:
        leaves = named_leaves({"params": getattr(state, "params", None)})
        checked = {n: x for n, x in leaves.items() if n not in self._nan_ok and jnp.issubdtype(x.dtype, jnp.inexact)}
        finite = jax.device_get(self._finite(list(checked.values()))) if checked else []
        return next((name for name, ok in zip(checked, finite, strict=True) if not ok), None)

    def _non_finite(self, what: str, step: int, name: str) -> NonFiniteError:
        kept = "nothing was checkpointed"
        if self._store is not None and self._store.newest is not None:
            kept = f"the last checkpoint is of step {self._store.newest}, in {self._store.directory}"
        return NonFiniteError(f"{what}; {kept}", step=step, name=name)


def _shapes(metrics: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape[1:] for name, value in sorted(metrics.items())}


def _first_non_finite(metrics: Mapping[str, np.ndarray], nan_ok: Collection[str]) -> tuple[int, str, str] | None:
    """(index of the step, metric, value and where in the metric) of the earliest one, or None."""
    found = []
    for name, value in metrics.items():
        may_be = name in nan_ok or name.startswith(EPISODE)
        if may_be or not jnp.issubdtype(value.dtype, jnp.inexact):
            continue
        if (bad := np.argwhere(~np.isfinite(value))).size:
            at, *place = (int(i) for i in bad[0])
            found.append((at, name, f"{value[at, *place]}" + (f" in {name}{place}" if place else "")))
    return min(found, default=None)


def _check_arguments(
    *, steps: int, chunk: int | None, checkpoint_every: int | None, directory: Any, resume: bool
) -> None:
    if steps < 0:
        raise ValueError(f"fit: steps must not be negative, got {steps}")
    for name, value in (("chunk", chunk), ("checkpoint_every", checkpoint_every)):
        if value is not None and value < 1:
            raise ValueError(f"fit: {name} must be at least 1, got {value}")
    if jax.process_count() > 1 and (chunk is None or (directory is not None and checkpoint_every is None)):
        raise ValueError("fit: with several processes give `chunk` and `checkpoint_every`: their clocks do not agree")
    if directory is None:
        if resume:
            raise ValueError("fit: resume=True needs the `directory` of the run")
        return
    checkpoints = Path(directory) / "checkpoints"
    if not resume and ((Path(directory) / FILE).exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))):
        raise FileExistsError(f"fit: {directory} holds a run already: give resume=True, or another directory")
    Path(directory).mkdir(parents=True, exist_ok=True)


def _console(progress: bool | Console) -> Console | None:
    if isinstance(progress, Console):
        return progress
    return Console(file=sys.stderr) if progress and jax.process_index() == 0 else None
