"""prefix_attention inside torch (checks, compile, export, autocast, functional gradients) and its arguments."""

import pytest
import torch
from fastprompt_kernels import prefix_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPAQUE = ["blocked", "triton"]
each_implementation = pytest.mark.parametrize("impl", ["reference", "sdpa", *OPAQUE])
TOKENS, SEQUENCE, SLOTS = torch.ones(2, 11, 3, 2, 4), torch.arange(8).view(2, 4) // 2, torch.tensor([[1, 3], [0, 3]])
QUERIES = torch.ones(2, 4, 2, 4)
KEYWORDS = {"queries": QUERIES, "slots": SLOTS}


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


def make_inputs(G=2, impl="blocked"):
    """Tokens, keys and values, queries, in float32 where the implementation takes it; sequence and slots."""
    dtype = torch.bfloat16 if impl == "triton" else torch.float32
    generator = torch.Generator().manual_seed(G)
    tensors = (torch.randn(G, *shape, generator=generator) for shape in ((11, 3, 2, 4), (11, 2, 2, 4), (4, 2, 4)))
    floats = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in tensors]
    return *floats, SEQUENCE.to(DEVICE), SLOTS.to(DEVICE)


def both(tokens, keys, queries, sequence, slots, impl):
    """All tokens ask, then some slots."""
    return torch.cat([
        prefix_attention(tokens, sequence, impl=impl),
        prefix_attention(keys, sequence, queries=queries, slots=slots, impl=impl),
    ], 1)  # fmt: skip


