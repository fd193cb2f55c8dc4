"""The numbers that tables are made of, computed by torchmetrics.

All of them are fractions between 0 and 1; tables turn them into per cent.
torchmetrics is imported inside the functions because it loads matplotlib, which costs more than torch itself.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastprompt.errors import InputError

FprRule = Literal["standard", "gallop"]


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


def fpr_at_recall(in_scores: Tensor, out_scores: Tensor, recall: float = 0.95, *, rule: FprRule = "standard") -> float:
    """Share of out-of-distribution images let through when `recall` of the in-distribution images are kept (FPR95).

    The score is LOWER for images that are more in-distribution. An image is kept if its score is at or below a
    threshold. By the standard rule, that is the smallest score that keeps at least `recall` of the in-distribution
    images.

    GalLoP's and GL-MCM's code take the number k of in-distribution images whose share is *nearest* to `recall`, the
    larger of two equally near ones, and among the thresholds that keep k the loosest: images are let through whose
    score is below the (k+1)-th smallest in-distribution score (if k is all of them: not above the largest). Where no
    scores are equal this is never lower than the standard rule: on average by 0.0095 for uniform scores of 100
    in-distribution images, by 0.0001 for 10,000.

    Args:
        in_scores: (n,) scores of in-distribution images.
        out_scores: (m,) scores of out-of-distribution images.
        recall: share of the in-distribution images to keep, 0 to 1.
        rule: "standard" or "gallop".

    Raises:
        InputError: no scores, NaN among them, a share out of its range, or an unknown rule.
    """
    if not 0 <= recall <= 1:
        raise InputError(f"recall: expected a share between 0 and 1, got {recall}")
    if rule not in get_args(FprRule):
        raise InputError(f"rule: expected one of {get_args(FprRule)}, got {rule!r}")
    if rule == "gallop":
        return _fpr_at_nearest_recall(in_scores, out_scores, recall)
    from torchmetrics.functional.classification import binary_specificity_at_sensitivity

    ranks, is_out = _ranks(in_scores, out_scores)
    # Here the in-distribution images are the positive class, and a higher value must mean more positive.
    specificity, _ = binary_specificity_at_sensitivity(1 - ranks, 1 - is_out, min_sensitivity=recall)
    return 1 - specificity.item()


def _fpr_at_nearest_recall(in_scores: Tensor, out_scores: Tensor, recall: float) -> float:
    _check_scores(in_scores, out_scores)
    known, unknown = in_scores.double().sort().values, out_scores.double()
    counts = torch.searchsorted(known, known.unique(), right=True)  # how many in-distribution images thresholds keep
    distance = (counts.double() / len(known) - recall).abs()
    k = int(counts[distance == distance.min()][-1])
    kept = unknown <= known[-1] if k == len(known) else unknown < known[k]
    return kept.double().mean().item()


def harmonic_mean(first: float, second: float) -> float:
    """2ab / (a + b); 0 if both are 0."""
    total = first + second
    return 2 * first * second / total if total else 0.0


def _ranks(in_scores: Tensor, out_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of scores as ranks in [0, 1], with 1 for every out-of-distribution image.

    torchmetrics passes anything outside [0, 1] through a sigmoid, which can make close scores equal; ranks keep their
    order and their ties.
    """
    _check_scores(in_scores, out_scores)
    scores = torch.cat([in_scores.double(), out_scores.double()])
    is_out = torch.cat([torch.zeros_like(in_scores, dtype=torch.long), torch.ones_like(out_scores, dtype=torch.long)])
    distinct, order = scores.unique(return_inverse=True)
    return order.double() / max(len(distinct) - 1, 1), is_out


def _check_scores(in_scores: Tensor, out_scores: Tensor) -> None:
    for name, scores in (("in_scores", in_scores), ("out_scores", out_scores)):
        if scores.ndim != 1 or not len(scores):
            raise InputError(f"{name} must be one score an image, (n,) with n >= 1, got shape {tuple(scores.shape)}.")
        if scores.isnan().any():
            raise InputError(f"{name} must be numbers, got {int(scores.isnan().sum())} NaN among {len(scores)}.")


def _check_pairs(name: str, values: Tensor, labels: Tensor) -> None:
    if values.ndim != 1 or not len(values) or values.shape != labels.shape:
        shapes = f"{tuple(values.shape)} and {tuple(labels.shape)}"
        raise InputError(f"{name} and its labels must both be (n,) with n >= 1, got {shapes}.")


def _class_count(predicted: Tensor, labels: Tensor) -> int:
    # torchmetrics wants two classes at least; one that never occurs changes nothing here.
    return max(int(predicted.max()) + 1, int(labels.max()) + 1, 2)
