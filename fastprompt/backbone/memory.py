"""How much memory a pass through the text tower takes, and how it is cut into pieces that fit a budget."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from fastprompt.errors import InputError

log = logging.getLogger(__name__)

MemoryBudget = int | Literal["auto"]

AUTO_SHARE = 0.5  # of the memory that is free when a shape is encoded for the first time
GAPS = 1.6  # times the estimate: what a process grew by in one piece, if its C library kept what was freed
SPARE = 0.97  # of a piece's tokens: packing leaves few slots empty
MEMINFO = Path("/proc/meminfo")  # Linux
CGROUP = Path("/sys/fs/cgroup")  # a container's limit on Linux

_TRIMS: ContextVar[bool] = ContextVar("trims", default=False)


@dataclass(frozen=True)
class TowerSize:
    """What decides how many bytes a token takes.

    Attributes:
        width: W.
        hidden: width of the MLP.
        blocks: number of blocks.
        element_size: bytes of a weight.
    """

    width: int
    hidden: int
    blocks: int
    element_size: int

    @property
    def saved_per_block(self) -> int:
        """Bytes that a token keeps in one block for the backward pass.

        The block's input, queries, keys, values, the sum behind the attention (5 W together), the activation's input,
        and mean and deviation of two layer norms.
        """
        return (5 * self.width + self.hidden) * self.element_size + 4 * max(4, self.element_size)

    def per_token(self, with_gradient: bool) -> int:
        """Bytes of a token at the worst moment of a pass: in the last block, of which little is kept.

        Beside what all other blocks keep, there are tensors that come and go: seven of width W and the hidden one.
        """
        passing = (7 * self.width + self.hidden) * self.element_size
        return passing + (self.blocks - 1) * self.saved_per_block if with_gradient else passing


@dataclass(frozen=True)
class EncodingPlan:
    """How G contexts and C classes are cut into pieces; every piece is encoded, and for gradients encoded again.

    Attributes:
        groups: contexts of a piece.
        classes: classes of each piece; they sum to C.
        nbytes: estimated bytes of all tensors at the worst moment, beside the weights and the features themselves.
        whole: whether there is a single piece.
        trims_memory: whether a CPU gives freed memory back in every block, because gaps in it would not fit as well.
    """

    groups: int
    classes: tuple[int, ...]
    nbytes: int
    whole: bool
    trims_memory: bool = True


def plan_encoding(
    size: TowerSize,
    groups: int,
    shared: int,
    lengths: tuple[int, ...],
    budget: MemoryBudget,
    device: torch.device,
    with_gradient: bool,
) -> EncodingPlan:
    """Cut as little as the budget allows: first between groups, which costs nothing but a second forward pass.

    Args:
        size: of the tower.
        groups: G.
        shared: tokens that a group has once for all classes.
        lengths: tokens of each class.
        budget: bytes, or "auto" for half of the memory that is free now.
        device: where the tower is.
        with_gradient: whether a backward pass follows.

    Raises:
        InputError: not even one class fits into the budget.
    """
    per_token = size.per_token(with_gradient)
    available = automatic_budget(device) if budget == "auto" else budget
    tokens = groups * (shared + sum(lengths))
    needed = tokens * per_token
    if available is None or needed <= available:
        trims_memory = available is not None and GAPS * needed > available
        return _logged(EncodingPlan(groups, (len(lengths),), needed, True, trims_memory), tokens, groups, with_gradient)
    at_once = int(available / per_token * SPARE)
    if shared + max(lengths) > at_once:
        needed = int((shared + max(lengths)) * per_token / SPARE) + 1
        raise InputError(f"memory_budget: expected at least {needed} bytes for the longest class name, got {available}")
    together = at_once // (shared + sum(lengths))
    if together:
        together = -(-groups // -(-groups // together))  # pieces of about the same size
        plan = EncodingPlan(together, (len(lengths),), together * (shared + sum(lengths)) * per_token, whole=False)
    else:
        classes = _cut(lengths, at_once - shared)
        ends = [0, *torch.tensor(classes).cumsum(0).tolist()]
        largest = max(sum(lengths[start:end]) for start, end in pairwise(ends))
        plan = EncodingPlan(1, classes, (shared + largest) * per_token, whole=False)
    return _logged(plan, tokens, groups, with_gradient)


def _cut(lengths: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """How many classes stand in each piece of at most ``limit`` tokens; the pieces are about equal."""
    target = sum(lengths) / -(-sum(lengths) // limit)
    classes, taken, done = [0], 0, 0
    for length in lengths:
        if classes[-1] and (taken + length > limit or done >= target * len(classes)):
            classes.append(0)
            taken = 0
        classes[-1] += 1
        taken += length
        done += length
    return tuple(classes)


def _logged(plan: EncodingPlan, tokens: int, groups: int, with_gradient: bool) -> EncodingPlan:
    pieces = -(-groups // max(1, plan.groups)) * len(plan.classes)
    log.log(
        logging.INFO if with_gradient else logging.DEBUG,
        "%s %d contexts x %d classes: %d tokens, in %d piece%s of about %.0f MB",
        *("training on" if with_gradient else "encoding", groups, sum(plan.classes), tokens),
        *(pieces, "s" * (pieces > 1), plan.nbytes / 1e6),
    )
    return plan


def automatic_budget(device: torch.device) -> int | None:
    """Half of the free memory in bytes; None where the system does not tell."""
    free = _free_memory(device)
    return None if free is None else int(AUTO_SHARE * free)


def _free_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if not MEMINFO.exists():
        names = getattr(os, "sysconf_names", {})  # not on Windows
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if "SC_PHYS_PAGES" in names else None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = 1024 * int(fields["MemAvailable"].split()[0])
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, int(most) - int((CGROUP / "memory.current").read_text()))
    return free


@contextmanager
def trimmed_memory(wanted: bool) -> Iterator[None]:
    """Let every block of a pass give freed memory back to the system, forward and backward."""
    token = _TRIMS.set(wanted)
    try:
        yield
    finally:
        _TRIMS.reset(token)


def trims_memory() -> bool:
    """Return whether blocks are to give freed memory back now."""
    return not torch.compiler.is_compiling() and _TRIMS.get()


def release_freed_memory() -> None:
    """Let the C library give back to the system what is free now.

    Torch asks for aligned memory, and glibc serves such a request from a gap only if the gap is larger than what is
    asked for. So a tensor does not fit where one of its size has been, and the heap grows to a multiple of what is in
    use. Gaps between tensors are given back too. Other C libraries are left alone.
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
