"""Small models that every test can afford."""

import open_clip
import torch

from fastprompt.backbone import Backbone
from fastprompt.backbone.tokenizer import read_tokenizer

VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 4, "layers": 3}


def make_clip(vision=VIT, text=TEXT, embed_dim=32, quick_gelu=True):
    """A CLIP with random weights in float64 that is not degenerate: biases and norms are random too."""
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim, vision, text, quick_gelu=quick_gelu).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_backbone(model, name="test", **options):
    return Backbone(
        model,
        read_tokenizer(open_clip.SimpleTokenizer()),
        name=name,
        pretrained="random",
        fingerprint="0" * 16,
        preprocessing={
            "size": model.visual.image_size,
            "mean": (0.5,) * 3,
            "std": (0.25,) * 3,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
        **options,
    )
