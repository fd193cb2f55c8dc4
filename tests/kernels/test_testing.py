"""The error rule and the poison do what they say."""

import pytest
import torch
from fastprompt_kernels.testing import BAND, assert_as_accurate, draw_inputs, poisoned_memory

ORACLE = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
PLAIN = torch.tensor([[1.0, 2.0], [3.0, 4.25]])


def changed(index, value):
    tensor = ORACLE.float()
    tensor[index] = value
    return tensor


def test_rule_allows_the_error_of_plain_torch_anywhere():
    assert_as_accurate(changed((0, 1), 2.25), PLAIN, ORACLE, ORACLE)


def test_rule_allows_a_few_roundings_where_plain_torch_is_exact():
    unit = torch.finfo(torch.float32).eps
    assert_as_accurate(changed((1, 0), 3 + 3 * BAND * unit), ORACLE.float(), ORACLE, ORACLE)
    with pytest.raises(AssertionError):
        assert_as_accurate(changed((1, 0), 3 + 3 * (BAND + 1) * unit), ORACLE.float(), ORACLE, ORACLE)


def test_message_names_the_worst_element_and_three_values():
    with pytest.raises(AssertionError, match=r"grad\[1, 1\] is 5.0, plain PyTorch gives 4.25, the truth is 4.0"):
        assert_as_accurate(changed((1, 1), 5.0), PLAIN, ORACLE, ORACLE, what="grad")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_a_number_fails(value):
    with pytest.raises(AssertionError, match=r"result\[0, 0\]"):
        assert_as_accurate(changed((0, 0), value), PLAIN, ORACLE, ORACLE)


def test_dtype_and_shape_must_be_right():
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate(ORACLE, PLAIN, ORACLE, ORACLE)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate(PLAIN[:1], PLAIN, ORACLE, ORACLE)


def test_poison_fills_new_memory_and_is_taken_back():
    with poisoned_memory():
        assert torch.empty(1000).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_gradient_where_rounding_decides():
    inputs = draw_inputs((2, 40, 1, 6, 16), [[3]], torch.float32)
    assert (inputs.grad != 0).all()
    # One dimension in bfloat16: equal similarities are common, and the others are far apart.
    inputs = draw_inputs((9, 200, 1, 6, 1), [[3]], torch.bfloat16)
    ranked = torch.einsum("bpd,ncd->bncp", inputs.patches.double(), inputs.prompts.double()).sort(descending=True)[0]
    tied = ranked[..., 2] == ranked[..., 3]
    assert tied.any()
    assert torch.equal(inputs.grad == 0, tied)


def test_layout_and_repetition():
    shape = (2, 5, 1, 3, 4)
    plain = draw_inputs(shape, [[1]], torch.float16, seed=1)
    strided = draw_inputs(shape, [[1]], torch.float16, seed=1, contiguous=False)
    assert not strided.patches.is_contiguous()
    assert torch.equal(plain.patches, strided.patches)
    assert not torch.equal(plain.patches, draw_inputs(shape, [[1]], torch.float16, seed=2).patches)
