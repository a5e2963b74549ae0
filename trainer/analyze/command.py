"""``trainer analyze``: subjects in, diagnostics run, numbers, plots and pages out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from featcache.build import pick_device
from featcache.errors import UserError
from trainer import runs
from trainer.analyze import DIAGNOSTICS, diagnostic, draw, page
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.result import NotApplicable, Result
from trainer.analyze.subject import Subject

SMALL = 1 << 19  # SiT-S/2 at 256 px, batch 32: 3.1 million; SiT-Ti/2 at 64 px: 0.1 million


class Progress(Protocol):
    def begin(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


def analyze_runs(paths: Sequence[Path], what: Sequence[str], options: AnalyzeConfig, progress: Progress) -> list[Path]:
    """Analyse runs, one after the other.

    Each run gets ``<run>/analysis/index.html`` and beside it, for every diagnostic, ``<what>.json``, ``<what>.csv`` and
    its plots as SVG and PNG. Several runs together also get ``comparison.html`` in the first one's folder.

    Args:
        what: names of :data:`trainer.analyze.DIAGNOSTICS`. Where several are asked for, those that do not apply to a
            run are left out, and its page says why.

    Returns:
        The pages written, the comparison first.

    Raises:
        UserError: not a run, no checkpoint, a missing cache, bad options, or the only diagnostic does not apply.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is named twice", remedy="Name each run once.")
    pages, by_run = [], {}
    progress.begin("analysing", total=len(paths) * len(what))
    for path in paths:
        written, results = _analyze(path, what, options, progress)
        pages.append(written)
        name = runs.display_name(path)
        by_run[name if name not in by_run else str(path)] = results
    if len(paths) > 1:
        out = paths[0] / "analysis" / "comparison.html"
        title = "Diagnostics of " + ", ".join(by_run)
        runs.write_text(
            out, page.comparison_page(title, "The same samples, noise and timesteps for every run.", by_run)
        )
        pages.insert(0, out)
    return pages


def _analyze(path: Path, what: Sequence[str], options: AnalyzeConfig, progress: Progress) -> tuple[Path, list[Result]]:
    device = pick_device(options.device)
    subjects: dict[str, Subject] = {}
    results: list[Result] = []
    left_out: dict[str, str] = {}
    folder = path / "analysis"
    started = time.monotonic()
    for name in what:
        kind, _ = DIAGNOSTICS[name]
        if kind not in subjects:
            subjects[kind] = Subject(path, options, device=device, gradients=kind == "gradients")
        try:
            with _fitting_threads(subjects[kind]):
                results.append(diagnostic(name)(subjects[kind]))
        except NotApplicable as error:
            if len(what) == 1:
                raise
            left_out[name] = error.what
        progress.advance(1)
    subject = next(iter(subjects.values()))
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "name": runs.display_name(path),
        "step": subject.step,
        "method": subject.config.method,
        "model": subject.config.model,
    }
    for result in results:
        page.write_table(result, folder, about)
        for plot in result.plots:
            draw.save(plot.drawing, folder / plot.name)
    elapsed_s = time.monotonic() - started
    title = f"Diagnostics of {about['name']}"
    runs.write_text(folder / "index.html", page.run_page(title, _lead(subject, elapsed_s), results, left_out))
    return folder / "index.html", results


@contextlib.contextmanager
def _fitting_threads(subject: Subject) -> Iterator[None]:
    """One thread for small models on the CPU.

    Their kernels are so short that threads mostly wait for each other: with SiT-Ti/2 on a busy two-core machine, G-SNR
    took 8 s of processor time on one thread and 62 s on two.
    """
    cfg, before = subject.cfg, torch.get_num_threads()
    entries = subject.options.batch_size * subject.info.grid**2 * cfg.width  # of one hidden state
    if subject.device == "cpu" and entries < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lead(subject: Subject, elapsed_s: float) -> str:
    method = subject.config.method if subject.alignment is not None else "no alignment"
    dataset: Any = subject.cache.manifest.dataset
    return (
        f"{subject.config.model}, {method}, step {subject.step}; block {subject.block} of {subject.depth} is looked "
        "at. "
        f"{len(subject.indices)} samples of {dataset.name} on {subject.device}, {elapsed_s:.0f} s in all."
    )
