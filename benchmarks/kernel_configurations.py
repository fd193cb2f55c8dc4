"""Every configuration in which a Triton kernel can be launched, and the code that it is compiled from."""

import ast
import hashlib
import inspect
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from types import ModuleType

import torch
import triton
import triton.language as tl
from fastprompt_kernels import triton_sorting
from fastprompt_kernels.patch_statistics import triton as statistics
from fastprompt_kernels.prefix_attention import triton as attention
from fastprompt_kernels.resized_crop import triton as crops
from fastprompt_kernels.sinkhorn import triton as sinkhorn
from fastprompt_kernels.topk_similarity import triton as launch
from fastprompt_kernels.topk_similarity import triton_backward, triton_forward
from triton.backends.compiler import GPUTarget

from . import triton_row_maximum

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Configuration:
    """A kernel as it can be launched.

    Attributes:
        kernel: its name, in one of the modules of KERNELS.
        target: the name of a target.
        dtype: of the inputs.
        patches: the largest P that is launched so, or 0 for any larger one.
        k: the length of the sorted run; 0 for kernels without one.
        keep: whether the selection is written, or read.
        scales: how many k a prompt has.
        blocks: tile sizes and warps, as the launch table gives them.
    """

    kernel: str
    target: str
    dtype: torch.dtype
    patches: int
    k: int
    keep: bool
    scales: int
    blocks: tuple[tuple[str, int | bool], ...]


# The kernels, and the modules whose source decides what is found out about them: the forward kernel's instructions are
# counted beyond those of the row maximum. Another op adds its kernels here and its configurations in `configurations`.
KERNELS: dict[str, tuple[object, tuple[ModuleType, ...]]] = {
    "forward_kernel": (triton_forward.forward_kernel, (triton_forward, triton_sorting, triton_row_maximum)),
    "grad_patches_kernel": (triton_backward.grad_patches_kernel, (triton_backward,)),
    "grad_prompts_kernel": (triton_backward.grad_prompts_kernel, (triton_backward,)),
    "row_maximum_kernel": (triton_row_maximum.row_maximum_kernel, (triton_row_maximum, triton_forward)),
    "statistics_kernel": (statistics.statistics_kernel, (statistics,)),
    "statistics_grad_kernel": (statistics.statistics_grad_kernel, (statistics,)),
    "sinkhorn_kernel": (sinkhorn.sinkhorn_kernel, (sinkhorn,)),
    "attention_kernel": (attention.attention_kernel, (attention,)),
    "attention_grad_kernel": (attention.attention_grad_kernel, (attention,)),
    "resized_crop_kernel": (crops.resized_crop_kernel, (crops,)),
}


def configurations(targets: Iterable[str] = TARGETS, dtypes: Iterable[torch.dtype] = DTYPES) -> Iterator[Configuration]:
    """Every configuration of the launch tables; of topk_similarity with int64 offsets those of runs of 16."""
    targets, dtypes = list(targets), list(dtypes)
    for dtype in dtypes:
        for target in targets:
            yield from _statistics(target, dtype)
            yield from _attention(target, dtype)
            yield from _crops(target, dtype)
            for usual in _similarity(target, dtype):
                yield usual
                if usual.kernel == "grad_prompts_kernel":
                    blocks = tuple(launch.grad_prompts_blocks(dtype, tl.int64).items())
                    yield replace(usual, blocks=(*blocks, ("INDEX", 64)))
                elif usual.keep and usual.scales == 1 and usual.k in (0, 16):
                    yield replace(usual, blocks=(*usual.blocks, ("INDEX", 64)))
    yield from (one for target in targets for dtype in dtypes for one in _sinkhorn(target, dtype))


def _statistics(target: str, dtype: torch.dtype) -> Iterator[Configuration]:
    """Those of patch_statistics."""
    for index in (tl.int32, tl.int64):
        bits = () if index == tl.int32 else (("INDEX", 64),)
        for keep, rank in product((False, True), (0, 1)):
            blocks = (*statistics.forward_blocks(dtype, index).items(), ("RANK", rank), *bits)
            yield Configuration("statistics_kernel", target, dtype, 0, 0, keep, 1, blocks)
        for of_patches in (0, 1):
            blocks = (*statistics.backward_blocks(target, dtype, index).items(), ("PATCHES", of_patches), *bits)
            yield Configuration("statistics_grad_kernel", target, dtype, 0, 0, True, 1, blocks)


def _sinkhorn(target: str, dtype: torch.dtype) -> Iterator[Configuration]:
    """Those of sinkhorn: many patches or few, and the largest problem; costs are differences of cosines, in float32."""
    problems = ((196, 4), (10, 4), (1024, 4)) if dtype == torch.float32 else ()
    for (M, N), changes, index in product(problems, (0, 1), (32, 64)):
        bits = () if index == 32 else (("INDEX", 64),)
        blocks = (*sinkhorn.blocks(M, N).items(), ("CHANGES", changes), ("LOWEST", sinkhorn.LOWEST), *bits)
        yield Configuration("sinkhorn_kernel", target, dtype, M, 0, False, 1, blocks)


