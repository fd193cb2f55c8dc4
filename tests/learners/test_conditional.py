"""CoCoOp and CoPL: against transcriptions that go image by image, and what follows from their equations."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastprompt import CoOp, ImageFeatures, InputError
from fastprompt.backbone import Backbone
from fastprompt.learners import CoCoOp, CoPL
from fastprompt.sources import CachedSource
from fastprompt.training import TrainingSettings, fit
from tests.learners import support
from tests.learners.support import LABELS
from tests.models import make_backbone, make_clip
from transcriptions.conditional import cocoop_context, conditional_logits, copl_context

NAMES = ("red fox", "polar bear", "cat", "very long name of a dog", "cat")
LEARNED = {"context", "meta_net.linear1.weight", "meta_net.linear1.bias"} | {
    "meta_net.linear2.weight",
    "meta_net.linear2.bias",
}

both = pytest.mark.parametrize("method", [CoCoOp, CoPL])


@pytest.fixture(scope="module")
def backbone():
    """A joint space of 64, so that the meta-net has four hidden units."""
    return make_backbone(make_clip(embed_dim=64))


@pytest.fixture
def features(backbone, images):
    return backbone.encode_images(images)


def trained(method, backbone):
    """A learner away from its start, so that no symmetry hides a mistake."""
    learner = method(backbone, NAMES).to(backbone.dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return learner


def transcribed(learner, features):
    """Logits and loss image by image, 77 tokens, with leaf copies of the learned tensors."""
    leaves = support.leaves_of(learner)
    context, *net = leaves.values()
    backbone = learner.backbone
    if isinstance(learner, CoPL):
        patches = F.normalize(features.patches @ backbone.model.visual.proj, dim=-1)
        contexts = [copl_context(context, net, image) for image in patches]
    else:
        contexts = [cocoop_context(context, net, image) for image in features.pooled]
    ids = support.ids(f"{name}." for name in NAMES)
    logits = conditional_logits(backbone.model, contexts, features.pooled, ids, backbone.logit_scale)
    return logits, F.cross_entropy(logits, LABELS), leaves


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_a_batch_equals_its_images_one_by_one(method, backbone, images, dtype, tolerance):
    backbone = make_backbone(copy.deepcopy(backbone.model).to(dtype))
    features = backbone.encode_images(images)
    learner = trained(method, backbone)
    scores = learner(features)
    loss = learner.loss(scores, LABELS)
    loss.backward()
    logits, expected, leaves = transcribed(learner, features)
    expected.backward()
    torch.testing.assert_close(scores.logits, logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for name, parameter in learner.named_parameters():
        assert leaves[name].grad.abs().max() > 1e-3
        torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=tolerance, atol=tolerance)


@both
def test_a_meta_net_that_answers_zero_leaves_coop(method, backbone, features):
    learner, coop = trained(method, backbone), CoOp(backbone, NAMES).double()
    with torch.no_grad():
        learner.meta_net.linear2.weight.zero_()
        learner.meta_net.linear2.bias.zero_()
        coop.context.copy_(learner.context)
    scores, expected = learner(features), coop(features)
    learner.loss(scores, LABELS).backward()
    coop.loss(expected, LABELS).backward()
    torch.testing.assert_close(scores.logits, expected.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(learner.context.grad, coop.context.grad, rtol=1e-10, atol=1e-10)


@both
def test_learned_tensors_are_the_published_ones_and_nothing_else_is_trained(method, backbone, features):
    learner = trained(method, backbone)
    assert set(learner.state_dict()) == {name for name, _ in learner.named_parameters()} == LEARNED
    learner.loss(learner(features), LABELS).backward()
    assert all(parameter.grad.any() for parameter in learner.parameters())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@both
def test_published_size_on_vit_b_16(method):
    vision = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 1}
    backbone = make_backbone(make_clip(vision, text, embed_dim=512))
    learner = method(backbone, NAMES)
    shapes = {name: tuple(tensor.shape) for name, tensor in learner.state_dict().items()}
    assert shapes.pop("context") == (4, 512)
    assert shapes.pop("meta_net.linear1.weight") == (32, 512)
    assert sum(parameter.numel() for parameter in learner.parameters()) == 35_360
    assert torch.equal(learner.context, backbone.embed_words("a photo of a").to(learner.context.dtype))


@both
def test_all_images_are_encoded_at_once_and_do_not_mix(method, backbone, features, monkeypatch):
    learner = trained(method, backbone)
    alone = torch.cat([learner.predict(features[index : index + 1]) for index in range(3)])
    groups = []
    encode = Backbone.encode_prompts
    monkeypatch.setattr(Backbone, "encode_prompts", lambda self, *a: groups.append(len(a[0])) or encode(self, *a))
    together = learner.predict(features)
    assert groups == [3]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(together.sum(dim=1), torch.ones(3, dtype=together.dtype))


def test_cocoop_looks_at_the_whole_image_and_copl_at_the_set_of_its_patches(backbone, features):
    generator = torch.Generator().manual_seed(0)
    other = ImageFeatures(features.pooled, torch.randn(features.patches.shape, generator=generator).double())
    shuffled = ImageFeatures(features.pooled, features.patches.flip(1))
    cocoop, copl = trained(CoCoOp, backbone), trained(CoPL, backbone)
    assert torch.equal(cocoop.predict(features), cocoop.predict(other))
    assert not torch.allclose(copl.predict(features), copl.predict(other), atol=1e-3)
    torch.testing.assert_close(copl.predict(features), copl.predict(shuffled), rtol=0, atol=1e-12)


@both
def test_ood_scores_compare_with_the_text_of_the_image_itself(method, backbone, features):
    learner = trained(method, backbone)
    with torch.no_grad():
        text, patches = learner.encode_text(features), learner.local_features(features)
        pooled = [(image @ own.T).softmax(-1).amax() for image, own in zip(features.pooled, text, strict=True)]
        local = [(image @ own.T).softmax(-1).amax() for image, own in zip(patches, text, strict=True)]
    pooled, local = torch.stack(pooled), torch.stack(local)
    for kind, expected in (("mcm", -pooled), ("l-mcm", -local), ("gl-mcm", -(pooled + local))):
        torch.testing.assert_close(learner.ood_score(features, kind).double(), expected, rtol=0, atol=1e-6)


@both
def test_no_images_have_no_scores(method, backbone, features):
    assert trained(method, backbone)(features[:0]).logits.shape == (0, len(NAMES))


@both
def test_other_class_names_share_the_learned_tensors(method, backbone, features):
    learner = trained(method, backbone)
    other = learner.with_class_names([NAMES[index] for index in (3, 1, 0)])
    assert other.meta_net is learner.meta_net
    logits = learner(features).logits[:, [3, 1, 0]]
    torch.testing.assert_close(other(features).logits, logits, rtol=0, atol=1e-9)


@both
def test_the_loop_trains_it(method, backbone, features):
    rows = features[torch.arange(3).repeat(4)]

    class Rows:
        def __len__(self):
            return len(rows)

        def rows(self, indices, names):
            return rows.keep(names)[indices].tensors

    torch.manual_seed(0)
    learner = method(backbone, NAMES)
    settings = TrainingSettings(epochs=6, batch_size=4, lr=0.02, warmup_epochs=0)
    result = fit(learner, CachedSource(Rows(), LABELS.repeat(4)), settings, progress=False)
    assert result.epochs[-1].loss < 0.8 * result.epochs[0].loss


@both
def test_wrong_use_gets_one_sentence(method, backbone):
    with pytest.raises(InputError, match="context: expected 1 to 77 tokens, got 0"):
        method(backbone, NAMES, context=0)
