"""Runs commands in forked children, which may be killed before any operation on files, or in the middle of a write.

Started as a process of its own: it imports everything once and computes nothing, so that a child costs a fork. A line
of its input is a JSON list of jobs that run at the same time; the answer is a line with one outcome a job.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import open_clip  # noqa: F401
import torch

import fastprompt.data.feature_cache
import fastprompt.demo.page
import fastprompt.exchange.export
import fastprompt.exchange.import_run
from fastprompt.cli import main

fastprompt.data.feature_cache.SHARD_ROWS = 8
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Operations:
    """Counts what a process does to the files below a folder, and kills it when it is its turn.

    Args:
        root: the folder.
        kill: number of the operation before which the process is killed, from 1; 0 for never.
        half: count synced files instead, and leave half of that file when it is killed.
    """

    def __init__(self, root, kill, half):
        self.root, self.kill, self.half, self.seen = Path(root), kill, half, []
        self.fsync = os.fsync
        os.fsync = self.sync
        if not half:
            sys.addaudithook(self.audit)

    def audit(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & WRITES
        else:
            path, changes = arguments[0] if arguments else None, event in CHANGES
        if changes and isinstance(path, str | bytes | os.PathLike):
            where = self.root / os.fsdecode(path)  # which is the working folder
            if where.is_relative_to(self.root):
                self.turn(f"{event} {where.relative_to(self.root)}")

    def sync(self, descriptor):
        if self.half:
            where = Path(f"/proc/self/fd/{descriptor}").readlink()
            if where.is_file():
                self.turn(f"half of {where.name}", descriptor)
        self.fsync(descriptor)

    def turn(self, what, descriptor=None):
        self.seen.append(what)
        if len(self.seen) == self.kill:
            if descriptor is not None:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def child(job, out):
    """Run one command; its words and the operations that it did go to files."""
    os.chdir(job["cwd"])
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    time.sleep(job.get("delay", 0))
    operations = Operations(job["cwd"], job.get("kill", 0), job.get("half", False))
    status = main(job["command"])
    sys.stdout.flush()
    (out / "operations").write_text(json.dumps(operations.seen))
    os._exit(status)


def run(jobs, scratch):
    """Run jobs at the same time; each ends with its status, words and operations, if it was not killed."""
    children = []
    for number, job in enumerate(jobs):
        out = scratch / str(number)
        out.mkdir(exist_ok=True)
        (out / "operations").write_text("[]")
        pid = os.fork()
        if not pid:
            try:
                child(job, out)
            finally:
                os._exit(77)  # a traceback, which is among its words
        children.append((pid, out))
    outcomes = []
    for pid, out in children:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        words = {name: (out / name).read_text() for name in ("stdout", "stderr")}
        outcomes.append(
            {"pid": pid, "status": status, "operations": json.loads((out / "operations").read_text()), **words}
        )
    return outcomes


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), Path(sys.argv[1]))), flush=True)
