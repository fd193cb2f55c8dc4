"""Tables, figures, and one self-contained HTML page a run."""

from fastprompt.report.table import Column, Table, TextCell

__all__ = ["Column", "Table", "TextCell"]
