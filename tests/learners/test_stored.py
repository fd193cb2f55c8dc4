"""Learned tensors and options from files: what does not fit the learner is named."""

from pathlib import Path

import pytest
import torch

from fastprompt import CoOp, InputError, make_learner
from fastprompt.learners.stored import read_description, restore_learned

NAMES = ("cat", "dog")
FILE = Path("model.safetensors")
DESCRIBED = {
    "method": "coop", "class_names": ["cat"], "backbone": "b", "pretrained": None, "fingerprint": "f", "options": {},
}  # fmt: skip


@pytest.fixture
def learner(vit_backbone):
    return CoOp(vit_backbone, NAMES, context=2)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.full((2, 48), float("nan")), "expected finite numbers in context, got NaN or infinity"),
        (torch.full((2, 48), 1e300, dtype=torch.float64), "expected finite numbers in context, got NaN or infinity"),
        (torch.ones(2, 48, dtype=torch.long), "expected floating-point numbers in context, got torch.int64"),
        (torch.ones(3, 48), r"expected the learned tensors context \(2, 48\), got context \(3, 48\)"),
    ],
)
def test_tensors_that_are_not_those_of_the_learner_are_refused(learner, tensor, words):
    before = learner.context.detach().clone()
    with pytest.raises(InputError, match=f"model.safetensors: {words}"):
        restore_learned(learner, {"context": tensor}, FILE)
    assert torch.equal(learner.context, before)
    restore_learned(learner, {"context": torch.ones(2, 48, dtype=torch.bfloat16)}, FILE)
    assert (learner.context == 1).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_names": "cat"}, r"class_names: expected list\[str\], got 'cat'"),
        ({"class_names": ["cat", 3]}, r"class_names: expected list\[str\]"),
        ({"pretrained": 3}, r"pretrained: expected str \| None, got 3"),
        ({"patches": "pooled"}, r"patches: expected Literal\['value', 'published'\], got 'pooled'"),
        ({"colour": 3}, "expected no value 'colour'"),
        ({"options": None}, r"options: expected dict\[str, Any\], got nothing"),
    ],
)
def test_a_description_of_other_types_is_refused(change, words):
    described = read_description(DESCRIBED, FILE)
    assert (described.weights_dir, described.patches) == (None, "value"), "of a file from before the option"
    with pytest.raises(InputError, match=f"model model.safetensors: {words}"):
        read_description(DESCRIBED | change, FILE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": [1]}, r"coop: context: expected int \| str, got \[1\]"),
        ({"class_specific": 1}, "coop: class_specific: expected bool, got 1"),
        ({"contexts": 1}, "coop: coop has no option 'contexts', only context, position, class_specific"),
        ({"context": 10**11}, "context: expected 1 to 77 tokens, got 100000000000"),
    ],
)
def test_options_of_other_types_are_refused(vit_backbone, options, words):
    with pytest.raises(InputError, match=words):
        make_learner("coop", vit_backbone, NAMES, **options)


def test_more_prompts_than_anybody_has_are_refused(vit_backbone):
    for method, name in (("gallop", "global_prompts"), ("plot", "prompts"), ("sot-glp", "local_prompts")):
        with pytest.raises(InputError, match=f"{name}: expected 1 to 10,000, got 1000000000"):
            make_learner(method, vit_backbone, NAMES, **{name: 10**9})
