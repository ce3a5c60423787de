"""Stopping a run in order when the machine is wanted back."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Preempted(SystemExit):
    """A run was asked to stop, and has saved everything; uncaught, the process exits with code 143."""

    def __init__(self, message: str) -> None:
        super().__init__(143)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """While entered, SIGTERM and the first Ctrl-C only set `received`; a second Ctrl-C interrupts at once.

    Python delivers signals to the main thread alone, so in any other thread this does nothing. The handlers that
    were there before come back on leaving.
    """

    def __init__(self, *, active: bool) -> None:
        self._active = active and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}
        self.received: signal.Signals | None = None

    def __enter__(self) -> Self:
        if self._active:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # None: a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
