"""The numbers that tables are made of, computed by torchmetrics.

All of them are fractions between 0 and 1; tables turn them into per cent.
torchmetrics is imported inside the functions because it loads matplotlib, which costs more than torch itself.
"""

import torch
from torch import Tensor

from fastprompt.errors import InputError


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of the images whose predicted class is their label (top-1).

    Args:
        predicted: (n,) predicted class indices.
        labels: (n,) true class indices.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    _check_pairs("predicted", predicted, labels)
    return multiclass_accuracy(predicted, labels, _class_count(predicted, labels), average="micro").item()


def mean_per_class_accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Mean over the classes of each class's own accuracy, so that every class weighs the same.

    Only classes with at least one image count: a class that is merely predicted has no accuracy of its own.

    Args:
        predicted: (n,) predicted class indices.
        labels: (n,) true class indices.
    """
    from torchmetrics.functional.classification import multiclass_accuracy

    _check_pairs("predicted", predicted, labels)
    per_class = multiclass_accuracy(predicted, labels, _class_count(predicted, labels), average="none")
    return per_class[labels.unique()].mean().item()


def expected_calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally wide bins of confidence, weighted by their images.

    The measure of Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017), with its 15 bins.

    Args:
        confidence: (n,) probability of the predicted class, 0 to 1.
        correct: (n,) bool, whether the predicted class was right.
        bins: number of bins.
    """
    from torchmetrics.functional.classification import binary_calibration_error

    _check_pairs("confidence", confidence, correct)
    # A softmax may round to a hair above 1, which torchmetrics would take for a logit.
    return binary_calibration_error(confidence.double().clamp(0, 1), correct.long(), n_bins=bins, norm="l1").item()


def auroc(in_scores: Tensor, out_scores: Tensor) -> float:
    """Area under the ROC curve of telling out-of-distribution images by their score; 0.5 is chance.

    The score is LOWER for images that are more in-distribution. The area is the probability that an out-of-distribution
    image has a higher score than an in-distribution one, ties counted half.

    Args:
        in_scores: (n,) scores of in-distribution images.
        out_scores: (m,) scores of out-of-distribution images.
    """
    from torchmetrics.functional.classification import binary_auroc

    ranks, is_out = _ranks(in_scores, out_scores)
    return binary_auroc(ranks, is_out).item()


def fpr_at_recall(in_scores: Tensor, out_scores: Tensor, recall: float = 0.95) -> float:
    """Share of out-of-distribution images let through when `recall` of the in-distribution images are kept (FPR95).

    The score is LOWER for images that are more in-distribution. An image is kept if its score is at or below a
    threshold: the smallest score that keeps at least `recall` of the in-distribution images. GalLoP's code takes the
    threshold with the *nearest* recall instead, which differs by at most one in-distribution image.

    Args:
        in_scores: (n,) scores of in-distribution images.
        out_scores: (m,) scores of out-of-distribution images.
        recall: share of the in-distribution images to keep, 0 to 1.
    """
    from torchmetrics.functional.classification import binary_specificity_at_sensitivity

    ranks, is_out = _ranks(in_scores, out_scores)
    # Here the in-distribution images are the positive class, and a higher value must mean more positive.
    specificity, _ = binary_specificity_at_sensitivity(1 - ranks, 1 - is_out, min_sensitivity=recall)
    return 1 - specificity.item()


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 if both are 0."""
    total = first + second
    return 2 * first * second / total if total else 0.0


def _ranks(in_scores: Tensor, out_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of scores as ranks in [0, 1], with 1 for every out-of-distribution image.

    torchmetrics passes anything outside [0, 1] through a sigmoid, which can make close scores equal; ranks keep their
    order and their ties.
    """
    for name, scores in (("in_scores", in_scores), ("out_scores", out_scores)):
        if scores.ndim != 1 or not len(scores):
            raise InputError(f"{name} must be one score an image, (n,) with n >= 1, got shape {tuple(scores.shape)}.")
        if scores.isnan().any():
            raise InputError(f"{name} must be numbers, got {int(scores.isnan().sum())} NaN among {len(scores)}.")
    scores = torch.cat([in_scores.double(), out_scores.double()])
    is_out = torch.cat([torch.zeros_like(in_scores, dtype=torch.long), torch.ones_like(out_scores, dtype=torch.long)])
    distinct, order = scores.unique(return_inverse=True)
    return order.double() / max(len(distinct) - 1, 1), is_out


def _check_pairs(name: str, values: Tensor, labels: Tensor) -> None:
    if values.ndim != 1 or not len(values) or values.shape != labels.shape:
        shapes = f"{tuple(values.shape)} and {tuple(labels.shape)}"
        raise InputError(f"{name} and its labels must both be (n,) with n >= 1, got {shapes}.")


def _class_count(predicted: Tensor, labels: Tensor) -> int:
    # torchmetrics wants two classes at least; one that never occurs changes nothing here.
    return max(int(predicted.max()) + 1, int(labels.max()) + 1, 2)
