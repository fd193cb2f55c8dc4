"""Registration of topk_similarity with torch: schema, fake, autograd, vmap and autocast.

The operator of each implementation is opaque to torch.compile and torch.export. The schema knows no nested lists, so k
travels flat: the S scales of the first prompt, then those of the second.
"""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..implementations import cast_by_autocast, on_its_device, runs_triton, without_autocast
from . import blocked, dense, reference

# The longest sorted run of the Triton kernels. One of 128 does not fit the registers of sm_90.
MAX_K = 64
# On a processor dense gradients are faster for so few pairs of a prompt and a class, or where a larger share of the
# patches is selected. The number of images has no say: the gradient of an image would change with its batch.
FEW_ROWS = 128
DENSE_SHARE = 1 / 8


def topk_similarity(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]], impl: str) -> Tensor:
    """Validated arguments in, (B, N, C) out; inputs are cast to autocast's dtype where autocast is on."""
    patches, prompts = cast_by_autocast(patches, prompts)
    # The products inside must stay in the accumulator's precision.
    with without_autocast(patches.device):
        if impl == "reference":
            return reference.topk_similarity(patches, prompts, k)
        # What only the backward pass needs is not written where there will be none.
        keep = torch.is_grad_enabled() and (patches.requires_grad or prompts.requires_grad)
        run = _TopkSimilarity.apply if keep else _forward
        return run(patches, prompts, [scale for scales in k for scale in scales], keep, impl)[0]


@torch.library.custom_op("fastprompt::topk_similarity", mutates_args=())
@on_its_device
def _forward(patches: Tensor, prompts: Tensor, k: list[int], keep: bool, impl: str) -> tuple[Tensor, Tensor]:
    return _implementation(impl, patches, k).forward(patches, prompts, nested(k, len(prompts)), keep)


@_forward.register_fake
def _(patches: Tensor, prompts: Tensor, k: list[int], keep: bool, impl: str) -> tuple[Tensor, Tensor]:
    (B, P, _), (N, C, _) = patches.shape, prompts.shape
    size, kind = _implementation(impl, patches, k).saved_size(B, P, C, nested(k, N))
    dtype = torch.promote_types(patches.dtype, torch.float32)
    return patches.new_empty(B, N, C, dtype=dtype), patches.new_empty(size if keep else 0, dtype=kind)


@torch.library.custom_op("fastprompt::topk_similarity_grad", mutates_args=())
@on_its_device
def _grad(
    grad: Tensor, patches: Tensor | None, prompts: Tensor | None, selected: Tensor, k: list[int], P: int, impl: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(grad.device):
        like = prompts if patches is None else patches
        _, N, C = grad.shape
        if impl == "auto" and like.device.type == "cpu":
            impl = "dense" if N * C <= FEW_ROWS or sum(k) > DENSE_SHARE * len(k) * P else "blocked"
        return _implementation(impl, like, k).backward(grad, patches, prompts, selected, nested(k, N), P)


@_forward.register_vmap
def _(info, dims, *args) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:  # noqa: ANN001, ANN002
    return one_by_one(_forward, info.batch_size, dims, args)


@_grad.register_vmap
def _(info, dims, *args) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:  # noqa: ANN001, ANN002
    return one_by_one(_grad, info.batch_size, dims, args)


@_grad.register_fake
def _(
    grad: Tensor, patches: Tensor | None, prompts: Tensor | None, selected: Tensor, k: list[int], P: int, impl: str
) -> tuple[Tensor, Tensor]:
    B, N, C = grad.shape
    of_patches = grad.new_empty(0) if prompts is None else prompts.new_empty(B, P, prompts.shape[-1])
    return of_patches, grad.new_empty(0) if patches is None else patches.new_empty(N, C, patches.shape[-1])


class _TopkSimilarity(torch.autograd.Function):
    """The operator with its gradient. Not registered with the operator: torch.func.grad could not pass then."""

    generate_vmap_rule = True

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

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, patches: Tensor | None, prompts: Tensor | None, selected: Tensor, k: list[int], P: int, impl: str
    ) -> tuple[Tensor | None, Tensor | None]:
        of_patches, of_prompts = _grad(grad, patches, prompts, selected, k, P, impl)
        return None if prompts is None else of_patches, None if patches is None else of_prompts

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *_):  # noqa: ANN001, ANN002, ANN205
        raise RuntimeError("the gradient of topk_similarity can be differentiated again with impl='reference' only")


def _implementation(impl: str, like: Tensor, k: list[int]) -> ModuleType:
    """The module that runs a pass: "auto", "dense", "blocked" or "triton". It is chosen here, out of sight of
    torch.compile.
    """
    too_much = None
    if max(k) > MAX_K:
        too_much = f"the kernels keep the k largest in registers, which hold at most {MAX_K}, not {max(k)}"
    if runs_triton(impl, like.device, like.dtype, too_much):
        from . import triton

        return triton
    if impl == "blocked" and like.device.type != "cpu":
        raise ValueError(f"impl='blocked' cannot run here: it is made for the CPU, not for {like.device}")
    return dense if impl == "dense" or like.device.type != "cpu" else blocked


def nested(k: list[int], N: int) -> list[list[int]]:
    """The scales of each of N prompts."""
    S = len(k) // N
    return [k[n * S : (n + 1) * S] for n in range(N)]


def one_by_one(
    run: Callable, size: int, dims: Sequence[int | None], args: Sequence
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The rule of torch.vmap for an operator that has several results: its calls one after another, stacked.

    Each implementation lays out what the forward pass keeps as it needs it, so the axis is not folded into another.
    """
    calls = [
        run(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in zip(args, dims, strict=True)))
        for i in range(size)
    ]
    results = tuple(torch.stack(same) for same in zip(*calls, strict=True))
    return results, (0,) * len(results)
