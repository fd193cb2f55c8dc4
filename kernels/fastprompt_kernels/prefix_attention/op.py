"""Registration of prefix_attention with torch: schema, fake, autograd and autocast.

The operator is opaque to torch.compile and torch.export. It keeps its inputs for the backward pass and nothing else.
"""

from types import ModuleType

import torch
from torch import Tensor

from ..implementations import cast_by_autocast, on_its_device, runs_triton, without_autocast
from . import blocked, reference, sdpa, xformers

# The most tokens of a prefix, slots of a row and elements of a head that the tiles of the Triton kernels hold.
LARGEST = 64
COMPOSED = {"reference": reference, "sdpa": sdpa, "xformers": xformers}


def prefix_attention(
    tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None, impl: str
) -> Tensor:
    """Validated arguments in, (G, Q, H * d) out; inputs are cast to autocast's dtype where autocast is on."""
    tokens, *rest = cast_by_autocast(tokens, *([] if queries is None else [queries]))
    queries = rest[0] if rest else None
    # The products inside must stay in the accumulator's precision.
    with without_autocast(tokens.device):
        if impl in COMPOSED:
            return COMPOSED[impl].prefix_attention(tokens, queries, sequence, slots)
        return _PrefixAttention.apply(tokens, queries, sequence, slots, impl)


@torch.library.custom_op("fastprompt::prefix_attention", mutates_args=())
@on_its_device
def _forward(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None, impl: str) -> Tensor:
    return _implementation(impl, tokens, sequence).forward(tokens, queries, sequence, slots)


@_forward.register_fake
def _(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None, impl: str) -> Tensor:
    G, Q, H, d = (tokens[:, :, 0] if queries is None else queries).shape
    return tokens.new_empty(G, Q, H * d)


@torch.library.custom_op("fastprompt::prefix_attention_grad", mutates_args=())
@on_its_device
def _grad(
    grad: Tensor, tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    with without_autocast(tokens.device):
        return _implementation(impl, tokens, sequence).backward(grad, tokens, queries, sequence, slots)


@_grad.register_fake
def _(
    grad: Tensor, tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    return tokens.new_empty(tokens.shape), tokens.new_empty(0 if queries is None else queries.shape)


class _PrefixAttention(torch.autograd.Function):
    """The operator with its gradient. Not registered with the operator: torch.func.grad could not pass then."""

    @staticmethod
    def forward(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None, impl: str) -> Tensor:
        return _forward(tokens, queries, sequence, slots, impl)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        *tensors, ctx.impl = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return *_Gradients.apply(grad, *ctx.saved_tensors, ctx.impl), None, None, None


class _Gradients(torch.autograd.Function):
    """The gradients of the operator."""

    @staticmethod
    def forward(
        grad: Tensor, tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None, impl: str
    ) -> tuple[Tensor, Tensor | None]:
        of_tokens, of_queries = _grad(grad, tokens, queries, sequence, slots, impl)
        return of_tokens, None if queries is None else of_queries

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        pass

    @staticmethod
    def backward(ctx, *_):  # noqa: ANN001, ANN002, ANN205
        raise RuntimeError("the gradient of prefix_attention can be differentiated again with impl='reference' only")


def _implementation(impl: str, like: Tensor, sequence: Tensor) -> ModuleType:
    """The module that runs this call. It is chosen here, out of sight of torch.compile, alike forward and backward."""
    too_much, sizes = None, (like.shape[1] - sequence.numel(), sequence.shape[1], like.shape[-1])
    if like.dtype.itemsize != 2:
        too_much = f"the kernels of prefix_attention take float16 and bfloat16, not {like.dtype}"
    elif max(sizes) > LARGEST:
        too_much = f"the kernels hold S, width and d of up to {LARGEST} in their tiles, not {sizes}"
    if not runs_triton(impl, like.device, like.dtype, too_much):
        return blocked
    from . import triton

    return triton
