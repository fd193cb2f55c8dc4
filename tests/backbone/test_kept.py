"""What is made once and kept."""

import copy
import pickle

import pytest
import torch

from fastprompt.backbone import kept
from fastprompt.backbone.kept import Kept
from fastprompt.backbone.packing import pack


@pytest.fixture
def made():
    """A ``Kept``, a function that asks it for a tensor, and the keys of what was made."""
    keys, values = [], Kept()

    def get(key, *read, **options):
        return values.get(key, lambda: keys.append(key) or torch.full((4,), float(len(keys))), read, **options)

    return values, get, keys


def test_what_is_kept_is_made_anew_for_another_key_dtype_shape_or_value(made):
    values, get, keys = made
    tensor = torch.zeros(2)
    assert get("a", tensor) is get("a", tensor.clone())
    assert len(keys) == 1
    others = (("b", tensor), ("b", tensor + 1), ("b", tensor.double()), ("b", torch.zeros(1)), ("b",), ("b", "word"))
    for number, arguments in enumerate(others, 2):
        get(*arguments)
        assert len(keys) == number
        assert get(*arguments) is get(*arguments)
    assert copy.deepcopy(values)._entries == {} == pickle.loads(pickle.dumps(values))._entries  # noqa: S301


def test_writing_through_data_is_noticed(made):
    _, get, keys = made
    tensor = torch.zeros(2)
    get("a", tensor)
    tensor.data.add_(1)
    get("a", tensor)
    assert keys == ["a", "a"]


def test_the_keys_used_last_are_kept_within_the_limit(made):
    values, get, keys = made
    values.limit = 2 * torch.zeros(4).nbytes
    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert keys == ["a", "b", "c", "b"]
    values.limit = 1
    get("d")
    get("d")
    assert keys[-2:] == ["d", "d"]


def test_values_without_tensors_are_not_kept_for_ever(made):
    values, _, keys = made
    for key in [*range(kept.MOST + 3), 3, 2]:
        values.get(key, lambda key=key: keys.append(key) or "words")
    assert keys == [*range(kept.MOST + 3), 2]  # of the first three, none is kept
    assert len(values._entries) == kept.MOST


def test_a_value_can_be_asked_for_without_keeping_it(made):
    _, get, keys = made
    get("a")
    get("a", keep=False)
    get("a")
    assert keys == ["a", "a"]


def test_tensors_of_dataclasses_count():
    packing = pack((3, 4), torch.device("cpu"))
    assert kept.nbytes(packing) == sum(tensor.nbytes for tensor in vars(packing).values()) > 0


def test_what_was_made_in_inference_mode_can_be_trained_on():
    values, weight = Kept(), torch.ones(3, requires_grad=True)
    with torch.inference_mode():
        value = values.get("a", lambda: 2 * weight)
    assert not value.requires_grad
    (value * weight).sum().backward()
    assert weight.grad.tolist() == [2, 2, 2]


def test_inside_of_a_capture_by_the_caller_nothing_is_compared_or_kept(made, monkeypatch):
    """The host would wait for a comparison, which ends a capture; and before a replay there is nothing to keep."""
    _, get, keys = made
    tensor = torch.zeros(2)
    first = get("a", tensor), get("b")
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        capture.setattr(torch, "equal", lambda *_: pytest.fail("the host waited for the device"))
        for arguments in (("a", tensor), ("a", tensor), ("c",), ("c",)):
            get(*arguments)
        assert keys == ["a", "b", "a", "a", "c", "c"]
        assert get("b") is first[1]  # made of no tensor, so there is nothing to compare
    assert get("a", tensor) is first[0]
