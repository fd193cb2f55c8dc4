"""What the Triton kernels need on every target, found by compiling them ahead of time: no GPU takes part.

Every row of a launch table (tile sizes, warps) is compiled for every target, with the aligned inputs that the launchers
make sure of. Of sm_90
also the machine instructions are counted: those of the forward kernel beyond a kernel that takes the maximum of every
row of the same product, for each element of the padded tile. Code that only runs where similarities tie is left out.
"""

import ast
import hashlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch
import triton
import triton.language as tl
from fastprompt_kernels import triton_sorting
from fastprompt_kernels.patch_statistics import triton as statistics
from fastprompt_kernels.prefix_attention import triton as attention
from fastprompt_kernels.topk_similarity import triton as launch
from fastprompt_kernels.topk_similarity import triton_backward, triton_forward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .triton_row_maximum import row_maximum_kernel

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TENSOR_CORES = re.compile(r"\b(HGMMA|UTCHMMA|HMMA|v_mfma)")


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


@dataclass(frozen=True)
class Row:
    """A configuration in words, and what its kernel needs; shared memory in bytes, per program."""

    kernel: str
    target: str
    dtype: str
    patches: int
    k: int
    keep: bool
    scales: int
    blocks: str
    source: str
    registers: int
    spilled: int
    shared: int
    tensor_core: str
    instructions: int
    per_element: str
    seconds: float
    triton: str

    @property
    def key(self) -> tuple:
        """What identifies the configuration and the source that was compiled."""
        return tuple(getattr(self, field.name) for field in fields(self)[:9])


# The kernels, and the modules whose source decides what is compiled. Another op adds its kernels here and its
# configurations in `configurations`.
KERNELS: dict[str, tuple[object, tuple[ModuleType, ...]]] = {
    "forward_kernel": (triton_forward.forward_kernel, (triton_forward, triton_sorting)),
    "grad_patches_kernel": (triton_backward.grad_patches_kernel, (triton_backward,)),
    "grad_prompts_kernel": (triton_backward.grad_prompts_kernel, (triton_backward,)),
    "row_maximum_kernel": (row_maximum_kernel, (triton_forward,)),
    "statistics_kernel": (statistics.statistics_kernel, (statistics,)),
    "statistics_grad_kernel": (statistics.statistics_grad_kernel, (statistics,)),
    "attention_kernel": (attention.attention_kernel, (attention,)),
    "attention_grad_kernel": (attention.attention_grad_kernel, (attention,)),
}
FEATURES = (
    "patches", "prompts", "result", "mine", "others", "tokens", "queries", "grad", "of_tokens", "of_queries"
)  # fmt: skip
FLOATS = ("values", "level_grad", "partial", "maximum", "logsumexp", "entropy", "grads", "unit", "of_prefix")
POINTERS = dict.fromkeys(FLOATS, "*fp32") | {"selected": "*i32", "largest": "*i32"}
POINTERS |= dict.fromkeys(("rank", "labels", "sequence", "slots"), "*i64")
MULTIPLES_OF_16 = (
    "D", "stride_patches_b", "stride_patches_p", "stride_prompts_n", "stride_prompts_c", "stride_mine_outer",
    "stride_mine_inner", "stride_others_outer", "stride_others_inner",
)  # fmt: skip


def configurations(targets: Iterable[str] = TARGETS, dtypes: Iterable[torch.dtype] = DTYPES) -> Iterator[Configuration]:
    """Every configuration of the launch tables; of topk_similarity with int64 offsets those of runs of 16."""
    targets, dtypes = list(targets), list(dtypes)
    for dtype in dtypes:
        for target in targets:
            yield from _statistics(target, dtype)
            yield from _attention(target, dtype)
            for usual in _similarity(target, dtype):
                yield usual
                if usual.kernel == "grad_prompts_kernel":
                    blocks = tuple(launch.grad_prompts_blocks(dtype, tl.int64).items())
                    yield replace(usual, blocks=(*blocks, ("INDEX", 64)))
                elif usual.keep and usual.scales == 1 and usual.k in (0, 16):
                    yield replace(usual, blocks=(*usual.blocks, ("INDEX", 64)))


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


def _attention(target: str, dtype: torch.dtype) -> Iterator[Configuration]:
    """Those of prefix_attention, which takes no float32."""
    if dtype == torch.float32:
        return
    for backward, S, everything in product((False, True), (16, 32, 64), (0, 1)):
        kernel = "attention_grad_kernel" if backward else "attention_kernel"
        blocks = (*attention.launch_blocks(target, S, backward).items(), ("ALL", everything))
        yield Configuration(kernel, target, dtype, 0, 0, False, 1, blocks)


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


def key(configuration: Configuration) -> tuple:
    """The key of the row that belongs to a configuration and the present source of its kernel."""
    values = {**asdict(configuration), "dtype": TYPES[configuration.dtype], "blocks": dict(configuration.blocks)}
    values["blocks"] = " ".join(f"{name}={int(value)}" for name, value in configuration.blocks)
    return (*(values[field.name] for field in fields(Row)[:8]), source(configuration.kernel))