def assert_same(actual, expected, inputs):
    assert torch.equal(actual, expected)
    grad = torch.linspace(-1, 1, actual.numel(), device=DEVICE).view(actual.shape).to(actual.dtype)
    pairs = zip(*(torch.autograd.grad(result, inputs[:3], grad) for result in (actual, expected)), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.parametrize("impl", OPAQUE)
def test_opcheck(impl):
    tokens, keys, queries, sequence, slots = (tensor.detach() for tensor in make_inputs(impl=impl))
    for arguments in ((tokens, None, sequence, None, impl), (keys, queries, sequence, slots, impl)):
        torch.library.opcheck(torch.ops.fastprompt.prefix_attention.default, arguments)
        grad = torch.ops.fastprompt.prefix_attention(*arguments)
        torch.library.opcheck(torch.ops.fastprompt.prefix_attention_grad.default, (grad, *arguments))


@pytest.mark.compile
@pytest.mark.parametrize(("impl", "dynamic"), [("sdpa", False), *((impl, d) for impl in OPAQUE for d in (False, True))])
def test_compiled_equals_eager(impl, dynamic):
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for G in (2, 3):
        inputs = make_inputs(G, impl)
        assert_same(compiled(*inputs, impl), both(*inputs, impl), inputs)


@each_implementation
def test_exported_equals_eager(impl):
    class Attention(torch.nn.Module):
        def forward(self, *inputs):
            return both(*inputs, impl)

    inputs = tuple(tensor.detach() for tensor in make_inputs(impl=impl))
    assert torch.equal(torch.export.export(Attention(), inputs).module()(*inputs), both(*inputs, impl))


@each_implementation
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_inputs_and_nothing_inside(impl, compiled):
    inputs = make_inputs()
    function = torch.compile(both, fullgraph=True, backend="aot_eager") if compiled else both
    expected = both(*(tensor.bfloat16() for tensor in inputs[:3]), *inputs[3:], impl)
    assert expected.dtype == torch.bfloat16
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_same(function(*inputs, impl), expected, inputs)
        double = prefix_attention(inputs[0].double(), inputs[3], impl="reference")
    assert double.dtype == torch.float64


@each_implementation
def test_functional_gradient_equals_that_of_autograd(impl):
    tokens, *rest = make_inputs(impl=impl)

    def loss(tokens):
        return both(tokens, *(tensor.detach() for tensor in rest), impl).square().sum()

    assert torch.equal(torch.func.grad(loss)(tokens.detach()), torch.autograd.grad(loss(tokens), tokens)[0])


@pytest.mark.parametrize("impl", OPAQUE)
def test_second_gradient_is_refused(impl):
    tokens, _, _, sequence, _ = make_inputs(impl=impl)
    first = torch.autograd.grad(prefix_attention(tokens, sequence, impl=impl).sum(), tokens, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated again with impl='reference' only"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        (
            torch.float32,
            (1, 9, 3, 1, 8),
            "the kernels of prefix_attention take float16 and bfloat16, not torch.float32",
        ),
        (torch.float64, (1, 9, 3, 1, 8), "float64"),
        (torch.float16, (1, 9, 3, 1, 65), r"S, width and d of up to 64 in their tiles, not \(1, 4, 65\)"),
        (torch.float16, (1, 73, 3, 1, 8), r"not \(65, 4, 8\)"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_and_auto_runs_without_them(dtype, shape, reason):
    tokens = torch.ones(shape, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"impl='triton' cannot run here: .*{reason}"):
        prefix_attention(tokens, SEQUENCE.to(DEVICE), impl="triton")
    assert torch.equal(prefix_attention(tokens, SEQUENCE.to(DEVICE)), torch.ones(1, shape[1], shape[-1]).to(tokens))


@pytest.mark.parametrize(
    ("tokens", "sequence", "keywords", "error", "sentence"),
    [
        (TOKENS.long(), SEQUENCE, {}, TypeError, "tokens must be a floating-point tensor, got torch.int64"),
        ([1.0], SEQUENCE, {}, TypeError, "tokens must be a floating-point tensor, got list"),
        (TOKENS[0], SEQUENCE, {}, ValueError, r"tokens must have shape \(G, T, 3, H, d\) .*, got \(11, 3, 2, 4\)"),
        (TOKENS[:, :, 1:], SEQUENCE, {}, ValueError, r"tokens must have shape \(G, T, 3, H, d\)"),
        (TOKENS[..., :0], SEQUENCE, {}, ValueError, "with H and d at least 1"),
        (TOKENS, SEQUENCE, KEYWORDS, ValueError, r"tokens must have shape \(G, T, 2, H, d\)"),
        (TOKENS, SEQUENCE.float(), {}, TypeError, "sequence must be a tensor of integers, got torch.float32"),
        (TOKENS, SEQUENCE[0], {}, ValueError, r"sequence must have shape \(rows, width\) .*, got \(4,\)"),
        (TOKENS, SEQUENCE.to("meta"), {}, ValueError, "tokens and sequence must be on one device, got cpu and meta"),
        (
            TOKENS[:, :8],
            SEQUENCE,
            {},
            ValueError,
            "tokens must hold a prefix and the 8 slots of sequence, got 8 tokens",
        ),
        (TOKENS, SEQUENCE, {"slots": SLOTS}, ValueError, "queries and slots must be given together"),
        (TOKENS[:, :, 1:], SEQUENCE, {"queries": QUERIES}, ValueError, "queries and slots must be given together"),
        (TOKENS[:, :, 1:], SEQUENCE, {**KEYWORDS, "queries": QUERIES.half()}, TypeError, "must have one dtype"),
        (TOKENS[:, :, 1:], SEQUENCE, {**KEYWORDS, "queries": [1.0]}, TypeError, "queries must be a floating-point"),
        (
            TOKENS[:, :, 1:],
            SEQUENCE,
            {**KEYWORDS, "queries": QUERIES.to("meta")},
            ValueError,
            "tokens and queries must",
        ),
        (TOKENS[:, :, 1:], SEQUENCE, {**KEYWORDS, "queries": QUERIES[:, :3]}, ValueError, r"shape \(2, 4, 2, 4\), got"),
        (TOKENS[:, :, 1:], SEQUENCE, {**KEYWORDS, "slots": SLOTS[:1]}, ValueError, "each of the 2 of sequence, got 1"),
        (TOKENS[:, :, 1:], SEQUENCE, {**KEYWORDS, "slots": SLOTS.bool()}, TypeError, "slots must be a tensor of integ"),
        (TOKENS[:, :, 1:], SEQUENCE, {**KEYWORDS, "slots": SLOTS + 1}, ValueError, "between 0 and 3, got 1 to 4"),
        (TOKENS[:, :, 1:], SEQUENCE, {**KEYWORDS, "slots": SLOTS - 1}, ValueError, "between 0 and 3, got -1 to 2"),
        (TOKENS, SEQUENCE, {"impl": "fused"}, ValueError, "impl must be one of 'auto', .*'sdpa'.*, got 'fused'"),
    ],
)
def test_arguments_that_do_not_fit(tokens, sequence, keywords, error, sentence):
    with pytest.raises(error, match=sentence):
        prefix_attention(tokens, sequence, **keywords)
