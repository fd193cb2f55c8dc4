"""What the tests of topk_similarity share."""

import torch
from fastprompt_kernels import topk_similarity
from fastprompt_kernels.testing import Inputs
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(*implementations: str) -> list[str]:
    """Those that the device has: `blocked` of topk_similarity is made for processors."""
    return [impl for impl in implementations if impl != "blocked" or DEVICE == "cpu"]


def run(inputs: Inputs, impl: str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Values and both gradients, in another dtype if one is given."""
    patches, prompts = (t.to(dtype or t.dtype).detach().requires_grad_() for t in (inputs.patches, inputs.prompts))
    values = topk_similarity(patches, prompts, inputs.k, impl=impl)
    return values.detach(), *torch.autograd.grad(values, (patches, prompts), inputs.grad.to(values.dtype))


class Seen(TorchDispatchMode):
    """Notes the names of the operators that run and the largest tensor that they make."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                held = tensor if tensor.layout == torch.strided else tensor.values()
                self.largest = max(self.largest, held.numel() * held.itemsize)
        return result
