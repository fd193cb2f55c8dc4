"""Triton kernels of prefix_attention: scores and probabilities stay in registers, and nothing is kept in memory.

A program belongs to one row, head and group, and goes through the queries of the row; as it sees all keys of row and
prefix at once, the softmax is made in one piece. The backward pass makes the probabilities again and
carries the gradients of keys and values in registers, so each is written once. Only the gradient of the prefix is a sum
over rows: each row writes its part, and the parts are added in their order. One more program is that of the prefix
itself, whose tokens ask and see no row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import architecture, dot_dtype


@triton.jit
def _first_token(group, index, per_group, kinds, H, D):
    """The offset of a token of a group, which int32 may not hold, in (G, per_group, kinds, H, D)."""
    return (group.to(tl.int64) * per_group + index) * kinds * H * D


@triton.jit
def _tile(first, rows, stride, count, D, BLOCK_D: tl.constexpr, DOT: tl.constexpr):
    """Rows `stride` apart behind an address, as operand of a product; 0 from row `count` and element D on."""
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    return tl.load(first + rows[:, None] * stride + d[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _store(first, rows, stride, count, D, tile, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = (rows < count)[:, None] & (d < D)[None, :]
    tl.store(first + rows[:, None] * stride + d[None, :], tile.to(first.dtype.element_ty), mask=mask)


@triton.jit
def _place(row, rows, S, WIDTH, E, ALL: tl.constexpr):
    """The first query of a program, how many it has, and how many keys are in its row: none if it is the prefix's."""
    of_prefix = row == rows
    if ALL:
        return tl.where(of_prefix, 0, S + row * WIDTH), tl.where(of_prefix, S, WIDTH), tl.where(of_prefix, 0, WIDTH)
    return row * E, E, WIDTH


@triton.jit
def _probabilities(
    q, k_prefix, k_row, i, own, numbers, sequence, slots, row, scale, S, WIDTH, E,
    ALL: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Of queries i for the prefix (BLOCK_Q, BLOCK_S), and for the row (BLOCK_Q, BLOCK_W)."""
    s, slot = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_W)
    place = i if ALL else tl.load(slots + row * E + i, mask=i < E, other=0).to(tl.int32)
    number = tl.load(sequence + row * WIDTH + place, mask=place < own, other=0)
    last = tl.where(own == 0, i, S - 1)  # the prefix sees itself up to the query
    of_prefix = tl.dot(q, tl.trans(k_prefix), input_precision="ieee") * scale
    of_prefix = tl.where((s < S)[None, :] & (s[None, :] <= last[:, None]), of_prefix, float("-inf"))
    of_row = tl.dot(q, tl.trans(k_row), input_precision="ieee") * scale
    same = (number[:, None] == numbers[None, :]) & (slot[None, :] <= place[:, None])
    of_row = tl.where((slot < own)[None, :] & same, of_row, float("-inf"))
    peak = tl.maximum(tl.max(of_prefix, 1), tl.max(of_row, 1))[:, None]
    of_prefix, of_row = tl.exp(of_prefix - peak), tl.exp(of_row - peak)
    total = (tl.sum(of_prefix, 1) + tl.sum(of_row, 1))[:, None]
    return of_prefix / total, of_row / total


@triton.jit(do_not_specialize=["rows", "T", "S", "E"])
def attention_kernel(
    tokens, queries, sequence, slots, result, scale, rows, T, S, WIDTH, E, H, D,
    ALL: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The results of the queries of one row, head and group, or of the prefix."""
    row, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s, slot = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_W)
    first_query, asking, own = _place(row, rows, S, WIDTH, E, ALL)
    kinds: tl.constexpr = 3 if ALL else 2
    stride = kinds * H * D
    prefix = tokens + _first_token(group, 0, T, kinds, H, D) + ((kinds - 2) * H + head) * D
    keys = tokens + _first_token(group, S + row * WIDTH, T, kinds, H, D) + ((kinds - 2) * H + head) * D
    numbers = tl.load(sequence + row * WIDTH + slot, mask=slot < own, other=0)
    query_kinds: tl.constexpr = 3 if ALL else 1
    per_group = T if ALL else rows * E
    source = queries + _first_token(group, first_query, per_group, query_kinds, H, D) + head * D
    target = result + _first_token(group, first_query, per_group, 1, H, D) + head * D
    for start in range(0, asking, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        k_prefix = _tile(prefix, s, stride, S, D, BLOCK_D, DOT)
        k_row = _tile(keys, slot, stride, own, D, BLOCK_D, DOT)
        q = _tile(source, i, query_kinds * H * D, asking, D, BLOCK_D, DOT)
        of_prefix, of_row = _probabilities(
            q, k_prefix, k_row, i, own, numbers, sequence, slots, row, scale, S, WIDTH, E, ALL, BLOCK_S, BLOCK_W
        )
        v_prefix = _tile(prefix + H * D, s, stride, S, D, BLOCK_D, DOT)
        v_row = _tile(keys + H * D, slot, stride, own, D, BLOCK_D, DOT)
        total = tl.dot(of_prefix.to(DOT), v_prefix, input_precision="ieee")
        total = tl.dot(of_row.to(DOT), v_row, total, input_precision="ieee")
        _store(target, i, H * D, asking, D, total, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "T", "S", "E"])
