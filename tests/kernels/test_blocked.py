"""What only the implementations of processors do: tiles, threads, and what they leave behind."""

import pytest
import torch
from fastprompt_kernels import patch_statistics, topk_similarity
from fastprompt_kernels.testing import Inputs, draw_inputs, draw_statistics_inputs
from fastprompt_kernels.topk_similarity import blocked, blocked_backward, dense

from tests.kernels.support import Seen, run

PARTS = slice(0, 1), slice(3, 5), slice(3, 9)  # of a batch: fewer images than threads, and more


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("k", [[[3], [5]], [[30], [40, 1]]], ids=["one scale", "several scales"])
def test_blocked_cuts_the_similarity_into_tiles(monkeypatch, one_thread, k):
    k = [row * (2 // len(row)) for row in k]
    inputs = draw_inputs((5, 64, 2, 50, 8), k, torch.float32)
    whole = run(inputs, "blocked")
    monkeypatch.setattr(blocked, "TILE_BYTES", 7 * 64 * 4)
    for name, value in {"FEATURE_BYTES": 60 * 8 * 4, "ENTRIES": 999}.items():
        monkeypatch.setattr(blocked_backward, name, value)
    with Seen() as seen:  # sees what happens in this thread
        selected = blocked.forward(inputs.patches, inputs.prompts, inputs.k, keep=True)[1]
        blocked.backward(inputs.grad, inputs.patches, inputs.prompts, selected, inputs.k, 64)
    assert seen.largest < 3 * 50 * 64 * 4  # the similarity of one prompt for three of the images
    for tile, tensor in zip(run(inputs, "blocked"), whole, strict=True):
        torch.testing.assert_close(tile, tensor)


@pytest.mark.parametrize("k", [[[3], [5]], [[3, 9], [70, 1]]], ids=["few", "all"])
def test_blocked_gives_the_same_bits_with_any_number_of_threads(monkeypatch, one_thread, k):
    inputs = draw_inputs((64, 70, 2, 110, 24), k, torch.float32)
    alone = run(inputs, "blocked")
    torch.set_num_threads(3)
    for few in (0, 2**40):  # every thread sorts; torch's threads multiply and one sorts
        monkeypatch.setattr(blocked, "LITTLE", few)
        assert all(map(torch.equal, run(inputs, "blocked"), alone))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("k", [[[3], [5]], [[3, 9], [70, 1]]], ids=["one scale", "several scales"])
def test_dense_holds_the_similarity_of_some_images(monkeypatch, k):
    inputs = draw_inputs((9, 70, 2, 30, 8), [row * (2 // len(row)) for row in k], torch.float32, ties=True)
    whole = run(inputs, "dense")
    monkeypatch.setattr(dense, "CHUNK_BYTES", 2 * 2 * 30 * 70 * 4)
    with Seen() as seen:
        selected = dense.forward(inputs.patches, inputs.prompts, inputs.k, keep=True)[1]
        dense.backward(inputs.grad, inputs.patches, inputs.prompts, selected, inputs.k, 70)
    assert seen.largest == dense.CHUNK_BYTES
    for chunk, tensor in zip(run(inputs, "dense"), whole, strict=True):
        torch.testing.assert_close(chunk, tensor)


def test_auto_takes_on_a_processor_what_is_faster_for_the_size(monkeypatch):
    taken = []
    for module in (dense, blocked):
        for name in ("forward", "backward"):
            real, label = getattr(module, name), f"{module.__name__.split('.')[-1]}.{name}"
            monkeypatch.setattr(module, name, lambda *a, real=real, label=label: taken.append(label) or real(*a))

    def kinds(C, k):
        taken.clear()
        inputs = draw_inputs((2, 64, 2, C, 4), [[k], [k]], torch.float32)
        inputs.patches.requires_grad_()
        topk_similarity(inputs.patches, inputs.prompts, inputs.k).sum().backward()
        return taken

    assert kinds(64, 8) == ["blocked.forward", "dense.backward"]
    assert kinds(65, 8) == ["blocked.forward", "blocked.backward"]
    assert kinds(65, 9) == ["blocked.forward", "dense.backward"]


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize(
    ("P", "C"), [(196, 100), (49, 400), (196, 30)], ids=["few selected", "many selected", "few rows"]
)
def test_auto_gives_an_image_the_same_bits_in_every_batch(one_thread, P, C, threads):
    torch.set_num_threads(threads)
    inputs = draw_inputs((64, P, 4, C, 128), [[5], [10], [15], [20]], torch.float32)
    assert 6 * P * 4 * C < blocked.LITTLE < 64 * P * 4 * C
    values, of_patches, _ = run(inputs, "auto")
    for part in PARTS:
        alone = run(Inputs(inputs.patches[part], inputs.prompts, inputs.k, inputs.grad[part]), "auto")
        assert torch.equal(alone[0], values[part])
        assert torch.equal(alone[1], of_patches[part])


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize(("P", "C"), [(49, 47), (49, 1000)], ids=["few classes", "many classes"])
def test_statistics_of_an_image_are_the_same_bits_in_every_batch(one_thread, P, C, threads):
    torch.set_num_threads(threads)
    inputs = draw_statistics_inputs((64, P, C, 512), torch.float32, scale=100)

    def of(part):
        patches = inputs.patches[part].clone().requires_grad_()
        maximum, logsumexp, entropy, _ = patch_statistics(patches, inputs.prompts, scale=100)
        (maximum + logsumexp + entropy).sum().backward()
        return maximum, logsumexp, entropy, patches.grad

    whole = of(slice(None))
    for part in PARTS:
        assert all(torch.equal(own, tensor[part]) for own, tensor in zip(of(part), whole, strict=True))


def test_blocked_leaves_torch_as_it_was(one_thread):
    torch.set_num_threads(2)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    run(draw_inputs((2, 30, 1, 5, 8), [[3]], torch.bfloat16), "blocked")
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert torch.get_num_threads() == 2
