"""The tests that are marked gpu, in as many processes as there are cores, up to eight."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec

from benchmarks.gpu import outcomes, store
from benchmarks.gpu.cases import Rows
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.processes import ROOT, end_with_parent

# It compiles for other targets, needs no GPU, and more packages than there may be.
IGNORED = "tests/kernels/test_kernel_resources.py"
REHEARSED = ("tests/kernels/test_sinkhorn.py", "-k", "marginals or no_problems")


def items(plan: Plan) -> dict[str, Rows]:
    """All in one: the tests write down their own outcomes."""
    return {"pytest": partial(_run, plan)}


def _run(plan: Plan) -> Iterator[dict]:
    """How many tests had which outcome; each is in a file of its own, from which the page has those that failed."""
    file = store.rows_file(plan.out, store.TESTS)
    file.unlink(missing_ok=True)
    chosen = REHEARSED if plan.rehearse else ("tests/kernels", f"--ignore={IGNORED}")
    workers = min(8, os.cpu_count() or 1)
    parallel = [] if plan.rehearse or find_spec("xdist") is None else ["-n", str(workers)]
    options = ["-m", "gpu", "-q", "-p", "benchmarks.gpu.outcomes", "-p", "no:cacheprovider", *parallel]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen, *options], cwd=ROOT, check=False, preexec_fn=end_with_parent,
        env={**os.environ, outcomes.FILE: str(file)},
    )  # fmt: skip
    counts = Counter(line["outcome"] for line in store.lines(file))
    yield {"status": done.returncode, **counts, "right": done.returncode == 0}
