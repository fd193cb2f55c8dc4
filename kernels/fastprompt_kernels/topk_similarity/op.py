"""Registration of topk_similarity with torch: schema, fake, autograd and autocast.

The operator of each implementation is opaque to torch.compile and torch.export. The schema knows no nested lists, so k
travels flat: the S scales of the first prompt, then those of the second.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import blocked, reference


def topk_similarity(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]], impl: str) -> Tensor:
    """Validated arguments in, (B, N, C) out; inputs are cast to autocast's dtype where autocast is on."""
    device = patches.device.type
    if torch.is_autocast_enabled(device) and patches.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        patches, prompts = patches.to(dtype), prompts.to(dtype)
    # The products inside must stay in the accumulator's precision.
    with torch.autocast(device, enabled=False):
        if impl == "reference":
            return reference.topk_similarity(patches, prompts, k)
        # What only the backward pass needs is not written where there will be none.
        keep = torch.is_grad_enabled() and (patches.requires_grad or prompts.requires_grad)
        run = _TopkSimilarity.apply if keep else _forward
        return run(patches, prompts, [scale for scales in k for scale in scales], keep, impl)[0]


def why_not_triton(device: torch.device, dtype: torch.dtype | None = None, P: int = 1) -> str | None:
    """The reason why the Triton implementation cannot take such inputs, or None where it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from . import triton

    return triton.why_not(device, dtype, P)


@torch.library.custom_op("fastprompt::topk_similarity", mutates_args=())
def _forward(patches: Tensor, prompts: Tensor, k: list[int], keep: bool, impl: str) -> tuple[Tensor, Tensor]:
    module = _implementation(impl, patches, patches.shape[1])
    return module.forward(patches, prompts, _nested(k, len(prompts)), keep)


@_forward.register_fake
def _(patches: Tensor, prompts: Tensor, k: list[int], keep: bool, impl: str) -> tuple[Tensor, Tensor]:
    (B, P, _), (N, C, _) = patches.shape, prompts.shape
    size, kind = _implementation(impl, patches, P).saved_size(B, P, C, _nested(k, N))
    dtype = torch.promote_types(patches.dtype, torch.float32)
    return patches.new_empty(B, N, C, dtype=dtype), patches.new_empty(size if keep else 0, dtype=kind)


@torch.library.custom_op("fastprompt::topk_similarity_grad_patches", mutates_args=())
def _grad_patches(grad: Tensor, prompts: Tensor, selected: Tensor, k: list[int], P: int, impl: str) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        module = _implementation(impl, prompts, P)
        return module.grad_patches(grad, prompts, selected, _nested(k, len(prompts)), P)


@_grad_patches.register_fake
def _(grad: Tensor, prompts: Tensor, selected: Tensor, k: list[int], P: int, impl: str) -> Tensor:
    return prompts.new_empty(len(grad), P, prompts.shape[-1])


@torch.library.custom_op("fastprompt::topk_similarity_grad_prompts", mutates_args=())
def _grad_prompts(grad: Tensor, patches: Tensor, selected: Tensor, k: list[int], impl: str) -> Tensor:
    with torch.autocast(grad.device.type, enabled=False):
        module = _implementation(impl, patches, patches.shape[1])
        return module.grad_prompts(grad, patches, selected, _nested(k, grad.shape[1]))


@_grad_prompts.register_fake
def _(grad: Tensor, patches: Tensor, selected: Tensor, k: list[int], impl: str) -> Tensor:
    return patches.new_empty(*grad.shape[1:], patches.shape[-1])


class _TopkSimilarity(torch.autograd.Function):
    """The operator with its gradient. Not registered with the operator: torch.func.grad could not pass then."""

    @staticmethod
    def forward(patches: Tensor, prompts: Tensor, k: list[int], keep: bool, impl: str) -> tuple[Tensor, Tensor]:
        return _forward(patches, prompts, k, keep, impl)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        patches, prompts, ctx.k, _, ctx.impl = inputs
        ctx.P = patches.shape[1]
        wants_patches, wants_prompts = ctx.needs_input_grad[:2]
        ctx.mark_non_differentiable(output[1])
        # Each gradient needs the other input: what no gradient needs is not kept alive.
        ctx.save_for_backward(prompts if wants_patches else None, patches if wants_prompts else None, output[1])

    @staticmethod
    def backward(ctx, grad, _):  # noqa: ANN001, ANN205
        prompts, patches, selected = ctx.saved_tensors
        return *_Gradients.apply(grad, patches, prompts, selected, ctx.k, ctx.P, ctx.impl), None, None, None


class _Gradients(torch.autograd.Function):
    """Those gradients of the operator that are asked for: a gradient needs the other input, which is None if not."""

    @staticmethod
    def forward(
        grad: Tensor, patches: Tensor | None, prompts: Tensor | None, selected: Tensor, k: list[int], P: int, impl: str
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_patches = None if prompts is None else _grad_patches(grad, prompts, selected, k, P, impl)
        grad_prompts = None if patches is None else _grad_prompts(grad, patches, selected, k, impl)
        return grad_patches, grad_prompts

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *_):  # noqa: ANN001, ANN002, ANN205
        raise RuntimeError("the gradient of topk_similarity can be differentiated again with impl='reference' only")


def _implementation(impl: str, like: Tensor, P: int) -> ModuleType:
    """The module that runs this call. It is chosen here, out of sight of torch.compile, alike forward and backward."""
    if impl == "blocked" or (impl == "auto" and like.device.type == "cpu"):
        return blocked
    reason = why_not_triton(like.device, like.dtype, P)
    if reason is None:
        from . import triton

        return triton
    if impl == "auto":
        return blocked
    raise ValueError(f"impl='triton' cannot run here: {reason}")


def _nested(k: list[int], N: int) -> list[list[int]]:
    """The scales of each of N prompts."""
    S = len(k) // N
    return [k[n * S : (n + 1) * S] for n in range(N)]
