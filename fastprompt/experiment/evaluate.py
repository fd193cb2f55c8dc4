"""Testing a finished run, with zero-shot CLIP beside it."""

from __future__ import annotations

from functools import partial

from fastprompt.data import load_dataset, select_classes
from fastprompt.errors import InputError
from fastprompt.evaluation import Row, evaluate_accuracy, ood_detection
from fastprompt.experiment.config import EvaluateConfig
from fastprompt.experiment.runs import load_run, run_settings
from fastprompt.experiment.sources import feature_source, images_in, split_of, unlabelled
from fastprompt.learners import ZeroShot
from fastprompt.report import MEASURES, Table
from fastprompt.training import RunFolder


def evaluate_run(config: EvaluateConfig, *, progress: bool = True) -> Table:
    """Test a run, with zero-shot CLIP beside it."""
    run = RunFolder.open(config.run)
    settings = run_settings(run)
    split_file = settings.split_file if config.data is None else None
    data = config.data or settings.data
    if data is None:
        raise InputError(f"data: expected a data folder to test on, as {run.path} was imported without one")
    dataset = load_dataset(data, split_file=split_file, keep_underscores=settings.keep_underscores)
    images = select_classes(split_of(dataset, config.split), config.classes)
    unknown = None if config.ood is None else unlabelled(images_in(config.ood, recursive=True))
    learner = load_run(config.run, device=config.device).with_class_names(images.class_names)
    zero_shot = ZeroShot(learner.backbone, images.class_names, template=settings.template)

    reads = learner.reads | zero_shot.reads
    if unknown is not None:
        reads |= learner.ood_reads(config.ood_kind) | zero_shot.ood_reads(config.ood_kind)
    encoded = partial(feature_source, backbone=learner.backbone, config=config.features, reads=reads, progress=progress)
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
