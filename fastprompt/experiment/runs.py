"""A finished run, as the learner that it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.backbone.class_tokens import check_class_names
from fastprompt.data import readable_name
from fastprompt.documents import build, check_object
from fastprompt.errors import InputError
from fastprompt.learners import Learner
from fastprompt.learners.stored import MODEL, rebuild
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
        precision = run_settings(run).precision
        place = {"device": device, "precision": precision, "cache_dir": described.weights_dir}
        backbone = load_backbone(described.backbone, described.pretrained, patches=described.patches, **place)
    learner = rebuild(described, tensors, backbone, run.path / MODEL)
    return learner.with_class_names(_readable(class_names, run)) if class_names else learner


def _readable(class_names: Sequence[str], run: RunFolder) -> list[str]:
    keep = run_settings(run).keep_underscores
    given = enumerate(check_class_names(class_names), 1)
    names = [readable_name(name, keep, f"class_names: name {number}") for number, name in given]
    if repeated := [name for number, name in enumerate(names) if name in names[:number]]:
        raise InputError(f"class_names: expected every class once, got {repeated[0]!r} twice")
    return names


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What a finished run is used with, of its config.json."""

    precision: str
    keep_underscores: bool
    data: str | None
    split_file: str | None
    template: str


def run_settings(run: RunFolder) -> RunSettings:
    """Read them; methods that learn have the template of the zero-shot row beside them, others one of their own."""
    where = f"run {run.path / CONFIG}"
    names = {field.name: field.name for field in fields(RunSettings)}
    if "zero_shot_template" in run.config:
        names["template"] = "zero_shot_template"
    check_object(run.config, where, names.values())
    return build(RunSettings, {name: run.config[stored] for name, stored in names.items()}, where)
