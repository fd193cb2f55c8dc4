"""The forward kernel of topk_similarity: product, selection and means of one tile, without leaving the registers.

A tile is the similarity of some classes to BLOCK_P patches: those of one image, or of several where they are few. The
K largest of every row come from a sorting network. More than 256 patches pass through in chunks; the K largest so far
are merged with those of each chunk, and the selection is found in a second pass over the chunks, for only then it is
known which similarity is the last to be selected.
"""

import triton
import triton.language as tl

from ..triton_sorting import by_row, cut, largest, merge


@triton.jit
def similarity(
    patches, prompts, c, start, first_image, B, C, P, D,
    stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
    LOG_ROW: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(classes, BLOCK_P): the similarity from patch `start` on, minus infinity where there is no patch."""
    column = tl.arange(0, BLOCK_P)
    b, p = first_image + (column >> LOG_ROW), start + (column & ((1 << LOG_ROW) - 1))
    inside = (p < P) & (b < B)
    patches += b.to(INDEX)[None, :] * stride_patches_b + p.to(INDEX)[None, :] * stride_patches_p
    prompts += c.to(INDEX)[:, None] * stride_prompts_c
    # Where there is no patch, zeros are added to minus infinity: the finished product needs no mask.
    scores = tl.where(inside[None, :], tl.zeros((c.shape[0], BLOCK_P), tl.float32), float("-inf"))
    tl.assume(D > 0)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D).to(INDEX)
        left = tl.load(prompts + d[None, :] * stride_prompts_d, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        right = tl.load(patches + d[:, None] * stride_patches_d, mask=inside[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(left.to(DOT), right.to(DOT), scores, input_precision="ieee")
    return scores


@triton.jit
def _pack(scores, last, EQUAL: tl.constexpr):
    """Selection words (R, G, BLOCKS, 4): which scores (R, G, L) are at least the last (R, G) of their row, or EQUAL."""
    R: tl.constexpr = scores.shape[0]
    G: tl.constexpr = scores.shape[1]
    BLOCKS: tl.constexpr = (scores.shape[2] + 127) // 128
    PAIRS: tl.constexpr = scores.shape[2] // BLOCKS // 8
    columns = scores.reshape(R, G, BLOCKS, PAIRS, 4, 2).permute(0, 1, 2, 4, 3, 5)
    run = cut(columns.reshape(R, G * BLOCKS * 4, 2 * PAIRS))
    last = last[:, :, None].broadcast_to(R, G, BLOCKS * 4).reshape(R, G * BLOCKS * 4)
    words = tl.zeros(last.shape, tl.int32)
    for i in tl.static_range(2 * PAIRS):
        # What is no number is not less, and so it is selected, as it is the largest.
        left_out = run[i] != last if EQUAL else run[i] < last
        words = tl.where(left_out, words, words | (1 << i if i < 31 else -(1 << 31)))
    return words.reshape(R, G, BLOCKS, 4)


@triton.jit
def _count(words):
    """(R, G): how many bits are set in the words (R, G, BLOCKS, 4) of every row."""
    ones = words - ((words >> 1) & 0x55555555)
    ones = (ones & 0x33333333) + ((ones >> 2) & 0x33333333)
    ones = tl.sum((ones + (ones >> 4)) & 0x0F0F0F0F, 2)
    ones = (ones & 0x00FF00FF) + ((ones >> 8) & 0x00FF00FF)
    return tl.sum((ones + (ones >> 16)) & 0xFFFF, 2)


@triton.jit
def _first(words, count):
    """The first count (R, G) of the patches whose bits are set in the words (R, G, BLOCKS, 4) of every row."""
    kept = tl.zeros_like(words)
    ones = tl.zeros_like(words)
    for bit in range(32):
        ones += (words >> bit) & 1
    ones = tl.sum(ones, 3)
    room = (count[:, :, None] - (tl.cumsum(ones, 2) - ones))[:, :, :, None]
    for pair in range(16):
        even, odd = (words >> (2 * pair)) & 1, (words >> (2 * pair + 1)) & 1
        here = room - (tl.cumsum(even + odd, 3) - even - odd)
        kept |= (tl.where(here > 0, even, 0) + tl.where(here > even, 2 * odd, 0)) << (2 * pair)
        room -= tl.sum(even + odd, 3, keep_dims=True)
    return kept


@triton.jit
def _most(counts, inside):
    """The largest of the counts (R, G) of rows that are inside, or 0.

    Reduced along an axis of two: Triton 3.6 and 3.7 fail on sm_100 where a vector is reduced.
    """
    R: tl.constexpr = counts.shape[0]
    G: tl.constexpr = counts.shape[1]
    return tl.max(tl.where(inside, counts, 0).reshape(1, R * G), 1).item()


@triton.jit
def _store_selection(row, scores, last, k, room, start, P, inside, CHUNKED: tl.constexpr):
    """Write the selection bits of a tile (R, G, L), and return how many equals of the last may still be taken.

    Among equal similarities the patch of the lowest index counts as the larger. Rows that are not inside, which are all
    equal, have no say in whether equals are told apart.
    """
    bits = _pack(scores, last, False)
    if CHUNKED:
        # Larger ones may still come, so the equals have to be told apart at once.
        tied = _pack(scores, last, True)
        taken = _count(tied)
        if _most(taken - room, inside) > 0:
            bits = (bits ^ tied) | _first(tied, room)
        room -= taken
    elif _most(_count(bits), inside) > k:
        # Some row has more patches equal to its last one than it may take: it takes the first of them.
        tied = _pack(scores, last, True)
        bits = (bits ^ tied) | _first(tied, k - _count(bits ^ tied))
    block = start // 128 + tl.arange(0, bits.shape[2])[:, None]
    word = 4 * block + tl.arange(0, 4)[None, :]
    inside = inside[:, :, None, None] & (block < tl.cdiv(P, 128))[None, None, :, :]
    tl.store(row[:, :, None, None] + word[None, None, :, :], bits, mask=inside)
    return room


@triton.jit(
    do_not_specialize=["B", "C", "P", "stride_values_b", "stride_selected_b"],
    do_not_specialize_on_alignment=["values"],
)
def forward_kernel(
    patches, prompts, values, selected, k,
    B, C, P, D,
    stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
    stride_values_b, stride_selected_b,
    SCALES: tl.constexpr, KEEP: tl.constexpr, CHUNKED: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    LOG_K: tl.constexpr, LOG_ROW: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Values, and selection bits if KEEP, of one prompt, BLOCK_C classes and BLOCK_P >> LOG_ROW images.

    The scales k are floats because Triton would compile the kernel again for an integer of 1 or a multiple of 16.
    """
    IMAGES: tl.constexpr = BLOCK_P >> LOG_ROW
    L: tl.constexpr = 1 << LOG_ROW
    tiles = tl.cdiv(C, BLOCK_C)
    first_image = tl.program_id(0) // tiles * IMAGES
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    if CHUNKED:
        top = ()
        for _ in tl.static_range(1 << LOG_K):
            top = top + (tl.full((BLOCK_C, 2), float("-inf"), tl.float32),)
        for start in range(0, P, BLOCK_P):
            chunk = similarity(
                patches, prompts, c, start, first_image, B, C, P, D,
                stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
                LOG_ROW, DOT, INDEX, BLOCK_P, BLOCK_D,
            )  # fmt: skip
            top = merge(top, largest(chunk, LOG_K, LOG_ROW))
    else:
        scores = similarity(
            patches, prompts, c, 0, first_image, B, C, P, D,
            stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
            LOG_ROW, DOT, INDEX, BLOCK_P, BLOCK_D,
        )  # fmt: skip
        top = largest(scores, LOG_K, LOG_ROW)

    mean = tl.zeros(top[0].shape, tl.float32)
    for s in tl.static_range(SCALES):
        count, total = tl.full((), k[s], tl.int32), top[0]
        for i in tl.static_range(1, 1 << LOG_K):
            total += tl.where(i < count, top[i], 0.0)
        mean += total / k[s]
    b = (first_image + tl.arange(0, IMAGES)).to(INDEX)[None, :]
    inside = (b < B) & (c < C)[:, None]
    tl.store(values + b * stride_values_b + c[:, None], by_row(mean / SCALES, BLOCK_C, IMAGES), mask=inside)

    for s in tl.static_range(SCALES if KEEP else 0):
        count, last = tl.full((), k[s], tl.int32), top[0]
        for i in tl.static_range(1, 1 << LOG_K):
            last = tl.where(i < count, top[i], last)
        larger = tl.zeros(last.shape, tl.int32)
        for i in tl.static_range((1 << LOG_K) if CHUNKED else 0):
            larger += (top[i] > last).to(tl.int32)
        last, room = by_row(last, BLOCK_C, IMAGES), count - by_row(larger, BLOCK_C, IMAGES)
        row = selected + b * stride_selected_b + (s * C + c[:, None]).to(INDEX) * (4 * tl.cdiv(P, 128))
        if CHUNKED:
            for start in range(0, P, BLOCK_P):
                scores = similarity(
                    patches, prompts, c, start, first_image, B, C, P, D,
                    stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
                    LOG_ROW, DOT, INDEX, BLOCK_P, BLOCK_D,
                )  # fmt: skip
                tile = scores.reshape(BLOCK_C, IMAGES, L)
                room = _store_selection(row, tile, last, count, room, start, P, inside, CHUNKED)
        else:
            _store_selection(row, scores.reshape(BLOCK_C, IMAGES, L), last, count, room, 0, P, inside, CHUNKED)
