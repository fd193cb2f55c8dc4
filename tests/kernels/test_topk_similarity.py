"""topk_similarity: every implementation against the float64 reference by the error rule."""

import pytest
import torch
import triton.language as tl
from fastprompt_kernels import selected_patches, topk_similarity, triton_launch
from fastprompt_kernels.testing import Inputs, assert_as_accurate, draw_inputs, poisoned_memory
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.support import DEVICE, on_device, run

IMPLEMENTATIONS = on_device("reference", "dense", "blocked", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
# The same examples in every run; shrinking is left out because one example takes seconds in Triton's interpreter.
repeatable = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@st.composite
def inputs_strategy(draw: st.DrawFn, largest_k: int = 310) -> Inputs:
    B, P, N = draw(st.integers(0, 3)), draw(st.integers(1, 300)), draw(st.integers(1, 5))
    C, D, S = draw(st.integers(1, 70)), draw(st.integers(8, 128)), draw(st.integers(1, 3))
    k = st.integers(1, min(P + 10, largest_k)) | st.integers(1, 20)
    row = st.lists(k, min_size=S, max_size=S) | st.lists(k, min_size=1, max_size=1)  # as many scales each, or one
    return draw_inputs(
        (B, P, N, C, D),
        draw(st.lists(row, min_size=N, max_size=N)),
        draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 2**31)),
        ties=draw(st.booleans()),
        contiguous=draw(st.booleans()),
        device=DEVICE,
    )


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
@pytest.mark.parametrize("impl", on_device("reference", "dense", "blocked"))
def test_error_rule(impl, inputs):
    check(inputs, impl)


@pytest.mark.interpreter
@given(inputs=inputs_strategy(largest_k=64))
@settings(repeatable, max_examples=20)
def test_error_rule_of_the_kernels(inputs):
    check(inputs, "triton")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024, 1, 3, 9), (2, 577, 1, 17, 100), (3, 64, 2, 65, 8), (1, 256, 1, 1, 64)])
def test_error_rule_of_the_kernels_at_the_borders(shape, dtype):
    check(draw_inputs(shape, [[7]] * shape[2], dtype, device=DEVICE), "triton")


@pytest.mark.interpreter
def test_equal_patches_of_several_chunks():
    # Larger ones of later chunks take the places of equal ones of earlier chunks.
    check(draw_inputs((2, 300, 1, 5, 4), [[20, 3]], torch.float32, ties=True, device=DEVICE), "triton")


def test_images_are_shared_out_to_programs(monkeypatch):
    monkeypatch.setattr(triton_launch, "PROGRAMS", 5)
    check(draw_inputs((5, 30, 2, 9, 8), [[3], [4]], torch.bfloat16, device=DEVICE), "triton")


@each_implementation
@pytest.mark.parametrize("shape", [(0, 5, 2, 3, 8), (2, 5, 2, 0, 8)])
def test_no_images_or_no_classes(impl, shape):
    inputs = draw_inputs(shape, [[2], [3]], torch.float32, device=DEVICE)
    values, *gradients = run(inputs, impl)
    assert values.shape == (shape[0], 2, shape[3])
    for gradient, like in zip(gradients, (inputs.patches, inputs.prompts), strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))


@pytest.mark.parametrize("impl", ["reference", "dense", "blocked"])
@pytest.mark.parametrize("k", [3, (1, 20), ((1, 4), (2, 7))])
def test_gradcheck(impl, k):
    inputs = draw_inputs((2, 7, 2, 3, 5), [[1], [1]], torch.float64)
    tensors = (inputs.patches.requires_grad_(), inputs.prompts.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, t: topk_similarity(v, t, k, impl=impl), tensors)


@each_implementation
def test_float64_stays_float64_or_is_refused(impl):
    inputs = draw_inputs((1, 4, 1, 2, 8), [[2]], torch.float64, device=DEVICE)
    if impl == "triton":
        with pytest.raises(ValueError, match=r"not torch\.float64"):
            run(inputs, impl)
    else:
        assert {tensor.dtype for tensor in run(inputs, impl)} == {torch.float64}


