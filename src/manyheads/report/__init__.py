"""One self-contained HTML page from recorded results."""

from manyheads.report.writing import report

__all__ = ["report"]
