"""The two halves of open_clip's transformer block that text and image tower share: before the attention, and after."""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor


def split_heads(block: ResidualAttentionBlock, x: Tensor) -> Tensor:
    """Queries, keys and values (..., L, 3, heads, d) of tokens (..., L, W)."""
    qkv = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias)
    return qkv.unflatten(-1, (3, block.attn.num_heads, -1))


def close_block(block: ResidualAttentionBlock, x: Tensor, attended: Tensor) -> Tensor:
    """Output projection, MLP and both residual sums, (..., W), of block inputs and attention results (..., W)."""
    x = x + block.ls_1(block.attn.out_proj(attended))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
