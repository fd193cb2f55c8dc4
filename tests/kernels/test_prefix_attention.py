"""prefix_attention: every implementation against the float64 reference by the error rule."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from fastprompt_kernels import prefix_attention
from fastprompt_kernels.prefix_attention import blocked
from fastprompt_kernels.prefix_attention.reference import visible_tokens
from fastprompt_kernels.testing import BAND, assert_as_accurate, poisoned_memory
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAST = ["sdpa", "blocked", "triton"]
each_implementation = pytest.mark.parametrize("impl", ["reference", *FAST])
each_fast_one = pytest.mark.parametrize("impl", FAST)


@dataclass(frozen=True)
class Inputs:
    """Arguments of prefix_attention, and the gradient of its result.

    Attributes:
        tokens: (G, T, 3 or 2, H, d).
        queries: (G, rows * E, H, d), or None.
        sequence: (rows, width).
        slots: (rows, E), or None.
        grad: (G, T or rows * E, H * d).
    """

    tokens: torch.Tensor
    queries: torch.Tensor | None
    sequence: torch.Tensor
    slots: torch.Tensor | None
    grad: torch.Tensor


def supported(impl: str, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype, or float16 where the implementation does not take it."""
    return torch.float16 if impl == "triton" and dtype.itemsize != 2 else dtype


