"""Packing of sequences into rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprompt.backbone.packing import ROW_TOKENS_CPU, pack

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 75), min_size=1, max_size=200).map(tuple)


@given(lengths=LENGTHS)
def test_every_token_has_a_slot_of_its_own(lengths):
    packing = pack(lengths, CPU)
    width = packing.sequence.shape[1]
    first = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    number = packing.sequence.flatten()
    for index, length in enumerate(lengths):
        slots = torch.arange(packing.last[index] - length + 1, packing.last[index] + 1)
        assert (number == index).nonzero().flatten().tolist() == slots.tolist()
        assert slots[0] // width == slots[-1] // width
        assert (packing.token[slots] == first[index] + torch.arange(length)).all()
        assert (packing.position[slots] == torch.arange(length)).all()
    empty = number[number < 0]
    assert len(empty.unique()) == len(empty) == len(number) - sum(lengths)


@given(lengths=LENGTHS)
def test_every_sequence_has_its_last_token_as_query(lengths):
    packing = pack(lengths, CPU)
    width = packing.sequence.shape[1]
    row = torch.arange(len(packing.sequence))[:, None]
    of_query = (row * width + packing.query_slots).flatten()  # slots of the queries, counted over all rows
    assert (of_query == packing.last[packing.query_class]).all()
    assert (packing.query_class[packing.query] == torch.arange(len(lengths))).all()


@given(lengths=LENGTHS)
def test_rows_are_narrow_and_full(lengths):
    rows, width = pack(lengths, CPU).sequence.shape
    assert width <= max(ROW_TOKENS_CPU, *lengths) + 7
    # First fit leaves at most one row that could have been put into another one.
    assert rows == 1 or (rows - 1) * (width + 1) < 2 * sum(lengths)


@pytest.mark.parametrize("lengths", [(4,) * 47, (3,) * 100, (3, 2, 3, 4, 5, 2) * 66])
def test_few_slots_are_left_empty(lengths):
    """Linear layers pay for an empty slot."""
    assert pack(lengths, CPU).sequence.numel() <= 1.03 * sum(lengths)
