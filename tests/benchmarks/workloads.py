"""Workloads of known cost. Fresh processes import this module, so it imports little."""

import time

import torch

from benchmarks.measure import Case

MEGABYTES = 200


def _waiting(seconds, result):
    def run():
        time.sleep(seconds)
        return (result,)

    return run


def build_waiting(shape, device):
    """One that takes 20 ms, one that takes 80 ms."""
    ones = torch.ones(shape["B"], shape["C"], device=device)
    return Case({"quick": _waiting(0.02, ones), "slow": _waiting(0.08, ones)}, baseline="slow", tolerance=1e-6)


def build_large(shape, device):
    """One that holds 200 MB for a moment, beside an input of 100 MB that does not count."""
    held = torch.ones(25_000_000)

    def run():
        return (torch.ones(MEGABYTES * 250_000).sum() + held[0],)

    return Case({"large": run}, baseline="large", tolerance=1e-6)
