"""The weights in the package load, are small, and know the demo's classes without having seen them."""

import numpy as np
import torch

from fastprompt.backbone import load_backbone
from fastprompt.backbone.demo_model import FOLDER, load_demo_clip, load_pretraining_facts
from fastprompt.demo.pretrain import Vocabulary, encode_patches
from fastprompt.demo.pretraining_pool import GRID, cut_patches
from fastprompt.demo.scenes import DEMO_CLASSES, demo_scene, render


def test_the_weights_are_small_and_their_facts_fit():
    assert (FOLDER / "model.safetensors").stat().st_size < 16_000_000
    facts = load_pretraining_facts()
    assert facts["pairs_seen"] == facts["settings"]["steps"] * facts["settings"]["batch"]
    assert facts["zero_shot_classes"] == len(DEMO_CLASSES)


def test_the_vocabulary_of_the_weights_is_that_of_the_captions():
    model, _ = load_demo_clip()
    trained = model.token_embedding.weight.abs().sum(1).nonzero().squeeze(1)
    assert torch.equal(trained, Vocabulary().rows)


def test_pretraining_computes_the_features_that_the_backbone_gives():
    model, _ = load_demo_clip()
    backbone = load_backbone("demo", device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    with torch.no_grad():
        features = backbone.encode_images((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
        places = torch.nn.functional.normalize(backbone.project_patches(features.patches), dim=-1)
        everywhere = torch.arange(GRID * GRID).expand(2, -1)
        pooled, patches = encode_patches(model, torch.from_numpy(cut_patches(pixels)), everywhere)
    torch.testing.assert_close(pooled, features.pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(patches, places, rtol=0, atol=1e-5)


def test_zero_shot_is_far_above_chance_on_pictures_never_seen():
    backbone = load_backbone("demo", device="cpu")
    rngs = [np.random.default_rng((31, label)) for label in range(len(DEMO_CLASSES))]
    scenes = [demo_scene(spec, "photo", rng) for spec, rng in zip(DEMO_CLASSES, rngs, strict=True)]
    pixels = np.stack([np.asarray(render(scene, rng)[0]) for scene, rng in zip(scenes, rngs, strict=True)])
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        pooled = backbone.encode_images(images).pooled
        tokens = backbone.tokenize([spec.name for spec in DEMO_CLASSES])
        texts = backbone.encode_prompts(backbone.embed_words("a photo of a")[None], tokens)[0]
    accuracy = ((pooled @ texts.T).argmax(1) == torch.arange(len(DEMO_CLASSES))).float().mean()
    assert accuracy > 0.35  # chance is 1/64
