"""Frozen halves of a block equal open_clip's block, and keep no more than the gradient of the input needs."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import nn

from fastprompt.backbone import blocks
from fastprompt.backbone.blocks import close_block, project, read_block, split_heads
from fastprompt.errors import InputError

W, HEADS = 16, 2

ACTIVATIONS = {"quick": QuickGELU, "exact": nn.GELU, "tanh": lambda: nn.GELU(approximate="tanh")}


def make_block(activation="quick", layer_scale=None, width=W):
    torch.manual_seed(0)
    block = ResidualAttentionBlock(width, HEADS, ls_init_value=layer_scale, act_layer=ACTIVATIONS[activation])
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block.double().eval().requires_grad_(False)


def own_pass(block, x):
    q, k, v = split_heads(block, x).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v)
    return close_block(block, x, attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_open_clips_block(activation, layer_scale):
    block = make_block(activation, layer_scale)
    x = torch.randn(2, 5, W, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    ours, expected = own_pass(block, x), block(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    with torch.no_grad():  # the activation is then computed in place
        torch.testing.assert_close(own_pass(block, x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer_scale", [None, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, layer_scale):
    block = make_block(activation, layer_scale, width=4)
    x, attended = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: split_heads(block, x), x)
    assert torch.autograd.gradcheck(lambda x, attended: close_block(block, x, attended), (x, attended))


def test_parts_of_the_projection():
    block = make_block()
    x = torch.randn(3, W, dtype=torch.float64)
    parts = [project(block, x, parts) for parts in ("q", "kv", "qkv")]
    torch.testing.assert_close(torch.cat(parts[:2], dim=-1), parts[2])


def test_what_a_block_keeps():
    """Five widths and the hidden width, with four numbers a token for two layer norms."""
    block, tokens, kept = make_block().float(), 7, {}
    x = torch.randn(1, tokens, W, requires_grad=True)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        qkv = split_heads(block, x)
        out = close_block(block, x, qkv[:, :, 2].flatten(2))
    assert out.requires_grad
    assert sum(kept.values()) == 4 * tokens * (W + (W + 4 * W) + 4)  # queries, keys and values are the attention's


def test_the_gradient_cannot_be_differentiated_again():
    block, x = make_block(), torch.randn(1, 3, W, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(own_pass(block, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_statistics_of_half_precision_are_kept_in_float32():
    """Against float64 on the same bfloat16 numbers, the gradient is as exact as bfloat16 can hold it."""
    block = make_block()
    x = (torch.randn(1, 50, W) + 8).bfloat16()  # a mean of 8 rounds to steps of 0.03
    half, exact = block.bfloat16(), make_block().bfloat16().double()
    weights = torch.randn(1, 50, 3, HEADS, W // HEADS).bfloat16()
    gradients = []
    for frozen, dtype in ((exact, torch.float64), (half, torch.bfloat16)):
        leaf = x.to(dtype).requires_grad_()
        (split_heads(frozen, leaf) * weights.to(dtype)).sum().backward()
        gradients.append(leaf.grad.double())
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 2**-8


def test_unknown_blocks_are_refused():
    block = make_block()
    block.mlp.gelu = nn.ReLU()
    with pytest.raises(InputError, match="expected QuickGELU or GELU in a block, got ReLU"):
        read_block(block)
    with pytest.raises(InputError, match="expected the plain ResidualAttentionBlock of a CLIP, got Linear"):
        read_block(nn.Linear(2, 2))


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_products_in_halves_of_their_columns(monkeypatch, layer_scale):
    """Results and gradients of bfloat16 weights are as near to float64 as those of whole products."""
    x, weights = torch.randn(2, 5, W).bfloat16(), torch.randn(2, 5, W).bfloat16()

    def results(dtype):
        block, leaf = make_block("quick", layer_scale).bfloat16().to(dtype), x.to(dtype).requires_grad_()
        out = own_pass(block, leaf)
        return out, *torch.autograd.grad((out * weights.to(dtype)).sum(), leaf)

    exact, whole = results(torch.float64), results(torch.bfloat16)
    monkeypatch.setattr(blocks, "MANY_INPUTS", 1)
    monkeypatch.setattr(blocks, "SLOW_TOKENS", (1, 100))
    assert len(blocks._columns(x.flatten(0, 1), W)) == 2
    for half, one, truth in zip(results(torch.bfloat16), whole, exact, strict=True):
        assert (half - truth).abs().max() <= 2 * (one - truth).abs().max()
