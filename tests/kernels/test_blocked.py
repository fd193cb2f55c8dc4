"""What only the implementations of processors do: tiles, threads, and what they leave behind."""

import multiprocessing
import sys

import pytest
import torch
from fastprompt_kernels import topk_similarity
from fastprompt_kernels.testing import Inputs, draw_inputs
from fastprompt_kernels.topk_similarity import blocked, blocked_backward

from tests.kernels.support import Seen, run


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [[[3], [5]], [[30], [40, 1]]], ids=["sums of features", "matrix products"])
def test_blocked_cuts_the_similarity_into_tiles(monkeypatch, one_thread, k):
    k = [row * (2 // len(row)) for row in k]
    inputs = draw_inputs((5, 64, 2, 50, 8), k, torch.float32)
    whole = run(inputs, "blocked")
    monkeypatch.setattr(blocked, "TILE_BYTES", 7 * 64 * 4)
    for name, value in {"TILE_BYTES": 7 * 64 * 4, "FEATURE_BYTES": 30 * 8 * 4, "ENTRIES": 999}.items():
        monkeypatch.setattr(blocked_backward, name, value)
    with Seen() as seen:  # sees what happens in this thread
        selected = blocked.forward(inputs.patches, inputs.prompts, inputs.k, keep=True)[1]
        blocked.backward(inputs.grad, inputs.patches, inputs.prompts, selected, inputs.k, 64)
    assert seen.largest < 3 * 50 * 64 * 4  # the similarity of one prompt for three of the images
    for tile, tensor in zip(run(inputs, "blocked"), whole, strict=True):
        torch.testing.assert_close(tile, tensor)


def test_blocked_gives_the_same_bits_with_any_number_of_threads(one_thread):
    inputs = draw_inputs((5, 70, 2, 150, 24), [[3, 9], [70, 1]], torch.float32, ties=True)
    alone = run(inputs, "blocked")
    torch.set_num_threads(3)
    assert all(map(torch.equal, run(inputs, "blocked"), alone))
    assert torch.get_num_threads() == 3


def test_blocked_works_in_a_forked_process():
    inputs = draw_inputs((4, 50, 2, 20, 8), [[3], [20]], torch.float32)
    expected = run(inputs, "blocked")[0]
    child = multiprocessing.get_context("fork").Process(target=_exit_with, args=(inputs, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _exit_with(inputs: Inputs, expected: torch.Tensor) -> None:
    torch.set_num_threads(2)
    sys.exit(not torch.equal(topk_similarity(inputs.patches, inputs.prompts, inputs.k, impl="blocked"), expected))


def test_blocked_leaves_torch_as_it_was(one_thread):
    torch.set_num_threads(2)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    run(draw_inputs((2, 30, 1, 5, 8), [[3]], torch.bfloat16), "blocked")
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert torch.get_num_threads() == 2
