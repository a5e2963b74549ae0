"""Reports: one self-contained HTML page about one or several runs."""

from trainer.plots import Chart, Series
from trainer.report.data import Column, RunData, load_run
from trainer.report.page import Figure
from trainer.report.report import router_chart, write_comparison, write_report
from trainer.report.table import PublishedFigure

__all__ = [
    "Chart",
    "Column",
    "Figure",
    "PublishedFigure",
    "RunData",
    "Series",
    "load_run",
    "router_chart",
    "write_comparison",
    "write_report",
]
