"""One training run, from a folder of images to a tested model in a run folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastprompt.backbone import Backbone
from fastprompt.data import Dataset, LabelledImages, few_shot, load_dataset, select_classes
from fastprompt.documents import check_type
from fastprompt.errors import InputError
from fastprompt.evaluation import Row, base_to_new, evaluate_accuracy
from fastprompt.experiment.augmentation import training_source
from fastprompt.experiment.configure import Experiment
from fastprompt.experiment.identity import data_identity
from fastprompt.experiment.sources import feature_source, open_backbone
from fastprompt.learners import Learner, ZeroShot, make_learner
from fastprompt.report import (
    MEASURES,
    CaptionedFigure,
    Report,
    Table,
    TrainingCurve,
    draw_training_curves,
    write_report,
)
from fastprompt.report.style import require_extra
from fastprompt.sources import FeatureSource
from fastprompt.training import RunFolder, epoch_metrics, fit

log = logging.getLogger(__name__)
EVALUATION = "evaluation"  # kind of line in metrics.jsonl
REPORT = "report.html"


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run.

    Attributes:
        run: its folder.
        table: zero-shot beside the method, on the test images.
        found: whether the run was complete already, so that nothing was trained.
    """

    run: RunFolder
    table: Table
    found: bool


def train_run(config: Experiment, *, backbone: Backbone | None = None, progress: bool = True) -> TrainedRun:
    """Train and test one learner as configured; what can be wrong with the input is checked before the long work.

    An unfinished run in the same folder is resumed; of a finished one the results are read, and no file is written that
    is there. The contents of the data and the weights of the backbone belong to what is compared. No other process may
    work on the folder meanwhile.

    Args:
        config: what to do.
        backbone: the one that ``config`` names, if it is loaded already.
        progress: whether to show bars.

    Raises:
        InputError: bad input, a folder with another run, or one that another process works on, in one sentence.
        Interrupted: Ctrl-C while training; the last step is kept.
    """
    config.settings()  # a number out of its range is said before anything is read
    data = config.data
    dataset = load_dataset(data.data, split_file=data.split_file, keep_underscores=data.keep_underscores)
    train = dataset.train
    if (drawn := config.training) is not None:
        train = few_shot(train, drawn.shots or None, drawn.seed, drawn.sampler)
    train = select_classes(train, data.classes)  # after the draw, as published
    backbone = backbone or open_backbone(config.backbone, config.runtime)
    asked = config.resolved() | {"weights": backbone.fingerprint}
    asked |= data_identity(config, dataset, train, progress=progress)
    run = RunFolder.create_or_resume(config.out or default_run_folder(config, dataset), asked)
    with run.locked():
        found = run.complete and bool(run.metrics(EVALUATION))
        if not found:
            _train_and_test(run, config, dataset, train, backbone, progress)
        table = results_table(run, dataset.name)
        if not found or not (run.path / REPORT).exists():
            _write_report(config, run, table)
    return TrainedRun(run, table, found)


def _train_and_test(
    run: RunFolder,
    config: Experiment,
    dataset: Dataset,
    train: LabelledImages,
    backbone: Backbone,
    progress: bool,
) -> None:
    """Do what the run still lacks of training, saving and testing."""
    learner, *peers = _learners(config, backbone, train.class_names)
    learner.check()
    parts = ("all",) if config.data.classes == "all" else ("base", "new")
    images = {part: select_classes(dataset.test, part) for part in parts}
    for row in (learner, *peers):
        for some in images.values():
            row.with_class_names(some.class_names)  # checks that they fit, before any image is encoded
    reads = learner.reads.union(*(peer.reads for peer in peers))
    options = {"reads": reads, "progress": progress, "what": "test images"}
    tests = {
        part: (feature_source(some, backbone, config.features, **options), some.class_names)
        for part, some in images.items()
    }
    if config.training is not None:
        source = training_source(train, backbone, config, reads=learner.reads, progress=progress)
        fit(learner, source, config.settings(), run=run, progress=progress)
    if not run.complete:
        run.save_model(learner, config.runtime.weights_dir)
    run.log(EVALUATION, results={row.method: _test(row, tests, progress) for row in (*peers, learner)})


def default_run_folder(config: Experiment, dataset: Dataset) -> Path:
    """runs/DATASET/METHOD/BACKBONE/shots16-seed1, or ...-base for base-to-new."""
    backbone = config.backbone.backbone.replace("/", "-").replace(":", "-")
    if config.backbone.pretrained:
        backbone = f"{backbone}-{Path(config.backbone.pretrained).stem}"
    return Path("runs") / dataset.name / config.method / backbone / config.run_name


def _learners(config: Experiment, backbone: Backbone, class_names: Sequence[str]) -> list[Learner]:
    """The learner of the method, and zero-shot CLIP beside a method that learns."""
    if config.training is not None:
        torch.manual_seed(config.training.seed)  # random contexts
    learner = make_learner(config.method, backbone, class_names, **config.options)
    if config.training is None:
        return [learner]
    return [learner, ZeroShot(backbone, class_names, template=config.zero_shot_template())]


def _test(
    learner: Learner, tests: dict[str, tuple[FeatureSource, tuple[str, ...]]], progress: bool
) -> dict[str, float]:
    """Accuracy on the test images; base, new and H where only base classes are known."""
    if "all" in tests:
        result = evaluate_accuracy(learner, tests["all"][0], progress=progress)
        return {
            "accuracy": result.top1,
            "mean_per_class": result.mean_per_class,
            "calibration_error": result.calibration_error,
        }
    (base, _), (new, new_names) = tests["base"], tests["new"]
    result = base_to_new(learner, base, new, new_names, progress=progress)
    return {"base": result.base.top1, "new": result.new.top1, "harmonic": result.harmonic}


def results_table(run: RunFolder, dataset: str) -> Table:
    """The test results in a run folder."""
    results = run.metrics(EVALUATION)[-1].get("results")
    check_type(results, dict[str, dict[str, float]], f"run {run.path}: results")
    measures = [name for name in MEASURES if all(name in result for result in results.values())]
    rows = tuple(Row(method, tuple(result[name] for name in measures)) for method, result in results.items())
    return Table(f"{dataset}: test images", tuple(MEASURES[name] for name in measures), rows, "Method")


def _write_report(config: Experiment, run: RunFolder, table: Table) -> None:
    try:
        require_extra()
    except InputError as missing:  # a run is whole without its page, and the same command writes it later
        log.warning("%s is not written: %s", REPORT, missing)
    else:
        write_report(_report(config, run, table), run.path / REPORT)


def _report(config: Experiment, run: RunFolder, table: Table) -> Report:
    epochs = epoch_metrics(run)
    curve = TrainingCurve(config.method, [[epoch.loss for epoch in epochs]], [[epoch.accuracy for epoch in epochs]])
    figures = (
        (CaptionedFigure(draw_training_curves([curve], "Training accuracy (%)"), "Each image before its update."),)
        if epochs
        else ()
    )
    return Report(
        title=f"{config.method} on {table.title.split(':')[0]}",
        summary=f"{config.backbone.backbone}, {config.run_name}.",
        tables=(table,),
        figures=figures,
        facts={"Configuration": config.resolved()},
    )
