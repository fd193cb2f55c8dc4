"""KgCoOp against a transcription of its equations."""

import pytest
import torch.nn.functional as F

from fastprompt import CoOp, InputError
from fastprompt.learners import KgCoOp
from fastprompt.learners.recipe import find_recipe
from tests.learners import support
from tests.learners.support import LABELS, NAMES

TEMPLATE = "a photo of a {}, a type of pet."


def test_equals_its_equations_in_float32(images):
    backbone = support.float32_backbone()
    features = backbone.encode_images(images)
    learner = support.moved(KgCoOp(backbone, NAMES, template=TEMPLATE, weight=3.0))
    scores = learner(features)
    loss = learner.backward(scores, LABELS)

    leaves = support.leaves_of(learner)
    text = support.padded_text(backbone, leaves["context"][None])[0]
    logits = backbone.logit_scale * features.pooled @ text.T
    distance = 1 - F.cosine_similarity(text, support.template_text(backbone, TEMPLATE)).mean()
    expected = F.cross_entropy(logits, LABELS) + 3.0 * distance
    expected.backward()
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, expected), leaves)


def test_with_weight_0_it_is_coop(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    support.assert_same_training(KgCoOp(vit_backbone, NAMES, weight=0.0), CoOp(vit_backbone, NAMES), features)


def test_the_distance_is_that_of_the_present_classes(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    learner = KgCoOp(vit_backbone, NAMES).with_class_names(NAMES[:4])
    alone = KgCoOp(vit_backbone, NAMES[:4])
    support.assert_same_training(learner, alone, features)


def test_recipes_have_the_template_of_their_data_set():
    assert find_recipe(KgCoOp, "oxford_pets").options["template"] == TEMPLATE
    assert find_recipe(KgCoOp, "dtd").options["template"] == "a photo of a {}, a type of texture."  # not CoOp's
    assert find_recipe(KgCoOp, "food101").options["template"] == "a photo of {}, a type of food."
    recipe = find_recipe(KgCoOp, "default")
    assert (recipe.epochs, recipe.batch_size, recipe.lr) == (100, 128, 0.002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight: expected a finite number of at least 0, got -1.0"),
        ({"weight": float("nan")}, "weight: expected a finite number of at least 0, got nan"),
        ({"template": "a photo"}, "template: expected a sentence with one {}"),
        ({"template": "a " * 80 + "{}"}, "is too long"),
    ],
)
def test_wrong_options_get_one_sentence(vit_backbone, options, message):
    with pytest.raises(InputError, match=message):
        KgCoOp(vit_backbone, NAMES, **options)
