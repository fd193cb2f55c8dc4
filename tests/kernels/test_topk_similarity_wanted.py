"""topk_similarity makes and keeps what is asked for, and no more."""

import pytest
import torch
from fastprompt_kernels import topk_similarity
from fastprompt_kernels.testing import draw_inputs
from fastprompt_kernels.topk_similarity import op

from tests.kernels.support import DEVICE, on_device


@pytest.mark.parametrize("impl", on_device("dense", "blocked", "triton"))
def test_without_gradients_no_selection_is_kept(impl):
    inputs = draw_inputs((2, 9, 1, 3, 8), [[4]], torch.float32, device=DEVICE)
    kept = torch.ops.fastprompt.topk_similarity(inputs.patches, inputs.prompts, [4], True, impl)
    values, nothing = torch.ops.fastprompt.topk_similarity(inputs.patches, inputs.prompts, [4], False, impl)
    assert torch.equal(values, kept[0])
    assert nothing.numel() == 0 < kept[1].numel()


@pytest.mark.parametrize("impl", on_device("dense", "blocked", "triton"))
def test_only_requested_gradients_are_made(impl):
    inputs = draw_inputs((2, 9, 1, 3, 8), [[4]], torch.float32, device=DEVICE)
    grads = torch.ops.fastprompt.topk_similarity_grad
    _, selected = torch.ops.fastprompt.topk_similarity(inputs.patches, inputs.prompts, [4], True, impl)
    both = grads(inputs.grad, inputs.patches, inputs.prompts, selected, [4], 9, impl)
    of_patches, nothing = grads(inputs.grad, None, inputs.prompts, selected, [4], 9, impl)
    assert torch.equal(of_patches, both[0])
    assert nothing.numel() == 0
    nothing, of_prompts = grads(inputs.grad, inputs.patches, None, selected, [4], 9, impl)
    assert torch.equal(of_prompts, both[1])
    assert nothing.numel() == 0


@pytest.mark.parametrize("wanted", ["patches", "prompts"])
def test_only_requested_gradients_are_asked_for(wanted, monkeypatch):
    asked = []
    monkeypatch.setattr(op, "_grad", lambda *inputs: asked.append(inputs[1:3]) or (None, None))
    inputs = draw_inputs((2, 9, 1, 3, 8), [[4]], torch.float32, device=DEVICE)
    getattr(inputs, wanted).requires_grad_()
    topk_similarity(inputs.patches, inputs.prompts, 4).sum().backward()
    assert [tensor is not None for tensor in asked[0]] == [wanted == "prompts", wanted == "patches"]
