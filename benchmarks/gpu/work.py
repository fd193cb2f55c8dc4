"""What a process of a step does: one item after the other, each written down as soon as it is done.

python -m benchmarks.gpu.work STEP OUT WORKER WORKERS [rehearse] [quick]
"""

from __future__ import annotations

import sys
import time
import traceback
from importlib import import_module
from pathlib import Path

from benchmarks.gpu import store
from benchmarks.gpu.plan import Plan

TAIL = 30  # lines of a traceback that are written down
# Exit status: a new process has to do the rest. CUDA serves this one no more, or a capture has failed in it, of which
# versions of torch before 2.15 may not undo everything.
GO_ON = 3


def work(module: str, step: str, plan: Plan, worker: int, workers: int) -> int:
    """Do every ``workers``-th item of a step that is not done yet; returns the exit status."""
    file = store.rows_file(plan.out, step)
    all_items = import_module(module).items(plan)
    done = store.finished_items(plan.out, step)
    mine = [name for index, name in enumerate(all_items) if index % workers == worker and name not in done]
    for name in sorted(mine, key=store.tried_items(plan.out, step).__contains__):
        store.append(file, {"item": name, "started": True})
        begin = time.perf_counter()
        error, spoilt = None, False
        try:
            for row in all_items[name]():
                store.append(file, {"item": name, "row": row})
                spoilt |= "not_captured" in row
        except Exception as failure:  # noqa: BLE001 (it is written down, and the next item goes on)
            traceback.print_exc()
            error = "".join(traceback.format_exception_only(failure)).strip() or type(failure).__name__
        took = round(time.perf_counter() - begin, 2)
        store.append(file, {"item": name, "seconds": took} | ({} if error is None else {"error": error[-2000:]}))
        if spoilt or (error is not None and device_is_lost(error)):
            return GO_ON
    return 0


def device_is_lost(error: str) -> bool:
    """Whether a kernel has gone wrong in a way after which CUDA serves this process no more."""
    return "CUDA error" in error or "Triton Error [CUDA]" in error or "HIP error" in error


if __name__ == "__main__":
    module, step, out, worker, workers, *flags = sys.argv[1:]
    plan = Plan("rehearse" in flags, "quick" in flags, Path(out))
    sys.exit(work(module, step, plan, int(worker), int(workers)))
