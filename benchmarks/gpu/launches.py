"""Launch tables of topk_similarity: what else could be in them, and how a kernel is launched with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
import triton.language as tl
from fastprompt_kernels.testing import draw_inputs
from fastprompt_kernels.topk_similarity import triton as launch
from fastprompt_kernels.triton_launch import architecture
from torch import Tensor

from benchmarks.gpu.plan import Plan

Blocks = Mapping[str, int | bool]
Results = tuple[Tensor, ...]

DRAWN = 8  # images that differ; drawing them takes float64 similarities

# What is changed in the row of the table, those first that are most likely to be better.
FORWARD: tuple[Blocks, ...] = (
    {"BLOCK_D": 64, "num_stages": 3},
    {"BLOCK_C": 128, "num_warps": 8},
    {"num_stages": 3},
    {"BLOCK_D": 64, "num_stages": 2},
    {"BLOCK_C": 128, "num_warps": 8, "BLOCK_D": 64, "num_stages": 3},
    {"num_stages": 2},
    {"BLOCK_C": 32},
    {"num_warps": 8},
    {"BLOCK_D": 128, "num_stages": 2},
)
GRAD_PATCHES: tuple[Blocks, ...] = (
    {"BLOCK_C": 64},
    {"num_stages": 4},
    {"BLOCK_D": 128},
    {"BLOCK_P": 64, "num_warps": 4},
    {"num_stages": 2},
    {"BLOCK_C": 64, "num_stages": 2},
    {"BLOCK_C": 16},
)
GRAD_PROMPTS: tuple[Blocks, ...] = (
    {"BLOCK_P": 64},
    {"BLOCK_P": 128, "num_stages": 2},
    {"num_stages": 4},
    {"BLOCK_D": 128},
    {"BLOCK_C": 64, "num_warps": 4},
    {"num_stages": 2},
)


@dataclass(frozen=True)
class Part:
    """One row of a launch table, at the headline shape in bfloat16.

    Attributes:
        kernel: its name.
        k: patches that are kept.
        keep: whether the selection is written, or read.
    """

    kernel: str
    k: int
    keep: bool

    def __str__(self) -> str:
        return f"{self.kernel} k={self.k}{' keep' * self.keep}"

    @property
    def changes(self) -> tuple[Blocks, ...]:
        """What can be changed."""
        tables = {"forward_kernel": FORWARD, "grad_patches_kernel": GRAD_PATCHES, "grad_prompts_kernel": GRAD_PROMPTS}
        return tables[self.kernel]

    def usual(self, device: torch.device, P: int) -> dict[str, int | bool]:
        """The present row."""
        dtype = torch.bfloat16
        if self.kernel == "forward_kernel":
            return dict(launch.forward_blocks(architecture(device), dtype, P, self.k, self.keep))
        if self.kernel == "grad_patches_kernel":
            return dict(launch.grad_patches_blocks(dtype, P))
        return dict(launch.grad_prompts_blocks(dtype, tl.int32))

    def changed(self, device: torch.device, P: int, change: Blocks) -> dict[str, int | bool]:
        """The row with a change; a limit of registers was chosen for the present one alone."""
        kept = {name: value for name, value in self.usual(device, P).items() if name != "maxnreg" or not change}
        return kept | dict(change)

    def prepare(self, plan: Plan, images: int) -> Callable[[Blocks], Results]:
        """A function that launches the kernel with tiles, warps and stages that are given to it."""
        device = torch.device(plan.device)
        P, C, D = (20, 5, 16) if plan.rehearse else (196, 1000, 512)
        N = 1 if self.kernel == "forward_kernel" else 4  # there is one launch for each prompt
        k = [[self.k]] * N
        few = draw_inputs((min(images, DRAWN), P, N, C, D), k, torch.bfloat16, device=device)
        patches, grad = (x.repeat(-(-images // len(x)), 1, 1)[:images] for x in (few.patches, few.grad))
        table = self.kernel.replace("_kernel", "_blocks")
        if self.kernel == "forward_kernel":
            run = lambda: launch.forward(patches, few.prompts, k, self.keep)  # noqa: E731
        else:
            selected = launch.forward(patches, few.prompts, k, True)[1]
            if self.kernel == "grad_patches_kernel":
                run = lambda: (launch.grad_patches(grad, few.prompts, selected, k, P),)  # noqa: E731
            else:
                run = lambda: (launch.grad_prompts(grad, patches, selected, k),)  # noqa: E731

        def with_blocks(blocks: Blocks) -> Results:
            with mock.patch.object(launch, table, lambda *_: dict(blocks)):
                return run()

        return with_blocks


def parts(plan: Plan) -> tuple[Part, ...]:
    """Those of the headline shape: k = 5, 10, 15 and 20 make runs of 8, 16, 16 and 32."""
    if plan.quick:
        return (Part("forward_kernel", 16, True),)
    forward = tuple(Part("forward_kernel", k, keep) for keep in (True, False) for k in (16, 8, 32))
    backward = (Part("grad_patches_kernel", 16, True), Part("grad_prompts_kernel", 16, True))
    return (*forward[:1], *backward) if plan.rehearse else (*forward, *backward)


def changes(plan: Plan, part: Part) -> tuple[Blocks, ...]:
    """What is tried, beside the row as it is."""
    return part.changes[: 1 if plan.rehearse or plan.quick else None]


def said(blocks: Blocks) -> str:
    """Tiles, warps and stages in words, as kernel_resources.csv has them."""
    return " ".join(f"{name}={int(value)}" for name, value in blocks.items())
