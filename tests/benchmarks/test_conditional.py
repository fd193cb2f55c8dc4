"""The step of methods with a context for every image: one computation, on B images and on the two of the peers."""

import pytest
import torch

from benchmarks import conditional
from benchmarks.measure import WrongResultError, check
from fastprompt.backbone import Backbone
from tests.models import make_backbone, make_clip

CPU = torch.device("cpu")
SHAPE = {"dtype": "float32", "B": 6, "C": 5, "names": "DTD"}

both = pytest.mark.parametrize("method", list(conditional.LEARNERS))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A joint space of 64, so that the meta-net has four hidden units."""
    backbone = make_backbone(make_clip(embed_dim=64).float())
    monkeypatch.setattr(conditional, "load_backbone", lambda *_, **__: backbone)
    monkeypatch.setitem(conditional.NAMES, "DTD", ("banded", "polka-dotted", "lined", "crosshatched", "grid"))


@both
def test_many_images_have_the_results_of_two_and_times_are_for_one(method):
    case = conditional.build({**SHAPE, "method": method}, CPU)
    first_calls, left_out = check(case)
    assert not left_out and set(first_calls) == set(conditional.BENCHMARK.implementations)
    images = {conditional.PADDED: 2, conditional.TRUNCATED: 2, conditional.OURS: SHAPE["B"]}
    assert case.units == images and not case.shares


@both
def test_an_image_with_the_text_of_another_is_found(method, monkeypatch):
    real = Backbone.encode_prompts
    monkeypatch.setattr(Backbone, "encode_prompts", lambda *args, **options: real(*args, **options).roll(1, dims=0))
    with pytest.raises(WrongResultError, match="fastprompt: result 0"):
        check(conditional.build({**SHAPE, "method": method}, CPU))
