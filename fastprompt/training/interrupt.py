"""Ctrl-C that loses nothing: the first one asks the loop to stop after its step, the second one stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after a whole step, and its state was saved if there is a run folder.

    Attributes:
        epoch: The epoch it stopped in, counted from 1.
        step: Steps of that epoch that are done.
    """

    def __init__(self, message: str, epoch: int, step: int) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.step = step


class InterruptFlag:
    """Context manager that turns the first SIGINT into `requested`; the handler before it is put back at the end.

    Python lets only the main thread handle signals; in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> InterruptFlag:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._installed:
            # None stands for a handler that was not installed from Python and cannot be put back.
            signal.signal(signal.SIGINT, self._previous or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
