"""SOT-GLP beside a transcription of its equations."""

import pytest
import torch
import torch.nn.functional as F
from fastprompt_kernels import sinkhorn

from fastprompt import InputError, load_backbone
from fastprompt.learners import SOTGLP
from tests.learners import support
from tests.learners.support import LABELS, NAMES
from transcriptions.transport import transported

PATCHES, DRAWN = 5, torch.tensor([[2], [0], [1]])


@pytest.fixture
def learner(vit_backbone):
    return support.moved(SOTGLP(support.float32_backbone(vit_backbone), NAMES, local_prompts=3, patches=PATCHES))


def transcribed(learner, features):
    """Logits, loss, plans and leaf copies of the learned tensors."""
    leaves, backbone = support.leaves_of(learner), learner.backbone
    of_global = support.padded_text(backbone, leaves["global_prompts"], suffix="")
    of_local = support.padded_text(backbone, leaves["local_prompts"], suffix="")
    projected = features.patches @ leaves["local_projection"].T @ backbone.model.visual.proj
    plan, scores = transported(F.normalize(projected, dim=-1), of_local, PATCHES)
    scores = scores / 3  # a mean over prompts of sums over patches
    cosines = torch.einsum("bd,mcd->bcm", features.pooled, of_global)
    logits = backbone.logit_scale * (cosines.mean(-1) + scores) / 2
    kept = torch.stack([image[:, index].mean(-1) for image, index in zip(cosines, DRAWN, strict=True)])
    loss = sum(F.cross_entropy(backbone.logit_scale * part, LABELS) for part in (kept, scores))
    return logits, loss, plan, leaves


def test_equals_its_equations(learner, images):
    features = learner.backbone.encode_images(images)
    scores = learner(features)
    learner.draw_prompts = lambda images, generator: DRAWN
    loss = learner.loss(scores, LABELS)
    loss.backward()
    logits, expected, plan, leaves = transcribed(learner, features)
    expected.backward()
    support.assert_equal_to_1e_5(learner, (scores.logits, loss), (logits, expected), leaves)
    torch.testing.assert_close(plan.sum((2, 3)), torch.ones(3, len(NAMES)))


def test_the_plan_sums_to_one(learner, images):
    local, text = learner.local_features(learner.backbone.encode_images(images)), learner.encode_text()[3:]
    cosines = torch.einsum("bpd,ncd->bcpn", local, text)
    torch.testing.assert_close(sinkhorn(1 - cosines).sum((-1, -2)), torch.ones(3, len(NAMES)))
    # With one cosine for all patches and prompts, what is left of the score is that sum and the published 1/n.
    same = local[:, :1].expand(-1, PATCHES, -1), text[:1].expand(3, -1, -1)
    learner.local_features = lambda features: same[0]
    scores = learner._score_patches(learner.backbone.encode_images(images), same[1])
    torch.testing.assert_close(scores[:, 0], torch.einsum("bd,cd->bc", local[:, 0], text[0]) / 3)


def test_prompt_dropout_is_that_of_gallop(learner):
    assert learner.draw_prompts(100).shape == (100, 1)


def test_selected_patches_are_those_that_are_matched(learner, images):
    features, index = learner.backbone.encode_images(images), torch.tensor([0, 3, 2])
    with torch.no_grad():
        local, text = learner.local_features(features), learner.encode_text()[3:]
        chosen = learner.selected_patches(features, index)
    assert chosen.shape == (3, 1, 16)
    assert torch.equal(learner.explain(features, index)[f"k = {PATCHES}"], chosen[:, 0])
    for image, label in enumerate(index):
        best = (local[image] @ text[:, label].mean(0)).topk(PATCHES).indices
        assert set(chosen[image, 0].nonzero().flatten().tolist()) == set(best.tolist())


@pytest.mark.slow
def test_start_and_size():
    torch.manual_seed(0)
    backbone = load_backbone("ViT-B-16", "random", device="cpu")
    learner = SOTGLP(backbone, NAMES)
    assert {name: tuple(tensor.shape) for name, tensor in learner.state_dict().items()} == {
        "global_prompts": (3, 4, 512),
        "local_prompts": (4, 5, 4, 512),
        "local_projection": (768, 768),
    }
    bound = (6 / ((len(NAMES) + 4) * 4 * 512)) ** 0.5
    assert learner.local_prompts.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert all(torch.equal(prompt, backbone.embed_words("a photo of a")) for prompt in learner.global_prompts)
    assert SOTGLP(backbone, NAMES, **learner.options).options == learner.options


def test_other_classes_are_refused(learner):
    assert learner.with_class_names(NAMES).class_names == NAMES
    with pytest.raises(InputError, match="sot-glp learned a context for each of its 5 classes, so expected red fox"):
        learner.with_class_names(("dog", "cat", "cow", "bird", "horse"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_prompts": 0}, "local_prompts: expected 1 to 10,000, got 0"),
        ({"patches": 0}, "patches: expected at least 1 to keep, got 0"),
        ({"global_prompts": 0}, "global_prompts: expected 1 to 10,000, got 0"),
    ],
)
def test_wrong_options_get_one_sentence(vit_backbone, options, message):
    with pytest.raises(InputError, match=message):
        SOTGLP(vit_backbone, NAMES, **options)


def test_published_recipes():
    values = {name: (r.epochs, r.batch_size, r.lr, r.options["local_prompts"]) for name, r in SOTGLP.recipes.items()}
    assert values["imagenet"] == (50, 256, 0.01, 4)
    assert values["fgvc_aircraft"] == (200, 128, 0.01, 2)
    assert values["eurosat"] == (200, 10, 0.001, 4)
    assert {(recipe.weight_decay, recipe.warmup_epochs) for recipe in SOTGLP.recipes.values()} == {(1e-2, 0)}
