"""patch_statistics: every implementation against the float64 reference by the error rule."""

from dataclasses import replace
from math import log

import pytest
import torch
from fastprompt_kernels import patch_statistics
from fastprompt_kernels.patch_statistics import blocked
from fastprompt_kernels.testing import StatisticsInputs, assert_as_accurate, draw_statistics_inputs, poisoned_memory
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_implementation = pytest.mark.parametrize("impl", ["reference", "blocked", "triton"])
each_fast_one = pytest.mark.parametrize("impl", ["blocked", "triton"])


@st.composite
def inputs_strategy(draw: st.DrawFn) -> StatisticsInputs:
    shape = tuple(draw(st.integers(*bounds)) for bounds in ((0, 4), (1, 150), (1, 300), (3, 70)))
    return draw_statistics_inputs(
        shape,
        draw(st.sampled_from(DTYPES)),
        scale=draw(st.sampled_from([0.1, 1.0, 7.3])),
        seed=draw(st.integers(0, 2**31)),
        ties=draw(st.booleans()),
        contiguous=draw(st.booleans()),
        device=DEVICE,
    )


def run(inputs: StatisticsInputs, impl: str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
    """The four statistics and both gradients, in another dtype if one is given."""
    patches, prompts = (t.to(dtype or t.dtype).detach().requires_grad_() for t in (inputs.patches, inputs.prompts))
    statistics = patch_statistics(patches, prompts, scale=inputs.scale, labels=inputs.labels, impl=impl)
    grads = [grad.to(statistics.entropy.dtype) for grad in inputs.grads]
    gradients = torch.autograd.grad(statistics[:3], (patches, prompts), grads)
    return *(tensor.detach() for tensor in statistics), *gradients


def sizes(inputs: StatisticsInputs) -> list[torch.Tensor]:
    """For every result the size of what is rounded on the way to it, in units of its own precision, float64.

    A logit is wrong by float32 rounding of its terms; its error reaches a statistic times the derivative.
    """
    left, right, scale = inputs.patches.double(), inputs.prompts.double(), inputs.scale
    z = (scale * left @ right.T).log_softmax(-1)
    p = z.exp()
    entropy = -(p * z).sum(-1, keepdim=True)
    terms = (scale * left.abs() @ right.abs().T).amax(-1, keepdim=True)
    spread = (p * (z + entropy).abs() * (1 + z.abs() + terms)).sum(-1)
    of_maximum, of_logsumexp, of_entropy = (grad.double().abs()[..., None] for grad in inputs.grads)
    ratio = torch.finfo(torch.float32).eps / torch.finfo(inputs.patches.dtype).eps
    weights = p * (of_logsumexp + of_entropy * (z.abs() + entropy)) * (1 + ratio * 2 * terms)
    weights = scale * (weights + of_maximum * (z == z.amax(-1, keepdim=True)))
    logs = log(len(right)) + terms.squeeze(-1)
    return [
        terms.squeeze(-1),
        logs,
        spread + log(len(right)),
        weights @ right.abs(),
        torch.einsum("bpc,bpd->cd", weights, left.abs()),
    ]


def check(inputs: StatisticsInputs, impl: str) -> None:
    *oracle, of_patches, of_prompts = run(inputs, "reference", torch.float64)
    *plain, plain_patches, plain_prompts = run(inputs, "reference")
    with poisoned_memory():
        *actual, grad_patches, grad_prompts = run(inputs, impl)
    names = ("maximum", "logsumexp", "entropy", "patches.grad", "prompts.grad")
    results = (*actual[:3], grad_patches, grad_prompts), (*plain[:3], plain_patches, plain_prompts)
    for what, *tensors in zip(names, *results, (*oracle[:3], of_patches, of_prompts), sizes(inputs), strict=True):
        assert_as_accurate(*tensors, what=what)
    check_rank(inputs, actual[3])


def check_rank(inputs: StatisticsInputs, rank: torch.Tensor) -> None:
    """Exact, but for classes so close to the label that rounding decides."""
    logits = inputs.patches.double() @ inputs.prompts.double().T
    band = 4 * torch.finfo(torch.float32).eps * (inputs.patches.double().abs() @ inputs.prompts.double().abs().T)
    label, classes = inputs.labels[:, None, None], torch.arange(logits.shape[-1], device=DEVICE)
    distance = logits - logits.gather(-1, label.expand(*logits.shape[:2], 1))
    close = (distance.abs() <= band) & (distance != 0)
    ahead = (distance > 0) | ((distance == 0) & (classes < label))
    assert rank.dtype == torch.int64
    assert ((rank >= (ahead & ~close).sum(-1)) & (rank <= (ahead | close).sum(-1))).all()


@each_fast_one
@given(inputs=inputs_strategy())
@settings(
    max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_error_rule(impl, inputs):
    check(inputs, impl)


# One class; many images in a tile; one patch; as many classes as a tile holds; D and the sum cut into parts.
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 1, 8), (150, 1, 3, 20), (1, 1, 257, 9), (2, 64, 128, 64), (1, 100, 5, 530)])
def test_error_rule_of_the_kernels_at_the_borders(shape, dtype):
    check(draw_statistics_inputs(shape, dtype, device=DEVICE), "triton")


