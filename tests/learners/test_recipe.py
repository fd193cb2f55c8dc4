"""Recipes by name and from a file, what registration asks of a method, and hand-crafted prompts."""

import json

import pytest
import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer

from fastprompt import CoOp, GalLoP, InputError, ZeroShot
from fastprompt.learners import METHODS, Learner, Recipe
from fastprompt.learners.recipe import find_recipe, write_recipe
from fastprompt.learners.templates import TEMPLATES, encode_templates

NAMES = ("red fox", "polar bear", "cat")


def test_a_data_set_without_a_recipe_of_its_own_takes_the_default():
    assert find_recipe(GalLoP, "imagenet").batch_size == 128
    assert find_recipe(GalLoP, "dtd") is GalLoP.recipes["default"]
    assert find_recipe(CoOp, "few-shot").options == {"context": 16}
    with pytest.raises(InputError, match=r"recipe: expected one of default, imagenet, .*or a .json file, got 'imgnet'"):
        find_recipe(GalLoP, "imgnet")


@pytest.mark.parametrize("learner", METHODS.values(), ids=METHODS)
def test_recipes_can_be_written_and_read(learner, tmp_path):
    for name, recipe in learner.recipes.items():
        write_recipe(learner, recipe, tmp_path / f"{name}.json")
        assert find_recipe(learner, str(tmp_path / f"{name}.json")) == recipe
    with pytest.raises(InputError, match="exists already"):
        write_recipe(learner, recipe, tmp_path / "default.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "coop"}, "mine.json: expected one of gallop, got one of 'coop'"),
        ({"learning_rate": 1}, "mine.json: expected no value 'learning_rate'"),
        ({"epochs": {"many": 3}}, r"mine.json: epochs: expected int \| Mapping\[int, int\], got {'many': 3}"),
        ({"momentum": [1]}, r"mine.json: momentum: expected float, got \[1\]"),
        ({"epochs": True}, r"mine.json: epochs: expected int \| Mapping"),
        ({"options": {"k": "x"}}, r"mine.json: k: expected Sequence\[int\], got 'x'"),
        ({"options": {"j": 1}}, "mine.json: gallop has no option 'j', only global_prompts, k, dropout, context"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(change, message, tmp_path):
    file = tmp_path / "mine.json"
    write_recipe(GalLoP, GalLoP.recipes["default"], file)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        find_recipe(GalLoP, str(file))


def test_a_recipe_file_must_be_json(tmp_path):
    with pytest.raises(InputError, match=r"file: expected a name that ends in .json, got .*mine.yaml"):
        write_recipe(GalLoP, GalLoP.recipes["default"], tmp_path / "mine.yaml")


def test_a_method_is_registered_once_and_has_a_default_recipe():
    with pytest.raises(InputError, match=r"'coop' of Other is the name of another method, fastprompt.learners.coop.Co"):
        type("Other", (Learner,), {"method": "coop", "recipes": {"default": Recipe(source="here")}})
    with pytest.raises(InputError, match="recipes of Other: expected a recipe named 'default'"):
        type("Other", (CoOp,), {"method": "other"})
    assert METHODS["coop"] is CoOp
    assert "other" not in METHODS


@pytest.mark.parametrize("learner", METHODS.values(), ids=METHODS)
def test_recipes_name_their_source_and_known_data_sets(learner):
    assert all(recipe.source for recipe in learner.recipes.values())
    assert set(learner.recipes) <= {"default", "few-shot", "gl-mcm", *TEMPLATES}


def test_the_sentence_of_gl_mcm_has_no_full_stop():
    assert find_recipe(ZeroShot, "gl-mcm").options == {"template": "a photo of a {}"}


def test_templates_are_encoded_as_open_clip_does(vit_backbone):
    templates = ["a photo of a {}, a type of pet.", "{} texture."]
    ids = [SimpleTokenizer()([text.format(name) for name in NAMES], context_length=77) for text in templates]
    each = torch.stack([vit_backbone.model.encode_text(tokens, normalize=True) for tokens in ids])
    one = encode_templates(vit_backbone, NAMES, templates[:1])
    torch.testing.assert_close(one, each[0], rtol=0, atol=1e-9)
    mean = encode_templates(vit_backbone, NAMES, templates)
    torch.testing.assert_close(mean, F.normalize(each.mean(0), dim=-1), rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="templates: expected at least one sentence, got none"):
        encode_templates(vit_backbone, NAMES, [])


def test_hand_crafted_text_is_encoded_once_for_each_set_of_classes(vit_backbone):
    learner = ZeroShot(vit_backbone, NAMES)
    first = learner.hand_crafted("a photo of a {}.")
    assert learner.hand_crafted("a photo of a {}.") is first
    assert len(learner.with_class_names(NAMES[:2]).hand_crafted("a photo of a {}.")) == 2
    assert not torch.allclose(learner.hand_crafted("{} texture."), first)


class PerImage(ZeroShot):
    """Text features that depend on the image, as conditional methods have them."""

    def mean_text(self, features):
        text = self.text_features()[0]
        moved = F.normalize(text + features.pooled[:, None], dim=-1)
        return moved, moved.flip(1)


def test_ood_scores_of_text_that_depends_on_the_image(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    learner = PerImage(vit_backbone, NAMES)
    expected = []
    for index in range(len(features)):
        of_pooled, of_patches = (text[index] for text in learner.mean_text(features))
        patches = learner.local_features(features)[index]
        pooled = (features.pooled[index] @ of_pooled.T).softmax(-1).max()
        expected.append(-(pooled + (patches @ of_patches.T).softmax(-1).max()))
    torch.testing.assert_close(learner.ood_score(features), torch.stack(expected), rtol=0, atol=1e-6)
