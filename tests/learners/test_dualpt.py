"""DuAl-PT beside a transcription of our reading of it, and its description files."""

import json

import pytest
import torch
import torch.nn.functional as F

from fastprompt import CoOp, InputError
from fastprompt.learners import PLOT, DuAlPT
from fastprompt.learners.descriptions import encode_descriptions, load_descriptions
from tests.learners import support
from tests.learners.support import LABELS, NAMES, float32_backbone, ids
from transcriptions.transport import local_features, transported

WORDS = {
    "red fox": ["It has a bushy tail.", "It is small, and its fur is red."],
    "polar bear": ["A large white bear."],
    "cat": ["Whiskers and pointed ears.", "A soft fur.", "It sleeps."],
    "very long name of a dog": ["A wet nose."],
    "house": ["It has a roof."],
    "not of these classes": ["Something else."],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "words.json"
    path.write_text(json.dumps(WORDS))
    return str(path)


def described(model):
    """(C, D), sentence by sentence with 77 tokens."""
    means = [model.encode_text(ids(WORDS[name]), normalize=True).mean(0) for name in NAMES]
    return F.normalize(torch.stack(means), dim=-1)


def test_equals_our_reading(vit_backbone, images, file):
    backbone = float32_backbone(vit_backbone)
    features = backbone.encode_images(images)
    learner = support.moved(DuAlPT(backbone, NAMES, prompts=3, context=2, descriptions=file, weight=0.7))
    leaves = support.leaves_of(learner)
    text = support.padded_text(backbone, leaves["contexts"])
    mean, scale = F.normalize(text.mean(0), dim=-1), backbone.logit_scale
    of_patches = transported(local_features(learner, features), text)[1]
    logits = scale * (features.pooled @ mean.T + of_patches) / 2
    similar = mean @ described(backbone.model).T
    aligned = (1 - similar.diagonal()).mean() + F.cross_entropy(scale * similar, torch.arange(len(NAMES)))
    expected = F.cross_entropy(logits, LABELS) + 0.7 * aligned
    expected.backward()
    scores = learner(features)
    loss = learner.backward(scores, LABELS)
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, expected), leaves)


def test_without_weight_it_is_coop_and_plot(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    learner = DuAlPT(vit_backbone, NAMES, prompts=1, context=3, weight=0.0, descriptions="nowhere.json").double()
    coop, plot = (method(vit_backbone, NAMES, context=3).double() for method in (CoOp, PLOT))
    plot.contexts = learner.contexts
    coop.context.data.copy_(learner.contexts[0])
    scores = learner(features)
    expected = (coop(features).logits + plot(features).logits) / 2
    torch.testing.assert_close(scores.logits, expected, rtol=0, atol=1e-9)
    learner.prepare(None)
    torch.testing.assert_close(learner.loss(scores, LABELS), F.cross_entropy(expected, LABELS), rtol=0, atol=1e-9)


def test_without_a_file_a_class_is_described_by_its_name(vit_backbone, caplog):
    expected = vit_backbone.model.encode_text(ids(f"a photo of a {name}." for name in NAMES), normalize=True)
    learner = DuAlPT(vit_backbone, NAMES)
    torch.testing.assert_close(learner.described(), expected, rtol=0, atol=1e-9)
    DuAlPT(vit_backbone, NAMES, weight=0.0).prepare(None)
    assert not caplog.records
    learner.prepare(None)
    assert "dualpt was given no descriptions: it aligns with 'a photo of a {}.' alone" in caplog.text


def test_descriptions_are_encoded_once_and_for_the_classes_asked_for(vit_backbone, file):
    learner = DuAlPT(vit_backbone, NAMES, descriptions=file)
    torch.testing.assert_close(learner.described(), described(vit_backbone.model), rtol=0, atol=1e-9)
    before = learner.described()
    assert learner.described() is before
    other = learner.with_class_names(["polar bear", "red fox"])
    torch.testing.assert_close(other.described(), learner.described()[[1, 0]], rtol=0, atol=1e-9)
    # Without a description nothing can be aligned, but everything can be predicted.
    unknown = learner.with_class_names(["cow"])
    with pytest.raises(InputError, match=r"words.json: has no entry for class 'cow'$"):
        unknown.prepare(None)


def test_descriptions_follow_the_backbone_to_another_precision(vit_backbone, file):
    learner = DuAlPT(float32_backbone(vit_backbone), NAMES, descriptions=file)
    assert learner.described().dtype == torch.float32
    learner.backbone.double()
    assert learner.described().dtype == torch.float64


def test_encoded_in_inference_mode_they_serve_training(vit_backbone, images, file):
    learner = DuAlPT(vit_backbone, NAMES, descriptions=file, context=2)
    with torch.inference_mode():
        learner.described()
    learner.loss(learner(vit_backbone.encode_images(images)), LABELS).backward()
    assert learner.contexts.grad.any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file, got no such file"),
        ("{", "expected JSON"),
        ("[]", r"expected a JSON object, got \[\]"),
        ('{"cat": ["x"]}', r"has no entry for class 'red fox' \(nor for 3 others\)"),
        (json.dumps(WORDS | {"cat": []}), r"expected at least one sentence for class 'cat', got \[\]"),
        (json.dumps(WORDS | {"cat": "a cat"}), "expected at least one sentence for class 'cat', got 'a cat'"),
        (json.dumps(WORDS | {"cat": ["a cat", " "]}), "expected at least one sentence for class 'cat'"),
    ],
)
def test_a_file_that_does_not_fit_gets_one_sentence(tmp_path, content, message):
    path = tmp_path / "words.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=f"descriptions .*words.json: {message}"):
        load_descriptions(path, NAMES)


def test_a_sentence_that_is_too_long_is_named(vit_backbone):
    with pytest.raises(InputError, match=r"'word word .* is too long"):
        encode_descriptions(vit_backbone, [["word " * 80]])


def test_wrong_weight(vit_backbone):
    with pytest.raises(InputError, match="weight: expected a finite number of at least 0, got -1"):
        DuAlPT(vit_backbone, NAMES, weight=-1.0)
