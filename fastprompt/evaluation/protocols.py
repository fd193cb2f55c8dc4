"""How a learner is tested: accuracy, base-to-new generalisation, detection of images that are in no class."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprompt.errors import InputError
from fastprompt.evaluation import metrics
from fastprompt.evaluation.summary import Summary
from fastprompt.progress import progress_bar
from fastprompt.sources import FeatureSource, ImageFeatures, Images, Reads, as_source
from fastprompt.sources.source import check_labels

if TYPE_CHECKING:
    from fastprompt.learners import Learner


@dataclass(frozen=True)
class Predictions:
    """What a learner said about every image of a source, in the source's order, on the CPU.

    Attributes:
        classes: (n,) int64, the predicted class.
        confidence: (n,) float32, its probability.
    """

    classes: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one learner on one test set, as fractions.

    Attributes:
        top1: share of images whose predicted class is right.
        mean_per_class: mean of the classes' own accuracies.
        calibration_error: expected calibration error, 15 bins.
        images: number of test images.
    """

    top1: float
    mean_per_class: float
    calibration_error: float
    images: int


@dataclass(frozen=True)
class BaseToNew:
    """Accuracy on the classes that were trained on, and on classes that the learner only knows by name."""

    base: Accuracy
    new: Accuracy

    @property
    def harmonic(self) -> float:
        """Harmonic mean of the two top-1 accuracies, H."""
        return metrics.harmonic_mean(self.base.top1, self.new.top1)


@dataclass(frozen=True)
class BaseToNewSummary:
    """Base and new accuracy over several runs, and the harmonic mean **of the two means**.

    The tables of the CoOp family are made this way; the mean of the runs' own H is another number.
    """

    base: Summary
    new: Summary

    @property
    def harmonic(self) -> float:
        """Harmonic mean of the mean base and the mean new accuracy."""
        return metrics.harmonic_mean(self.base.mean, self.new.mean)

    @classmethod
    def of(cls, results: Sequence[BaseToNew]) -> "BaseToNewSummary":
        """Summarise the seeds of one dataset, or the datasets of an average row."""
        return cls(
            Summary.of(result.base.top1 for result in results), Summary.of(result.new.top1 for result in results)
        )


@dataclass(frozen=True)
class OodDetection:
    """How well the score tells images of no class from images of the learner's classes, as fractions.

    Attributes:
        auroc: area under the ROC curve, out-of-distribution as the positive class.
        fpr95: share of out-of-distribution images kept when 95 % of the in-distribution images are kept.
        kind: which score.
        fpr_rule: which threshold keeps 95 %.
    """

    auroc: float
    fpr95: float
    kind: str
    fpr_rule: metrics.FprRule = "standard"


def predict_all(learner: "Learner", source: Images, *, batch_size: int = 256, progress: bool = True) -> Predictions:
    """Predict every image of a source.

    Args:
        learner: the classifier; its training mode is left as it was.
        source: the images; those of `as_source`, too.
        batch_size: images at a time.
        progress: show a progress bar.

    Raises:
        InputError: the source is empty, or the batch size is not positive.
    """
    source = as_source(source, learner, what="test images", progress=progress)
    classes, confidences = [], []
    with _inference(learner):
        for features in _batches(learner, source, learner.reads, batch_size, "predict" if progress else None):
            confidence, predicted = learner.predict(features).float().max(dim=-1)
            classes.append(predicted.cpu())
            confidences.append(confidence.cpu())
    return Predictions(torch.cat(classes), torch.cat(confidences))


def evaluate_accuracy(learner: "Learner", source: Images, *, batch_size: int = 256, progress: bool = True) -> Accuracy:
    """Measure how often the learner's first choice is right.

    Args:
        learner: the classifier; its training mode is left as it was.
        source: the test images; their labels index `learner.class_names`. A torch Dataset or DataLoader of
            (image, label) is taken, too; see `as_source`.
        batch_size: images at a time.
        progress: show a progress bar.

    Raises:
        InputError: a label has no class name, the source is empty, or the batch size is not positive.
    """
    source = as_source(source, learner, what="test images", progress=progress)
    check_labels(source, learner.class_names, "test images")
    labels = source.labels.cpu()
    predictions = predict_all(learner, source, batch_size=batch_size, progress=progress)
    correct = predictions.classes == labels
    return Accuracy(
        top1=metrics.accuracy(predictions.classes, labels),
        mean_per_class=metrics.mean_per_class_accuracy(predictions.classes, labels),
        calibration_error=metrics.expected_calibration_error(predictions.confidence, correct),
        images=len(labels),
    )


def base_to_new(
    learner: "Learner",
    base: Images,
    new: Images,
    new_class_names: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = True,
) -> BaseToNew:
    """CoOp's base-to-new protocol: the same learned prompts on their own classes and on others, each among its own.

    Args:
        learner: trained on the base classes, which are its `class_names`.
        base: test images of the base classes.
        new: test images of the new classes, labelled from 0.
        new_class_names: names of the new classes.
        batch_size: images at a time.
        progress: show progress bars.
    """
    new_learner = learner.with_class_names(tuple(new_class_names))
    return BaseToNew(
        base=evaluate_accuracy(learner, base, batch_size=batch_size, progress=progress),
        new=evaluate_accuracy(new_learner, new, batch_size=batch_size, progress=progress),
    )


def ood_detection(
    learner: "Learner",
    in_source: Images,
    out_source: Images,
    kind: str = "gl-mcm",
    *,
    fpr_rule: metrics.FprRule = "standard",
    batch_size: int = 256,
    progress: bool = True,
) -> OodDetection:
    """Measure how well the learner's score separates its own classes from everything else.

    Args:
        learner: the classifier; its `ood_score` is LOWER for images that are more in-distribution.
        in_source: test images of the learner's classes.
        out_source: images of none of its classes; their labels are not used.
        kind: "mcm", "l-mcm" or "gl-mcm".
        fpr_rule: "standard" or "gallop", see `fpr_at_recall`.
        batch_size: images at a time.
        progress: show progress bars.
    """

    def scores(source: Images, title: str) -> Tensor:
        reads = learner.ood_reads(kind)
        source = as_source(source, learner, what=f"{title} images", progress=progress, reads=reads)
        with _inference(learner):
            batches = _batches(learner, source, reads, batch_size, title if progress else None)
            return torch.cat([learner.ood_score(features, kind=kind).cpu() for features in batches])

    in_scores, out_scores = scores(in_source, "in-distribution"), scores(out_source, "out-of-distribution")
    fpr95 = metrics.fpr_at_recall(in_scores, out_scores, rule=fpr_rule)
    return OodDetection(metrics.auroc(in_scores, out_scores), fpr95, kind, fpr_rule)


@contextmanager
def _inference(learner: "Learner") -> Iterator[None]:
    """No gradients and no dropout, and the learner as it was afterwards."""
    training = learner.training
    learner.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        learner.train(training)


def _batches(
    learner: "Learner", source: FeatureSource, reads: Reads, batch_size: int, title: str | None
) -> Iterator[ImageFeatures]:
    """The images in order, on the backbone's device; a bar with the title, or none."""
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    if not len(source):
        raise InputError("source must hold at least one image, got an empty one.")
    device = next(learner.backbone.parameters()).device
    indices = torch.arange(len(source)).split(batch_size)
    for batch in progress_bar(indices, what=title or "", shown=title is not None, unit="batch", leave=False):
        yield source.batch(batch, reads=reads).to(device)
