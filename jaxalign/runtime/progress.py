"""What a person sees while `fit` runs: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
SHOWN = ("evaluation/return", "loss")  # the first of these that there is
Tokens = int | Callable[[int], int]


class TrainingProgress:
    """Steps done of `steps`, the return or loss, steps or tokens per second since the last update, and the time left.

    console: where to; None shows nothing. A console that is not a terminal gets at most one line in ten seconds,
    beside the first and the last.
    tokens: tokens in a step, or a function of the step; None if unknown.
    """

    def __init__(self, console: Console | None, *, steps: int, start: int, tokens: Tokens | None) -> None:
        self._console, self._steps, self._start, self._done = console, steps, start, start
        self._tokens = tokens
        self._clock = time.monotonic()
        self._compiled: tuple[float, int] | None = None  # when the first chunk was done, and the step it reached
        self._spoke = -SECONDS_BETWEEN_LINES
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=False)
            self._task = self._bar.add_task("compiling", total=steps, completed=start)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        elif self._console is not None:
            self._console.print(f"step {self._start}/{self._steps}: compiling", highlight=False)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Show that `step` steps are done; `metrics` are those of the steps since the last call, [count, ...]."""
        if self._console is None:
            return
        now = time.monotonic()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        rate = self._rate(step, seconds) if self._compiled else f"first in {seconds:.1f} s"
        text = "  ".join([*_latest(metrics), rate])
        self._done = step
        self._compiled = self._compiled or (now, step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._spoke >= SECONDS_BETWEEN_LINES or step == self._steps:
            self._spoke = now
            self._console.print(f"step {step}/{self._steps}: {text}{self._left(step, now)}", highlight=False)

    def _left(self, step: int, now: float) -> str:
        """Time left at the mean speed since the first chunk, which is mostly compilation and so left out."""
        began, first = self._compiled or (now, step)
        if step == first or step == self._steps:
            return ""
        seconds = round((now - began) * (self._steps - step) / (step - first))
        return f"  {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"

    def _rate(self, step: int, seconds: float) -> str:
        if self._tokens is None:
            return f"{(step - self._done) / seconds:.3g} steps/s"
        tokens = self._tokens
        total = sum(tokens(i) if callable(tokens) else tokens for i in range(self._done, step))
        return f"{total / seconds:.3g} tokens/s"


def _latest(metrics: Mapping[str, Any]) -> list[str]:
    """The newest of `SHOWN` (or of the first metric), the mean over lanes if there are any."""
    name = next((n for n in SHOWN if n in metrics), next(iter(metrics), None))
    return [] if name is None else [f"{name} {float(np.mean(np.asarray(metrics[name][-1], np.float64))):.4g}"]
