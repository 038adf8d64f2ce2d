"""The report of a run: a page for the browser and a table for the terminal."""

from minirlhf.report.page import write_report
from minirlhf.report.table import summary_table

__all__ = ["summary_table", "write_report"]
