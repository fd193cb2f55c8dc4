"""What of the CPU path only an unusual call shows. Each test fails for a change to the code that no other test saw."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from fastprompt_kernels import cores, patch_statistics, topk_similarity
from fastprompt_kernels.patch_statistics import blocked as statistics
from fastprompt_kernels.testing import draw_inputs
from fastprompt_kernels.topk_similarity import blocked

from tests.kernels.support import run


@pytest.mark.parametrize(("P", "kind"), [(256, "uint8"), (257, "int16"), (2**15, "int16"), (2**15 + 1, "int32")])
def test_the_last_patch_has_a_number_that_its_dtype_holds(P, kind):
    patches = torch.zeros(1, P, 1)
    patches[0, -1] = 1
    _, selected = blocked.forward(patches, torch.ones(1, 1, 1), [[1]], keep=True)
    assert selected.dtype == getattr(torch, kind)
    assert selected.flatten().tolist() == [P - 1]


def test_patches_of_many_images_have_gradients_of_their_own(monkeypatch):
    # 200 images of 200 patches in one tile: their 40,000 patches are more than int16 numbers.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # or the images would be shared out
    patches = torch.zeros(200, 200, 1)
    patches[:, 150] = 1
    patches.requires_grad_()
    topk_similarity(patches, torch.ones(1, 1, 1), 1, impl="blocked").sum().backward()
    assert patches.grad[..., 0].nonzero().tolist() == [[image, 150] for image in range(200)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("P", [2, 50, 300])
def test_patches_that_differ_in_their_last_bits_are_told_apart(sign, P):
    """Their places stand in those bits while they are sorted."""
    order = torch.randperm(P, generator=torch.Generator().manual_seed(P))
    patches = (sign * (1 + order * 2.0**-23)).view(1, P, 1)
    _, selected = blocked.forward(patches, torch.ones(1, 1, 1), [[P // 2]], keep=True)
    assert selected.flatten().sort().values.tolist() == patches.flatten().topk(P // 2).indices.sort().values.tolist()


@pytest.mark.parametrize("impl", ["dense", "blocked"])
def test_infinite_and_missing_numbers_are_selected_as_the_definition_does(impl):
    patches = torch.arange(12.0).view(1, 12, 1)
    for place, number in ((2, torch.inf), (5, -torch.inf), (7, torch.nan), (9, torch.nan)):
        patches[0, place] = number
    for k in (1, 2, 3, 4, 11):
        grads = []
        for name in ("reference", impl):
            leaf = patches.clone().requires_grad_()
            topk_similarity(leaf, torch.ones(1, 1, 1), k, impl=name).sum().backward()
            grads.append(leaf.grad)
        assert grads[0].count_nonzero() == k
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, "bf16"), (torch.float32, None)])
def test_products_have_the_precision_of_their_inputs(monkeypatch, dtype, expected):
    seen, real = [], blocked._scores
    settings = torch.backends.mkldnn.matmul
    monkeypatch.setattr(blocked, "_scores", lambda *inputs: seen.append(settings.fp32_precision) or real(*inputs))
    before = settings.fp32_precision
    run(draw_inputs((2, 30, 1, 5, 8), [[3]], dtype), "blocked")
    assert set(seen) == {expected or before}
    assert before != "bf16"


@pytest.fixture
def three_threads():
    """Three threads whose pool is made anew."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    cores._cores.cache_clear()
    yield
    torch.set_num_threads(before)


def in_every_thread(function):
    """What a function gives in the three threads that share out work."""
    ready, found = Barrier(3), []

    def tile():
        ready.wait(60)
        found.append(function())

    cores.on_all_cores(tile, [()] * 3, torch.device("cpu"))
    return found


def test_every_thread_computes_alone_and_those_to_come_do_not(three_threads):
    assert in_every_thread(torch.get_num_threads) == [1, 1, 1]
    assert torch.get_num_threads() == 3
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


@pytest.mark.parametrize("inference", [False, True])
def test_threads_prepare_no_gradients_and_are_in_the_mode_of_the_caller(three_threads, inference):
    with torch.inference_mode(inference):
        assert in_every_thread(torch.is_inference_mode_enabled) == [inference] * 3
        assert in_every_thread(torch.is_grad_enabled) == [False] * 3


@pytest.mark.parametrize(("function", "module"), [(topk_similarity, blocked), (patch_statistics, statistics)])
def test_what_only_the_backward_pass_needs_is_kept_only_for_it(monkeypatch, function, module):
    kept, real = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *inputs: kept.append(inputs[-1]) or real(*inputs))
    inputs = draw_inputs((2, 9, 1, 3, 8), [[4]], torch.float32)
    prompts, more = (inputs.prompts, [4]) if function is topk_similarity else (inputs.prompts[0], [])
    function(inputs.patches, prompts, *more, impl="blocked")
    function(inputs.patches.requires_grad_(), prompts, *more, impl="blocked")
    with torch.no_grad():
        function(inputs.patches, prompts, *more, impl="blocked")
    assert kept == [False, True, False]


def test_gradients_inside_autocast_are_those_outside(monkeypatch):
    """In one thread: others would not be in autocast anyway."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    inputs = draw_inputs((2, 9, 2, 3, 8), [[4], [5]], torch.float32)
    tensors = inputs.patches.requires_grad_(), inputs.prompts.requires_grad_()
    values = topk_similarity(*tensors, inputs.k, impl="blocked")
    expected = torch.autograd.grad(values, tensors, inputs.grad, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(values, tensors, inputs.grad), expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_threads_of_a_forked_process_are_its_own(three_threads):
    """The pool is there, and in use, before the process is forked."""
    assert in_every_thread(torch.get_num_threads) == [1, 1, 1]
    child = multiprocessing.get_context("fork").Process(target=in_every_thread, args=(torch.get_num_threads,))
    child.start()
    child.join(20)
    code = child.exitcode
    child.kill()
    assert code == 0
