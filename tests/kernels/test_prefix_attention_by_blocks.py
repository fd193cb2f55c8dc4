"""prefix_attention by xformers: the layout of blocks with a dense attention, and what is refused.

xformers' kernels need a GPU. Its masks are made on any machine: where it is installed the dense attention reads them,
elsewhere what their documentation says.
"""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from fastprompt_kernels import prefix_attention
from fastprompt_kernels.prefix_attention import xformers

from tests.kernels.test_prefix_attention import DEVICE, check, draw, run

CPU = torch.device("cpu")


def mask(blocks):
    """(Q, K): 0 where a query sees a key, else minus infinity.

    A query sees no key of another block, and none nearer to the last of its block than it is to the last query.
    """
    if find_spec("xformers"):
        return xformers.mask_of(blocks, CPU).materialize((sum(blocks.queries), sum(blocks.keys)), torch.float64)
    of_blocks = []
    for queries, keys in zip(blocks.queries, blocks.keys, strict=True):
        query, key = torch.arange(queries)[:, None], torch.arange(keys)
        of_blocks.append(keys - 1 - key >= queries - 1 - query)
    return torch.zeros(()).double().masked_fill(~torch.block_diag(*of_blocks).bool(), -torch.inf)


def dense(q, k, v, blocks):
    """What ``memory_efficient_attention`` computes, in plain torch."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", (scores + mask(blocks).to(scores.device)).softmax(-1), v)


def use(monkeypatch, attend):
    """Another attention of blocks, which runs on any device."""
    monkeypatch.setattr(xformers, "why_not", lambda device: None)
    monkeypatch.setattr(xformers, "attend", attend)


@pytest.mark.parametrize("E", [0, 1, 9], ids=["all tokens ask", "one a row asks", "nine a row ask"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 3, 12), (3, 17, 2, 30), (0, 3, 2, 4)])
def test_layout_gives_the_results_and_gradients_of_the_reference(monkeypatch, shape, E):
    """Empty slots stand inside of sequences; of nine slots some ask twice."""
    inputs = draw(*shape, 2, 8, torch.float64, E=E, seed=4)
    expected = run(inputs, "reference")
    use(monkeypatch, dense)
    got = run(inputs, "xformers")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_gradient_of_the_prefix_is_rounded_once(monkeypatch):
    """In bfloat16 a sum of 512 ones that is rounded after each of them stops at 256."""
    tokens = torch.zeros(1, 1 + 512, 2, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    queries = torch.zeros(1, 512, 1, 1, dtype=torch.bfloat16)
    sequence, slots = torch.zeros(8, 64, dtype=torch.long), torch.arange(64).expand(8, -1)

    def first_value(q, k, v, blocks):
        keys = torch.tensor(blocks.keys)
        return v[:, keys.cumsum(0) - keys]

    use(monkeypatch, first_value)
    prefix_attention(tokens, sequence, queries=queries, slots=slots, impl="xformers").sum().backward()
    assert tokens.grad[0, 0, 1].item() == 512


def test_lengths_of_blocks():
    """The prefix; sequence 5, 7 and two empty slots; an empty slot, sequence 9 around it, and another empty slot."""
    sequence = torch.tensor([[5, 5, 7, -1, -2], [9, -3, 9, 9, -4]])
    blocks = xformers.blocks_of(sequence, None, 3)
    assert (blocks.queries, blocks.keys) == ([3, 2, 1, 1, 1, 1, 3, 1], [3, 5, 4, 4, 4, 4, 6, 4])
    blocks = xformers.blocks_of(sequence, torch.tensor([[1, 0, 1], [2, 3, 4]]), 3)
    assert (blocks.queries, blocks.keys) == ([1] * 6, [5, 4, 5, 5, 6, 4])


def test_blocks_are_made_once_and_again_when_the_tensor_changes():
    sequence = torch.tensor([[0, 0, 1, 1]])
    first = xformers.blocks_of(sequence, None, 2)
    assert xformers.blocks_of(sequence, None, 2) is first
    sequence[0, 1] = 1
    assert xformers.blocks_of(sequence, None, 2).queries == [2, 1, 3]
    with torch.inference_mode():
        assert xformers.blocks_of(sequence.clone(), None, 2).queries == [2, 1, 3]


def test_it_is_refused_on_a_cpu_and_where_it_is_not_installed(monkeypatch):
    with pytest.raises(ValueError, match=r"impl='xformers' cannot run here: it needs tensors on a CUDA .*, got cpu"):
        prefix_attention(torch.ones(1, 3, 3, 1, 8), torch.zeros(1, 2, dtype=torch.long), impl="xformers")
    monkeypatch.setattr(xformers, "find_spec", lambda name: None)
    assert xformers.why_not(torch.device("cuda")).startswith("xformers is not installed (pip install")


def test_inputs_without_a_kernel_are_refused_in_one_sentence(monkeypatch):
    def no_operator(*tensors, attn_bias):
        raise NotImplementedError("No operator found, for many\nreasons")

    monkeypatch.setitem(sys.modules, "xformers.ops", SimpleNamespace(memory_efficient_attention=no_operator))
    monkeypatch.setattr(xformers, "mask_of", lambda blocks, device: None)
    monkeypatch.setattr(xformers, "why_not", lambda device: None)
    with pytest.raises(ValueError, match=r"cannot run here: xformers has no kernel for heads of 8 .* torch.float64 on"):
        run(draw(1, 1, 1, 2, 1, 8, torch.float64), "xformers")


@pytest.mark.skipif(
    xformers.why_not(torch.device(DEVICE)) is not None, reason="needs xformers and a CUDA or ROCm device"
)
@pytest.mark.parametrize("E", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_its_kernels_are_as_accurate_as_plain_torch(dtype, E):
    check(draw(3, 5, 4, 40, 8, 64, dtype, E=E, seed=4), "xformers")
