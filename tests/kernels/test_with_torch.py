"""topk_similarity inside torch: operator checks, compile, export, autocast, lazy imports."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from fastprompt_kernels import (
    patch_statistics,
    prefix_attention,
    resized_crop,
    sinkhorn,
    sinkhorn_changes,
    topk_similarity,
)
from fastprompt_kernels.testing import draw_inputs
from triton.runtime.errors import OutOfResources

from tests.kernels.support import DEVICE, on_device

IMPLEMENTATIONS = on_device("reference", "dense", "blocked", "triton")
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def make_inputs(B=2, requires_grad=True):
    inputs = draw_inputs((B, 9, 2, 3, 8), [[2, 3], [1, 20]], torch.float32, device=DEVICE)
    return inputs.patches.requires_grad_(requires_grad), inputs.prompts.requires_grad_(requires_grad), inputs.grad


@pytest.mark.parametrize("impl", on_device("dense", "blocked", "triton"))
def test_opcheck(impl):
    dtype = torch.bfloat16 if impl == "triton" else torch.float32
    patches, prompts, grad = make_inputs()
    patches, prompts = (tensor.detach().to(dtype) for tensor in (patches, prompts))
    k = [2, 3, 1, 9]
    _, selected = torch.ops.fastprompt.topk_similarity(patches, prompts, k, True, impl)
    torch.library.opcheck(torch.ops.fastprompt.topk_similarity.default, (patches, prompts, k, True, impl))
    gradients = torch.ops.fastprompt.topk_similarity_grad.default
    for inputs in ((patches, prompts), (None, prompts), (patches, None)):
        torch.library.opcheck(gradients, (grad, *inputs, selected, k, 9, impl))


@pytest.mark.compile
@each_implementation
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(impl, dynamic):
    def scores(patches, prompts):
        return 100 * topk_similarity(patches, prompts, [[2, 3], [1, 20]], reduce="mean", impl=impl)

    compiled = torch.compile(scores, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (2, 3):
        patches, prompts, grad = make_inputs(B)
        expected, actual = scores(patches, prompts), compiled(patches, prompts)
        assert torch.equal(actual, expected)
        for left, right in zip(
            torch.autograd.grad(actual, (patches, prompts), grad[:, 0]),
            torch.autograd.grad(expected, (patches, prompts), grad[:, 0]),
            strict=True,
        ):
            assert torch.equal(left, right)


@pytest.mark.compile
def test_compiled_by_inductor_equals_eager():
    patches, prompts, grad = make_inputs()
    values = torch.compile(topk_similarity, fullgraph=True)(patches, prompts, 3)
    expected = topk_similarity(patches, prompts, 3)
    assert torch.equal(values, expected)
    for left, right in zip(
        torch.autograd.grad(values, (patches, prompts), grad),
        torch.autograd.grad(expected, (patches, prompts), grad),
        strict=True,
    ):
        assert torch.equal(left, right)


@each_implementation
def test_exported_equals_eager(impl):
    class Scores(torch.nn.Module):
        def forward(self, patches, prompts):
            return topk_similarity(patches, prompts, 3, impl=impl)

    patches, prompts, _ = make_inputs(requires_grad=False)
    exported = torch.export.export(Scores(), (patches, prompts))
    assert torch.equal(exported.module()(patches, prompts), topk_similarity(patches, prompts, 3, impl=impl))


@each_implementation
@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_functional_gradient(impl, argnums):
    patches, prompts, grad = make_inputs()

    def loss(patches, prompts):
        return (topk_similarity(patches, prompts, [[2, 3], [1, 20]], impl=impl) * grad).sum()

    expected = torch.autograd.grad(loss(patches, prompts), (patches, prompts))
    actual = torch.func.grad(loss, argnums)(patches.detach(), prompts.detach())
    for left, right in zip(actual if argnums else [actual], expected, strict=False):
        assert torch.equal(left, right)


def test_second_gradient_is_refused():
    patches, prompts, grad = make_inputs()
    first = torch.autograd.grad(topk_similarity(patches, prompts, 3), patches, grad, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated again with impl='reference' only"):
        first.sum().backward()


@each_implementation
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_inputs_and_nothing_inside(impl, compiled):
    patches, prompts, grad = make_inputs()
    function = torch.compile(topk_similarity, fullgraph=True, backend="aot_eager") if compiled else topk_similarity
    expected = topk_similarity(patches.bfloat16(), prompts.bfloat16(), 3, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        values = function(patches, prompts, 3, impl=impl)
        assert torch.equal(values, expected)
        # The gradient of the reference is autograd's own, which obeys autocast.
        if impl != "reference":
            gradients = torch.autograd.grad(values, (patches, prompts), grad)
            assert all(map(torch.equal, gradients, torch.autograd.grad(expected, (patches, prompts), grad)))


def test_autocast_leaves_float64_alone():
    patches, prompts, _ = (tensor.double() for tensor in make_inputs())
    expected = topk_similarity(patches, prompts, 3)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(topk_similarity(patches, prompts, 3), expected)


WITHOUT_THE_REST = """
import sys
sys.modules |= dict.fromkeys(("open_clip", "fastprompt", "torchvision", "timm", "PIL", "triton"))  # not to be imported
import torch, fastprompt_kernels as kernels
patches, prompts, tokens = torch.ones(1, 4, 8), torch.ones(1, 2, 8), torch.ones(1, 6, 3, 2, 4)
pixels, places, boxes = torch.ones(48, dtype=torch.uint8), torch.tensor([[0, 4, 4]]), torch.tensor([[0, 0, 4, 4]])
results = {
    "topk_similarity": kernels.topk_similarity(patches, prompts, 2, impl="reference"),
    "patch_statistics": kernels.patch_statistics(patches, prompts[0], impl="reference").maximum,
    "prefix_attention": kernels.prefix_attention(tokens, torch.zeros(1, 4, dtype=torch.int32), impl="reference"),
    "sinkhorn": kernels.sinkhorn(torch.ones(1, 2, 4), impl="reference"),
    "sinkhorn_changes": kernels.sinkhorn_changes(torch.ones(1, 2, 4), iterations=3, impl="reference").amin(),
    "resized_crop": kernels.resized_crop(pixels, places, boxes, 2, impl="reference"),
}
print({name: result.unique().tolist() for name, result in results.items()})
"""


@pytest.mark.slow
def test_every_reference_runs_where_there_is_nothing_but_torch():
    process = subprocess.run([sys.executable, "-c", WITHOUT_THE_REST], capture_output=True, text=True, check=True)
    assert ast.literal_eval(process.stdout) == {
        "topk_similarity": [8.0],
        "patch_statistics": [8.0],
        "prefix_attention": [1.0],
        "sinkhorn": [1 / 8],
        "sinkhorn_changes": [0.0],
        "resized_crop": [torch.tensor(1 / 255).item()],
    }


ON_ITS_OWN = """
import json, sys
import torch
import fastprompt_kernels, fastprompt_kernels.testing
after_import = {"triton": "triton" in sys.modules, "device": torch.cuda.is_initialized()}
patches, prompts = torch.ones(1, 4, 8), torch.ones(1, 2, 8)
values = fastprompt_kernels.topk_similarity(patches, prompts, 2)
try:
    fastprompt_kernels.topk_similarity(patches, prompts, 2, impl="triton")
