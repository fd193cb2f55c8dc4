"""The two halves of CLIP's transformer block, before the attention and after it, with frozen weights.

Frozen weights need no gradient, so a half keeps only what the gradient of its input needs: the input of each layer norm
with its two statistics, and the input of the activation. Layer norm and activation are computed again in the backward
pass, from these tensors in the precision of the weights.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from open_clip.transformer import LayerScale, QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastprompt.backbone.memory import release_freed_memory, trims_memory
from fastprompt.errors import InputError

aten = torch.ops.aten

# QuickGELU(x) = x * sigmoid(1.702 x) = silu(1.702 x) / 1.702: one pass over memory if the factors go into the products.
QUICK = 1.702

# oneDNN's bfloat16 products of so many tokens over so many inputs run at half the rate of others, but not in two halves
# of their columns: 1160 tokens, 2048 inputs and 512 outputs took 1.4 instead of 2.2 ms on two cores with AMX.
SLOW_TOKENS, MANY_INPUTS = (512, 1200), 1536


Block = ResidualAttentionBlock | SimpleNamespace


def read_block(block: nn.Module) -> Block:
    """Return a block in the layout of open_clip, whose blocks scale both residual sums; those of openai/CLIP do not.

    Raises:
        InputError: not a plain ``ResidualAttentionBlock``, or one with an activation that is not known here.
    """
    # By name: deep prompts (MaPLe, PromptSRC) come with blocks of the same attributes and another forward pass.
    if type(block).__name__ != "ResidualAttentionBlock":
        raise InputError(f"model: expected the plain ResidualAttentionBlock of a CLIP, got {type(block).__name__}")
    activation = block.mlp.gelu
    if not isinstance(activation, nn.GELU) and type(activation).__name__ != "QuickGELU":
        raise InputError(f"model: expected QuickGELU or GELU in a block, got {type(activation).__name__}")
    if isinstance(block, ResidualAttentionBlock):
        return block
    parts = {name: getattr(block, name) for name in ("attn", "ln_1", "ln_2")}
    scales = {name: getattr(block, name, nn.Identity()) for name in ("ls_1", "ls_2")}
    gelu = activation if isinstance(activation, nn.GELU) else QuickGELU()
    return SimpleNamespace(
        **parts, **scales, mlp=SimpleNamespace(c_fc=block.mlp.c_fc, gelu=gelu, c_proj=block.mlp.c_proj)
    )


def split_heads(block: Block, x: Tensor) -> Tensor:
    """Return queries, keys and values (..., L, 3, heads, d) of block inputs (..., L, W), which are normalised first.

    Differentiable once, with respect to ``x`` only.
    """
    return project(block, x, "qkv").unflatten(-1, (3, block.attn.num_heads, -1))


def project(block: Block, x: Tensor, parts: str) -> Tensor:
    """Return adjacent ``parts`` of "qkv" (..., len(parts) * W) of block inputs (..., W), which are normalised first."""
    width = x.shape[-1]
    start = "qkv".index(parts) * width
    rows = slice(start, start + len(parts) * width)
    return _NormedProjection.apply(x, block.ln_1, block.attn.in_proj_weight[rows], block.attn.in_proj_bias[rows])


def close_block(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    """Apply output projection, MLP and both residual sums to block inputs and attention results (..., W).

    Differentiable once, with respect to ``x`` and ``attended`` only.
    """
    return _SecondHalf.apply(x, attended, block)


class _NormedProjection(Function):
    """``linear(layer_norm(x))``; keeps x and two statistics a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> Tensor:
        if ctx.needs_input_grad[0] and trims_memory():
            release_freed_memory()
        normed, mean, rstd = _normalise(norm, _flat(x))
        ctx.save_for_backward(x, mean, rstd)
        ctx.norm, ctx.weight = norm, weight
        return torch.addmm(bias, normed, weight.t()).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):  # in which backward may have been called
            through = _product(_flat(grad), ctx.weight)
            return _normalise_backward(ctx.norm, through, _flat(x), mean, rstd).view(x.shape), None, None, None


