"""Tables, figures, and one self-contained HTML page a run. Figures and pages need the extra "report"."""

from fastprompt.report.curves import TrainingCurve, draw_training_curves
from fastprompt.report.heatmap import draw_selected_patches
from fastprompt.report.measures import MEASURES, percent_column
from fastprompt.report.page import CaptionedFigure, GalleryItem, Report, render_report, write_report
from fastprompt.report.table import Column, Table, TextCell

__all__ = [
    "MEASURES",
    "CaptionedFigure",
    "Column",
    "GalleryItem",
    "Report",
    "Table",
    "TextCell",
    "TrainingCurve",
    "draw_selected_patches",
    "draw_training_curves",
    "percent_column",
    "render_report",
    "write_report",
]
