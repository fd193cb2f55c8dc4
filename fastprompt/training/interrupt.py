"""Ctrl-C and SIGTERM that lose nothing: the first asks the loop to stop after its step, the second stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal after a whole step, and its state was saved if there is a run folder.

    Attributes:
        epoch: The epoch it stopped in, counted from 1.
        step: Steps of that epoch that are done.
        signal: Number of the signal: SIGINT (Ctrl-C) or SIGTERM.
    """

    def __init__(self, message: str, epoch: int, step: int, number: int) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step
        self.signal = number


class InterruptFlag:
    """Context manager that notes the first SIGINT or SIGTERM; the handlers before it are put back at the end.

    Python lets only the main thread handle signals; in any other thread this does nothing.

    Attributes:
        requested: Number of the signal that came; 0 for none.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> InterruptFlag:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number
