"""DualView against a transcription of our reading of it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastprompt import CoOp, InputError
from fastprompt.learners import DualView
from tests.learners import support
from tests.learners.support import LABELS, NAMES

TEMPLATES = ("a photo of a {}.", "{} texture.")


def source_of(features, labels=LABELS):
    """Training images in two batches."""
    return SimpleNamespace(plain_batches=lambda reads: [(features[:2], labels[:2]), (features[2:], labels[2:])])


def test_equals_its_equations_in_float32(images):
    backbone = support.float32_backbone()
    features = backbone.encode_images(images)
    learner = support.moved(DualView(backbone, NAMES, templates=TEMPLATES, weight=0.5))
    learner.prepare(source_of(features, torch.tensor([1, 0, 1])))
    mix, labels = torch.tensor([0.3, 0.0, 0.5]), torch.tensor([1, 0, 1])
    scores = learner(features)
    learner.draw_mix = lambda images, generator: mix
    loss = learner.loss(scores, labels)
    loss.backward()

    leaves = support.leaves_of(learner)
    text = support.padded_text(backbone, leaves["context"][None])[0]
    hand = F.normalize(sum(support.template_text(backbone, template) for template in TEMPLATES) / 2, dim=-1)
    logits = backbone.logit_scale * features.pooled @ F.normalize(text + hand, dim=-1).T
    mixed = []
    for z, share, label in zip(features.pooled, mix, labels, strict=True):
        mean = features.pooled[labels == label].mean(0)
        mixed.append(F.normalize((1 - share) * z + share * mean, dim=0))
    cross_entropy = F.cross_entropy(backbone.logit_scale * torch.stack(mixed) @ text.T, labels)
    target = torch.arange(len(NAMES))
    there, back = (F.cross_entropy(view / 0.07, target) for view in (text @ hand.T, hand @ text.T))
    expected = cross_entropy + 0.5 * (there + back) / 2
    expected.backward()
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, expected), leaves)


def test_with_weight_0_and_no_mixing_it_trains_as_coop(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    learner = DualView(vit_backbone, NAMES, weight=0.0, mixing=0.0)
    support.assert_same_training(learner, CoOp(vit_backbone, NAMES), features)


def test_class_means_are_those_of_the_training_images(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    learner = DualView(vit_backbone, NAMES)
    learner.prepare(source_of(features, torch.tensor([1, 0, 1])))
    torch.testing.assert_close(learner.class_means[1], features.pooled[[0, 2]].mean(0).float())
    torch.testing.assert_close(learner.class_means[0], features.pooled[1].float())
    assert not learner.class_means[2:].any()
    assert learner.with_class_names(["dog", "cat"]).class_means is None


def test_half_of_the_images_are_mixed_with_up_to_half_of_the_mean(vit_backbone):
    mix = DualView(vit_backbone, NAMES).draw_mix(4000)
    mixed = mix[mix > 0]
    assert len(mixed) / 4000 == pytest.approx(0.5, abs=0.05)
    assert mixed.max() < 0.5
    assert mixed.mean().item() == pytest.approx(0.25, abs=0.02)


def test_predictions_on_other_classes_use_their_templates(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    other = DualView(vit_backbone, NAMES).with_class_names(["dog", "cat"])
    with torch.no_grad():
        both = F.normalize(
            support.padded_text(vit_backbone, other.context.double()[None], ["dog", "cat"])[0]
            + support.template_text(vit_backbone, "a photo of a {}.", ["dog", "cat"]),
            dim=-1,
        )
    expected = (vit_backbone.logit_scale * features.pooled @ both.T).softmax(1)
    torch.testing.assert_close(other.predict(features), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(other.mean_text(features)[1].detach(), both, rtol=0, atol=1e-9)


def test_wrong_use_gets_one_sentence(vit_backbone, images):
    learner = DualView(vit_backbone, NAMES)
    with pytest.raises(InputError, match=r"class_means: expected a call of prepare\(source\)"):
        learner.loss(learner(vit_backbone.encode_images(images)), LABELS)
    with pytest.raises(InputError, match=r"mixing: expected a share between 0 and 1, got 2.0"):
        DualView(vit_backbone, NAMES, mixing=2.0)
    with pytest.raises(InputError, match="templates: expected at least one sentence, got none"):
        DualView(vit_backbone, NAMES, templates=())