def _attention(target: str, dtype: torch.dtype) -> Iterator[Configuration]:
    """Those of prefix_attention, which takes no float32."""
    if dtype == torch.float32:
        return
    for backward, S, everything in product((False, True), (16, 32, 64), (0, 1)):
        kernel = "attention_grad_kernel" if backward else "attention_kernel"
        blocks = (*attention.launch_blocks(target, S, backward).items(), ("ALL", everything))
        yield Configuration(kernel, target, dtype, 0, 0, False, 1, blocks)


def _crops(target: str, dtype: torch.dtype) -> Iterator[Configuration]:
    """Those of resized_crop, whose sums are float32; the dtype of the result matters to its last instruction alone."""
    if dtype == torch.float32:
        for levels, cubic in product((0, 1), (0, 1)):
            blocks = (*crops.launch_blocks(target, bool(levels)).items(), ("LEVELS", levels), ("CUBIC", cubic))
            yield Configuration("resized_crop_kernel", target, dtype, 0, 0, False, 1, blocks)


def _similarity(target: str, dtype: torch.dtype) -> Iterator[Configuration]:
    """Those of topk_similarity."""
    for patches, k in ((patches, k) for patches in (64, 256, 0) for k in (4, 8, 16, 32, 64)):
        for keep, scales in ((False, 1), (True, 1), (True, 4)) if k == 16 else ((False, 1), (True, 1)):
            blocks = tuple(launch.forward_blocks(target, dtype, patches or 1024, k, keep).items())
            yield Configuration("forward_kernel", target, dtype, patches, k, keep, scales, blocks)
    for patches in (64, 0):
        blocks = tuple(launch.grad_patches_blocks(dtype, patches or 1024).items())
        yield Configuration("grad_patches_kernel", target, dtype, patches, 0, True, 1, blocks)
    blocks = tuple(launch.grad_prompts_blocks(dtype, tl.int32).items())
    yield Configuration("grad_prompts_kernel", target, dtype, 0, 0, True, 1, blocks)


def has_budget(configuration: Configuration) -> bool:
    """Whether the instructions of its kernel are counted for every version of Triton: those that the page names."""
    c = configuration
    tile = c.kernel == "forward_kernel" and c.target == "sm_90" and c.dtype == torch.bfloat16 and c.patches == 256
    return tile and c.k <= 32 and ("INDEX", 64) not in c.blocks


def telling(configuration: Configuration) -> bool:
    """Whether it is one of the few that tests compile: each kernel with all it can have to do, on sm_90 the counted."""
    one, blocks = configuration, set(configuration.blocks)
    if ("INDEX", 64) in blocks or one.scales > 1 or one.dtype == torch.float16:
        return False
    if one.kernel in ("sinkhorn_kernel", "resized_crop_kernel"):  # of float32 alone
        return (("CHANGES", 1) in blocks and one.patches == 196) or {("LEVELS", 1), ("CUBIC", 1)} <= blocks
    if one.kernel == "forward_kernel":
        chosen = {(256, 8, True), (256, 16, False), (0, 8, True)} if one.target == "sm_90" else {(256, 16, True)}
        return one.dtype == torch.bfloat16 and (one.patches, one.k, one.keep) in chosen
    less = {("RANK", 0), ("PATCHES", 0), ("ALL", 0), ("BLOCK_S", 32), ("BLOCK_S", 64)}
    keeps = one.keep or one.kernel != "statistics_kernel"
    return one.dtype == torch.bfloat16 and one.patches == 0 and keeps and blocks.isdisjoint(less)


def key(configuration: Configuration, version: str = triton.__version__) -> tuple:
    """The key of the resources of a configuration: with the present source of its kernel, and a version of Triton."""
    blocks = " ".join(f"{name}={int(value)}" for name, value in configuration.blocks)
    values = {**asdict(configuration), "dtype": TYPES[configuration.dtype], "blocks": blocks}
    return (*values.values(), source(configuration.kernel), version)


@cache
def source(kernel: str) -> str:
    """A short hash of the code that a kernel is compiled from.

    Comments and docstrings do not count, nor does what a decorator says of arguments: it decides how often a kernel is
    compiled for a user, not what is compiled here.
    """
    digest = hashlib.sha256()
    for module in KERNELS[kernel][1]:
        text = inspect.getsource(module)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
                first = node.body[1 if ast.get_docstring(node) is not None else 0]
                lines = text.splitlines(keepends=True)
                kept = lines[node.lineno - 1 : node.body[0].lineno - 1] + lines[first.lineno - 1 : node.end_lineno]
                digest.update(" ".join(_words("".join(kept))).encode())
    return digest.hexdigest()[:12]


def _words(code: str) -> Iterator[str]:
    """The tokens of some code without comments. Every version of Python has the same, of its syntax tree not."""
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            yield token.string.strip()