def draw(G, S, rows, width, H, d, dtype, *, E=0, seed=0, contiguous=True) -> Inputs:
    """Random inputs; a row has sequences of 1 to 9 slots, and each tenth slot or so is empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        tensor = torch.randn(size, generator=generator).to(DEVICE, dtype)
        return tensor if contiguous else tensor.transpose(0, 1).contiguous().transpose(0, 1)

    sequence = torch.arange(rows * width).view(rows, width) // (1 + seed % 9)
    empty = torch.rand(rows, width, generator=generator) < 0.1
    sequence = torch.where(empty, -1 - torch.arange(width), sequence).to(DEVICE)
    slots = torch.randint(width, (rows, E), generator=generator).to(DEVICE) if E else None
    tokens = normal(G, S + rows * width, 2 if E else 3, H, d)
    queries = normal(G, rows * E, H, d) if E else None
    return Inputs(tokens, queries, sequence, slots, normal(G, (queries if E else tokens).shape[1], H * d))


@st.composite
def inputs_strategy(draw_one: st.DrawFn) -> Inputs:
    G, S, rows, width, H, d, E = (
        draw_one(st.integers(*bounds)) for bounds in ((0, 3), (1, 20), (1, 3), (1, 40), (1, 3), (1, 64), (0, 9))
    )
    dtype, seed = draw_one(st.sampled_from(DTYPES)), draw_one(st.integers(0, 2**31))
    return draw(G, S, rows, width, H, d, dtype, E=E, seed=seed, contiguous=draw_one(st.booleans()))


def run(inputs: Inputs, impl: str, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """The result and the gradients of tokens and queries, in another dtype if one is given."""
    given = [tensor for tensor in (inputs.tokens, inputs.queries) if tensor is not None]
    tokens, *queries = (tensor.to(dtype or tensor.dtype).detach().requires_grad_() for tensor in given)
    keywords = {"queries": queries[0], "slots": inputs.slots} if queries else {}
    result = prefix_attention(tokens, inputs.sequence, impl=impl, **keywords)
    return [result.detach(), *torch.autograd.grad(result, (tokens, *queries), inputs.grad.to(result.dtype))]


def sizes(inputs: Inputs) -> list[torch.Tensor]:
    """For every result the sum of the absolute values of the terms that make it up, float64.

    A score is wrong by float32 rounding of its terms, and so is the logarithm of its probability.
    """
    (rows, width), (_, T, _, H, d) = inputs.sequence.shape, inputs.tokens.shape
    shared = T - rows * width
    visible = visible_tokens(inputs.sequence, shared)
    q = inputs.tokens[:, :, 0].double()
    if inputs.slots is not None:
        first = shared + width * torch.arange(rows, device=DEVICE)[:, None]
        visible, q = visible[(first + inputs.slots).flatten()], inputs.queries.double()
    k, v = inputs.tokens[:, :, -2:].double().unbind(2)
    grad = inputs.grad.double().unflatten(2, (H, d))
    p = (torch.einsum("gqhd,gkhd->ghqk", q, k) * d**-0.5).masked_fill(~visible, -torch.inf).softmax(-1)
    terms = (torch.einsum("gqhd,gkhd->ghqk", q.abs(), k.abs()) * d**-0.5 * visible).amax(-1, keepdim=True)
    ratio = torch.finfo(torch.float32).eps / torch.finfo(inputs.tokens.dtype).eps
    unsure = 1 + 2 * ratio * terms
    of_p = torch.einsum("gqhd,gkhd->ghqk", grad.abs(), v.abs())
    of_scores = unsure * p * (of_p + (p * of_p).sum(-1, keepdim=True)) * d**-0.5
    result = torch.einsum("ghqk,gkhd->gqhd", unsure * p, v.abs()).flatten(2)
    of_q = torch.einsum("ghqk,gkhd->gqhd", of_scores, k.abs())
    of_k = torch.einsum("ghqk,gqhd->gkhd", of_scores, q.abs())
    of_v = torch.einsum("ghqk,gqhd->gkhd", unsure * p, grad.abs())
    if inputs.queries is None:
        return [result, torch.stack([of_q, of_k, of_v], 2)]
    return [result, torch.stack([of_k, of_v], 2), of_q]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    queries = None if inputs.queries is None else inputs.queries.to(dtype)
    return replace(inputs, tokens=inputs.tokens.to(dtype), queries=queries, grad=inputs.grad.to(dtype))


def check(inputs: Inputs, impl: str) -> None:
    inputs = cast(inputs, supported(impl, inputs.tokens.dtype))
    oracle, plain = run(inputs, "reference", torch.float64), run(inputs, "reference")
    with poisoned_memory():
        actual = run(inputs, impl)
    names = ("result", "tokens.grad", "queries.grad")
    for what, *tensors in zip(names, actual, plain, oracle, sizes(inputs), strict=False):
        assert_as_accurate(*tensors, what=what)


@each_fast_one
@given(inputs=inputs_strategy())
@settings(
    max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_error_rule(impl, inputs):
    check(inputs, impl)


# One token behind a prefix of one; a full row; odd d; a prefix longer than the rows. The last is too large for Triton.
@each_fast_one
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 8), (1, 5, 2, 64, 1, 64), (2, 3, 2, 7, 2, 15), (1, 64, 2, 9, 1, 8), (1, 70, 1, 129, 1, 96)],
)
@pytest.mark.parametrize("E", [0, 3])
def test_error_rule_at_the_borders(impl, shape, E, dtype):
    if impl == "triton" and max(shape[1], shape[3], shape[5]) > 64:
        pytest.skip("larger than the tiles of the kernels")
    check(draw(*shape, dtype, E=E, seed=3), impl)


@pytest.mark.parametrize("E", [0, 5])
def test_error_rule_of_small_tiles(monkeypatch, E):
    monkeypatch.setattr(blocked, "SLOTS", 30)
    check(draw(3, 4, 7, 12, 4, 8, torch.float32, E=E, seed=2), "blocked")


@pytest.mark.parametrize("impl", ["reference", "sdpa", "blocked"])
@pytest.mark.parametrize("E", [0, 2])
def test_gradcheck(impl, E):
    inputs = draw(2, 2, 2, 5, 2, 3, torch.float64, E=E, seed=2)
    tokens = inputs.tokens.requires_grad_()
    queries = () if inputs.queries is None else (inputs.queries.requires_grad_(),)

    def function(tokens, queries=None):
        return prefix_attention(tokens, inputs.sequence, queries=queries, slots=inputs.slots, impl=impl)

    assert torch.autograd.gradcheck(function, (tokens, *queries))


@each_implementation
def test_every_sequence_is_that_of_causal_attention_behind_the_prefix(impl):
    """Sequences of 1, 2, 3 and 4 slots, of which the third is scattered over its row, and two empty slots."""
    S, sequence = 3, torch.tensor([[7, 2, -1, 2, 5, 2], [9, 9, 9, -1, 9, 4]], device=DEVICE)
    tokens = torch.randn(2, S + 12, 3, 2, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, supported(impl))
    result = prefix_attention(tokens, sequence, impl=impl)
    for row, number in {(r, int(n)) for r in (0, 1) for n in sequence[r]}:
        slots = S + 6 * row + (sequence[row] == number).nonzero()[:, 0]
        alone = torch.cat([torch.arange(S, device=DEVICE), slots])
        q, k, v = tokens[:, alone].permute(2, 0, 3, 1, 4)
        expected = F.scaled_dot_product_attention(*(tensor.double() for tensor in (q, k, v)), is_causal=True)
        allowed = BAND * torch.finfo(tokens.dtype).eps * v.abs().max().item()
        torch.testing.assert_close(result[:, alone].double(), expected.transpose(1, 2).flatten(2), rtol=0, atol=allowed)


@each_implementation
def test_queries_in_slots_equal_those_of_all(impl):
    inputs = draw(2, 4, 3, 10, 2, 8, supported(impl), seed=3)
    slots = torch.tensor([[9, 0, 4], [3, 3, 8], [5, 6, 7]], device=DEVICE)
    chosen = (4 + 10 * torch.arange(3, device=DEVICE)[:, None] + slots).flatten()
    whole = prefix_attention(inputs.tokens, inputs.sequence, impl=impl)
    queries, keys = inputs.tokens[:, chosen, 0], inputs.tokens[:, :, 1:]
    some = prefix_attention(keys, inputs.sequence, queries=queries, slots=slots, impl=impl)
    torch.testing.assert_close(some, whole[:, chosen])


@each_implementation
@pytest.mark.parametrize("E", [0, 3])
def test_no_groups(impl, E):
    inputs = draw(0, 3, 2, 7, 2, 8, supported(impl), E=E)
    result, *grads = run(inputs, impl)
    assert result.shape == inputs.grad.shape
    assert [grad.shape for grad in grads] == [t.shape for t in (inputs.tokens, inputs.queries) if t is not None]


@each_implementation
@pytest.mark.parametrize("level", [-3e4, 3e4])
def test_large_scores(impl, level):
    """The exponential of any of these scores is 0 or infinite."""
    tokens = torch.ones(1, 3 + 8, 3, 1, 4, device=DEVICE, dtype=supported(impl))
    tokens[:, :, 0] = level
    tokens[:, :, 2] = torch.arange(11, device=DEVICE)[:, None, None]
    result = prefix_attention(tokens, torch.zeros(1, 8, dtype=torch.long, device=DEVICE), impl=impl)
    torch.testing.assert_close(result[0, :, 0], (torch.arange(11, device=DEVICE) / 2).to(result.dtype))


@each_implementation
def test_scores_are_accumulated_in_float32(impl):
    """Scores of 257 and 256, which are equal in bfloat16."""
    tokens = torch.zeros(1, 2, 3, 1, 2, dtype=torch.bfloat16, device=DEVICE)
    tokens[0, 1, 0, 0] = torch.tensor([256.0, 1.0]) * 2**0.5
    tokens[0, :, 1, 0] = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    tokens[0, :, 2, 0] = torch.tensor([[1.0], [0.0]])
    result = prefix_attention(tokens, torch.zeros(1, 1, dtype=torch.long, device=DEVICE), impl=impl)
    assert abs(result[0, 1, 0].item() - torch.sigmoid(torch.tensor(1.0)).item()) < 4e-3


@each_implementation
def test_not_a_number_shows_in_its_group_and_head_and_nowhere_else(impl):
    inputs = draw(2, 3, 2, 7, 2, 4, supported(impl), seed=3)
    inputs.tokens[0, 5, 0, 1] = torch.nan
    result = prefix_attention(inputs.tokens, inputs.sequence, impl=impl)
    assert result.isnan().nonzero().tolist() == [[0, 5, d] for d in (4, 5, 6, 7)]


@each_fast_one
@pytest.mark.parametrize("E", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bits_in_every_run_and_in_every_batch(monkeypatch, impl, E, dtype):
    monkeypatch.setattr(blocked, "SLOTS", 64)
    inputs = draw(3, 5, 3, 32, 1, 16, supported(impl, dtype), E=E, seed=3)
    whole = run(inputs, impl)
    assert all(map(torch.equal, whole, run(inputs, impl)))
    parts = []
    for part in (slice(0, 1), slice(1, 3)):
        queries = None if inputs.queries is None else inputs.queries[part]
        parts.append(run(replace(inputs, tokens=inputs.tokens[part], queries=queries, grad=inputs.grad[part]), impl))
    assert all(torch.equal(torch.cat(pair), tensor) for *pair, tensor in zip(*parts, whole, strict=True))


def test_nothing_but_the_inputs_is_kept():
    inputs = draw(2, 3, 2, 7, 2, 8, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda tensor: tensor):
        prefix_attention(inputs.tokens.requires_grad_(), inputs.sequence)
    assert kept == [inputs.tokens.data_ptr(), inputs.sequence.data_ptr()]
