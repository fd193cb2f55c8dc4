"""Peak memory of one implementation, measured in a fresh process."""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastprompt.errors import InputError

if TYPE_CHECKING:
    from benchmarks.measure import Build, Shape

MB = 1e6


@dataclass(frozen=True)
class Memory:
    """MB (1e6 bytes) in use at the worst moment.

    Attributes:
        beyond_inputs: results included.
        extra: beyond inputs and results: what the implementation needs for itself.
    """

    beyond_inputs: float
    extra: float


def peak_memory(build: Build, shape: Shape, device: torch.device, implementation: str) -> Memory | None:
    """Peak memory of one implementation; None where the system does not tell.

    Every implementation has a process of its own. Where there is a fork server they share its imports, not its memory.

    Raises:
        InputError: that process was killed.
    """
    if device.type != "cuda" and platform.libc_ver()[0] != "glibc":
        return None
    _release_free_memory()  # the other process may need it
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload([build.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            peak, results = pool.submit(_peak_here, build, shape, device, implementation).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{implementation}: its process was killed while it was weighed, probably because this machine has "
                f"too little free memory for {dict(shape)}"
            ) from error
    return Memory(peak / MB, max(peak - results, 0) / MB)


def _peak_here(build: Build, shape: Shape, device: torch.device, name: str) -> tuple[int, int]:
    """Bytes at the peak and bytes of the results, in this process.

    A first run loads code and fills caches, which are not the implementation's own.
    """
    run = build(shape, device).implementations[name]
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = run()
        peak = torch.cuda.max_memory_allocated(device)
    else:
        _release_free_memory()  # or it would hide what is taken again
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
        before = _resident("VmRSS")
        results = run()
        peak = _resident("VmHWM")
    return peak - before, sum(tensor.nbytes for tensor in results)


def _release_free_memory() -> None:
    """Give memory that this process keeps but does not use back to the system, where its C library can."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (resident now) or VmHWM (its highest mark)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
