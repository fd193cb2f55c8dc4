"""Protocols that test a learner, and the metrics they report."""

from fastprompt.evaluation.metrics import (
    accuracy,
    auroc,
    expected_calibration_error,
    fpr_at_recall,
    harmonic_mean,
    mean_per_class_accuracy,
)
from fastprompt.evaluation.protocols import (
    Accuracy,
    BaseToNew,
    BaseToNewSummary,
    OodDetection,
    Predictions,
    base_to_new,
    evaluate_accuracy,
    ood_detection,
    predict_all,
)
from fastprompt.evaluation.summary import Cell, Row, Summary

__all__ = [
    "Accuracy",
    "BaseToNew",
    "BaseToNewSummary",
    "Cell",
    "OodDetection",
    "Predictions",
    "Row",
    "Summary",
    "accuracy",
    "auroc",
    "base_to_new",
    "evaluate_accuracy",
    "expected_calibration_error",
    "fpr_at_recall",
    "harmonic_mean",
    "mean_per_class_accuracy",
    "ood_detection",
    "predict_all",
]