def attention_grad_kernel(
    grad, tokens, queries, sequence, slots, of_tokens, of_queries, of_prefix, scale, rows, T, S, WIDTH, E, H, D,
    ALL: tl.constexpr, DOT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of the queries, keys and values of one row, head and group, and its part of that of the prefix.

    of_prefix is (programs of a group and head, 2, G, H, S, D); the rest is laid out like what it is the gradient of.
    """
    row, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s, slot = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_W)
    first_query, asking, own = _place(row, rows, S, WIDTH, E, ALL)
    kinds: tl.constexpr = 3 if ALL else 2
    stride = kinds * H * D
    prefix = tokens + _first_token(group, 0, T, kinds, H, D) + ((kinds - 2) * H + head) * D
    offset = _first_token(group, S + row * WIDTH, T, kinds, H, D) + ((kinds - 2) * H + head) * D
    keys = tokens + offset
    numbers = tl.load(sequence + row * WIDTH + slot, mask=slot < own, other=0)
    query_kinds: tl.constexpr = 3 if ALL else 1
    per_group = T if ALL else rows * E
    source = _first_token(group, first_query, per_group, query_kinds, H, D) + head * D
    above = grad + _first_token(group, first_query, per_group, 1, H, D) + head * D

    of_k_prefix, of_v_prefix = tl.zeros((BLOCK_S, BLOCK_D), tl.float32), tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    of_k_row, of_v_row = tl.zeros((BLOCK_W, BLOCK_D), tl.float32), tl.zeros((BLOCK_W, BLOCK_D), tl.float32)
    for start in range(0, asking, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        # Keys and values are loaded where they are used, from the nearest cache: they would fill the registers.
        k_prefix = _tile(prefix, s, stride, S, D, BLOCK_D, DOT)
        k_row = _tile(keys, slot, stride, own, D, BLOCK_D, DOT)
        q = _tile(queries + source, i, query_kinds * H * D, asking, D, BLOCK_D, DOT)
        above_q = _tile(above, i, H * D, asking, D, BLOCK_D, DOT)
        p_prefix, p_row = _probabilities(
            q, k_prefix, k_row, i, own, numbers, sequence, slots, row, scale, S, WIDTH, E, ALL, BLOCK_S, BLOCK_W
        )
        of_v_prefix = tl.dot(tl.trans(p_prefix.to(DOT)), above_q, of_v_prefix, input_precision="ieee")
        of_v_row = tl.dot(tl.trans(p_row.to(DOT)), above_q, of_v_row, input_precision="ieee")
        v_prefix = _tile(prefix + H * D, s, stride, S, D, BLOCK_D, DOT)
        v_row = _tile(keys + H * D, slot, stride, own, D, BLOCK_D, DOT)
        of_p_prefix = tl.dot(above_q, tl.trans(v_prefix), input_precision="ieee")
        of_p_row = tl.dot(above_q, tl.trans(v_row), input_precision="ieee")
        mean = (tl.sum(p_prefix * of_p_prefix, 1) + tl.sum(p_row * of_p_row, 1))[:, None]
        of_score = (p_prefix * (of_p_prefix - mean)).to(DOT)
        of_k_prefix = tl.dot(tl.trans(of_score), q, of_k_prefix, input_precision="ieee")
        of_q = tl.dot(of_score, k_prefix, input_precision="ieee")
        of_score = (p_row * (of_p_row - mean)).to(DOT)
        of_k_row = tl.dot(tl.trans(of_score), q, of_k_row, input_precision="ieee")
        of_q = tl.dot(of_score, k_row, of_q, input_precision="ieee")
        _store(of_queries + source, i, query_kinds * H * D, asking, D, of_q * scale, BLOCK_D)

    _store(of_tokens + offset, slot, stride, own, D, of_k_row * scale, BLOCK_D)
    _store(of_tokens + offset + H * D, slot, stride, own, D, of_v_row, BLOCK_D)
    groups = tl.num_programs(2)
    part = of_prefix + (((row * 2).to(tl.int64) * groups + group) * H + head) * S * D
    _store(part, s, D, S, D, of_k_prefix * scale, BLOCK_D)
    _store(part + groups.to(tl.int64) * H * S * D, s, D, S, D, of_v_prefix, BLOCK_D)


def forward(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """(G, T, H * d), or (G, rows * E, H * d) with queries; the arguments are those of the reference."""
    tokens = tokens.contiguous()
    source = tokens if queries is None else queries.contiguous()
    (G, _, _, H, d), Q = tokens.shape, source.shape[1]
    result = torch.empty(G, Q, H * d, dtype=tokens.dtype, device=tokens.device)
    if G > 0:
        grid, arguments = _launch(tokens, sequence, slots, backward=False)
        attention_kernel[grid](tokens, source, *_integers(sequence, slots), result, **arguments)
    return result


def backward(
    grad: Tensor, tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of tokens and of queries, (0,) without them, from that of the result."""
    tokens = tokens.contiguous()
    source = tokens if queries is None else queries.contiguous()
    of_tokens = torch.empty_like(tokens)
    of_source = of_tokens if queries is None else torch.empty_like(source)
    (G, _, _, H, d), shared = tokens.shape, tokens.shape[1] - sequence.numel()
    if G > 0:
        grid, arguments = _launch(tokens, sequence, slots, backward=True)
        of_prefix = torch.empty(grid[0], 2, G, H, shared, d, dtype=torch.float32, device=tokens.device)
        attention_grad_kernel[grid](
            grad.contiguous(), tokens, source, *_integers(sequence, slots), of_tokens, of_source, of_prefix, **arguments
        )
        of_tokens[:, :shared, -2:] = of_prefix.sum(0).permute(1, 3, 0, 2, 4)
    return of_tokens, tokens.new_empty(0) if queries is None else of_source


def _integers(sequence: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where all ask, any pointer stands for the slots."""
    sequence = sequence.contiguous()
    return sequence, sequence if slots is None else slots.contiguous()


def _launch(
    tokens: Tensor, sequence: Tensor, slots: Tensor | None, *, backward: bool
) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """The grid, and what a kernel is given besides tensors."""
    (G, T, _, H, d), (rows, width) = tokens.shape, sequence.shape
    S = T - rows * width
    sizes = {"rows": rows, "T": T, "S": S, "WIDTH": width, "E": width if slots is None else slots.shape[1]}
    options = {
        "ALL": slots is None,
        "DOT": dot_dtype(tokens.dtype),
        **launch_blocks(architecture(tokens.device), S, backward),
    }
    return (rows + (slots is None), H, G), {**sizes, "H": H, "D": d, "scale": d**-0.5, **options}


def launch_blocks(target: str, S: int, backward: bool) -> dict[str, int]:
    """Tile sizes and warps of a kernel for an architecture: as many queries at a time as spill nothing.

    Rows and heads are padded to 64 always: the heads of CLIP's text towers have 64 elements. The products of sm_90 and
    sm_100 have 64 rows at least, or fall back to the instructions of sm_80. On gfx942 every warp holds all keys in its
    registers; with 4 warps each thread has 512 of them.
    """
    if target == "gfx942":
        queries, warps = 16, 4 if backward else 8
    else:
        queries, warps = 32 if backward or target == "sm_80" else 64, 8
    blocks = {"BLOCK_Q": queries, "BLOCK_S": max(16, triton.next_power_of_2(S)), "BLOCK_W": 64, "BLOCK_D": 64}
    # Left alone, ptxas stops at 128 registers there and spills a few bytes.
    limit = {"maxnreg": 168} if target == "sm_80" and not backward else {}
    return {**blocks, "num_warps": warps, "num_stages": 1, **limit}
