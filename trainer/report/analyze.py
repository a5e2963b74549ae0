"""From runs to their diagnostics and the pages about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from featcache.progress import Progress
from trainer.analyze.command import measure_runs
from trainer.analyze.config import AnalyzeConfig
from trainer.report.analysis import write_diagnostics, write_diagnostics_comparison
from trainer.report.run import write_run_report


def analyze_runs(paths: Sequence[Path], what: Sequence[str], options: AnalyzeConfig, progress: Progress) -> list[Path]:
    """Measures, then makes the pages from what was written down.

    Each run gets `<run>/analysis/index.html` and beside it, for every diagnostic, `<what>.json`, `<what>.csv` and
    its plots as SVG and PNG; its report is written anew with the findings. Several runs together also get
    `comparison.html` in the first one's folder, with its plots and `comparison.json`.

    Arguments and errors as `trainer.analyze.command.measure_runs`.

    Returns:
        The pages written, the comparison (of the runs that were not skipped, if there are several) first.
    """
    measured = measure_runs(paths, what, options, progress)
    pages = [write_diagnostics(path, what) for path in measured]
    if len(measured) > 1:
        pages.insert(0, write_diagnostics_comparison(measured[0], what))
    for path in measured:
        write_run_report([path])
    return pages
