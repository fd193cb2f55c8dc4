"""Kernels that do one thing only: read the second-level cache, and take minima and maxima in registers."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK = 4096
WARPS = 4
PROGRAMS = 8  # for each multiprocessor


@triton.jit(do_not_specialize=["words", "shift"])
def reading_kernel(source, result, words, shift, BLOCK: tl.constexpr):
    """The sum of all words, from a place of its own on; every program reads them all."""
    total = tl.zeros((BLOCK,), tl.float32)
    place = (tl.program_id(0) * shift) % words
    for first in range(0, words, BLOCK):
        at = tl.multiple_of((place + first) % words, BLOCK) + tl.arange(0, BLOCK)
        total += tl.load(source + at, cache_modifier=".cg")
    tl.store(result + tl.program_id(0), tl.sum(total))


@triton.jit(do_not_specialize=["rounds"])
def comparing_kernel(source, result, rounds, step, BLOCK: tl.constexpr):
    """A minimum and a maximum, and an addition that other units of the processor make beside them, a round."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.load(source + at), tl.load(source + at) + step
    for _ in range(rounds):
        # The addition keeps the compiler from seeing that one exchange is enough.
        low, high = tl.minimum(low, high) + step, tl.maximum(low, high)
    tl.store(result + at, low + high)


def reading(words: int, device: torch.device, *, few: bool) -> tuple[Callable[[], object], int]:
    """A run of the reading kernel over a power of two of float32, and the bytes that it reads."""
    programs = _programs(device, few)
    source, result = torch.ones(words, device=device), torch.empty(programs, device=device)

    def run() -> None:
        reading_kernel[(programs,)](source, result, words, 17 * BLOCK, BLOCK=BLOCK, num_warps=WARPS)

    run()
    if not torch.equal(result, torch.full_like(result, float(words))):
        raise RuntimeError("the reading kernel did not read everything")
    return run, 4 * words * programs


def comparing(rounds: int, device: torch.device, *, few: bool) -> tuple[Callable[[], object], int]:
    """A run of the comparing kernel, and how many minima and maxima it takes."""
    programs = _programs(device, few)
    source = torch.randn(programs * BLOCK, device=device)
    result = torch.empty_like(source)

    def run() -> None:
        comparing_kernel[(programs,)](source, result, rounds, 1e-3, BLOCK=BLOCK, num_warps=WARPS)

    run()
    if not bool(result.isfinite().all()):
        raise RuntimeError("the comparing kernel left something out")
    return run, 2 * rounds * programs * BLOCK


def _programs(device: torch.device, few: bool) -> int:
    return 2 if few else PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
