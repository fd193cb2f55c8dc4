"""patch_statistics inside torch (checks, compile, export, autocast, functional gradients) and its arguments."""

import pytest
import torch
from fastprompt_kernels import patch_statistics
from fastprompt_kernels.testing import draw_statistics_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_implementation = pytest.mark.parametrize("impl", ["reference", "blocked", "triton"])
PATCHES, PROMPTS, LABELS = torch.ones(2, 6, 8), torch.ones(4, 8), torch.tensor([0, 3])


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def make_inputs(B=2, dtype=torch.float32):
    inputs = draw_statistics_inputs((B, 9, 5, 8), dtype, device=DEVICE)
    return inputs.patches.requires_grad_(), inputs.prompts.requires_grad_(), inputs.labels, list(inputs.grads)


def assert_same(actual, expected, patches, prompts, grads):
    assert all(map(torch.equal, actual, expected))
    for left, right in zip(
        torch.autograd.grad(actual[:3], (patches, prompts), grads),
        torch.autograd.grad(expected[:3], (patches, prompts), grads),
        strict=True,
    ):
        assert torch.equal(left, right)


@pytest.mark.parametrize(("impl", "dtype"), [("blocked", torch.float32), ("triton", torch.bfloat16)])
def test_opcheck(impl, dtype):
    patches, prompts, labels, grads = make_inputs(dtype=dtype)
    patches, prompts = patches.detach(), prompts.detach()
    arguments = (patches, prompts, 0.5, labels, True, True, impl)
    torch.library.opcheck(torch.ops.fastprompt.patch_statistics.default, arguments)
    torch.library.opcheck(
        torch.ops.fastprompt.patch_statistics.default, (patches, prompts, 0.5, None, False, False, impl)
    )
    _, logsumexp, entropy, _, largest, kept = torch.ops.fastprompt.patch_statistics(*arguments)
    arguments = (grads, patches, prompts, logsumexp, entropy, largest, kept, 0.5, [True, False], impl)
    torch.library.opcheck(torch.ops.fastprompt.patch_statistics_grad.default, arguments)


@pytest.mark.compile
@each_implementation
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(impl, dynamic):
    def function(patches, prompts, labels):
        return patch_statistics(patches, prompts, scale=2.0, labels=labels, impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for B in (2, 3):
        patches, prompts, labels, grads = make_inputs(B)
        actual, expected = compiled(patches, prompts, labels), function(patches, prompts, labels)
        assert_same(actual, expected, patches, prompts, grads)


@each_implementation
def test_exported_equals_eager(impl):
    class Statistics(torch.nn.Module):
        def forward(self, patches, prompts, labels):
            return tuple(patch_statistics(patches, prompts, labels=labels, impl=impl))

    patches, prompts, labels, _ = make_inputs()
    exported = torch.export.export(Statistics(), (patches.detach(), prompts.detach(), labels))
    actual = exported.module()(patches.detach(), prompts.detach(), labels)
    assert all(map(torch.equal, actual, patch_statistics(patches, prompts, labels=labels, impl=impl)))


@pytest.mark.parametrize("impl", ["blocked", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_inputs_and_nothing_inside(impl, compiled):
    patches, prompts, labels, grads = make_inputs()
    function = torch.compile(patch_statistics, fullgraph=True, backend="aot_eager") if compiled else patch_statistics
    expected = patch_statistics(patches.bfloat16(), prompts.bfloat16(), labels=labels, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(function(patches, prompts, labels=labels, impl=impl), expected, patches, prompts, grads)
        double = patch_statistics(patches.double(), prompts.double(), impl="reference")
    assert double.entropy.dtype == torch.float64


@each_implementation
def test_functional_gradient_equals_that_of_autograd(impl):
    patches, prompts, _, _ = make_inputs()

    def loss(prompts):
        return patch_statistics(patches.detach(), prompts, impl=impl).entropy.sum()

    assert torch.equal(torch.func.grad(loss)(prompts.detach()), torch.autograd.grad(loss(prompts), prompts)[0])


def test_second_gradient_is_refused():
    patches, prompts, _, _ = make_inputs()
    entropy = patch_statistics(patches, prompts).entropy
    first = torch.autograd.grad(entropy.sum(), patches, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated again with impl='reference' only"):
        first.sum().backward()


@each_implementation
def test_float64_stays_float64_or_is_refused(impl):
    patches, prompts, _, _ = make_inputs(dtype=torch.float64)
    if impl == "triton":
        with pytest.raises(ValueError, match=r"not torch\.float64"):
            patch_statistics(patches, prompts, impl=impl)
    else:
        assert patch_statistics(patches, prompts, impl=impl).entropy.dtype == torch.float64


@pytest.mark.parametrize(
    ("patches", "prompts", "keywords", "error", "sentence"),
    [
        (PATCHES[0], PROMPTS, {}, ValueError, r"patches must have shape \(B, P, D\) with P at least 1, got \(6, 8\)"),
        (PATCHES, PROMPTS[None], {}, ValueError, r"prompts must have shape \(C, D\) .*, got \(1, 4, 8\)"),
        (PATCHES[:, :0], PROMPTS, {}, ValueError, "patches must have .* with P at least 1"),
        (PATCHES, PROMPTS[:0], {}, ValueError, "prompts must have .* with C at least 1"),
        (PATCHES, PROMPTS[:, :7], {}, ValueError, "must agree in D, got 8 and 7"),
        (PATCHES, PROMPTS.half(), {}, TypeError, "must have one dtype, got torch.float32 and torch.float16"),
        (PATCHES.long(), PROMPTS, {}, TypeError, "patches must be a floating-point tensor, got torch.int64"),
        (PATCHES, [[1.0]], {}, TypeError, "prompts must be a floating-point tensor, got list"),
        (PATCHES, PROMPTS.to("meta"), {}, ValueError, "must be on one device, got cpu and meta"),
        (PATCHES, PROMPTS, {"scale": 0.0}, ValueError, "scale must be a finite number above 0, got 0.0"),
        (PATCHES, PROMPTS, {"scale": float("nan")}, ValueError, "scale must be a finite number above 0, got nan"),
        (PATCHES, PROMPTS, {"labels": LABELS.float()}, TypeError, "labels must be .* integers, got torch.float32"),
        (PATCHES, PROMPTS, {"labels": LABELS[:1]}, ValueError, r"labels must have shape \(2,\), .*, got \(1,\)"),
        (PATCHES, PROMPTS, {"labels": LABELS + 1}, ValueError, "labels must lie between 0 and 3, got 1 to 4"),
        (PATCHES, PROMPTS, {"labels": LABELS - 1}, ValueError, "labels must lie between 0 and 3, got -1 to 2"),
        (PATCHES, PROMPTS, {"labels": LABELS.to("meta")}, ValueError, "must be on one device, got cpu and meta"),
        (PATCHES, PROMPTS, {"impl": "cuda"}, ValueError, "impl must be one of 'auto', .*, got 'cuda'"),
    ],
)
def test_arguments_that_do_not_fit(patches, prompts, keywords, error, sentence):
    with pytest.raises(error, match=sentence):
        patch_statistics(patches, prompts, **keywords)
