"""Registration of patch_statistics with torch: schema, fake, autograd and autocast.

The operator is opaque to torch.compile and torch.export. Both gradients come from one operator, because an
implementation that makes the logits again makes them once for both.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..implementations import cast_by_autocast, on_its_device, runs_triton, without_autocast
from . import blocked, reference


def patch_statistics(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, entropy: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Validated arguments in, statistics out; inputs are cast to autocast's dtype where autocast is on."""
    patches, prompts = cast_by_autocast(patches, prompts)
    # The products inside must stay in the accumulator's precision.
    with without_autocast(patches.device):
        if impl == "reference":
            maximum, logsumexp, of_classes, rank = reference.patch_statistics(patches, prompts, scale, labels)
            return maximum, logsumexp, of_classes if entropy else None, rank
        # What only the backward pass needs is not written where there will be none.
        keep = torch.is_grad_enabled() and (patches.requires_grad or prompts.requires_grad)
        run = _PatchStatistics.apply if keep else _forward
        results = run(patches, prompts, scale, labels, entropy or keep, keep, impl)
        maximum, logsumexp, of_classes, rank, _, _ = results
        return maximum, logsumexp, of_classes if entropy else None, None if labels is None else rank


@torch.library.custom_op("fastprompt::patch_statistics", mutates_args=())
@on_its_device
def _forward(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, entropy: bool, keep: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    module = _implementation(impl, patches)
    if module is blocked:
        return blocked.forward(patches, prompts, scale, labels, entropy, keep)
    # A kernel has the entropy at hand; not to write it would save nothing that shows.
    maximum, logsumexp, of_classes, *others = module.forward(patches, prompts, scale, labels, keep)
    return maximum, logsumexp, of_classes if entropy else of_classes.new_empty(0), *others


@_forward.register_fake
def _(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, entropy: bool, keep: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = patches.shape[:2], torch.promote_types(patches.dtype, torch.float32)
    statistics = [patches.new_empty(wanted, dtype=dtype) for wanted in (shape, shape, shape if entropy else 0)]
    rank = patches.new_empty(0 if labels is None else shape, dtype=torch.int64)
    largest = patches.new_empty(shape if keep else 0, dtype=torch.int32)
    keeps = keep and _implementation(impl, patches) is blocked
    kept = blocked.kept_shape(*shape, len(prompts), dtype) if keeps else 0
    return *statistics, rank, largest, patches.new_empty(kept, dtype=dtype)


@torch.library.custom_op("fastprompt::patch_statistics_grad", mutates_args=())
@on_its_device
def _grad(
    grads: list[Tensor], patches: Tensor, prompts: Tensor, logsumexp: Tensor, entropy: Tensor, largest: Tensor,
    kept: Tensor, scale: float, wanted: list[bool], impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with without_autocast(patches.device):
        module = _implementation(impl, patches)
        return module.backward(grads, patches, prompts, logsumexp, entropy, largest, kept, scale, wanted)


@_grad.register_fake
def _(
    grads: list[Tensor], patches: Tensor, prompts: Tensor, logsumexp: Tensor, entropy: Tensor, largest: Tensor,
    kept: Tensor, scale: float, wanted: list[bool], impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return patches.new_empty(patches.shape if wanted[0] else 0), prompts.new_empty(prompts.shape if wanted[1] else 0)


class _PatchStatistics(torch.autograd.Function):
    """The operator with its gradient. Not registered with the operator: torch.func.grad could not pass then."""

    @staticmethod
    def forward(
        patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, entropy: bool, keep: bool, impl: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _forward(patches, prompts, scale, labels, entropy, keep, impl)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        patches, prompts, ctx.scale, _, _, _, ctx.impl = inputs
        _, logsumexp, entropy, rank, largest, kept = output
        ctx.wanted = list(ctx.needs_input_grad[:2])
        ctx.mark_non_differentiable(rank, largest, kept)
        ctx.save_for_backward(patches, prompts, logsumexp, entropy, largest, kept)

    @staticmethod
    def backward(ctx, of_maximum, of_logsumexp, of_entropy, *_):  # noqa: ANN001, ANN002, ANN205
        grads = of_maximum, of_logsumexp, of_entropy
        return *_Gradients.apply(*grads, *ctx.saved_tensors, ctx.scale, ctx.wanted, ctx.impl), *[None] * 5


class _Gradients(torch.autograd.Function):
    """Those gradients of the operator that are wanted."""

    @staticmethod
    def forward(
        of_maximum: Tensor, of_logsumexp: Tensor, of_entropy: Tensor, patches: Tensor, prompts: Tensor,
        logsumexp: Tensor, entropy: Tensor, largest: Tensor, kept: Tensor, scale: float, wanted: list[bool],
        impl: str,
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        grads = [of_maximum, of_logsumexp, of_entropy]
        of_patches, of_prompts = _grad(grads, patches, prompts, logsumexp, entropy, largest, kept, scale, wanted, impl)
        return of_patches if wanted[0] else None, of_prompts if wanted[1] else None

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *_):  # noqa: ANN001, ANN002, ANN205
        raise RuntimeError("the gradient of patch_statistics can be differentiated again with impl='reference' only")


def _implementation(impl: str, like: Tensor) -> ModuleType:
    """The module that runs this call. It is chosen here, out of sight of torch.compile, alike forward and backward."""
    if not runs_triton(impl, like.device, like.dtype):
        return blocked
    from . import triton

    return triton
