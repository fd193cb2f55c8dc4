"""PLOT, and the transport that it shares with SOT-GLP and DuAl-PT."""

import pytest
import torch
import torch.nn.functional as F

from fastprompt import ImageFeatures, InputError
from fastprompt.learners import PLOT, transport
from fastprompt.learners.transport import Transport, transport_similarity
from tests.kernels.support import Seen
from tests.learners import support
from tests.learners.support import LABELS, NAMES
from transcriptions.transport import local_features, transported


def draw(B=5, P=7, N=3, C=6, D=16):
    generator = torch.Generator().manual_seed(0)
    patches, prompts = (
        F.normalize(torch.randn(*shape, D, generator=generator, dtype=torch.float64), dim=-1).requires_grad_()
        for shape in ((B, P), (N, C))
    )
    return patches, prompts, torch.randn(B, C, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pooled", [False, True])
def test_equals_its_equations(vit_backbone, images, pooled):
    backbone = support.float32_backbone(vit_backbone)
    features = backbone.encode_images(images)
    learner = support.moved(PLOT(backbone, NAMES, prompts=3, context=2, pooled=pooled))
    leaves = support.leaves_of(learner)
    text = support.padded_text(backbone, leaves["contexts"], normalise=False)
    unit = F.normalize(text, dim=-1)
    logits = backbone.logit_scale * transported(local_features(learner, features), unit)[1]
    if pooled:
        mean = F.normalize(text.mean(0), dim=-1)
        assert (mean - F.normalize(unit.mean(0), dim=-1)).abs().max() > 1e-4, "the order makes no difference here"
        logits = logits + backbone.logit_scale * features.pooled @ mean.T
    torch.testing.assert_close(learner.mean_text(features)[0], unit.mean(0))
    scores = learner(features)
    loss, expected = learner.backward(scores, LABELS), F.cross_entropy(logits, LABELS)
    expected.backward()
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, expected), leaves)


def test_one_prompt_and_one_patch_make_a_cosine(vit_backbone, images):
    features = vit_backbone.encode_images(images)
    features = ImageFeatures(features.pooled, features.patches[:, 3:4])
    learner = PLOT(vit_backbone, NAMES, prompts=1)
    with torch.no_grad():
        cosines = learner.local_features(features)[:, 0] @ learner.encode_text()[0].T
        torch.testing.assert_close(learner(features).logits, vit_backbone.logit_scale * cosines, rtol=0, atol=1e-9)


@pytest.mark.parametrize("keep", [None, 4, 7, 99])
@pytest.mark.parametrize("images_at_once", [1, 2, 5])
def test_chunks_are_the_same_as_the_whole_batch(monkeypatch, keep, images_at_once):
    patches, prompts, grad = draw()
    monkeypatch.setattr(transport, "CHUNK_BYTES", images_at_once * 7 * 3 * 6 * 8)
    scores = transport_similarity(patches, prompts, Transport(keep=keep))
    expected = transported(patches, prompts, keep if keep == 4 else None)[1]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)
    for left, right in zip(
        torch.autograd.grad(scores, (patches, prompts), grad),
        torch.autograd.grad(expected, (patches, prompts), grad),
        strict=True,
    ):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_the_similarities_of_a_batch_are_never_held(monkeypatch):
    patches, prompts, grad = draw(B=20, P=30, N=5, C=12)
    monkeypatch.setattr(transport, "CHUNK_BYTES", 2 * 30 * 5 * 12 * 8)
    with Seen() as seen:
        transport_similarity(patches, prompts, Transport()).backward(grad)
    assert "fastprompt::sinkhorn" in seen.names
    assert seen.largest == 20 * 30 * 16 * 8, "more than the gradient of the patches"


def test_a_frozen_input_gets_no_gradient():
    patches, prompts, grad = draw()
    transport_similarity(patches.detach(), prompts, Transport()).backward(grad)
    assert prompts.grad.any()
    transport_similarity(patches, prompts.detach(), Transport()).backward(grad)
    assert patches.grad.any()


def test_without_a_tolerance_an_image_does_not_depend_on_its_batch():
    patches, prompts, _ = draw()
    whole = transport_similarity(patches, prompts, Transport(tolerance=0, iterations=3))
    alone = transport_similarity(patches[2:3], prompts, Transport(tolerance=0, iterations=3))
    torch.testing.assert_close(whole[2:3], alone, rtol=0, atol=1e-14)
    further = transport_similarity(patches, prompts, Transport(tolerance=0))
    assert (whole - further).abs().max() > 1e-6
    assert transport_similarity(patches[:0], prompts, Transport()).shape == (0, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": 0}, "prompts: expected 1 to 10,000, got 0"),
        ({"eps": 0.0}, "eps: expected a number above 0, got 0.0"),
        ({"iterations": 0}, "iterations: expected at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance: expected a number of at least 0, got -1.0"),
    ],
)
def test_wrong_options_get_one_sentence(vit_backbone, options, message):
    with pytest.raises(InputError, match=message):
        PLOT(vit_backbone, NAMES, **options)


def test_published_recipes():
    """The epochs are those of the training script, which overrides its configuration files."""
    recipe = PLOT.recipes["default"]
    assert [recipe.epochs_for(shots) for shots in (1, 2, 4, 8, 16, None)] == [50, 100, 100, 200, 200, 200]
    assert (recipe.batch_size, recipe.lr, recipe.warmup_epochs) == (128, 0.002, 1)
    for name in ("flowers102", "fgvc_aircraft", "stanford_cars"):
        assert (PLOT.recipes[name].batch_size, PLOT.recipes[name].epochs_for(16)) == (32, 200)
    assert (PLOT.recipes["imagenet"].epochs_for(16), PLOT.recipes["imagenet"].options) == (50, {"pooled": True})
