"""Pooled features are open_clip's own; patch features are the value path, computed the long way here."""

import json

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastprompt import load_backbone
from fastprompt.backbone.image_towers import _value_path_block
from fastprompt.backbone.load import PRECISIONS
from fastprompt.errors import InputError
from tests.models import RESNET, TEXT, VIT, make_backbone, make_clip


def timm_trunk(name, pool, proj="linear"):
    return {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pool,
        "timm_proj": proj,
        "image_size": 64,
    }


TOWERS = {
    "vit": VIT,
    "vit with pixels beyond its patches": VIT | {"image_size": 35},
    "resnet": RESNET,
    "timm map": timm_trunk("mobilenetv2_050", "avg"),
    "timm head behind the pool": timm_trunk("convnext_atto", "avg"),
    "timm channels last": timm_trunk("swin_s3_tiny_224", "avg") | {"image_size": 224},
}


@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS.keys())
def test_pooled_features_are_those_of_open_clip(vision):
    backbone = make_backbone(make_clip(vision, TEXT))
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size, dtype=torch.float64)
    with torch.no_grad():
        features = backbone.encode_images(images)
        expected = backbone.model.encode_image(images, normalize=True)
    rows, columns = backbone.patch_grid
    torch.testing.assert_close(features.pooled, expected, rtol=0, atol=1e-12)
    assert features.patches.shape == (2, rows * columns, backbone.patch_width)
    assert backbone.project_patches(features.patches).shape == (2, rows * columns, backbone.embed_dim)


def test_vit_patches_follow_the_value_path_of_the_last_block(vit_backbone, images):
    visual = vit_backbone.model.visual
    with torch.no_grad():
        x = visual._embeds(images)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        last = visual.transformer.resblocks[-1]
        width = x.shape[-1]
        value_weight, value_bias = last.attn.in_proj_weight[2 * width :], last.attn.in_proj_bias[2 * width :]
        x = x + last.attn.out_proj(F.linear(last.ln_1(x), value_weight, value_bias))
        x = x + last.mlp(last.ln_2(x))
        expected = visual.ln_post(x)[:, 1:]
        got = vit_backbone.encode_images(images).patches
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(vit_backbone.project_patches(got), expected @ visual.proj, rtol=0, atol=1e-12)


def test_resnet_patches_are_projected_values_without_position():
    backbone = make_backbone(make_clip(RESNET, TEXT))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    visual = backbone.model.visual
    with torch.no_grad():
        cells = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
        cells = cells.flatten(2).transpose(1, 2)
        expected = visual.attnpool.c_proj(visual.attnpool.v_proj(cells))
        torch.testing.assert_close(backbone.encode_images(images).patches, expected, rtol=0, atol=1e-12)


def test_a_constant_timm_map_projects_to_the_pooled_feature():
    """Averaging equal patches changes nothing, so each projected patch must be the pooled feature itself."""
    backbone = make_backbone(make_clip(TOWERS["timm head behind the pool"], TEXT))
    visual = backbone.model.visual
    patch = torch.randn(1, 1, backbone.patch_width, dtype=torch.float64)
    grid = patch.transpose(1, 2)[..., None].expand(1, backbone.patch_width, *backbone.patch_grid)
    with torch.no_grad():
        pooled = visual.head(visual.trunk.forward_head(grid))
        torch.testing.assert_close(backbone.project_patches(patch)[:, 0], pooled, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS.keys())
def test_a_learned_layer_before_the_projection_is_two_products_in_one(vision):
    """Values and gradients, with the learned weight in float32 as learners have it."""
    backbone = make_backbone(make_clip(vision, TEXT))
    patches = torch.randn(2, 3, backbone.patch_width, dtype=torch.float64)
    learned = (0.1 * torch.randn(backbone.patch_width, backbone.patch_width)).requires_grad_()
    got = backbone.project_patches(patches, learned)
    expected = backbone.project_patches(patches @ learned.double().T)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    weights = torch.randn_like(got)
    gradients = [torch.autograd.grad((values * weights).sum(), learned)[0] for values in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)  # of float32 as the weight is


