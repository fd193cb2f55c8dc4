"""Workloads of known cost. Fresh processes import this module, so it imports little."""

import os
import signal
import time

import torch

from benchmarks.measure import Case

MEGABYTES, RESULT_MEGABYTES = 200, 40


def _waiting(seconds, result):
    def run():
        time.sleep(seconds)
        return (result,)

    return run


def build_waiting(shape, device):
    """One that takes 20 ms, one that takes 80 ms, and floors of 1 and 10 ms."""
    ones = torch.ones(shape["B"], shape["C"], device=device)
    slow = _waiting(0.08, ones)
    floors = {"floor: low": lambda: time.sleep(0.001), "floor: high": lambda: time.sleep(0.01)}
    return Case({"quick": _waiting(0.02, ones), "slow": slow}, "slow", slow, 1e-6, floors)


def build_large(shape, device):
    """One that holds 200 MB for a moment and returns 40 MB, beside an input of 100 MB that does not count."""
    held = torch.ones(25_000_000)

    def run():
        result = torch.ones(RESULT_MEGABYTES * 250_000)
        result += torch.ones(MEGABYTES * 250_000).sum() + held[0]
        return (result,)

    return Case({"large": run}, "large", run, 1e-6)


def build_killed(shape, device):
    """One whose process ends as where memory runs out."""
    run = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    return Case({"killed": run}, "killed", run, 1e-6)
