"""Copies and pickles of learners, and text that is kept only while nothing has changed."""

import copy
import io
import pickle

import pytest
import torch

from fastprompt import CoOp, GalLoP, InputError, make_learner
from fastprompt.learners import METHODS
from tests.learners.support import LABELS, NAMES, float32_backbone, moved
from tests.models import make_backbone, make_clip

LEARNING = [name for name, method in METHODS.items() if method.learns]


@pytest.fixture
def features(vit_backbone, images):
    return vit_backbone.encode_images(images)


def written_past_autograd(learner):
    """As moving averages of weights write: neither addresses nor versions of the tensors change."""
    for parameter in learner.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter))
    return learner


@pytest.mark.parametrize("method", LEARNING)
def test_predictions_follow_weights_that_were_written_through_data(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES).eval()
    before = learner.predict(features)
    versions = [(parameter.data_ptr(), parameter._version) for parameter in learner.parameters()]
    after = written_past_autograd(learner).predict(features)
    assert versions == [(parameter.data_ptr(), parameter._version) for parameter in learner.parameters()]
    fresh = make_learner(method, vit_backbone, NAMES).eval()
    fresh.load_state_dict(learner.state_dict())
    torch.testing.assert_close(after, fresh.predict(features), rtol=0, atol=0)
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("method", METHODS)
def test_deep_copies_share_the_backbone_and_own_what_is_learned(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES).eval()
    before = learner.predict(features)
    twin = copy.deepcopy(learner)
    assert twin.backbone is vit_backbone
    written_past_autograd(learner)
    assert torch.equal(twin.predict(features), before)
    assert not set(twin.parameters()) & set(learner.parameters())
    assert not list(twin.children()) or twin.meta_net is not learner.meta_net


@pytest.mark.parametrize("method", METHODS)
def test_pickles_leave_the_backbone_out_and_take_it_again(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES).eval()
    before = learner.predict(features)  # what is kept of the text is not written, either
    written = pickle.dumps(learner)
    assert len(written) < 6000 + 2 * sum(4 * parameter.numel() for parameter in learner.parameters())
    again = pickle.loads(written)  # noqa: S301
    assert repr(again) == repr(learner)
    with pytest.raises(InputError, match=r"set learner.backbone = load_backbone\('test', 'random', patches='value'\)"):
        again.predict(features)
    again.backbone = vit_backbone
    assert torch.equal(again.predict(features), before)
    assert again.state_dict().keys() == learner.state_dict().keys()


def test_a_learner_without_its_backbone_can_be_pickled_again_and_takes_no_other(vit_backbone):
    again = CoOp(vit_backbone, NAMES)
    for _ in range(2):
        again = pickle.loads(pickle.dumps(again))  # noqa: S301
    other = make_backbone(make_clip())
    other.fingerprint = "1" * 16
    with pytest.raises(InputError, match=r"expected the weights with fingerprint 0{16} .*, got 'test' with 1{16}"):
        again.backbone = other
    with pytest.raises(InputError, match="backbone: expected what load_backbone returns, got str"):
        again.backbone = "ViT-B-16"
    again.backbone = vit_backbone
    assert again.class_names == NAMES


def test_torch_save_writes_a_learner_without_its_backbone(vit_backbone):
    file = io.BytesIO()
    torch.save(GalLoP(vit_backbone, NAMES), file)
    assert file.tell() < 100_000 < sum(tensor.nbytes for tensor in vit_backbone.parameters()) / 10


@pytest.mark.parametrize("method", LEARNING)
def test_features_made_in_a_callers_inference_mode_train(vit_backbone, images, method):
    with torch.inference_mode():
        features = vit_backbone.encode_images(images)
        gathered = features[torch.tensor([2, 0, 1])]  # which makes tensors of the caller's mode
    assert not features.pooled.is_inference()
    assert gathered.patches.is_inference()
    learner = moved(make_learner(method, vit_backbone, NAMES, **{"mixing": 0} if method == "dual-view" else {}))
    trained = []
    for some in (gathered, vit_backbone.encode_images(images)[torch.tensor([2, 0, 1])]):
        learner.zero_grad()
        torch.manual_seed(4)  # of prompts that are drawn
        learner.backward(learner(some), LABELS)
        trained.append([parameter.grad.clone() for parameter in learner.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*trained, strict=True))
    assert any(grad.any() for grad in trained[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_no_images_works(vit_backbone, features, method):
    learner = make_learner(method, vit_backbone, NAMES)
    none = features[:0]
    logits = learner(none).logits
    assert logits.shape == (0, len(NAMES))
    assert logits.requires_grad == learner.learns
    assert learner.predict(none).shape == (0, len(NAMES))
    assert learner.ood_score(none).shape == (0,)


@pytest.mark.compile
@pytest.mark.parametrize("method", ["coop", "sot-glp"])
def test_a_compiled_learner_takes_another_number_of_classes(method, images):
    """The tracer alone is what failed; code that it hands to a compiler is not of interest here."""
    backbone = float32_backbone()
    features = backbone.encode_images(images)
    for names in (NAMES, NAMES[:2], (*NAMES, "dog", "small bird")):
        learner = moved(make_learner(method, backbone, names))
        torch.testing.assert_close(torch.compile(learner, backend="eager")(features).logits, learner(features).logits)