@pytest.mark.parametrize("impl", ["reference", "blocked"])
@pytest.mark.parametrize("statistic", [0, 1, 2])
def test_gradcheck(impl, statistic):
    inputs = draw_statistics_inputs((2, 3, 5, 4), torch.float64)

    def function(patches, prompts):
        return patch_statistics(patches, prompts, scale=0.7, impl=impl)[statistic]

    assert torch.autograd.gradcheck(function, (inputs.patches.requires_grad_(), inputs.prompts.requires_grad_()))


@each_implementation
def test_no_images(impl):
    inputs = draw_statistics_inputs((0, 5, 3, 8), torch.float32, device=DEVICE)
    *statistics, of_patches, of_prompts = run(inputs, impl)
    assert [tuple(tensor.shape) for tensor in statistics] == [(0, 5)] * 4
    assert of_patches.shape == (0, 5, 8)
    assert torch.equal(of_prompts, torch.zeros(3, 8, device=DEVICE))


@each_implementation
def test_by_hand(impl):
    patches = torch.tensor([[[1.0, 0], [0, 0]]], device=DEVICE)
    prompts = torch.tensor([[log(2), 0], [0, 1], [log(2), 5]], device=DEVICE)
    statistics = patch_statistics(patches, prompts, scale=2.0, labels=torch.tensor([1], device=DEVICE), impl=impl)
    expected = [[2 * log(2), 0], [log(9), log(3)], [log(9) - 8 / 9 * log(4), log(3)]]
    torch.testing.assert_close(torch.stack(statistics[:3])[:, 0], torch.tensor(expected, device=DEVICE))
    assert statistics.rank.tolist() == [[2, 1]]
    assert patch_statistics(patches, prompts, impl=impl).rank is None


@each_implementation
@pytest.mark.parametrize("C", [3, 200])
def test_among_equal_classes_the_first_comes_first(impl, C):
    """Rank and the gradient of the maximum, where the largest logit is that of class 1 and of every later one."""
    prompts = torch.full((C, 8), 2.0, device=DEVICE)
    prompts[0] = 1
    prompts.requires_grad_()
    labels = torch.tensor([0, 1, C - 1], device=DEVICE)
    statistics = patch_statistics(torch.ones(3, 5, 8, device=DEVICE), prompts, labels=labels, impl=impl)
    statistics.maximum.sum().backward()
    assert statistics.rank.tolist() == [[C - 1] * 5, [0] * 5, [C - 2] * 5]
    assert prompts.grad[:, 0].tolist() == [0, 15] + [0] * (C - 2)


