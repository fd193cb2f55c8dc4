"""prefix_attention by xformers' attention of blocks, an alternative to measure against.

A block is one sequence: its queries, and as keys a copy of the prefix and its own slots. Its queries are the last of
its keys, so the mask is causal from the bottom right corner of each block. Where only some slots ask, each query is a
block, whose keys end with its slot.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .sdpa import visible_keys


@dataclass(frozen=True, eq=False)
class Blocks:
    """Queries and keys in the order of blocks.

    Attributes:
        copies: how many blocks see a copy of the prefix.
        asking: (Q,) index of every query among those given: T tokens, or rows * E.
        answers: (Q,) where in that order the result of each query given stands.
        seen: (K,) index of every key among the copies of the prefix, copies * S, and the slots behind them.
        queries: how many each block has.
        keys: how many each block has, at least as many.
    """

    copies: int
    asking: Tensor
    answers: Tensor
    seen: Tensor
    queries: list[int]
    keys: list[int]


def prefix_attention(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """What the reference computes, of arguments as they are there, by ``memory_efficient_attention``. Differentiable as
    that is: once.

    xformers wants the lengths of blocks on the host, so the first call with a `sequence` and `slots` waits until the
    device has copied them. What was made of the 64 pairs used last is kept. xformers does not promise the same bits in
    every run, and refuses to run where torch is told to be deterministic.

    Raises:
        ValueError: xformers is not installed, or has no kernel for such inputs.
    """
    reason = why_not(tokens.device)
    if reason is not None:
        raise ValueError(f"impl='xformers' cannot run here: {reason}")
    (G, T, _, H, _), shared = tokens.shape, tokens.shape[1] - sequence.numel()
    blocks = blocks_of(sequence, slots, shared)
    # Groups stand beside heads, so that one mask serves all of them.
    source = (tokens[:, :, 0] if queries is None else queries).transpose(0, 1)
    q = source.index_select(0, blocks.asking).flatten(1, 2)[None]
    prefix, own = tokens[:, :, -2:].permute(2, 1, 0, 3, 4).split([shared, T - shared], dim=1)  # (2, ., G, H, d)
    # Expanded, not indexed: the gradient of the prefix is one sum then, in float32 and in a fixed order.
    copies = prefix[:, None].expand(-1, blocks.copies, -1, -1, -1, -1).flatten(1, 2)
    k, v = torch.cat([copies, own], dim=1).index_select(1, blocks.seen).flatten(2, 3)[:, None]
    result = attend(q, k, v, blocks)[0].index_select(0, blocks.answers)
    return result.unflatten(1, (G, H)).transpose(0, 1).flatten(2)


def why_not(device: torch.device) -> str | None:
    """The reason why xformers cannot take tensors on this device, or None."""
    if device.type != "cuda":
        return f"it needs tensors on a CUDA or ROCm device, got {device}"
    if find_spec("xformers") is None:
        return "xformers is not installed (pip install 'fastprompt[xformers]')"
    return None


def blocks_of(sequence: Tensor, slots: Tensor | None, shared: int) -> Blocks:
    """Blocks of all tokens, the prefix first, or of the queries in slots; kept for the tensors used last."""
    given = [sequence] if slots is None else [sequence, slots]
    if any(tensor.is_inference() for tensor in given):  # torch does not say whether they were changed in between
        return _make_blocks.__wrapped__(sequence, slots, shared, None)
    return _make_blocks(sequence, slots, shared, tuple(tensor._version for tensor in given))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may serve a training later
def _make_blocks(sequence: Tensor, slots: Tensor | None, shared: int, _versions: tuple[int, ...] | None) -> Blocks:
    width, device = sequence.shape[1], sequence.device
    visible = visible_keys(sequence.cpu(), None if slots is None else slots.cpu(), 0)  # (rows, E or width, width)
    # What the last slot of a sequence sees is the sequence; no other slot sees the last one.
    ends = visible.sum(1) == 1 if slots is None else visible.any(2)
    row, own = ends.nonzero()[:, 0], visible[ends]  # (blocks,), (blocks, width)
    block, slot = own.nonzero().unbind(1)
    slot = row[block] * width + slot
    lengths = own.sum(1)
    asking, queries = torch.arange(len(row)), torch.ones_like(lengths)
    if slots is None:  # the prefix is the first block
        asking, queries = torch.cat([torch.arange(shared), shared + slot]), torch.cat([torch.tensor([shared]), lengths])
        block, lengths = block + 1, torch.cat([torch.tensor([0]), lengths])
    copies = len(lengths)
    of_copies = torch.arange(copies).repeat_interleave(shared)
    order = torch.cat([of_copies, block]).argsort(stable=True)
    seen = torch.cat([torch.arange(copies * shared), copies * shared + slot])[order]
    tensors = (asking, asking.argsort(), seen)
    return Blocks(copies, *(x.to(device) for x in tensors), queries.tolist(), (shared + lengths).tolist())


@lru_cache(maxsize=64)
def mask_of(blocks: Blocks, device: torch.device) -> Any:
    """The mask of the blocks: the last query of a block sees all its keys, the one before it one less."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

    return BlockDiagonalCausalFromBottomRightMask.from_seqlens(blocks.queries, blocks.keys, device=device)


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """(1, Q, G * H, d) from queries of that shape, and keys and values (1, K, G * H, d), in the order of the blocks.

    Raises:
        ValueError: xformers has no kernel for such inputs.
    """
    from xformers.ops import memory_efficient_attention

    try:
        return memory_efficient_attention(q, k, v, attn_bias=mask_of(blocks, q.device))
    except NotImplementedError as error:
        raise ValueError(
            f"impl='xformers' cannot run here: xformers has no kernel for heads of {q.shape[-1]} elements in {q.dtype} "
            f"on {q.device}"
        ) from error
