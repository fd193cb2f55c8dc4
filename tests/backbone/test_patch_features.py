"""The patch features of PLOT's code: what attention pooling makes of every cell of a ResNet's map."""

import pickle

import pytest
import torch
import torch.nn.functional as F

from fastprompt import CoOp, InputError, load_backbone
from tests.models import RESNET, TEXT, make_backbone, make_clip
from tests.models import VIT as SMALL_VIT

TIMM = {"timm_model_name": "mobilenetv2_050", "timm_model_pretrained": False, "timm_pool": "avg", "image_size": 64}


@pytest.fixture(scope="module")
def model():
    return make_clip(RESNET, TEXT)


@pytest.fixture(scope="module")
def published(model):
    return make_backbone(model, patches="published")


def pooled_with_all_queries(visual, images):
    """Features (1 + P, B, D) of torch's own attention with every token as a query."""
    cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    cells = cells.flatten(2).permute(2, 0, 1)  # (P, B, W)
    pool = visual.attnpool
    x = torch.cat([cells.mean(dim=0, keepdim=True), cells]) + pool.positional_embedding[:, None]
    return F.multi_head_attention_forward(
        x, x, x,
        x.shape[-1], pool.num_heads,
        None, torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias,
        training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )[0]  # fmt: skip


@torch.no_grad()
def test_every_cell_asks_in_the_attention_pooling(model, published):
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = pooled_with_all_queries(model.visual, images)
    features, value = published.encode_images(images), make_backbone(model).encode_images(images)
    torch.testing.assert_close(features.patches, expected[1:].transpose(0, 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(features.pooled, F.normalize(expected[0], dim=-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(features.pooled, value.pooled, rtol=0, atol=1e-12)
    assert not torch.allclose(features.patches, value.patches, rtol=0, atol=1e-2)
    assert torch.equal(published.project_patches(features.patches), features.patches)


def test_the_fingerprint_tells_them_apart_and_that_of_value_patches_stays(model, published):
    value = make_backbone(model, patches="value")
    assert (value.patches, value.fingerprint) == ("value", "0" * 16)
    assert (published.patches, published.fingerprint) == ("published", f"{'0' * 16}-patches=published")
    with pytest.raises(InputError, match=r"features: expected those of .* 0{16}-patches=published, got those of"):
        published.accept(value.encode_images(torch.zeros(1, 3, 64, 64)))


@pytest.mark.parametrize("vision", [SMALL_VIT, TIMM], ids=["ViT", "timm"])
def test_other_towers_have_none(vision):
    with pytest.raises(InputError, match="expected 'value' for all but CLIP's ResNets, got 'published': GalLoP's"):
        make_backbone(make_clip(vision, TEXT), patches="published")


def test_other_words_and_a_vit_by_name_are_refused():
    with pytest.raises(InputError, match="patches: expected value or published, got 'Published'"):
        load_backbone("demo", device="cpu", patches="Published")
    with pytest.raises(InputError, match="expected 'value' for all but CLIP's ResNets, got 'published'"):
        load_backbone("demo", device="cpu", patches="published")


def test_an_unpickled_learner_says_which_backbone_it_needs_and_takes_no_other(model, published):
    again = pickle.loads(pickle.dumps(CoOp(published, ("cat", "dog"))))  # noqa: S301
    with pytest.raises(InputError, match=r"load_backbone\('test', 'random', patches='published'\)"):
        again.text_features()
    with pytest.raises(InputError, match=r"fingerprint 0{16}-patches=published that this CoOp .*, got 'test' with 0"):
        again.backbone = make_backbone(model)
    again.backbone = published
    assert again.text_features().shape == (1, 2, 32)
