"""Compile the kernels of topk_similarity for targets that need not be present; print their resources as JSON.

It runs as a program of its own, because triton must not be in interpreter mode.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from fastprompt_kernels.topk_similarity import triton as ours
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Target, dtype, patches, k. The network of sm_80 takes ptxas a minute for a larger k.
FORWARD = [
    ("sm_80", torch.bfloat16, 196, 4),
    ("sm_90", torch.bfloat16, 196, 20),
    ("sm_90", torch.bfloat16, 577, 10),
    ("sm_90", torch.float32, 196, 10),
    ("sm_100", torch.bfloat16, 196, 10),
    ("gfx942", torch.bfloat16, 196, 10),
]
BACKWARD = [(target, dtype) for target in TARGETS for dtype in (torch.bfloat16, torch.float32)]


def resources(kernel, target, dtype, blocks, constants):
    """Compile one kernel with contiguous, aligned inputs, as the launcher would for D = 512."""
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**blocks, **constants, "SCALES": 1, "DOT": getattr(tl, str(dtype)[6:]), "INDEX": tl.int32}
    constants.update({name: 1 for name in kernel.arg_names if name.startswith("stride") and name.endswith("s_d")})
    element = {"patches": NAMES[dtype], "prompts": NAMES[dtype], "result": NAMES[dtype], "selected": "i32"}
    element.update(values="fp32", level_grad="fp32")

    def kind(name):
        if name in constants:
            return "constexpr"
        if name in element:
            return "*" + element[name]
        return ("i32",) if name == "k" else "i32"

    multiples = ("D", "stride_patches_b", "stride_patches_p", "stride_prompts_n", "stride_prompts_c")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in element or name in multiples
    }
    source = ASTSource(kernel, {name: kind(name) for name in kernel.arg_names}, constants, aligned)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return {"kernel": kernel.__name__, "target": target, "dtype": NAMES[dtype], **blocks, **spills(target, compiled)}


def spills(target, compiled):
    """Bytes of memory that a thread needs because its registers do not suffice."""
    if target.startswith("gfx"):
        fields = dict(re.findall(r"\.(\w+): +(\d+)", compiled.asm["amdgcn"]))
        spilled = int(fields["vgpr_spill_count"]) + int(fields["private_segment_fixed_size"])
    else:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            command = [tool, "--dump-resource-usage", file]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spilled = sum(int(re.search(rf"{field}:(\d+)", listing)[1]) for field in ("STACK", "LOCAL"))
    return {"spilled": spilled, "shared": compiled.metadata.shared}


def main():
    report = [
        resources(ours._forward_kernel, target, dtype, ours.forward_blocks(P, dtype), {"LOG_K": (k - 1).bit_length()})
        for target, dtype, P, k in FORWARD
    ]
    for kernel in (ours._grad_patches_kernel, ours._grad_prompts_kernel):
        report += [resources(kernel, target, dtype, ours.backward_blocks(dtype), {}) for target, dtype in BACKWARD]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
