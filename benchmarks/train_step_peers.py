"""A training step of GalLoP without this library: with the towers of its published code, and in clean PyTorch.

Both are written by us from the equations, on the modules of an open_clip model with a ViT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transcriptions.gallop import gallop_dense
from transcriptions.text import encode_padded

# Blocks, tokens (S, L, W) and a mask to the tokens behind the last block, and to the value path of the last block.
Transformer = Callable[[Sequence[nn.Module], Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What a step is given.

    Attributes:
        images: (B, 3, S, S), preprocessed.
        labels: (B,).
        drawn: (B, kept) global prompts that count for each image.
        ids: (C, L) token ids of the class names alone, zero-padded.
        k: patches of each local prompt.
        scale: temperature.
        copies: how often each encoded prompt counts; more than once where a step does a share of the work.
    """

    images: Tensor
    labels: Tensor
    drawn: Tensor
    ids: Tensor
    k: tuple[int, ...]
    scale: float
    copies: int


def value_path(block: nn.Module, x: Tensor) -> Tensor:
    """A block (S, L, W) in which every token takes its own value instead of a mixture of values."""
    weight, bias = block.attn.in_proj_weight.chunk(3)[2], block.attn.in_proj_bias.chunk(3)[2]
    x = x + block.attn.out_proj(F.linear(block.ln_1(x), weight, bias))
    return x + block.mlp(block.ln_2(x))


def clean_transformer(blocks: Sequence[nn.Module], x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``Transformer``; the value path of the last block alone."""
    *blocks, last = blocks
    for block in blocks:
        x = block(x, attn_mask=mask)
    return last(x, attn_mask=mask), value_path(last, x)


def published_transformer(blocks: Sequence[nn.Module], x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``Transformer``; as GalLoP's code computes it, in the text tower too.

    Beside its attention, every block projects queries, keys and values once more, takes all three through the output
    projection, and the values through the MLP. Only the values of the last block of the image tower are ever read.
    """
    for block in blocks:
        streams = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias).unflatten(-1, (3, -1))
        values = x + block.attn.out_proj(streams)[..., 2, :]
        values = values + block.mlp(block.ln_2(values))
        x = block(x, attn_mask=mask)
    return x, values


def published_text_tower(model: nn.Module) -> SimpleNamespace:
    """The text tower of an open_clip model, with the blocks of ``published_transformer``."""
    return SimpleNamespace(
        token_embedding=model.token_embedding,
        positional_embedding=model.positional_embedding,
        attn_mask=model.attn_mask,
        transformer=lambda x, attn_mask: published_transformer(model.transformer.resblocks, x, attn_mask)[0],
        ln_final=model.ln_final,
        text_projection=model.text_projection,
    )


def gallop_step(
    tower: nn.Module | SimpleNamespace,
    visual: nn.Module,
    transformer: Transformer,
    contexts: Tensor,
    projection: Tensor,
    task: Task,
    *,
    again: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and loss, in float32 behind the towers.

    Args:
        tower: text tower.
        visual: image tower, a ViT.
        transformer: of the image tower.
        contexts: (G, M, W), learned, those of global prompts first; each counts ``task.copies`` times.
        projection: (W, W), learned, of patches.
        task: images, labels and names.
        again: encode the text of a prompt a second time in the backward pass, instead of keeping the graphs of all.
    """
    dtype = visual.proj.dtype
    with torch.no_grad():
        x, values = transformer(visual.transformer.resblocks, visual._embeds(task.images.to(dtype)), None)
        pooled = F.normalize((visual.ln_post(x[:, 0]) @ visual.proj).float(), dim=-1)
        patches = visual.ln_post(values[:, 1:])
    local = F.normalize((F.linear(patches, projection.to(dtype)) @ visual.proj).float(), dim=-1)
    encode = partial(checkpoint, encode_padded, use_reentrant=False) if again else encode_padded
    in_turn = [encode(tower, one[None], task.ids) for one in contexts.to(dtype)]  # as GalLoP's code does
    text = torch.cat(in_turn).float().repeat_interleave(task.copies, dim=0)
    return gallop_dense(text, pooled, local, task.k, task.scale, task.labels, task.drawn)
