"""Drawing which patches speak for a class."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastprompt.backbone import ImageFeatures
from fastprompt.data import load_image
from fastprompt.errors import InputError, listed
from fastprompt.experiment.config import ExplainConfig
from fastprompt.experiment.runs import load_run
from fastprompt.experiment.sources import features_of, image_transform
from fastprompt.files import locked, replacing
from fastprompt.learners import Learner
from fastprompt.report import draw_selected_patches
from fastprompt.report.style import require_extra


def explain_image(config: ExplainConfig) -> tuple[Path, str]:
    """Draw which patches speak for a class; returns the PNG file and the class."""
    require_extra()
    if config.out is not None and config.out.suffix.lower() != ".png":
        raise InputError(f"out: expected a .png file, got {config.out}")
    learner = load_run(config.run, device=config.device)
    features = features_of(config.image, learner.backbone)
    index = _class_index(learner, config.class_name, features)
    name = learner.class_names[index]
    maps = learner.explain(features, torch.tensor([index]))
    seen = image_transform(learner.backbone).visible(load_image(config.image))
    weights = torch.cat(list(maps.values())).cpu()  # (N, P)
    figure = draw_selected_patches(seen, weights, learner.backbone.patch_grid, list(maps), name)
    file = re.sub(r"\W", "_", f"{config.image.stem}-{name}") + ".png"
    out = config.out or config.run / "explained" / file
    with locked(out.parent, wait=True), replacing(out) as temporary:
        figure.savefig(temporary, dpi=160, format="png")
    return out, name


def _class_index(learner: Learner, class_name: str | None, features: ImageFeatures) -> int:
    if class_name is None:
        return int(learner.predict(features)[0].argmax())
    if class_name not in learner.class_names:
        raise InputError(
            f"class_name: expected one of the {len(learner.class_names)} classes of this run "
            f"({listed(learner.class_names)}), got {class_name!r}"
        )
    return learner.class_names.index(class_name)
