"""The kernels of topk_similarity in variants that headline shapes launch: half precision, D = 512, ragged C = 130."""

import pytest
import torch
from fastprompt_kernels import topk_similarity
from fastprompt_kernels.testing import draw_inputs

from tests.kernels.support import DEVICE
from tests.kernels.test_topk_similarity import check

SCALES = ([4], [1, 2, 3, 4], [16], [4, 8, 12, 16])
FAST = [(49, torch.bfloat16), (196, torch.bfloat16)]
REST = [(577, torch.bfloat16), (196, torch.float16), (577, torch.float16)]


@pytest.mark.interpreter
@pytest.mark.parametrize(("P", "dtype"), [*FAST, *(pytest.param(*one, marks=pytest.mark.torture) for one in REST)])
@pytest.mark.parametrize("k", SCALES, ids=str)
def test_error_rule_with_and_without_a_selection_kept(P, dtype, k):
    inputs = draw_inputs((1, P, 1, 130, 512), [k], dtype, device=DEVICE)
    check(inputs, "triton")
    with torch.no_grad():
        values = topk_similarity(inputs.patches, inputs.prompts, inputs.k, impl="triton")
    # What is kept for the backward pass changes no value, and the values that it was kept with obey the rule.
    kept = topk_similarity(inputs.patches.requires_grad_(), inputs.prompts, inputs.k, impl="triton")
    assert torch.equal(values, kept)
