"""The kernels of topk_similarity in variants that the headline shapes launch: bfloat16, D = 512, a ragged C = 130."""

import pytest
import torch
from fastprompt_kernels import topk_similarity
from fastprompt_kernels.testing import draw_inputs

from tests.kernels.support import DEVICE
from tests.kernels.test_topk_similarity import check


@pytest.mark.parametrize("P", [49, 196])
@pytest.mark.parametrize("k", [[4], [1, 2, 3, 4], [16], [4, 8, 12, 16]], ids=str)
def test_error_rule_with_and_without_a_selection_kept(P, k):
    inputs = draw_inputs((1, P, 1, 130, 512), [k], torch.bfloat16, device=DEVICE)
    check(inputs, "triton")
    with torch.no_grad():
        values = topk_similarity(inputs.patches, inputs.prompts, inputs.k, impl="triton")
    # What is kept for the backward pass changes no value, and the values that it was kept with obey the rule.
    kept = topk_similarity(inputs.patches.requires_grad_(), inputs.prompts, inputs.k, impl="triton")
    assert torch.equal(values, kept)
