"""Sorting networks for Triton kernels: the K largest elements of every row of a tile, in registers.

A network is a fixed list of compare-exchanges. Here each of them is one maximum and one minimum of two whole tensors: a
row is first cut into K tensors, so no compare-exchange moves data, and where the pieces of a row lie in one thread it
costs two instructions.

The K largest of a row do not depend on the order of its columns. That freedom is used: columns and rows are renamed so
that the last cuts are those across threads, in the layout in which tensor cores leave a product.
"""

import triton
import triton.language as tl


@triton.jit
def larger(x, y):
    """The larger of two. NaN counts as the larger, and tl.minimum gives the other: so it sorts first, as in torch."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(tile, LOG_K: tl.constexpr, LOG_LENGTH: tl.constexpr):
    """The K = 2^LOG_K largest elements of every row, in descending order.

    Args:
        tile: (R, G * L) float32 with R a multiple of 16: G rows of length L = 2^LOG_LENGTH lie side by side.
        LOG_K: of the length of the result.
        LOG_LENGTH: of the length of a row, larger than LOG_K and at least 4.

    Returns:
        K tensors: element i of all rows, in the order that `by_row` undoes, each twice.
    """
    R: tl.constexpr = tile.shape[0]
    L: tl.constexpr = 1 << LOG_LENGTH
    G: tl.constexpr = tile.shape[1] // L
    # Tensor cores leave the columns 2 and 4 apart in neighbouring threads and the rows 8 apart in one thread, so the
    # cut between columns 4 apart is an exchange against rows 8 apart: half of a warp's values, one shuffle each.
    parts = tile.reshape(R // 16, 2, 8, G, L // 8, 2, 2, 2).permute(3, 0, 2, 1, 6, 5, 4, 7)
    run = (parts.reshape(G * R, L),)
    for _ in tl.static_range(LOG_K):
        left, right = _halves(run)
        run = left + right
    run = _sort(run)
    for _ in tl.static_range(LOG_LENGTH - LOG_K - 1):
        left, right = _halves(run)
        run = merge(left, right)
    return _merge_columns(run)


@triton.jit
def by_row(element, R: tl.constexpr, G: tl.constexpr):
    """One of the tensors that `largest` returns, or what was computed from them element by element, as (R, G)."""
    return tl.max(element, 1).reshape(G, R // 16, 8, 2).permute(1, 3, 2, 0).reshape(R, G)


@triton.jit
def merge(left, right):
    """The larger half of two descending runs of one length, as a descending run."""
    K: tl.constexpr = len(left)
    run = ()
    for i in tl.static_range(K):
        run = run + (larger(left[i], right[K - 1 - i]),)
    return _sort_bitonic(run)


@triton.jit
def _merge_columns(run):
    """Like merge, of the runs in the two columns of every tensor; both columns receive the result."""
    K: tl.constexpr = len(run)
    second = tl.arange(0, 2)[None, :] == 1
    upper = ()
    for i in tl.static_range(K):
        opposite = tl.where(second, run[K - 1 - i], run[i])
        upper = upper + (tl.reduce(opposite, 1, larger, keep_dims=True).broadcast_to(run[i].shape),)
    return _sort_bitonic(upper)


@triton.jit
def _halves(run):
    """Every tensor cut between its even and its odd columns."""
    left = ()
    right = ()
    for i in tl.static_range(len(run)):
        even, odd = run[i].reshape(run[i].shape[0], run[i].shape[1] // 2, 2).split()
        left = left + (even,)
        right = right + (odd,)
    return left, right


@triton.jit
def cut(tile):
    """The columns (R, W) of a tile (R, W, L), one by one."""
    run = (tile.reshape(tile.shape[0], tile.shape[1] * tile.shape[2]),)
    LENGTH: tl.constexpr = tile.shape[2]
    return _cut(run, LENGTH)


@triton.jit
def _cut(run, LENGTH: tl.constexpr):
    if LENGTH == 1:
        return run
    else:
        left, right = _halves(run)
        return _cut(left + right, LENGTH // 2)


@triton.jit
def _sort(run):
    """A descending run, by Batcher's odd-even merge sort: the fewest compare-exchanges of the regular networks."""
    K: tl.constexpr = len(run)
    if K == 1:
        return run
    else:
        return _merge_odd_even(_sort(run[: K // 2]) + _sort(run[K // 2 :]))


@triton.jit
def _merge_odd_even(run):
    """A descending run from two descending halves."""
    K: tl.constexpr = len(run)
    if K == 2:
        return (larger(run[0], run[1]), tl.minimum(run[0], run[1]))
    else:
        even = _merge_odd_even(run[0::2])
        odd = _merge_odd_even(run[1::2])
        result = (even[0],)
        for i in tl.static_range(K // 2 - 1):
            result = result + (larger(odd[i], even[i + 1]), tl.minimum(odd[i], even[i + 1]))
        return result + (odd[K // 2 - 1],)


@triton.jit
def _sort_bitonic(run):
    """A descending run from a bitonic one: one that rises and then falls, or does so when rotated."""
    K: tl.constexpr = len(run)
    if K == 1:
        return run
    else:
        upper = ()
        lower = ()
        for i in tl.static_range(K // 2):
            upper = upper + (larger(run[i], run[i + K // 2]),)
            lower = lower + (tl.minimum(run[i], run[i + K // 2]),)
        return _sort_bitonic(upper) + _sort_bitonic(lower)