@each_implementation
@pytest.mark.parametrize("level", [-3e4, 3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits(impl, level, dtype):
    """The exponential of any of these logits is 0 or infinite."""
    patches = torch.ones(2, 3, 1, dtype=dtype, device=DEVICE, requires_grad=True)
    prompts = torch.full((5, 1), level, dtype=dtype, device=DEVICE, requires_grad=True)
    statistics = patch_statistics(patches, prompts, impl=impl)
    (statistics.maximum + statistics.logsumexp + statistics.entropy).sum().backward()
    exact = prompts[0].item()
    torch.testing.assert_close(statistics.logsumexp, torch.full((2, 3), exact + log(5), device=DEVICE))
    torch.testing.assert_close(statistics.entropy, torch.full((2, 3), log(5), device=DEVICE), rtol=0, atol=4e-3)
    torch.testing.assert_close(patches.grad, torch.full_like(patches, 2 * exact), rtol=2e-2, atol=0)
    torch.testing.assert_close(prompts.grad[:, 0].float().cpu(), torch.tensor([7.2] + [1.2] * 4), rtol=1e-2, atol=0)


@each_implementation
@pytest.mark.parametrize("first", [-1.0, 1.0])
def test_logits_of_minus_infinity_have_no_probability(monkeypatch, impl, first):
    """Whole tiles of them too, before and after the others."""
    monkeypatch.setattr(blocked, "TILE_BYTES", 2 * 100 * 4)
    prompts = torch.full((600, 1), -torch.inf if first > 0 else 0.0, device=DEVICE)
    prompts[:300] = 0.0 if first > 0 else -torch.inf
    labels = torch.tensor([299], device=DEVICE)
    statistics = patch_statistics(torch.ones(1, 2, 1, device=DEVICE), prompts, labels=labels, impl=impl)
    torch.testing.assert_close(statistics.logsumexp, torch.full((1, 2), log(300), device=DEVICE))
    torch.testing.assert_close(statistics.entropy, torch.full((1, 2), log(300), device=DEVICE))
    assert statistics.maximum.tolist() == [[0, 0]]
    assert statistics.rank.tolist() == [[299 if first > 0 else 599] * 2]
    nothing = patch_statistics(torch.ones(1, 2, 1, device=DEVICE), prompts[prompts < 0, None], impl=impl)
    assert nothing.maximum.tolist() == nothing.logsumexp.tolist() == [[-torch.inf] * 2]


@each_implementation
def test_not_a_number_shows_where_it_is_and_nowhere_else(impl):
    inputs = draw_statistics_inputs((2, 9, 5, 8), torch.float32, device=DEVICE)
    inputs.patches[0, 2] = torch.nan
    for statistic in patch_statistics(inputs.patches, inputs.prompts, impl=impl)[:3]:
        assert statistic.isnan().nonzero().tolist() == [[0, 2]]


@each_implementation
def test_products_are_accumulated_in_float32(impl):
    patches = torch.tensor([[[256.0, 1.0]]], dtype=torch.bfloat16, device=DEVICE)
    statistics = patch_statistics(patches, torch.ones(2, 2, dtype=torch.bfloat16, device=DEVICE), impl=impl)
    assert statistics.maximum.item() == 257
    assert {tensor.dtype for tensor in statistics[:3]} == {torch.float32}


@each_fast_one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "shape", [(4, 50, 150, 64), (4, 7, 33, 512)]
)  # the latter divides no block of matrix libraries
def test_results_are_the_same_bits_in_every_run_and_in_every_batch(impl, shape, dtype):
    inputs = draw_statistics_inputs(shape, dtype, scale=0.3, device=DEVICE)
    # Gradients of very different sizes, so that a unit taken from the whole batch would show in float16.
    inputs = replace(inputs, grads=tuple(g * torch.logspace(-6, 0, 4, device=DEVICE)[:, None] for g in inputs.grads))
    whole = run(inputs, impl)
    assert all(map(torch.equal, whole, run(inputs, impl)))
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        grads = tuple(grad[part] for grad in inputs.grads)
        parts.append(run(StatisticsInputs(inputs.patches[part], inputs.prompts, 0.3, inputs.labels[part], grads), impl))
    assert all(torch.equal(torch.cat(pair), tensor) for *pair, tensor in zip(*parts, whole[:5], strict=False))


@pytest.mark.parametrize("size", [2.0**-20, 2.0**20])
def test_gradients_that_float16_cannot_hold_on_the_way(size):
    inputs = draw_statistics_inputs((2, 9, 300, 16), torch.float16, scale=0.25, device=DEVICE)
    shift = 2**8 if size < 1 else 2**-8  # leaves the logits as they are, and brings the result back into range
    patches, prompts = inputs.patches / shift, inputs.prompts * shift
    inputs = replace(inputs, patches=patches, prompts=prompts, grads=tuple(grad * size for grad in inputs.grads))
    of_patches = run(inputs, "triton")[4]
    expected = run(inputs, "reference", torch.float64)[4]
    assert ((of_patches.double() - expected).norm() / expected.norm()).item() < 1e-3


class Seen(TorchDispatchMode):
    """Notes the shapes of what the operators of patch_statistics return, sizes and addresses of all that is made."""

    def __init__(self):
        super().__init__()
        self.shapes = {}
        self.sizes = []
        self.places = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [
            t for t in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(t, torch.Tensor)
        ]
        self.sizes += [tensor.numel() for tensor in tensors if tensor.is_floating_point()]
        self.places += [(tensor.data_ptr(), tensor.numel()) for tensor in tensors]
        if func.name().startswith("fastprompt::"):
            self.shapes[func.name()] = [tuple(tensor.shape) for tensor in tensors]
        return result


@each_fast_one
@pytest.mark.parametrize("wanted", ["patches", "prompts", None])
def test_only_what_is_asked_for_is_made(impl, wanted):
    inputs = draw_statistics_inputs((2, 9, 3, 8), torch.float32, device=DEVICE)
    if wanted:
        getattr(inputs, wanted).requires_grad_()
    with Seen() as seen:
        statistics = patch_statistics(inputs.patches, inputs.prompts, impl=impl)
        if wanted:
            statistics.entropy.sum().backward()
    largest_and_kept = [(2, 9), (2, 9, 3) if impl == "blocked" else (0,)] if wanted else [(0,), (0,)]
    assert seen.shapes["fastprompt::patch_statistics"][3:] == [(0,), *largest_and_kept]
    expected = {"patches": [(2, 9, 8), (0,)], "prompts": [(0,), (3, 8)], None: None}[wanted]
    assert seen.shapes.get("fastprompt::patch_statistics_grad") == expected


def test_offsets_beyond_2_to_31():
    # The stride fits 32 bits, its double does not. Untouched pages of the large storage take no memory.
    storage = torch.empty(2**31 + 4096, dtype=torch.float16, device=DEVICE)
    far = storage.as_strided((3, 20, 8), (2**30, 8, 1))
    near = draw_statistics_inputs((3, 20, 5, 8), torch.float16, device=DEVICE)
    far.copy_(near.patches)
    assert all(map(torch.equal, run(near, "triton"), run(replace(near, patches=far), "triton")))
