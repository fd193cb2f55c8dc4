"""One training run, from a folder of images to a tested model in a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.data import Dataset, few_shot, load_dataset, select_classes
from fastprompt.evaluation import Row, base_to_new, evaluate_accuracy
from fastprompt.experiment.config import TrainConfig
from fastprompt.experiment.sources import feature_source
from fastprompt.learners import Learner, ZeroShot, make_learner
from fastprompt.report import CaptionedFigure, Column, Report, Table, TrainingCurve, draw_training_curves, write_report
from fastprompt.training import RunFolder, epoch_metrics, fit

EVALUATION = "evaluation"  # kind of line in metrics.jsonl
REPORT = "report.html"

PERCENT = {"unit": "%", "scale": 100.0}
COLUMNS = {
    "accuracy": Column("Accuracy", higher_is_better=True, **PERCENT),
    "mean_per_class": Column("Mean per class", higher_is_better=True, **PERCENT),
    "calibration_error": Column("Calibration error", higher_is_better=False, **PERCENT),
    "base": Column("Base", higher_is_better=True, **PERCENT),
    "new": Column("New", higher_is_better=True, **PERCENT),
    "harmonic": Column("H", higher_is_better=True, **PERCENT),
}


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run.

    Attributes:
        run: its folder.
        table: zero-shot beside the method, on the test images.
    """

    run: RunFolder
    table: Table


def train_run(config: TrainConfig, *, backbone: Backbone | None = None, progress: bool = True) -> TrainedRun:
    """Train and test one learner as configured; what can be wrong with the input is checked before the long work.

    An unfinished run in the same folder is resumed; of a finished one the results are read.

    Args:
        config: what to train.
        backbone: the one that ``config`` names, if it is loaded already.
        progress: whether to show bars.

    Raises:
        InputError: bad input, in one sentence.
        Interrupted: Ctrl-C while training; the last step is kept.
    """
    config.settings()  # checks them
    dataset = load_dataset(config.data, split_file=config.split_file, keep_underscores=config.keep_underscores)
    train = few_shot(select_classes(dataset.train, config.classes), config.shots or None, config.seed, config.sampler)
    run = RunFolder.create_or_resume(config.out or default_run_folder(config, dataset), config.resolved())
    if not run.complete or not run.metrics(EVALUATION):
        backbone = backbone or load_backbone(
            config.backbone,
            config.pretrained,
            device=config.device,
            precision=config.precision,
            cache_dir=config.weights_dir,
        )
        torch.manual_seed(config.seed)  # random contexts
        learner = make_learner(config.method, backbone, train.class_names, **config.learner_options())
        template = ZeroShot(backbone, train.class_names, template=config.zero_shot_template)
        if config.settings() is not None:
            source = feature_source(train, backbone, config, augment=config.augment, progress=progress)
            fit(learner, source, config.settings(), run=run, progress=progress)
        if not run.complete:
            run.save_model(learner, {"options": learner.options})
        rows = {template.method: template, learner.method: learner}
        results = {name: _test(row, dataset, backbone, config, progress) for name, row in rows.items()}
        run.log(EVALUATION, results=results)
    table = results_table(run, dataset.name)
    write_report(_report(config, run, table), run.path / REPORT)
    return TrainedRun(run, table)


def default_run_folder(config: TrainConfig, dataset: Dataset) -> Path:
    """runs/DATASET/METHOD/BACKBONE/shots16-seed1, or ...-base for base-to-new."""
    backbone = config.backbone.replace("/", "-").replace(":", "-")
    if config.pretrained:
        backbone = f"{backbone}-{Path(config.pretrained).stem}"
    shots = f"shots{config.shots}" if config.shots else "all"
    suffix = "" if config.classes == "all" else f"-{config.classes}"
    return Path("runs") / dataset.name / config.method / backbone / f"{shots}-seed{config.seed}{suffix}"


def _test(
    learner: Learner, dataset: Dataset, backbone: Backbone, config: TrainConfig, progress: bool
) -> dict[str, float]:
    """Accuracy on the test images; base, new and H where only base classes were learned."""
    if config.classes == "all":
        source = feature_source(dataset.test, backbone, config, progress=progress)
        result = evaluate_accuracy(learner, source, progress=progress)
        return {
            "accuracy": result.top1,
            "mean_per_class": result.mean_per_class,
            "calibration_error": result.calibration_error,
        }
    base, new = (select_classes(dataset.test, half) for half in ("base", "new"))
    sources = [feature_source(images, backbone, config, progress=progress) for images in (base, new)]
    result = base_to_new(learner, *sources, new.class_names, progress=progress)
    return {"base": result.base.top1, "new": result.new.top1, "harmonic": result.harmonic}


def results_table(run: RunFolder, dataset: str) -> Table:
    """The test results in a run folder."""
    results = run.metrics(EVALUATION)[-1]["results"]
    measures = [name for name in COLUMNS if all(name in result for result in results.values())]
    rows = tuple(Row(method, tuple(result[name] for name in measures)) for method, result in results.items())
    return Table(f"{dataset}: test images", tuple(COLUMNS[name] for name in measures), rows, "Method")


def _report(config: TrainConfig, run: RunFolder, table: Table) -> Report:
    epochs = epoch_metrics(run)
    curve = TrainingCurve(config.method, [[epoch.loss for epoch in epochs]], [[epoch.accuracy for epoch in epochs]])
    figures = (
        (CaptionedFigure(draw_training_curves([curve], "Training accuracy (%)"), "Each image before its update."),)
        if epochs
        else ()
    )
    return Report(
        title=f"{config.method} on {table.title.split(':')[0]}",
        summary=f"{config.backbone}, {config.shots or 'all'} training images per class, seed {config.seed}.",
        tables=(table,),
        figures=figures,
        facts={"Configuration": config.resolved()},
    )
