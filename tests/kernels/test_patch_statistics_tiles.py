"""patch_statistics in tiles of images and classes, with logits that are kept for the backward pass and without."""

import pytest
import torch
from fastprompt_kernels.patch_statistics import blocked
from fastprompt_kernels.testing import draw_statistics_inputs

from tests.kernels.test_patch_statistics import DEVICE, Seen, check, run


def use_small_tiles(monkeypatch, keep):
    for name, value in {"TILE_BYTES": 7 * 20 * 4, "GRAD_TILE_BYTES": 9 * 20 * 4, "KEPT_BYTES": keep * 2**20}.items():
        monkeypatch.setattr(blocked, name, value)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_error_rule_of_small_tiles(monkeypatch, keep, ties):
    use_small_tiles(monkeypatch, keep)
    check(draw_statistics_inputs((3, 20, 50, 16), torch.float32, scale=3.0, ties=ties, device=DEVICE), "blocked")


@pytest.mark.parametrize("keep", [False, True])
def test_blocked_holds_all_logits_only_for_the_backward_pass_and_only_few(monkeypatch, keep):
    use_small_tiles(monkeypatch, keep)
    inputs = draw_statistics_inputs((3, 20, 50, 16), torch.float32, device=DEVICE)
    with Seen() as seen:  # not through the operator, whose inside it does not see
        blocked.forward(inputs.patches, inputs.prompts, 1.0, inputs.labels, entropy=True, keep=False)
    assert max(seen.sizes) < 3 * 20 * 50
    with Seen() as seen:
        run(inputs, "blocked")
    assert (max(seen.sizes) < 3 * 20 * 50) is not keep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_kept_logits_give_the_same_bits_as_those_made_again(monkeypatch, dtype):
    inputs = draw_statistics_inputs((5, 20, 50, 16), dtype, scale=3.0, device=DEVICE)
    kept = run(inputs, "blocked")
    results = torch.ops.fastprompt.patch_statistics(inputs.patches, inputs.prompts, 3.0, None, True, True, "blocked")
    assert results[-1].shape == (5, 20, 50)
    monkeypatch.setattr(blocked, "KEPT_BYTES", 5 * 20 * 50 * results[-1].itemsize - 1)
    assert all(map(torch.equal, run(inputs, "blocked"), kept))
    again = torch.ops.fastprompt.patch_statistics(inputs.patches, inputs.prompts, 3.0, None, True, True, "blocked")
    assert again[-1].shape == (0,)
