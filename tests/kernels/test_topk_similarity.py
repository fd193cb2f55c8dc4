"""topk_similarity: every implementation against the float64 reference by the error rule."""

import pytest
import torch
from fastprompt_kernels import selected_patches, topk_similarity
from fastprompt_kernels.testing import Inputs, assert_as_accurate, draw_inputs, poisoned_memory
from fastprompt_kernels.topk_similarity import blocked
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ["reference", "blocked", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
# The same examples in every run; shrinking is left out because one example takes seconds in Triton's interpreter.
repeatable = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@st.composite
def inputs_strategy(draw: st.DrawFn) -> Inputs:
    B, P, N = draw(st.integers(0, 3)), draw(st.integers(1, 300)), draw(st.integers(1, 5))
    C, D, S = draw(st.integers(1, 70)), draw(st.integers(8, 128)), draw(st.integers(1, 3))
    row = st.lists(st.integers(1, P + 10) | st.integers(1, 20), min_size=S, max_size=S)
    return draw_inputs(
        (B, P, N, C, D),
        draw(st.lists(row, min_size=N, max_size=N)),
        draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**31)),
        ties=draw(st.booleans()),
        contiguous=draw(st.booleans()),
        device=DEVICE,
    )


def run(inputs: Inputs, impl: str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """Values and both gradients, in another dtype if one is given."""
    patches, prompts = (t.to(dtype or t.dtype).detach().requires_grad_() for t in (inputs.patches, inputs.prompts))
    values = topk_similarity(patches, prompts, inputs.k, impl=impl)
    return values.detach(), *torch.autograd.grad(values, (patches, prompts), inputs.grad.to(values.dtype))


def share(inputs: Inputs) -> torch.Tensor:
    """(B, N, C, P) float64: the share that every patch has in the result, from a stable sort of exact similarities."""
    similarity = torch.einsum("bpd,ncd->bncp", inputs.patches.double(), inputs.prompts.double())
    rank = similarity.argsort(descending=True, stable=True).argsort()
    P = rank.shape[-1]
    per_prompt = [
        sum((rank[:, n] < scale) / min(scale, P) for scale in map(float, scales)) / len(scales)
        for n, scales in enumerate(inputs.k)
    ]
    return torch.stack(per_prompt, dim=1).double()


def sums(patches: torch.Tensor, prompts: torch.Tensor, weights: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Values and both gradients in plain PyTorch, the selection given; the products in the dtype of the inputs."""
    similarity = torch.einsum("bpd,ncd->bncp", patches.to(grad.dtype), prompts.to(grad.dtype))
    gradient = (weights * grad[..., None]).to(patches.dtype)
    return [
        (weights * similarity).sum(-1),
        torch.einsum("bncp,ncd->bpd", gradient, prompts),
        torch.einsum("bncp,bpd->ncd", gradient, patches),
    ]


def check(inputs: Inputs, impl: str) -> None:
    weights = share(inputs)
    patches, prompts, grad = inputs.patches, inputs.prompts, inputs.grad
    oracle = run(inputs, "reference", torch.float64)
    terms = sums(patches.double().abs(), prompts.double().abs(), weights, grad.double().abs())
    plain = sums(patches, prompts, weights.to(grad.dtype), grad)
    with poisoned_memory():
        actual = run(inputs, impl)
    for what, *tensors in zip(("values", "patches.grad", "prompts.grad"), actual, plain, oracle, terms, strict=True):
        assert_as_accurate(*tensors, what=what)


@given(inputs=inputs_strategy())
@settings(repeatable, max_examples=60)
@pytest.mark.parametrize("impl", ["reference", "blocked"])
def test_error_rule(impl, inputs):
    check(inputs, impl)


@given(inputs=inputs_strategy())
@settings(repeatable, max_examples=20)
def test_error_rule_of_the_kernels(inputs):
    check(inputs, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024, 1, 3, 9), (2, 577, 1, 17, 100), (2, 1, 2, 65, 8), (1, 256, 1, 1, 64)])
def test_error_rule_of_the_kernels_at_the_borders(shape, dtype):
    check(draw_inputs(shape, [[7]] * shape[2], dtype, device=DEVICE), "triton")


@each_implementation
@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 8), (2, 5, 2, 0, 8)])
def test_no_images_or_no_classes(impl, shape):
    inputs = draw_inputs(shape, [[2], [3]], torch.float32, device=DEVICE)
    values, *gradients = run(inputs, impl)
    assert values.shape == (shape[0], 2, shape[3])
    for gradient, like in zip(gradients, (inputs.patches, inputs.prompts), strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("k", [3, (1, 20), ((1, 4), (2, 7))])
def test_gradcheck(impl, k):
    inputs = draw_inputs((2, 7, 2, 3, 5), [[1], [1]], torch.float64)
    tensors = (inputs.patches.requires_grad_(), inputs.prompts.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, t: topk_similarity(v, t, k, impl=impl), tensors)


@each_implementation
def test_float64_stays_float64_or_is_refused(impl):
    inputs = draw_inputs((1, 4, 1, 2, 8), [[2]], torch.float64, device=DEVICE)
    if impl == "triton":
        with pytest.raises(ValueError, match="not torch.float64"):
            run(inputs, impl)
    else:
        assert {tensor.dtype for tensor in run(inputs, impl)} == {torch.float64}


@each_implementation
def test_lowest_patch_wins_ties(impl):
    # Similarities of the patches to the only class: 1, 2, 1, 2, 1, 2. The three largest are all the 2s; of five, the
    # last two are the first two 1s; of two, the first two 2s.
    patches = torch.tensor([1.0, 2, 1, 2, 1, 2], device=DEVICE)[None, :, None].repeat(1, 1, 8).requires_grad_()
    prompts = torch.zeros(3, 1, 8, device=DEVICE)
    prompts[..., 0] = 1
    topk_similarity(patches, prompts, [3, 5, 2], impl=impl).backward(torch.eye(3, device=DEVICE)[:, None, :1][None, 0])
    assert patches.grad is not None
    for k, expected in ((3, [0, 1, 0, 1, 0, 1]), (5, [1, 1, 1, 1, 0, 1]), (2, [0, 1, 0, 1, 0, 0])):
        leaf = patches.detach().clone().requires_grad_()
        topk_similarity(leaf, prompts[:1], k, impl=impl).sum().backward()
        assert torch.equal(leaf.grad[0, :, 0], torch.tensor(expected, device=DEVICE) / k)
