"""Registration of patch_statistics with torch: schema, fake, autograd and autocast.

The operator is opaque to torch.compile and torch.export. Both gradients come from one operator, because an
implementation that makes the logits again makes them once for both.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..topk_similarity.op import why_not_triton
from . import blocked, reference


def patch_statistics(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Validated arguments in, statistics out; inputs are cast to autocast's dtype where autocast is on."""
    device = patches.device.type
    if torch.is_autocast_enabled(device) and patches.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        patches, prompts = patches.to(dtype), prompts.to(dtype)
    # The products inside must stay in the accumulator's precision.
    with torch.autocast(device, enabled=False):
        if impl == "reference":
            return reference.patch_statistics(patches, prompts, scale, labels)
        keep = torch.is_grad_enabled() and (patches.requires_grad or prompts.requires_grad)
        *statistics, rank, _ = _forward(patches, prompts, scale, labels, keep, impl)
        return *statistics, None if labels is None else rank


@torch.library.custom_op("fastprompt::patch_statistics", mutates_args=())
def _forward(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, keep: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _implementation(impl, patches).forward(patches, prompts, scale, labels, keep)


@_forward.register_fake
def _(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, keep: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = patches.shape[:2], torch.promote_types(patches.dtype, torch.float32)
    statistics = [patches.new_empty(shape, dtype=dtype) for _ in range(3)]
    rank = patches.new_empty(0 if labels is None else shape, dtype=torch.int64)
    return *statistics, rank, patches.new_empty(shape if keep else 0, dtype=torch.int32)


@torch.library.custom_op("fastprompt::patch_statistics_grad", mutates_args=())
def _grad(
    grads: list[Tensor], patches: Tensor, prompts: Tensor, logsumexp: Tensor, entropy: Tensor, largest: Tensor,
    scale: float, wanted: list[bool], impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.autocast(patches.device.type, enabled=False):
        module = _implementation(impl, patches)
        return module.backward(grads, patches, prompts, logsumexp, entropy, largest, scale, wanted)


@_grad.register_fake
def _(
    grads: list[Tensor], patches: Tensor, prompts: Tensor, logsumexp: Tensor, entropy: Tensor, largest: Tensor,
    scale: float, wanted: list[bool], impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return patches.new_empty(patches.shape if wanted[0] else 0), prompts.new_empty(prompts.shape if wanted[1] else 0)


def _setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
    patches, prompts, ctx.scale, _, _, ctx.impl = inputs
    _, logsumexp, entropy, _, largest = output
    ctx.save_for_backward(patches, prompts, logsumexp, entropy, largest)


def _backward(ctx, of_maximum, of_logsumexp, of_entropy, *_):  # noqa: ANN001, ANN002, ANN202
    wanted = list(ctx.needs_input_grad[:2])
    grads = _grad([of_maximum, of_logsumexp, of_entropy], *ctx.saved_tensors, ctx.scale, wanted, ctx.impl)
    of_patches, of_prompts = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return of_patches, of_prompts, None, None, None, None


_forward.register_autograd(_backward, setup_context=_setup_context)


def _implementation(impl: str, like: Tensor) -> ModuleType:
    """The module that runs this call. It is chosen here, out of sight of torch.compile, alike forward and backward."""
    if impl == "blocked" or (impl == "auto" and like.device.type == "cpu"):
        return blocked
    reason = why_not_triton(like.device, like.dtype)
    if reason is None:
        from . import triton

        return triton
    if impl == "auto":
        return blocked
    raise ValueError(f"impl='triton' cannot run here: {reason}")
