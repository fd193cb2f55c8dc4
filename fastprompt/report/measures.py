"""The measures of a classifier as columns: title, unit and better end are the same in every table."""

from fastprompt.report.table import Column


def percent_column(title: str, *, higher_is_better: bool = True) -> Column:
    """A column that shows fractions as per cent."""
    return Column(title, unit="%", scale=100.0, higher_is_better=higher_is_better)


MEASURES = {
    "accuracy": percent_column("Accuracy"),
    "mean_per_class": percent_column("Mean per class"),
    "calibration_error": percent_column("Calibration error", higher_is_better=False),
    "base": percent_column("Base"),
    "new": percent_column("New"),
    "harmonic": percent_column("H"),
    "fpr95": percent_column("FPR95", higher_is_better=False),
    "fpr95_gallop": percent_column("FPR95 by GalLoP's rule", higher_is_better=False),
    "auroc": percent_column("AUROC"),
}
