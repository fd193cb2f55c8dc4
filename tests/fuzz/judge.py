"""Runs one command line in this process and says what is wrong with how it ended."""

import faulthandler
import io
import os
import re
import resource
import signal
import stat
import sys
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path

from fastprompt.cli import main
from fastprompt.files import LOCK, TEMPORARY
from tests.fuzz.case import Case
from tests.fuzz.world import inside

SECONDS = 60  # a case takes one; the machine may be busy
MEMORY = 4 * 2**30  # that a case may take more than there was before
LONGEST = 300
OURS = re.compile(r"fastprompt\.[\w.]+: |(encoding|hashing|training on|epoch) \d")  # messages, and lines of progress
ALWAYS = ("cache", ".cache", ".config", "tools")  # features of good images, and files of other packages


class TooLong(BaseException):
    """A command took longer than any should."""


def snapshot(home: Path) -> dict[str, str]:
    """What lies where: the hash of every file, and the kind of everything else."""
    found = {}
    for path in sorted(home.rglob("*")):
        mode = path.lstat().st_mode
        name = os.fsencode(path.relative_to(home)).decode(errors="backslashreplace")
        kind = stat.S_IFMT(mode)
        found[name] = sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else str(kind)
    return found


def judge(home: Path, case: Case) -> tuple[str, str | None]:
    """Run a case's command in its world, and look at what it did.

    Returns:
        How it ended ("works", "refuses" or "fails"), and what is wrong with it, if anything is.
    """
    before = snapshot(home)
    out = io.TextIOWrapper(io.BytesIO(), encoding=case.encoding)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    fault = None
    try:
        with ExitStack() as stack:
            for context in (inside(home), redirect_stdout(out), redirect_stderr(err), _limits(home, case.file_size)):
                stack.enter_context(context)
            status = main(list(case.arguments))
    except TooLong:
        status, fault = None, f"hangs: took more than {SECONDS} s"
    except SystemExit as ended:  # as after --help
        status = ended.code or 0
    except Exception as error:  # noqa: BLE001 (whatever comes through is what is looked for)
        last = traceback.extract_tb(error.__traceback__)[-1]
        status, fault = (
            None,
            f"traceback: {type(error).__name__}: {str(error)[:150]!r} at {last.filename}:{last.lineno}",
        )
    err.flush()
    lines = [line.split("\r")[-1] for line in err.buffer.getvalue().decode().split("\n")]
    said = "\n".join(line for line in lines if line.strip() and "%|" not in line)  # without progress bars
    after = snapshot(home)
    allowed = case.may_change if status == 0 else case.may_stay
    fault = fault or _wrong_words(status, said) or _wrong_changes(before, after, allowed)
    ended = {0: "works", 2: "refuses"}.get(status, "fails")
    if not fault and case.expects != "either" and ended != {"success": "works", "refusal": "refuses"}[case.expects]:
        fault = f"{ended}, but a {case.expects} is right: {said[-200:]}"
    return ended, fault


def _wrong_words(status: int | None, said: str) -> str | None:
    if status not in (0, 2):
        return f"ends with status {status}"
    if "Traceback" in said:
        return f"says a traceback: {said[-300:]}"
    if status == 0:
        return None
    lines = [line for line in said.splitlines() if not OURS.match(line)]
    if len(lines) != 1 or not lines[0].startswith("fastprompt: error: ") or said.splitlines()[-1] != lines[0]:
        return f"says {len(lines)} lines instead of one sentence: {said[:400]!r}"
    if len(lines[0]) > LONGEST or not lines[0].isprintable():
        return f"says a sentence of {len(lines[0])} characters or unprintable ones: {lines[0][:400]!r}"
    return None


def _wrong_changes(before: dict[str, str], after: dict[str, str], may_change: Sequence[str]) -> str | None:
    if "canary" in after:
        return "executes what it reads"
    if left := [name for name in after if name.endswith((LOCK, TEMPORARY))]:
        return f"leaves {left[0]}"
    allowed = (*ALWAYS, *may_change)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    wrong = [name for name in changed if not any(name == place or name.startswith(f"{place}/") for place in allowed)]
    return f"changes {', '.join(wrong[:5])}" if wrong else None


@contextmanager
def _limits(home: Path, file_size: int | None):
    """Bounds on time, memory and, if the disk is to be full, the size of files."""

    def stop(number: int, frame: object) -> None:
        pipes = [path for path in home.rglob("*") if stat.S_ISFIFO(path.lstat().st_mode)]
        for pipe in pipes:  # lets a thread that waits for one go on
            os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
        raise TooLong

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {resource.RLIMIT_AS: now + MEMORY}
    if file_size is not None:
        limits[resource.RLIMIT_FSIZE] = file_size
    previous = {limit: resource.getrlimit(limit) for limit in limits}
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    # Code in C does not hear of the alarm: then the process ends, after it has said where it is.
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)
    for limit, size in limits.items():
        resource.setrlimit(limit, (size, previous[limit][1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, handler)
        for limit, sizes in previous.items():
            resource.setrlimit(limit, sizes)
        sys.stdout.flush()