except ValueError as error:
    message = str(error)
print(json.dumps({**after_import, "values": values.tolist(), "message": message,
                  "available": fastprompt_kernels.available_implementations("cpu")}))
"""


@pytest.mark.slow
def test_without_a_gpu_triton_is_neither_imported_nor_used():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", ON_ITS_OWN], env=environment, capture_output=True, text=True, check=True
    )
    report = json.loads(process.stdout)
    reason = "the kernels run on CUDA and ROCm devices, not on cpu"
    assert report == {
        "triton": False,
        "device": False,
        "values": [[[8.0, 8.0]]],
        "message": f"impl='triton' cannot run here: {reason}",
        "available": {"reference": "usable", "dense": "usable", "blocked": "usable", "triton": reason},
    }


SENTENCE = r"fails to run the kernels of topk_similarity here \(.*\): name another impl"
FAILURES = {
    "passes": (RuntimeError("PassManager::run failed"), RuntimeError, SENTENCE),
    "resources": (OutOfResources(9, 8, "registers"), RuntimeError, SENTENCE),
    "of others": (ZeroDivisionError("not its fault"), ZeroDivisionError, "not its fault"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_triton_fails_with_becomes_one_sentence(monkeypatch, failure):
    error, kind, sentence = FAILURES[failure]

    def fail(*_):
        raise error

    monkeypatch.setattr(import_module("fastprompt_kernels.topk_similarity.triton"), "forward", fail)
    with pytest.raises(kind, match=sentence):
        topk_similarity(torch.ones(1, 4, 8), torch.ones(1, 2, 8), 2, impl="triton")


def test_every_operator_runs_on_the_device_of_its_inputs(monkeypatch):
    entered, device_of = [], torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or device_of(tensor))
    patches = torch.randn(2, 9, 8, requires_grad=True)
    topk_similarity(patches, torch.randn(1, 3, 8), [2], impl="blocked").sum().backward()
    patch_statistics(patches, torch.randn(3, 8), impl="blocked").maximum.sum().backward()
    tokens = torch.randn(1, 6, 3, 2, 4, requires_grad=True)
    prefix_attention(tokens, torch.zeros(1, 4, dtype=torch.int32), impl="blocked").sum().backward()
    sinkhorn(torch.rand(2, 3, 4), impl="blocked")
    sinkhorn_changes(torch.rand(2, 3, 4), impl="blocked")
    pixels, places = torch.zeros(48, dtype=torch.uint8), torch.tensor([[0, 4, 4]])
    resized_crop(pixels, places, torch.tensor([[0, 0, 4, 4]]), 2, impl="blocked")
    assert len(entered) == 9  # five operators, and a second one of each but the crop
