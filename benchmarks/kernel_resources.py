"""What the Triton kernels need on every target, found by compiling them ahead of time: no GPU takes part.

Every row of a launch table (tile sizes, warps) is compiled for every target, with the aligned inputs that the launchers
make sure of. Of sm_90 also the machine instructions are counted: those of the forward kernel beyond a kernel that takes
the maximum of every row of the same product, for each element of the padded tile. Code that only runs where
similarities tie is left out.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import triton
import triton.language as tl
from triton.compiler import ASTSource

from benchmarks.kernel_configurations import KERNELS, TARGETS, TYPES, Configuration, configurations, key
from benchmarks.kernel_instructions import instructions

TENSOR_CORES = re.compile(r"\b(HGMMA|UTCHMMA|HMMA|v_mfma)")


@dataclass(frozen=True)
class Resources:
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
        """What identifies the configuration, the source that was compiled and the compiler."""
        return (*(getattr(self, field.name) for field in fields(self)[:9]), self.triton)


FEATURES = (
    "patches", "prompts", "result", "mine", "others", "tokens", "queries", "grad", "of_tokens", "of_queries",
)  # fmt: skip
FLOATS = (
    "values", "level_grad", "partial", "maximum", "logsumexp", "entropy", "grads", "unit", "cost", "plan", "changes",
    "of_prefix", "mean", "std",
)  # fmt: skip
INT32S, INT64S = ("selected", "largest", "count"), ("rank", "labels", "sequence", "slots", "table")
POINTERS = dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(INT32S, "*i32") | dict.fromkeys(INT64S, "*i64")
MULTIPLES_OF_16 = (
    "D", "stride_patches_b", "stride_patches_p", "stride_prompts_n", "stride_prompts_c", "stride_mine_outer",
    "stride_mine_inner", "stride_others_outer", "stride_others_inner",
)  # fmt: skip


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
    pointers["pixels"] = "*u8" if blocks.get("LEVELS") else "*fp32"

    def kind(name: str) -> str | tuple[str, ...]:
        if name in constants:
            return "constexpr"
        numbers = {"k": ("fp32",) * configuration.scales, "scale": "fp32", "eps": "fp32"}
        return pointers.get(name) or numbers.get(name, "i32")

    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if (name in pointers and name not in ("values", "std")) or name in MULTIPLES_OF_16
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


def examine(configuration: Configuration) -> Resources:
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
        count = instructions(code) if configuration.target == "sm_90" else 0
    units = " ".join(sorted(set(TENSOR_CORES.findall(code))))
    *configured, version = key(configuration)
    return Resources(
        *configured, registers, spilled, kernel.metadata.shared, units, count,
        per_element(configuration, count), round(seconds, 1), version,
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


def survey(chosen: Iterable[Configuration]) -> Iterator[Resources]:
    """What some configurations need, compiled by two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from pool.map(examine, chosen)


if __name__ == "__main__":
    # For the test: configurations as indices into the list of all, rows as JSON.
    everything = list(configurations())
    json.dump([asdict(row) for row in survey([everything[int(index)] for index in sys.argv[1:]])], sys.stdout)
