"""Bad arguments of topk_similarity get one sentence that names the argument."""

import pytest
import torch
from fastprompt_kernels import selected_patches, topk_similarity

from tests.kernels.support import DEVICE

PATCHES, PROMPTS = torch.ones(2, 6, 8), torch.ones(3, 4, 8)


@pytest.mark.parametrize("function", [topk_similarity, selected_patches])
@pytest.mark.parametrize(
    ("patches", "prompts", "k", "error", "sentence"),
    [
        (PATCHES[0], PROMPTS, 2, ValueError, r"patches must have shape \(B, P, D\) .*, got \(6, 8\)"),
        (PATCHES, PROMPTS[None], 2, ValueError, r"prompts must have shape \(N, C, D\) .*, got \(1, 3, 4, 8\)"),
        (PATCHES[:, :0], PROMPTS, 2, ValueError, r"patches must have .* with P at least 1"),
        (PATCHES, PROMPTS[:0], 2, ValueError, r"prompts must have .* with N at least 1"),
        (PATCHES, PROMPTS[..., :7], 2, ValueError, "must agree in D, got 8 and 7"),
        (PATCHES, PROMPTS.half(), 2, TypeError, "must have one dtype, got torch.float32 and torch.float16"),
        (PATCHES.long(), PROMPTS, 2, TypeError, "patches must be a floating-point tensor, got torch.int64"),
        (PATCHES, [[1.0]], 2, TypeError, "prompts must be a floating-point tensor, got list"),
        (PATCHES, PROMPTS.to("meta"), 2, ValueError, "must be on one device, got cpu and meta"),
        (PATCHES, PROMPTS, 0, ValueError, "k must be at least 1, got 0"),
        (PATCHES, PROMPTS, [1, -2, 3], ValueError, r"k must be at least 1, got \[1, -2, 3\]"),
        (PATCHES, PROMPTS, [1, 2], ValueError, r"k must be an int, 3 ints or .*, got \[1, 2\]"),
        (PATCHES, PROMPTS, [[1], [2], []], ValueError, "k must be .* 3 sequences of ints"),
        (PATCHES, PROMPTS, 2.0, TypeError, "k must be an int, .*, got 2.0"),
        (PATCHES, PROMPTS, [1.5, 2, 3], TypeError, "k must be an int, "),
        (PATCHES, PROMPTS, [["a"], ["b"], ["c"]], TypeError, "k must be an int, "),
    ],
)
def test_arguments_that_do_not_fit(function, patches, prompts, k, error, sentence):
    with pytest.raises(error, match=sentence):
        function(patches, prompts, k)


def test_unknown_names():
    with pytest.raises(ValueError, match="reduce must be 'none' or 'mean', got 'sum'"):
        topk_similarity(PATCHES, PROMPTS, 2, reduce="sum")
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'reference', 'dense', 'blocked', 'triton', got"):
        topk_similarity(PATCHES, PROMPTS, 2, impl="cuda")


def test_more_than_the_kernels_select_is_refused_by_triton_only():
    patches, prompts = torch.ones(1, 66, 8, device=DEVICE), torch.ones(1, 1, 8, device=DEVICE)
    with pytest.raises(ValueError, match="hold at most 64, not 65"):
        topk_similarity(patches, prompts, 65, impl="triton")
    assert topk_similarity(patches, prompts, 65).item() == 8