def test_a_learned_layer_costs_one_product_of_the_patches():
    backbone = make_backbone(make_clip())
    width, joint = backbone.patch_width, backbone.embed_dim
    patches, learned = torch.randn(5, 16, width, dtype=torch.float64), torch.eye(width, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        backbone.project_patches(patches, learned)
    assert counter.get_total_flops() == 2 * width * joint * (width + 5 * 16)


def test_a_small_step_of_a_learned_layer_survives_bfloat16():
    """The weight 1 + 1/256 is 1 in bfloat16, so the two must be multiplied before they are rounded."""
    backbone = make_backbone(make_clip().bfloat16())
    patches = torch.randn(4, backbone.patch_width).bfloat16()
    learned = torch.eye(backbone.patch_width) * (1 + 2**-8)
    assert not torch.equal(backbone.project_patches(patches, learned), backbone.project_patches(patches))


def test_the_last_block_computes_nothing_that_is_thrown_away(vit_backbone):
    """Queries of the class token alone; keys and values, output projection and MLP of all tokens."""
    block = vit_backbone.model.visual.transformer.resblocks[-1]
    B, L, W = 3, 17, VIT["width"]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        _value_path_block(block, torch.randn(B, L, W, dtype=torch.float64))
    products = [torch.ops.aten.addmm, torch.ops.aten.mm]
    counted = sum(counter.get_flop_counts()["Global"].get(product, 0) for product in products)
    assert counted == 2 * B * W * W * (1 + L * (2 + 1 + 4 + 4))


def test_the_tower_runs_in_inference_mode_and_its_features_can_be_trained_on(vit_backbone, images):
    seen = []
    norm = vit_backbone.model.visual.ln_pre
    hook = norm.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    features = vit_backbone.encode_images(images)
    hook.remove()
    assert seen == [True]
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    ((weight * features.pooled).sum() + (weight * features.patches).sum()).backward()  # refuses inference tensors
    torch.testing.assert_close(weight.grad, features.pooled.sum() + features.patches.sum())


def test_each_block_runs_once(vit_backbone, images):
    """No branch is computed and thrown away: open_clip's own pass does not do fewer operations."""

    def operations(run):
        with FlopCounterMode(display=False) as counter:
            run(images)
        return counter.get_total_flops()

    torch.backends.mha.set_fastpath_enabled(False)  # its operator is not counted
    plain = operations(vit_backbone.model.encode_image)
    torch.backends.mha.set_fastpath_enabled(True)
    assert 0.75 * plain < operations(vit_backbone.encode_images) <= plain


def test_a_backbone_is_frozen_for_good(vit_backbone):
    vit_backbone.train()
    assert not vit_backbone.training
    assert not vit_backbone.model.training
    assert not any(parameter.requires_grad for parameter in vit_backbone.parameters())


def test_wrong_image_size_is_refused(vit_backbone):
    with pytest.raises(InputError, match=r"expected a tensor \(B, 3, 32, 32\), got shape \(1, 3, 33, 32\)"):
        vit_backbone.encode_images(torch.zeros(1, 3, 33, 32))


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("ViT-B-61", "openai", "'ViT-B-61' is not an architecture of open_clip: did you mean ViT-B-16"),
        ("ViT-B-16", None, "needs weights: pass pretrained as a file or one of openai"),
        ("ViT-B-16", "nonsense", "'nonsense' is neither a file nor a tag of 'ViT-B-16'"),
        ("ViT-B-16", "openai", "trained with QuickGELU, .* pass 'ViT-B-16-quickgelu' instead"),
        ("local-dir:nowhere", None, "backbone folder nowhere: no such folder"),
        ("ViT-B-16", __file__, r"expected a .safetensors file, got .*test_image_towers.py"),
    ],
)
def test_unknown_backbones_say_what_to_pass(name, pretrained, message):
    with pytest.raises(InputError, match=message):
        load_backbone(name, pretrained, device="cpu")


def test_precision_and_device_are_checked():
    with pytest.raises(InputError, match="expected one of fp64, fp32, bf16, fp16, got 'float'"):
        load_backbone("ViT-B-32", "random", precision="float")
    with pytest.raises(InputError, match=r"device: expected cpu.*, got 'toaster'"):
        load_backbone("ViT-B-32", "random", device="toaster")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fingerprint_tells_weights_apart_and_precision_does_not_change_it(tmp_path, precision):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps({"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT}))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    reference = load_backbone("tiny", "random", device="cpu")
    torch.manual_seed(0)
    same = load_backbone("tiny", "random", device="cpu", precision=precision)
    other = load_backbone("tiny", "random", device="cpu")
    assert same.fingerprint == reference.fingerprint != other.fingerprint
    assert same.dtype == PRECISIONS[precision]
    assert same.encode_images(torch.zeros(1, 3, 32, 32)).pooled.dtype in (torch.float32, torch.float64)
