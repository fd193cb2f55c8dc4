"""Every operator once at a small shape, forward and backward: what memory checkers run.

python -m benchmarks.gpu.smallest cuda|cpu
"""

from __future__ import annotations

import sys

import torch
from fastprompt_kernels import resized_crop

from benchmarks.gpu.capture import operators


def main(device: str) -> None:
    """Run all of them; raises RuntimeError where a result is not finite."""
    for name, (function, inputs) in operators(device).items():
        leaves = [x.detach().requires_grad_() for x in inputs]
        result = function(*leaves)
        if result.requires_grad:
            result.sum().backward()
        if not bool(result.isfinite().all()):
            raise RuntimeError(f"{name}: the result is not finite")
        print(name)
    pixels = torch.arange(3 * 9 * 12, device=device).to(torch.uint8)
    crop = resized_crop(pixels, torch.tensor([[0, 9, 12]]), torch.tensor([[1, 2, 7, 8]]), 5, impl="triton")
    if not bool(crop.isfinite().all()):
        raise RuntimeError("resized_crop: the result is not finite")
    print("resized_crop")


if __name__ == "__main__":
    main(sys.argv[1])
