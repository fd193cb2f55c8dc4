"""The frozen CLIP model: image towers with patch features, and a text tower with shared prefixes."""

from fastprompt.backbone.backbone import Backbone
from fastprompt.backbone.class_tokens import ClassTokens
from fastprompt.backbone.load import load_backbone
from fastprompt.sources.features import ImageFeatures

__all__ = ["Backbone", "ClassTokens", "ImageFeatures", "load_backbone"]
