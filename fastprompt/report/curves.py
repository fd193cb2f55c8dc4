"""Training curves: loss and accuracy by epoch, one colour a method, a band over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastprompt.errors import InputError
from fastprompt.report.style import INK, PALETTE, new_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Sequence[Sequence[float]]  # one sequence a seed, one number an epoch


@dataclass(frozen=True)
class TrainingCurve:
    """What one method did while it trained.

    Attributes:
        method: its name.
        loss: for every seed the mean training loss of each epoch; empty if there was no training.
        accuracy: for every seed the accuracy after each epoch, as a fraction. A method that is not trained has one
            number a seed, which is drawn as a level; empty if it was not measured.
    """

    method: str
    loss: Runs
    accuracy: Runs


def draw_training_curves(curves: Sequence[TrainingCurve], accuracy_title: str = "Accuracy (%)") -> Figure:
    """Draw loss and accuracy side by side: lines are means over seeds, bands one sample standard deviation.

    Args:
        curves: one for each method; colours follow their order.
        accuracy_title: what the accuracy is of, such as "Validation accuracy (%)".

    Returns:
        A figure with a transparent background.

    Raises:
        InputError: there is no curve, or the seeds of one method have different numbers of epochs.
    """
    if not curves:
        raise InputError("curves must hold one curve for each method, got none.")
    figure = new_figure(9.5, 3.4)
    from matplotlib.ticker import MaxNLocator

    figure.set_layout_engine("constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for axes, title in ((loss_axes, "Training loss"), (accuracy_axes, accuracy_title)):
        style_axes(axes)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel("Epoch", fontsize=8, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for index, curve in enumerate(curves):
        color = PALETTE[index % len(PALETTE)]
        _draw_runs(loss_axes, curve.method, "loss", curve.loss, color)
        percent = [[100 * value for value in run] for run in curve.accuracy]
        _draw_runs(accuracy_axes, curve.method, "accuracy", percent, color)
    lines = {line.get_label(): line for line in [*loss_axes.lines, *accuracy_axes.lines]}
    handles = [lines[curve.method] for curve in curves if curve.method in lines]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False, fontsize=8, labelcolor=INK)
    return figure


def _draw_runs(axes: Axes, method: str, measure: str, runs: Runs, color: str) -> None:
    if not runs:
        return
    lengths = sorted({len(run) for run in runs})
    if len(lengths) > 1 or not lengths[0]:
        raise InputError(
            f"The {measure} of {method} must have the same number of epochs (1 or more) in every seed, got {lengths}."
        )
    values = np.asarray(runs, dtype=float)
    mean = values.mean(axis=0)
    if lengths == [1]:
        axes.axhline(mean[0], color=color, linewidth=1.2, linestyle=(0, (4, 3)), label=method)
        return
    epochs = np.arange(1, lengths[0] + 1)
    axes.plot(epochs, mean, color=color, linewidth=1.6, solid_capstyle="round", label=method)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
