"""``trainer analyze``: subjects in, diagnostics run, numbers, plots and pages out."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from featcache.build import pick_device
from featcache.errors import UserError
from featcache.store import files
from trainer import locks, runs, schemas
from trainer.analyze import DIAGNOSTICS, diagnostic, draw, page
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.result import NotApplicable, Result
from trainer.analyze.subject import Subject
from trainer.evaluation import write_run_report

SMALL = 1 << 19  # SiT-S/2 at 256 px, batch 32: 3.1 million; SiT-Ti/2 at 64 px: 0.1 million


class Progress(Protocol):
    def begin(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


def analyze_runs(paths: Sequence[Path], what: Sequence[str], options: AnalyzeConfig, progress: Progress) -> list[Path]:
    """Analyse runs, one after the other.

    Each run gets ``<run>/analysis/index.html`` and beside it, for every diagnostic, ``<what>.json``, ``<what>.csv`` and
    its plots as SVG and PNG; its report is written anew with the findings. Several runs together also get
    ``comparison.html`` in the first one's folder, with its plots and ``comparison.json``. Sections of diagnostics that are not asked for
    stay as an earlier call left them; files of those that are asked for are replaced, not added to.

    Args:
        what: names of :data:`trainer.analyze.DIAGNOSTICS`. Where several are asked for, those that do not apply to a
            run are left out, and its page says why. A single one skips the runs to which it does not apply, with a note.

    Returns:
        The pages written, the comparison (of the runs that were not skipped, if there are several) first.

    Raises:
        UserError: not a run, no checkpoint, a missing cache, bad options, or the only diagnostic applies to no run.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is named twice", remedy="Name each run once.")
    for path in paths:
        runs.load_config(path)  # before any work is done on the runs in front of it
    shown = [runs.display_name(path) for path in paths]
    names = [name if shown.count(name) == 1 else str(path) for name, path in zip(shown, paths)]
    done, pages, by_run, steps = [], [], {}, []
    unfit: list[NotApplicable] = []
    progress.begin("analysing", total=len(paths) * len(what))
    for path, name in zip(paths, names):
        try:
            written, results, step = _analyze(path, what, options, progress)
        except NotApplicable as error:
            unfit.append(error)
            progress.advance(len(what))
            continue
        done.append(path)
        pages.append(written)
        by_run[name] = results
        steps.append(step)
    if not done:
        raise unfit[0]
    for skipped in unfit:
        progress.note(f"skipped: {skipped.what}")
    if len(done) > 1:
        with _writing(done[0]) as folder:
            pages.insert(0, _compare(folder, by_run, [f"{p} {s}" for p, s in zip(done, steps)]))
    for path in done:
        write_run_report([path])
    return pages


def _analyze(
    path: Path, what: Sequence[str], options: AnalyzeConfig, progress: Progress
) -> tuple[Path, list[Result], int]:
    """The page written, what came out, and the checkpoint's step."""
    device = pick_device(options.device)
    subjects: dict[str, Subject] = {}
    results: list[tuple[Result, str]] = []
    left_out: dict[str, str] = {}
    for name in what:
        started = time.monotonic()
        kind, _ = DIAGNOSTICS[name]
        if kind not in subjects:
            subjects[kind] = Subject(path, options, device=device, gradients=kind == "gradients")
        subject = subjects[kind]
        try:
            with _fitting_threads(subject):
                result = diagnostic(name)(subject)
            results.append((result, _measured(subject, result, time.monotonic() - started)))
        except NotApplicable as error:
            if len(what) == 1:
                raise
            left_out[name] = error.what
        progress.advance(1)
    subject = next(iter(subjects.values()))
    about = {
        "name": runs.display_name(path),
        "step": subject.step,
        "method": subject.config.method,
        "model": subject.config.model,
    }
    title = f"Diagnostics of {about['name']}"
    with _writing(path) as folder:
        out = folder / "index.html"
        for name in what:
            _remove(folder, name)
        for result, _ in results:
            page.write_table(result, folder, about)
            for plot in result.plots:
                draw.save(plot.drawing, folder / plot.name)
        runs.write_text(out, page.run_page(title, _lead(subject), results, left_out, runs.read_page(out)))
    return out, [result for result, _ in results], subject.step


@contextlib.contextmanager
def _writing(run: Path) -> Iterator[Path]:
    """The folder of a run's diagnostics, for one process at a time: what another has written meanwhile is added to.

    Raises:
        UserError: it cannot be written to, or is a link.
    """
    folder = files.inside(run, "analysis")
    with locks.waiting(folder, "writing"):
        files.remove_parts(folder)
        yield folder


def _remove(folder: Path, what: str) -> None:
    """Deletes what an earlier call wrote for one diagnostic: it may have drawn plots that the new one does not."""
    _remove_plots(folder, _earlier(folder / f"{what}.json", schemas.Diagnostic).get("plots", ()))
    for kind in ("json", "csv"):
        files.remove_file(folder / f"{what}.{kind}")


def _earlier(path: Path, schema: Any) -> dict[str, Any]:
    """What an earlier call wrote; nothing where it is not what one writes."""
    try:
        found: dict[str, Any] = schemas.check(runs.read_json(path, {}), schema, path, remedy="")
    except UserError:
        return {}
    return found


def _remove_plots(folder: Path, stems: Iterable[str]) -> None:
    for stem in stems:
        for kind in ("svg", "png"):
            files.remove_file(folder / f"{stem}.{kind}")


def _compare(folder: Path, by_run: Mapping[str, Sequence[Result]], compared: Sequence[str]) -> Path:
    """Writes ``comparison.html``, its plots, and its lines as ``comparison.json`` into the first run's folder.

    The caller holds the folder.
    """
    out, table = folder / "comparison.html", folder / "comparison.json"
    old = _earlier(table, schemas.Comparison)
    same = old.get("compared") == list(compared)
    new = page.comparison_numbers(by_run)
    for what, found in old.get("diagnostics", {}).items():
        if not same or what in new:
            _remove_plots(folder, found["plots"])
    for what in new:
        for plot in page.comparison_plots(by_run, what):
            draw.save(plot.drawing, folder / plot.name)
    kept = old.get("diagnostics", {}) if same else {}
    document = {"compared": list(compared), "diagnostics": kept | new}
    runs.write_text(table, json.dumps(document, indent=1) + "\n")
    title = "Diagnostics of " + ", ".join(by_run)
    lead = "The same samples, noise and timesteps for every run."
    runs.write_text(out, page.comparison_page(title, lead, by_run, runs.read_page(out) if same else ""))
    return out


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


def _lead(subject: Subject) -> str:
    method = f"trained with {subject.config.method}" if subject.alignment is not None else "trained without alignment"
    dataset: Any = subject.cache.manifest.dataset
    return f"{subject.config.model}, {method}, on {dataset.name}."


def _measured(subject: Subject, result: Result, elapsed_s: float) -> str:
    every = None if result.what == "router" else len(subject.indices)
    samples = result.settings.get("samples", result.settings.get("samples measured", every))
    seen = f"{samples} samples, " if samples else ""
    return f"Step {subject.step}, block {subject.block} of {subject.depth}, {seen}{subject.device}, {elapsed_s:.1f} s."
