"""What learners do not take: other people's features, images, and names that read alike."""

import logging
import unicodedata

import pytest
import torch

from fastprompt import CoOp, GalLoP, ImageFeatures, InputError, ZeroShot, make_learner
from fastprompt.backbone import class_tokens
from fastprompt.learners import METHODS
from fastprompt.sources import POOLED, CachedSource
from tests.learners.support import LABELS, NAMES
from tests.models import make_backbone, make_clip


@pytest.fixture
def features(vit_backbone, images):
    return vit_backbone.encode_images(images)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", r"class_names: expected a list of names, got one string: pass \['cat'\]"),
        (None, "class_names: expected a list of names, got NoneType"),
        ({"cat", "dog"}, "class_names: expected a list of names, got set"),
        (["cat", 3], r"class_names: expected strings, got 3 \(int\) among them"),
        ([], "class_names is empty"),
        (["cat", "dog", "Cat"], "names that the tokenizer tells apart, got 'cat' and 'Cat'"),
        (["polar bear", "polar  bear"], "tells apart, got 'polar bear' and 'polar  bear'"),
        ([unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")], "tells apart, got 'caf"),
    ],
)
def test_class_names_get_one_sentence(vit_backbone, names, message):
    for make in (
        lambda: GalLoP(vit_backbone, names),
        lambda: ZeroShot(vit_backbone, names),
        lambda: CoOp(vit_backbone, names, class_specific=True),
        lambda: GalLoP(vit_backbone, NAMES).with_class_names(names),
    ):
        with pytest.raises(InputError, match=message):
            make()


def test_the_same_name_twice_is_taken_and_said(vit_backbone, caplog):
    """ImageNet's published names have two such pairs."""
    class_tokens._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        learner = ZeroShot(vit_backbone, ["cat", "missile", "dog", "missile"])
        ZeroShot(vit_backbone, learner.class_names)  # for what comes behind a training: it is said once
    assert learner.class_names[1] == learner.class_names[3]
    assert [record.message for record in caplog.records] == [
        "classes 1 and 3 are both 'missile': a context that they share cannot tell them apart"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_only_features_of_the_own_backbone_are_taken(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES)
    other = make_backbone(make_clip())
    other.fingerprint = "1" * 16
    wrong = [
        (torch.zeros(2, 3, 32, 32), r"expected ImageFeatures, as backbone.encode_images\(images\) makes them, got Ten"),
        (other.encode_images(torch.zeros(1, 3, 32, 32)), "those of 'test' with fingerprint 0{16}, got .* with 1{16}"),
        (ImageFeatures(features.pooled[:, :31], features.patches), r"expected pooled \(B, 32\) .* got \(3, 31\)"),
        (ImageFeatures(features.pooled, features.patches[..., :63]), r"patches \(B, P, 64\) of 'test', got"),
        (ImageFeatures(features.pooled, features.patches[:2]), r"got \(3, 32\) and \(2, 16, 64\)"),
        (ImageFeatures(features.pooled[0], features.patches[0]), r"got \(32,\) and \(16, 64\)"),
    ]
    for given, message in wrong:
        for use in (learner, learner.predict, learner.ood_score, lambda f: learner.explain(f, torch.tensor([0]))):
            with pytest.raises(InputError, match=message):
                use(given)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_needs_what_it_reads_and_no_more(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES)
    few, missing = features.keep(learner.reads), r"expected those of the patches, too, got pooled features alone"
    learner.prepare(CachedSource(few, LABELS))
    learner.loss(learner(few), LABELS)
    assert torch.equal(learner.predict(few), learner.predict(features))
    uses = [] if learner.reads == POOLED else [learner.predict]
    for use in (*uses, learner.ood_score, lambda given: learner.explain(given, torch.tensor([0] * len(given)))):
        with pytest.raises(InputError, match=missing):
            use(features.keep(POOLED))
    enough = features.keep(learner.ood_reads("mcm"))
    assert torch.equal(learner.ood_score(enough, "mcm"), learner.ood_score(features, "mcm"))


def test_features_that_do_not_say_whose_they_are_are_taken(vit_backbone, features):
    learner = CoOp(vit_backbone, NAMES)
    unnamed = ImageFeatures(features.pooled, features.patches)
    assert torch.equal(learner.predict(unnamed), learner.predict(features))
    assert features[:1].to("cpu").fingerprint == vit_backbone.fingerprint


@pytest.mark.parametrize("method", METHODS)
def test_a_name_is_no_backbone(method):
    with pytest.raises(InputError, match="backbone: expected what load_backbone returns, got str"):
        make_learner(method, "ViT-B-16", NAMES)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "of floats, normalised with .*, got torch.uint8"),
        (torch.full((1, 3, 32, 32), float("nan")), "of finite numbers, got NaN or infinity"),
        (torch.full((1, 3, 32, 32), float("inf")), "of finite numbers, got NaN or infinity"),
        (torch.zeros(3, 32, 32), r"expected a tensor \(B, 3, 32, 32\), got shape \(3, 32, 32\)"),
        ([[0.0]], r"expected a tensor \(B, 3, 32, 32\), got list"),
    ],
)
def test_images_that_were_not_preprocessed_get_one_sentence(vit_backbone, images, message):
    with pytest.raises(InputError, match=message):
        vit_backbone.encode_images(images)
