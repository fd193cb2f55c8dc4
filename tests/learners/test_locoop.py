"""LoCoOp against a transcription of its equations."""

import pytest
import torch
import torch.nn.functional as F

from fastprompt import CoOp, InputError
from fastprompt.learners import LoCoOp
from tests.learners import support
from tests.learners.support import LABELS, NAMES


def test_equals_its_equations_in_float32(images):
    backbone = support.float32_backbone()
    features = backbone.encode_images(images)
    learner = support.moved(LoCoOp(backbone, NAMES, top_share=0.4, weight=0.5))
    scores = learner(features)
    loss = learner.backward(scores, LABELS)

    leaves = support.leaves_of(learner)
    text = support.padded_text(backbone, leaves["context"][None])[0]
    scale = backbone.logit_scale
    logits = scale * features.pooled @ text.T
    local = F.normalize(features.patches @ backbone.model.visual.proj, dim=-1)
    of_background = []
    for image, label in zip(local, LABELS, strict=True):
        probabilities = (scale * image @ text.T).softmax(-1)  # (P, C)
        best = probabilities.topk(2).indices  # K = 0.4 of 5 classes
        background = probabilities[~(best == label).any(-1)]
        of_background.append(-(background * background.log()).sum(-1))
    entropy = torch.cat(of_background)
    assert 0 < len(entropy) < local.shape[0] * local.shape[1], "some patches, and not all, must be background"
    expected = F.cross_entropy(logits, LABELS) - 0.5 * entropy.mean()
    expected.backward()
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, expected), leaves)


def test_with_weight_0_it_is_coop(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    support.assert_same_training(LoCoOp(vit_backbone, NAMES, weight=0.0), CoOp(vit_backbone, NAMES), features)


def test_without_background_it_is_coop(vit_backbone, images):
    """With one class, it is among the best of every patch."""
    features = vit_backbone.encode_images(images)
    learner = LoCoOp(vit_backbone, NAMES[:1])
    loss = learner.loss(learner(features), torch.zeros(3, dtype=torch.long))
    assert loss.item() == 0


def test_the_published_share_is_200_of_1000():
    learner = LoCoOp.__init__.__kwdefaults__
    assert round(1000 * learner["top_share"]) == 200
    assert learner["weight"] == 0.25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -0.5}, "weight: expected a finite number of at least 0, got -0.5"),
        ({"top_share": 200}, "top_share: expected a share between 0 and 1, got 200"),
    ],
)
def test_wrong_options_get_one_sentence(vit_backbone, options, message):
    with pytest.raises(InputError, match=message):
        LoCoOp(vit_backbone, NAMES, **options)