@each_implementation
@pytest.mark.parametrize(
    ("k", "share"),
    [
        (2, [0, 1, 0, 1, 0, 0]),
        (3, [0, 1, 0, 1, 0, 1]),
        (5, [1, 1, 1, 1, 0, 1]),
        (9, [1, 1, 1, 1, 1, 1]),
        ([[1, 4]], [0.25, 1.25, 0, 0.25, 0, 0.25]),
    ],
)
def test_among_equal_patches_the_first_receive_the_gradient(impl, k, share):
    patches = torch.tensor([1.0, 2, 1, 2, 1, 2], device=DEVICE)[None, :, None].repeat(1, 1, 8).requires_grad_()
    prompts = torch.ones(1, 1, 8, device=DEVICE)
    topk_similarity(patches, prompts, k, impl=impl).sum().backward()
    expected = torch.tensor(share, device=DEVICE) / (2 if isinstance(k, list) else min(k, 6))
    assert torch.allclose(patches.grad[0, :, 0], expected)


@each_implementation
@pytest.mark.parametrize("k", [1, 7, 63, 64])
def test_where_all_patches_are_equal_the_first_k_count(impl, k):
    patches = torch.ones(2, 65, 8, device=DEVICE, requires_grad=True)
    prompts = torch.ones(2, 3, 8, device=DEVICE)
    values = topk_similarity(patches, prompts, k, impl=impl)
    values.sum().backward()
    assert torch.equal(values, torch.full((2, 2, 3), 8.0, device=DEVICE))
    assert torch.equal(patches.grad[..., 0] != 0, (torch.arange(65, device=DEVICE) < k).expand(2, 65))


@each_implementation
@pytest.mark.parametrize(("dtype", "large"), [(torch.bfloat16, 256.0), (torch.float16, 2048.0), (torch.float32, 2.0)])
def test_selection_and_result_are_exact_in_float32(impl, dtype, large):
    # Both similarities are the same number in the low precision; in float32 the second is larger.
    patches = torch.tensor([[[large, 0.0], [large, 1.0]]], dtype=dtype, device=DEVICE, requires_grad=True)
    values = topk_similarity(patches, torch.ones(1, 1, 2, dtype=dtype, device=DEVICE), 1, impl=impl)
    values.backward()
    assert values.item() == large + 1
    assert values.dtype == torch.float32
    assert patches.grad[0, :, 0].tolist() == [0, 1]


@each_implementation
def test_similarities_below_zero_lose_to_no_padding(impl):
    patches = -torch.ones(1, 33, 8, device=DEVICE)
    values = topk_similarity(patches, torch.ones(1, 3, 8, device=DEVICE), 33, impl=impl)
    assert torch.equal(values, torch.full((1, 1, 3), -8.0, device=DEVICE))


@each_implementation
def test_every_prompt_has_its_k(impl):
    patches = torch.arange(1.0, 9, device=DEVICE)[None, :, None]
    values = topk_similarity(patches, torch.ones(4, 1, 1, device=DEVICE), [1, 2, 8, 100], impl=impl)
    assert values[0, :, 0].tolist() == [8, 7.5, 4.5, 4.5]
    scales = topk_similarity(patches, torch.ones(2, 1, 1, device=DEVICE), [[1, 2], [8, 1]], impl=impl)
    assert scales[0, :, 0].tolist() == [7.75, 6.25]


@each_implementation
def test_reduce_averages_over_the_prompts(impl):
    inputs = draw_inputs((2, 9, 3, 4, 8), [[1], [2], [3]], torch.float32, device=DEVICE)
    values = topk_similarity(inputs.patches, inputs.prompts, [1, 2, 3], impl=impl)
    mean = topk_similarity(inputs.patches, inputs.prompts, [1, 2, 3], reduce="mean", impl=impl)
    assert torch.equal(mean, values.mean(1))