class _SecondHalf(Function):
    """Everything behind the attention; keeps the sum after it, two statistics a token, and the activation's input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, attended: Tensor, block: Block) -> Tensor:
        out_proj, down = block.attn.out_proj, block.mlp.c_proj
        middle = torch.addmm(out_proj.bias, _flat(attended), out_proj.weight.t())
        middle = _scale_(middle, block.ls_1).add_(_flat(x))
        normed, mean, rstd = _normalise(block.ln_2, middle)
        hidden = _up(block.mlp, normed)
        del normed
        keep = any(ctx.needs_input_grad)
        if keep:
            ctx.save_for_backward(middle, mean, rstd, hidden)
            ctx.block, ctx.trims_memory = block, trims_memory()
        factor = 1 / QUICK if isinstance(block.mlp.gelu, QuickGELU) else 1
        active = _activate(block.mlp.gelu, hidden, in_place=not keep)
        out = _product(active, down.weight.t(), bias=down.bias, alpha=factor)
        return _scale_(out, block.ls_2).add_(middle).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        middle, mean, rstd, hidden = ctx.saved_tensors
        block, flat = ctx.block, _flat(grad)
        if ctx.trims_memory:
            release_freed_memory()
        with torch.autocast(grad.device.type, enabled=False):
            through = _scaled(flat, block.ls_2) @ block.mlp.c_proj.weight
            _activate_backward_(block.mlp.gelu, through, hidden)
            through = _product(through, block.mlp.c_fc.weight)
            grad_middle = _normalise_backward(block.ln_2, through, middle, mean, rstd).add_(flat)
            grad_attended = _scaled(grad_middle, block.ls_1) @ block.attn.out_proj.weight
        return grad_middle.view(grad.shape), grad_attended.view(grad.shape), None


def _flat(x: Tensor) -> Tensor:
    """(..., W) as (tokens, W)."""
    return x.reshape(-1, x.shape[-1])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, alpha: float = 1) -> Tensor:
    """Scaled x @ weight, and a bias: (tokens, N) of x (tokens, K) and weight (K, N), for products over many inputs."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for columns in _columns(x, weight.shape[1]):
        if bias is None:
            torch.mm(x, weight[:, columns], out=out[:, columns])
        else:
            torch.addmm(bias[columns], x, weight[:, columns], alpha=alpha, out=out[:, columns])
    return out


def _columns(x: Tensor, width: int) -> list[slice]:
    """Of a product that is made at once, or in two halves where that is faster."""
    few, many = SLOW_TOKENS
    if x.is_cpu and x.dtype == torch.bfloat16 and x.shape[1] >= MANY_INPUTS and few <= x.shape[0] <= many:
        return [slice(0, width // 2), slice(width // 2, width)]
    return [slice(0, width)]


# ------------------------------------------------------------------------------------------ layer norm


def _norm_parameters(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias; in float32 where a CPU would keep the statistics of a half-precision x in x's dtype.

    Elsewhere in x's dtype: openai/CLIP keeps those of its half-precision model in float32.
    """
    dtype = torch.float32 if x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return norm.weight.to(dtype), norm.bias.to(dtype)


def _normalise(norm: nn.LayerNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x, mean and reciprocal deviation of each token."""
    return torch.native_layer_norm(x, norm.normalized_shape, *_norm_parameters(norm, x), norm.eps)


def _normalise_backward(norm: nn.LayerNorm, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of x, in memory of its own."""
    parameters = _norm_parameters(norm, x)
    only_x = [True, False, False]
    return aten.native_layer_norm_backward(grad, x, norm.normalized_shape, mean, rstd, *parameters, only_x)[0]


# ------------------------------------------------------------------------------------------ MLP


def _up(mlp: nn.Sequential, normed: Tensor) -> Tensor:
    """The activation's input: the first product of the MLP, times 1.702 where QuickGELU follows."""
    factor = QUICK if isinstance(mlp.gelu, QuickGELU) else 1
    return torch.addmm(mlp.c_fc.bias * factor, normed, mlp.c_fc.weight.t(), alpha=factor)


def _activate(activation: nn.Module, hidden: Tensor, in_place: bool) -> Tensor:
    out = hidden if in_place else torch.empty_like(hidden)
    if isinstance(activation, QuickGELU):
        return aten.silu.out(hidden, out=out)
    return aten.gelu.out(hidden, approximate=activation.approximate, out=out)


def _activate_backward_(activation: nn.Module, grad: Tensor, hidden: Tensor) -> None:
    """Turn the gradient of the activation's output into that of its input; QuickGELU's two factors cancel."""
    if isinstance(activation, QuickGELU):
        aten.silu_backward.grad_input(grad, hidden, grad_input=grad)
    else:
        aten.gelu_backward.grad_input(grad, hidden, approximate=activation.approximate, grad_input=grad)


def _scale_(x: Tensor, scale: nn.Module) -> Tensor:
    """LayerScale in place, where there is one."""
    return x.mul_(scale.gamma) if isinstance(scale, LayerScale) else x


def _scaled(grad: Tensor, scale: nn.Module) -> Tensor:
    return grad * scale.gamma if isinstance(scale, LayerScale) else grad
