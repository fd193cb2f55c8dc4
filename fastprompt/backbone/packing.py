"""Sequences of tokens packed into rows for the attention of the text tower."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

# Attention runs inside rows, so its cost grows with their width, and narrow rows copy the shared prefix more often.
ROW_TOKENS_CPU = 32
ROW_TOKENS_DEVICE = 56  # with up to seven more, the tiles of the Triton kernels hold a row

WIDTHS, FULL = 8, 1.01  # how many widths are tried, until at most 1 % of the slots are empty


@dataclass(frozen=True)
class Packing:
    """Where the tokens of C sequences stand in rows of slots.

    A query is the last token of a sequence. Every row has as many of them as the row with the most; rows with fewer
    repeat one.

    Attributes:
        token: (rows * width,) index of the token in the concatenated sequences; 0 in an empty slot.
        position: (rows * width,) position of the token in its sequence; 0 in an empty slot.
        sequence: (rows, width) int32 number of the sequence; an empty slot has a negative number of its own.
        last: (C,) slot of the last token of each sequence, counted over all rows.
        query_slots: (rows, E) slots of the queries in their rows.
        query_class: (rows * E,) sequence of each query.
        query: (C,) index of each sequence's query among the rows * E.
    """

    token: Tensor
    position: Tensor
    sequence: Tensor
    last: Tensor
    query_slots: Tensor
    query_class: Tensor
    query: Tensor


def row_tokens(device: torch.device) -> int:
    """Slots of a row where no sequence is longer."""
    return ROW_TOKENS_CPU if device.type == "cpu" else ROW_TOKENS_DEVICE


def pack(lengths: tuple[int, ...], device: torch.device) -> Packing:
    """Pack sequences by first fit, longest first, into rows of the width that leaves the fewest slots empty."""
    width, rows, places = best_fit(lengths, row_tokens(device))
    token = torch.zeros(rows, width, dtype=torch.long)
    position = torch.zeros(rows, width, dtype=torch.long)
    sequence = torch.arange(-rows * width, 0, dtype=torch.int32).view(rows, width)
    queries: list[list[int]] = [[] for _ in range(rows)]
    first_token = 0
    for index, ((row, start), length) in enumerate(zip(places, lengths, strict=True)):
        slots = slice(start, start + length)
        token[row, slots] = torch.arange(first_token, first_token + length)
        position[row, slots] = torch.arange(length)
        sequence[row, slots] = index
        queries[row].append(index)
        first_token += length
    most = max(map(len, queries))
    query_class = torch.tensor([[*row, *row[:1] * (most - len(row))] for row in queries])
    last = torch.tensor([row * width + start + n - 1 for (row, start), n in zip(places, lengths, strict=True)])
    query = torch.empty(len(lengths), dtype=torch.long)
    query[query_class.flatten().flip(0)] = torch.arange(query_class.numel()).flip(0)  # the first of equal ones
    tensors = token.flatten(), position.flatten(), sequence, last, last[query_class] % width, query_class.flatten()
    return Packing(*(tensor.to(device) for tensor in (*tensors, query)))


def best_fit(lengths: tuple[int, ...], wanted: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Width, number and places of rows of about ``wanted`` slots, or as many as the longest sequence has."""
    total, longest = sum(lengths), max(lengths)
    narrowest = max(longest, -(-total // -(-total // max(wanted, longest))))
    tried = []
    for width in range(narrowest, narrowest + WIDTHS):
        places = first_fit(lengths, width)
        rows = 1 + max(row for row, _ in places)
        tried.append((rows * width, width, rows, places))
        if rows * width <= FULL * total:
            break
    return min(tried)[1:]


def first_fit(lengths: tuple[int, ...], width: int) -> list[tuple[int, int]]:
    """Row and first slot of every sequence, placed longest first into the first row with room."""
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # a heap of rows for every number of free slots
    rows, places = 0, [(0, 0)] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        row, free = min(((heap[0], n) for n, heap in enumerate(with_room) if heap and n >= length), default=(rows, 0))
        if row == rows:
            rows, free = rows + 1, width
        else:
            heappop(with_room[free])
        places[index] = (row, width - free)
        heappush(with_room[free - length], row)
    return places