@each_implementation
def test_permuting_classes_permutes_the_result(impl):
    inputs = draw_inputs((2, 50, 2, 70, 16), [[3], [60]], torch.float32, device=DEVICE)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    values = topk_similarity(inputs.patches, inputs.prompts, [3, 60], impl=impl)
    permuted = topk_similarity(inputs.patches, inputs.prompts[:, order], [3, 60], impl=impl)
    torch.testing.assert_close(permuted, values[:, :, order])


@pytest.mark.parametrize("impl", on_device("dense", "blocked", "triton"))
@pytest.mark.parametrize(("shape", "k"), [((4, 50, 2, 20, 64), [[3], [20]]), ((4, 33, 1, 7, 512), [[1]])])
def test_results_are_the_same_bits_in_every_run_and_in_every_batch(impl, shape, k):
    inputs = draw_inputs(shape, k, torch.float32, device=DEVICE)
    values, of_patches, of_prompts = run(inputs, impl)
    again = run(inputs, impl)
    assert all(map(torch.equal, (values, of_patches, of_prompts), again))
    parts = [
        run(Inputs(inputs.patches[part], inputs.prompts, inputs.k, inputs.grad[part]), impl)
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert torch.equal(torch.cat([part[0] for part in parts]), values)
    assert torch.equal(torch.cat([part[1] for part in parts]), of_patches)


@each_implementation
@pytest.mark.parametrize(("P", "k"), [(9, 4), (70, 1), (70, 16), (300, 4)])
def test_not_a_number_in_gives_not_a_number_out_for_its_image_alone(impl, P, k):
    inputs = draw_inputs((2, P, 1, 3, 8), [[k]], torch.float32, device=DEVICE)
    inputs.patches[0, 7] = torch.nan
    inputs.grad[0] = 1
    values, of_patches, of_prompts = run(inputs, impl)
    assert values[0].isnan().all()
    assert values[1].isfinite().all()
    assert of_patches[1].isfinite().all()
    assert of_prompts.isnan().all()


@pytest.mark.parametrize("k", [2, [3, 1], [[1, 3], [5, 2]], 50])
def test_selected_patches_are_those_that_receive_gradient(k):
    inputs = draw_inputs((2, 20, 2, 3, 8), [[1], [1]], torch.float32, ties=True)
    selected = selected_patches(inputs.patches, inputs.prompts, k)
    assert selected.shape == (2, 2, 3, 20)
    for n in range(2):
        for c in range(3):
            patches = inputs.patches.clone().requires_grad_()
            topk_similarity(patches, inputs.prompts, k)[:, n, c].sum().backward()
            assert torch.equal(selected[:, n, c], (patches.grad != 0).any(-1))


def test_offsets_beyond_2_to_31():
    # The stride fits 32 bits, its double does not. Untouched pages of the large storage take no memory.
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((3, 20, 16), (2**30, 16, 1))
    near = draw_inputs((3, 20, 1, 3, 16), [[4]], torch.float16, device=DEVICE)
    far.copy_(near.patches)
    assert all(map(torch.equal, run(near, "triton"), run(Inputs(far, near.prompts, near.k, near.grad), "triton")))


def test_the_index_type_follows_the_largest_offset(monkeypatch):
    def index_dtype(size, stride):
        return str(triton_launch.index_dtype(torch.empty(8), torch.empty_strided(size, stride, device="meta")))

    assert index_dtype((2**16, 2**15), (2**15, 1)) == "int32"
    assert index_dtype((2**16, 2**15 + 1), (2**15 + 1, 1)) == "int64"
    assert index_dtype((2, 2), (2**31 - 1, 1)) == "int64"
    inputs = draw_inputs((2, 150, 2, 5, 8), [[3], [4]], torch.float32, device=DEVICE)
    expected = run(inputs, "triton")
    monkeypatch.setattr(triton_launch, "INT32_REACH", 0)
    assert triton_launch.index_dtype(inputs.patches) == tl.int64
    assert all(map(torch.equal, run(inputs, "triton"), expected))
