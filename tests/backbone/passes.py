"""Passes through a text tower whose peak memory is measured in a process of their own."""

from types import SimpleNamespace

import torch

from benchmarks.class_names import CALTECH
from fastprompt.backbone import Backbone
from tests.models import VIT, make_backbone, make_clip

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 5}


def backbone_of(dtype: torch.dtype) -> Backbone:
    """A backbone whose text tower is that of ViT-B/16, with five blocks."""
    return make_backbone(make_clip(VIT, TEXT, embed_dim=512).to(dtype))


def build(shape, device):
    """A pass over 100 real names, with the shape's dtype, groups G, ``gradient`` (0 or 1) and memory ``budget``."""
    backbone = backbone_of(getattr(torch, shape["dtype"]))
    backbone.memory_budget = shape["budget"]
    class_tokens = backbone.tokenize(CALTECH)
    context = 0.02 * torch.randn(shape["G"], 4, 512)

    def run():
        with torch.set_grad_enabled(bool(shape["gradient"])):
            leaf = context.clone().requires_grad_()
            features = backbone.encode_prompts(leaf, class_tokens)
            if shape["gradient"]:
                features.sum().backward()
        return (features.detach(),)

    return SimpleNamespace(implementations={"pass": run})
