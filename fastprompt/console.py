"""What the command line says when something is wrong: one sentence, as the last and only line."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from fastprompt.errors import LONGEST, InputError, printable, sentence

PREFIX = "fastprompt: error: "
T = TypeVar("T")


def explained(error: Exception) -> str | None:
    """The line that stands for an error that is no fault of the program; None where it is one."""
    # torch raises an error of its own on a GPU, and a RuntimeError on a CPU
    memory = isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))
    if not memory and not isinstance(error, InputError | OSError):
        return None
    begin = PREFIX + ("not enough memory: " if memory else "")
    return begin + sentence(error, LONGEST - len(begin))


def parsed(parse: Callable[[], T]) -> T:
    """What tyro reads from the command line; the box that it draws around an error becomes one sentence.

    Raises:
        InputError: the arguments are not those of a command.
    """
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return parse()
    except SystemExit as ended:
        if ended.code in (None, 0):
            raise
        box = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())  # without colours
        rows = [row.strip(" │╭╮╰╯─") for row in box.splitlines()[1:]]  # without the title
        sections = " ".join(row if row.strip("-") else "\n" for row in rows).split("\n")
        said = [section.strip() for section in sections if section.strip()]
        raise InputError("; ".join(dict.fromkeys((said[0], said[-1])))) from None  # what is wrong, where help is


@contextlib.contextmanager
def quiet_others() -> Iterator[None]:
    """Show our own messages at once, and what other packages warn of at the end.

    If the input is at fault, they are not shown: of two messages a reader should see the one that says what to do.
    """
    root, handler = logging.getLogger(), _Handler()
    root.addHandler(handler)
    memory = logging.getLogger("fastprompt.backbone.memory")  # says what a training step will take
    level = memory.level
    memory.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) and explained(error):
            handler.held.clear()
        raise
    finally:
        memory.setLevel(level)
        logging.captureWarnings(False)
        root.removeHandler(handler)
        for message in handler.held:
            print(message, file=sys.stderr)


class _Handler(logging.Handler):
    """Prints records of fastprompt, and keeps those of others."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.held: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] == "fastprompt":
            print(printable(self.format(record)), file=sys.stderr)
        else:
            self.held.append(self.format(record))


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing is to be saved first; ``signal`` is its number, as of an interrupted training."""

    signal = signal.SIGTERM


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, with a sentence; only the main thread can handle signals."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Terminated("terminated")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, handle) or signal.SIG_DFL  # None: one that Python did not install
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def escape_output() -> None:
    """Let output show as an escape what its encoding lacks, such as a class name in a terminal that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Drop what standard output cannot take, which Python would try to write again when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
