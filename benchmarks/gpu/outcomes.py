"""A plugin of pytest that writes down every outcome as it comes: ``-p benchmarks.gpu.outcomes``.

Where a kernel has gone wrong in a way after which CUDA serves a process no more, that process ends; with pytest-xdist
another one takes its place.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.gpu.store import append
from benchmarks.gpu.work import device_is_lost

FILE = "FASTPROMPT_OUTCOMES"
LOST = 3


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of tests that failed, passed or were skipped; set-up and clean-up only where they fail."""
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    if not in_worker and (report.when == "call" or report.outcome != "passed"):
        said = report.longreprtext[-1500:] if report.failed else ""
        append(Path(os.environ[FILE]), {"test": report.nodeid, "outcome": report.outcome, "said": said})


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End a worker whose device is lost, after the test has been reported."""
    if "PYTEST_XDIST_WORKER" in os.environ and (error := _error_of_device()) and device_is_lost(error):
        os._exit(LOST)


def _error_of_device() -> str:
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)
    return ""