@cache
def source(kernel: str) -> str:
    """A short hash of the code that a kernel is compiled from; comments and docstrings do not count."""
    digest = hashlib.sha256()
    for module in KERNELS[kernel][1]:
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in node.decorator_list):
                if ast.get_docstring(node) is not None:
                    node.body.pop(0)
                digest.update(ast.unparse(node).encode())
    return digest.hexdigest()[:12]


def compiled(configuration: Configuration) -> triton.compiler.CompiledKernel:
    """The kernel as the launcher would compile it for contiguous, aligned inputs."""
    kernel = KERNELS[configuration.kernel][0]
    blocks = dict(configuration.blocks)
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in blocks}
    index = {32: tl.int32, 64: tl.int64}[blocks.pop("INDEX", 32)]
    constants = {**blocks, "SCALES": configuration.scales, "KEEP": configuration.keep, "INDEX": index}
    # Classes are images of one patch to the gradients of patch_statistics.
    constants |= {"OTHERS_INNER": 1, "stride_unit": 1} if blocks.get("PATCHES") else {"MINE_INNER": 1}
    constants["DOT"] = getattr(tl, str(configuration.dtype).removeprefix("torch."))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    constants.update({name: 1 for name in kernel.arg_names if name.startswith("stride") and name.endswith("s_d")})
    pointers = dict.fromkeys(FEATURES, "*" + TYPES[configuration.dtype]) | POINTERS

    def kind(name: str) -> str | tuple[str, ...]:
        if name in constants:
            return "constexpr"
        return pointers.get(name) or {"k": ("fp32",) * configuration.scales, "scale": "fp32"}.get(name, "i32")

    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if (name in pointers and name != "values") or name in MULTIPLES_OF_16
    }
    signature = {name: kind(name) for name in kernel.arg_names}
    return triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=TARGETS[configuration.target], options=options
    )


def listing(binary: bytes, option: str) -> str:
    """What cuobjdump, which comes with Triton, says about a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def instructions(code: str, scales: int = 0) -> int:
    """How many instructions a listing has, without the block of each scale that only runs where similarities tie.

    Those blocks are the longest that a branch behind the product skips.
    """
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code)
    product = max((int(address, 16) for address, name in lines if "MMA" in name), default=0)
    branches = re.findall(r"/\*([0-9a-f]{4,})\*/\s+@!?U?P\w+ BRA (?:\S+, )?0x([0-9a-f]+)", code)
    skipped = [(int(end, 16) - int(start, 16)) // 16 - 1 for start, end in branches if int(start, 16) > product]
    return sum(name != "NOP" for _, name in lines) - sum(sorted(skipped, reverse=True)[:scales])


def measure(configuration: Configuration) -> Row:
    """Compile one configuration."""
    start = time.perf_counter()
    kernel = compiled(configuration)
    seconds = time.perf_counter() - start
    if configuration.target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        found = dict(re.findall(r"\.(\w+): +(\d+)", code))
        registers, spilled = int(found["vgpr_count"]), int(found["vgpr_spill_count"])
        spilled += int(found["private_segment_fixed_size"])
        count = 0
    else:
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listing(kernel.asm["cubin"], "--dump-resource-usage")))
        registers, spilled = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
        code = listing(kernel.asm["cubin"], "--dump-sass")
        scales = configuration.scales if configuration.kernel == "forward_kernel" and configuration.keep else 0
        count = instructions(code, scales) if configuration.target == "sm_90" else 0
    units = " ".join(sorted(set(TENSOR_CORES.findall(code))))
    return Row(
        *key(configuration), registers, spilled, kernel.metadata.shared, units, count,
        per_element(configuration, count), round(seconds, 1), triton.__version__,
    )  # fmt: skip


def per_element(configuration: Configuration, count: int) -> str:
    """Instructions for each element of a tile of the forward kernel, beyond the product with a row maximum."""
    blocks = dict(configuration.blocks)
    if configuration.target != "sm_90" or configuration.kernel != "forward_kernel" or blocks["CHUNKED"]:
        return ""
    baseline = Configuration(
        "row_maximum_kernel", "sm_90", configuration.dtype, configuration.patches, 0, False, 1,
        tuple((name, value) for name, value in configuration.blocks if name not in ("LOG_K", "CHUNKED")),
    )  # fmt: skip
    beyond = count - instructions(listing(compiled(baseline).asm["cubin"], "--dump-sass"))
    return f"{beyond / (blocks['BLOCK_C'] * blocks['BLOCK_P'] / (32 * blocks['num_warps'])):.2f}"


def survey(chosen: Iterable[Configuration], processes: int = 2) -> Iterator[Row]:
    """The rows of some configurations, compiled by several processes."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(measure, chosen)


if __name__ == "__main__":
    # For the test: configurations as indices into the list of all, rows as JSON.
    everything = list(configurations())
    json.dump([asdict(row) for row in survey([everything[int(index)] for index in sys.argv[1:]])], sys.stdout)
