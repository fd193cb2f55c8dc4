"""patch_statistics without gradients, with the entropy and without it."""

from dataclasses import replace
from math import log

import pytest
import torch
from fastprompt_kernels import PatchStatistics, patch_statistics
from fastprompt_kernels.patch_statistics import blocked
from fastprompt_kernels.testing import StatisticsInputs, assert_as_accurate, draw_statistics_inputs, poisoned_memory

from tests.kernels.test_patch_statistics import DEVICE, Seen, check_rank, sizes

each_fast_one = pytest.mark.parametrize("impl", ["blocked", "triton"])


def infer(inputs: StatisticsInputs, impl: str, entropy: bool = True, labels: bool = True) -> PatchStatistics:
    chosen = inputs.labels if labels else None
    return patch_statistics(
        inputs.patches, inputs.prompts, scale=inputs.scale, labels=chosen, entropy=entropy, impl=impl
    )


@each_fast_one
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 20, 50, 16), (3, 50, 20, 16)], ids=["more classes", "more patches"])
@pytest.mark.parametrize("tile", [7 * 50 * 4, blocked.TILE_BYTES], ids=["tiles", "one tile"])
def test_error_rule_without_gradients(monkeypatch, tile, shape, dtype, entropy, impl):
    monkeypatch.setattr(blocked, "TILE_BYTES", tile)
    inputs = draw_statistics_inputs(shape, dtype, scale=3.0, device=DEVICE)
    oracle = infer(replace(inputs, patches=inputs.patches.double(), prompts=inputs.prompts.double()), "reference")
    plain = infer(inputs, "reference")
    with poisoned_memory():
        actual = infer(inputs, impl, entropy)
    for name, *tensors in zip(PatchStatistics._fields, actual, plain, oracle, sizes(inputs), strict=False):
        if name in ("maximum", "logsumexp") or (name == "entropy" and entropy):
            assert_as_accurate(*tensors, what=name)
    assert (actual.entropy is None) is not entropy
    check_rank(inputs, actual.rank)


@each_fast_one
@pytest.mark.parametrize("shape", [(4, 50, 150, 64), (4, 7, 33, 512), (4, 33, 7, 512)])
def test_results_are_the_same_bits_in_every_run_and_in_every_batch_without_gradients(impl, shape):
    inputs = draw_statistics_inputs(shape, torch.float32, scale=0.3, device=DEVICE)
    whole = infer(inputs, impl)
    assert all(map(torch.equal, whole, infer(inputs, impl)))
    halves = [
        infer(replace(inputs, patches=inputs.patches[part], labels=inputs.labels[part]), impl)
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert all(torch.equal(torch.cat(pair), tensor) for *pair, tensor in zip(*halves, whole, strict=True))


@pytest.mark.parametrize("impl", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("shape", [(3, 20, 50, 16), (3, 50, 20, 16)])
def test_without_entropy_all_else_has_the_same_bits(monkeypatch, impl, shape):
    monkeypatch.setattr(blocked, "TILE_BYTES", 7 * 20 * 4)
    inputs = draw_statistics_inputs(shape, torch.float32, device=DEVICE)
    full, without = infer(inputs, impl), infer(inputs, impl, entropy=False)
    assert without.entropy is None
    assert all(map(torch.equal, (full.maximum, full.logsumexp, full.rank), (*without[:2], without.rank)))
    inputs.patches.requires_grad_()
    grads = []
    for entropy in (False, True):
        statistics = infer(inputs, impl, entropy)
        assert (statistics.entropy is None) is not entropy
        grads += torch.autograd.grad((statistics.maximum - statistics.logsumexp).sum(), inputs.patches)
    assert torch.equal(*grads)


def test_blocked_without_entropy_holds_one_tile():
    inputs = draw_statistics_inputs((3, 20, 50, 16), torch.float32, device=DEVICE)
    made = []
    for entropy in (False, True):
        with Seen() as seen:  # not through the operator, whose inside it does not see
            results = blocked.forward(inputs.patches, inputs.prompts, 1.0, None, entropy, keep=False)
        assert results[2].shape == ((3, 20) if entropy else (0,))
        made.append({address for address, size in seen.places if size == 3 * 20 * 50})
    assert list(map(len, made)) == [1, 2]


@pytest.mark.compile
@each_fast_one
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_entropy(impl, dynamic):
    torch.compiler.reset()
    inputs = draw_statistics_inputs((3, 9, 5, 8), torch.float32, device=DEVICE)

    def function(patches, prompts):
        statistics = patch_statistics(patches, prompts, entropy=False, impl=impl)
        return statistics.maximum - statistics.logsumexp

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert torch.equal(compiled(inputs.patches, inputs.prompts), function(inputs.patches, inputs.prompts))


@each_fast_one
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("P", [2, 9])
def test_classes_of_minus_infinity_and_patches_that_are_no_number(monkeypatch, impl, entropy, P):
    monkeypatch.setattr(blocked, "TILE_BYTES", 2 * P * 4)
    patches = torch.ones(1, P, 1, device=DEVICE)
    patches[0, 1] = torch.nan
    prompts = torch.tensor([-torch.inf, -torch.inf, 0.0, 0.0, -torch.inf], device=DEVICE)[:, None]
    statistics = patch_statistics(patches, prompts, entropy=entropy, impl=impl)
    expected = (0.0, log(2), log(2))
    for statistic, value in zip(statistics[: 2 + entropy], expected[: 2 + entropy], strict=True):
        assert statistic.isnan().nonzero().tolist() == [[0, 1]]
        others = torch.cat([statistic[0, :1], statistic[0, 2:]])
        torch.testing.assert_close(others, torch.full((P - 1,), value, device=DEVICE))
