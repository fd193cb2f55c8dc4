"""What each learner declares of itself is so, and what it was made from is recorded."""

import inspect
from collections.abc import Sequence

import pytest
import torch

from fastprompt import CoOp, InputError, Recipe, make_learner
from fastprompt.backbone import ImageFeatures
from fastprompt.learners import METHODS
from fastprompt.learners.base import OOD_KINDS, Learner, Scores
from fastprompt.learners.text import PromptLearner, TextLearner
from fastprompt.sources import PATCHES, POOLED
from tests.learners.support import LABELS, NAMES, moved

RECIPES = {"default": Recipe(source="test")}


@pytest.fixture
def features(vit_backbone, images):
    return vit_backbone.encode_images(images)


@pytest.fixture
def no_methods(monkeypatch):
    """Methods that a test makes are forgotten behind it."""
    for name in ("one", "two"):
        monkeypatch.setitem(METHODS, name, CoOp)
        monkeypatch.delitem(METHODS, name)


def step(learner, features):
    """Logits and loss of one step."""
    torch.manual_seed(0)
    scores = learner(features)
    return scores.logits, learner.loss(scores, LABELS)


@pytest.mark.parametrize("method", METHODS)
def test_patches_are_read_where_that_is_declared_and_nowhere_else(vit_backbone, features, method):
    learner = moved(make_learner(method, vit_backbone, NAMES, **({"mixing": 0.0} if method == "dual-view" else {})))
    assert learner.reads in (POOLED, PATCHES)
    other = ImageFeatures(features.pooled, features.patches.flip(0) + 0.1, features.fingerprint)
    same = [torch.equal(*pair) for pair in zip(step(learner, features), step(learner, other), strict=True)]
    assert all(same) == (learner.reads == POOLED)
    for kind in OOD_KINDS:
        if learner.ood_reads(kind) == POOLED:
            assert torch.equal(learner.ood_score(features, kind), learner.ood_score(other, kind))


@pytest.mark.parametrize("method", METHODS)
def test_images_are_independent_where_that_is_declared_and_nowhere_else(vit_backbone, features, method):
    learner = moved(make_learner(method, vit_backbone, NAMES)).eval()
    # Far from one another, so that a rule that looks at all of them stops otherwise than for one.
    features = ImageFeatures(features.pooled, features.patches * torch.tensor([0.0, 1.0, 1.0])[:, None, None])
    alone = torch.cat([learner.predict(features[index : index + 1]) for index in range(len(features))])
    assert torch.allclose(learner.predict(features), alone, rtol=0, atol=1e-10) == learner.independent_images


@pytest.mark.parametrize("method", METHODS)
def test_text_is_fixed_where_that_is_declared_and_nowhere_else(vit_backbone, features, method):
    learner = moved(make_learner(method, vit_backbone, NAMES)).eval()
    shapes = [tuple(text.shape) for text in learner.mean_text(features)]
    classes = (len(NAMES), vit_backbone.embed_dim)
    assert shapes == 2 * [classes if learner.fixed_text else (len(features), *classes)]
    assert (learner.linear_head() is not None) == learner.fixed_text
    assert isinstance(learner, TextLearner if learner.fixed_text else PromptLearner)


@pytest.mark.parametrize("method", METHODS)
def test_contexts_are_learned_tensors_as_wide_as_tokens(vit_backbone, method):
    learner = make_learner(method, vit_backbone, NAMES)
    assert bool(learner.contexts_named) == learner.learns
    for name in learner.contexts_named:
        assert learner.get_parameter(name).shape[-1] == vit_backbone.text_width


@pytest.mark.parametrize("method", METHODS)
def test_all_options_are_recorded_and_make_the_same_learner(vit_backbone, method):
    learner = make_learner(method, vit_backbone, NAMES)
    assert list(learner.options) == list(METHODS[method].option_parameters())
    again = make_learner(method, vit_backbone, NAMES, **learner.options)
    assert again.options == learner.options
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in learner.state_dict().items()}


def test_help_shows_the_arguments_of_the_constructor():
    arguments = inspect.signature(METHODS["coop"]).parameters
    assert list(arguments)[:3] == ["backbone", "class_names", "context"]
    assert arguments["context"].default == "a photo of a"


@pytest.mark.usefixtures("no_methods")
def test_a_subclass_cannot_forget_an_option(vit_backbone):
    class One(CoOp):
        method = "one"
        recipes = RECIPES

        def __init__(self, backbone, class_names, *, weight: float = 1.0, words: Sequence[str] = ("a", "b")) -> None:
            super().__init__(backbone, class_names, context=3)
            self.weight = weight

    assert One(vit_backbone, NAMES, weight=2.0).options == {"weight": 2.0, "words": ["a", "b"]}  # as JSON has it
    assert make_learner("one", vit_backbone, NAMES, **One(vit_backbone, NAMES, weight=2.0).options).weight == 2.0
    for constructor in (lambda self, b, c, weight=1.0: None, lambda self, b, c, **options: None):
        with pytest.raises(InputError, match=r"constructor of .*: expected \(self, backbone, class_names, \*, options"):
            type("Two", (CoOp,), {"method": "two", "recipes": RECIPES, "__init__": constructor})
    assert "two" not in METHODS


@pytest.mark.usefixtures("no_methods")
def test_a_learner_without_text_predicts_and_says_what_it_cannot(vit_backbone, features):
    class One(Learner):
        """A linear layer on pooled features."""

        method = "one"
        recipes = RECIPES
        reads = POOLED
        class_specific = True

        def __init__(self, backbone, class_names) -> None:
            super().__init__(backbone, class_names)
            self.weight = torch.nn.Parameter(torch.randn(len(self.class_names), backbone.embed_dim).double())

        def forward(self, features):
            return Scores(self.backbone.accept(features).pooled @ self.weight.T)

    learner = One(vit_backbone, NAMES)
    learner.backward(learner(features), LABELS)
    assert learner.weight.grad.any()
    torch.testing.assert_close(learner.predict(features).sum(1), torch.ones(3).double())
    assert learner.linear_head() is None
    assert torch.equal(learner.with_constants()(features).logits, learner(features).logits)
    with pytest.raises(InputError, match="kind: expected a method with out-of-distribution scores, got one"):
        learner.ood_score(features)
    with pytest.raises(InputError, match="explain: expected a method that weighs patches, got one"):
        learner.explain(features, LABELS)
    with pytest.raises(InputError, match="class_names: expected a list of names, got one string"):
        One(vit_backbone, "cat")
