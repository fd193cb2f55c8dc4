"""Hand-crafted prompts: the sentences of zero-shot CLIP, by data set, and their text features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError

DEFAULT_TEMPLATE = "a photo of a {}."

# As in CoOp's code base; data sets with the default are listed, too, so that this is the table of all of them.
TEMPLATES: dict[str, str] = {
    "imagenet": DEFAULT_TEMPLATE,
    "caltech101": DEFAULT_TEMPLATE,
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": DEFAULT_TEMPLATE,
    "flowers102": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "sun397": DEFAULT_TEMPLATE,
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
}


def split_template(template: str) -> tuple[str, str]:
    """What stands before and behind the class name.

    Raises:
        InputError: there is not exactly one "{}".
    """
    if template.count("{}") != 1:
        raise InputError(f"template: expected a sentence with one {{}} for the class name, got {template!r}")
    before, after = template.split("{}")
    return before, after


@torch.no_grad()
def encode_templates(backbone: Backbone, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Frozen text features (C, D) of class names in hand-crafted sentences, L2-normalised; of several, their mean.

    Args:
        backbone: the frozen model.
        class_names: C names.
        templates: at least one sentence with one "{}" for the class name.

    Raises:
        InputError: no template, one without a "{}", or a sentence that is too long.
    """
    if not templates:
        raise InputError("templates: expected at least one sentence, got none")
    encoded = []
    for template in templates:
        before, after = split_template(template)
        tokens = backbone.tokenize(class_names, after)
        encoded.append(backbone.encode_prompts(backbone.embed_words(before)[None], tokens)[0])
    return F.normalize(torch.stack(encoded).mean(dim=0), dim=-1)
