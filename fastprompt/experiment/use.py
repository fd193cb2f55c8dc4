"""What a finished run is good for: testing, predicting, explaining."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastprompt.backbone import Backbone, ImageFeatures, load_backbone
from fastprompt.backbone.class_tokens import check_class_names
from fastprompt.data import find_images, load_dataset, load_image, readable_name, select_classes
from fastprompt.documents import build, check_object
from fastprompt.errors import InputError, listed
from fastprompt.evaluation import Row, evaluate_accuracy, ood_detection
from fastprompt.experiment.config import EvaluateConfig, ExplainConfig, PredictConfig
from fastprompt.experiment.sources import feature_source, image_transform, split_of, unlabelled
from fastprompt.files import locked, replacing
from fastprompt.learners import Learner, ZeroShot
from fastprompt.learners.stored import MODEL, rebuild
from fastprompt.report import MEASURES, Table, draw_selected_patches
from fastprompt.report.style import require_extra
from fastprompt.training import RunFolder
from fastprompt.training.run_folder import CONFIG


def load_run(
    path: str | Path,
    *,
    device: str | None = None,
    backbone: Backbone | None = None,
    class_names: Sequence[str] = (),
) -> Learner:
    """The trained learner of a run folder.

    Args:
        path: the run folder.
        device: where it runs; CUDA if there is one by default.
        backbone: the one that it was trained on, if it is loaded already.
        class_names: other classes than those of the run, read as its own were: underscores become spaces, or stay.

    Raises:
        InputError: not a finished run, its backbone has other weights now, or class names that it cannot take.
    """
    run = RunFolder.open(path)
    tensors, described = run.load_model()
    if backbone is None:
        precision = _settings(run).precision
        place = {"device": device, "precision": precision, "cache_dir": described.weights_dir}
        backbone = load_backbone(described.backbone, described.pretrained, patches=described.patches, **place)
    learner = rebuild(described, tensors, backbone, run.path / MODEL)
    return learner.with_class_names(_readable(class_names, run)) if class_names else learner


def _readable(class_names: Sequence[str], run: RunFolder) -> list[str]:
    keep = _settings(run).keep_underscores
    given = enumerate(check_class_names(class_names), 1)
    names = [readable_name(name, keep, f"class_names: name {number}") for number, name in given]
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise InputError(f"class_names: expected every class once, got {repeated[0]!r} twice")
    return names


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """What a finished run is used with, of its config.json."""

    precision: str
    keep_underscores: bool
    data: str | None
    split_file: str | None
    template: str


def _settings(run: RunFolder) -> _Settings:
    """Read them; zero-shot has its template as an option, the other methods that of the row beside them."""
    where = f"run {run.path / CONFIG}"
    names = {field.name: field.name for field in fields(_Settings)}
    if run.config.get("method") != ZeroShot.method:
        names["template"] = "zero_shot_template"
    check_object(run.config, where, names.values())
    return build(_Settings, {name: run.config[stored] for name, stored in names.items()}, where)


def evaluate_run(config: EvaluateConfig, *, progress: bool = True) -> Table:
    """Test a run, with zero-shot CLIP beside it."""
    run = RunFolder.open(config.run)
    settings = _settings(run)
    split_file = settings.split_file if config.data is None else None
    data = config.data or settings.data
    if data is None:
        raise InputError(f"data: expected a data folder to test on, as {run.path} was imported without one")
    dataset = load_dataset(data, split_file=split_file, keep_underscores=settings.keep_underscores)
    images = select_classes(split_of(dataset, config.split), config.classes)
    unknown = None if config.ood is None else unlabelled(_images_in(config.ood, recursive=True))
    learner = load_run(config.run, device=config.device).with_class_names(images.class_names)
    zero_shot = ZeroShot(learner.backbone, images.class_names, template=settings.template)

    reads = learner.reads | zero_shot.reads
    if unknown is not None:
        reads |= learner.ood_reads(config.ood_kind) | zero_shot.ood_reads(config.ood_kind)
    encoded = partial(feature_source, backbone=learner.backbone, config=config, reads=reads, progress=progress)
    source = encoded(images, what=f"{config.split} images")
    outside = None if unknown is None else encoded(unknown, what="images of no class")
    measures = ["accuracy", "mean_per_class", "calibration_error"]
    if outside is not None:
        measures += ["fpr95" if config.fpr_rule == "standard" else f"fpr95_{config.fpr_rule}", "auroc"]
    rows = []
    for row in {zero_shot.method: zero_shot, learner.method: learner}.values():
        result = evaluate_accuracy(row, source, progress=progress)
        cells = [result.top1, result.mean_per_class, result.calibration_error]
        if outside is not None:
            detection = ood_detection(
                row, source, outside, config.ood_kind, fpr_rule=config.fpr_rule, progress=progress
            )
            cells += [detection.fpr95, detection.auroc]
        rows.append(Row(row.method, tuple(cells)))
    columns = tuple(MEASURES[name] for name in measures)
    title = f"{dataset.name}: {len(images)} images ({config.split}), {len(images.class_names)} classes"
    return Table(title, columns, tuple(rows), "Method")


def _images_in(folder: Path, *, recursive: bool = False) -> tuple[Path, ...]:
    """The image files of a folder, of which there must be one."""
    if not (paths := find_images(folder, recursive=recursive)):
        raise InputError(f"image folder {folder}: expected at least one image, found none")
    return paths


def predict_images(config: PredictConfig) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """The most probable classes of every image, with their probabilities, best first; each as soon as it is known."""
    if not config.images:
        raise InputError("images: expected image files or folders, got none")
    if config.top < 1:
        raise InputError(f"top: expected at least 1, got {config.top}")
    paths = [path for given in config.images for path in (_images_in(given) if given.is_dir() else (given,))]
    learner = load_run(config.run, device=config.device, class_names=config.class_names)
    for path in paths:
        probabilities = learner.predict(_features(learner, path))[0]
        best = probabilities.topk(min(config.top, len(learner.class_names)))
        classes = [learner.class_names[index] for index in best.indices.tolist()]
        yield path, list(zip(classes, best.values.tolist(), strict=True))


def explain_image(config: ExplainConfig) -> tuple[Path, str]:
    """Draw which patches speak for a class; returns the PNG file and the class."""
    require_extra()
    if config.out is not None and config.out.suffix.lower() != ".png":
        raise InputError(f"out: expected a .png file, got {config.out}")
    learner = load_run(config.run, device=config.device)
    features = _features(learner, config.image)
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


@torch.no_grad()
def _features(learner: Learner, path: Path) -> ImageFeatures:
    pixels: Tensor = image_transform(learner.backbone)(load_image(path))
    return learner.backbone.encode_images(pixels[None])
