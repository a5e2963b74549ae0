"""Measuring for `trainer analyze`: subjects in, diagnostics run, results out as files."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from featcache.console import time_text
from featcache.errors import UserError
from featcache.machine import pick_device
from featcache.progress import Progress
from trainer.analyze import DIAGNOSTICS, diagnostic
from trainer.analyze.compare import compare
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.result import (
    About,
    NotApplicable,
    Result,
    remove_result,
    write_about,
    write_comparison,
    write_result,
    writing,
)
from trainer.analyze.subject import Subject
from trainer.runs import folder as runs

SMALL = 1 << 19  # SiT-S/2 at 256 px, batch 32: 3.1 million; SiT-Ti/2 at 64 px: 0.1 million


def measure_runs(paths: Sequence[Path], what: Sequence[str], options: AnalyzeConfig, progress: Progress) -> list[Path]:
    """Runs diagnostics on runs, one after the other, and writes what came out (`trainer.analyze.result`) into their
    `analysis` folders; what several of them have in common goes into the first one's.

    Results of diagnostics that are not asked for stay as an earlier call left them; files of those that are asked for
    are replaced, not added to.

    Args:
        what: names of `trainer.analyze.DIAGNOSTICS`. Where several are asked for, those that do not apply to a
            run are left out, with the reason. A single one skips the runs to which it does not apply, with a note.

    Returns:
        The runs that were not skipped.

    Raises:
        UserError: not a run, no checkpoint, a missing cache, bad options, or the only diagnostic applies to no run.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is named twice", remedy="Name each run once.")
    for path in paths:
        runs.load_config(path)  # before any work is done on the runs in front of it
    shown = [runs.display_name(path) for path in paths]
    names = [name if shown.count(name) == 1 else str(path) for name, path in zip(shown, paths)]
    done: list[Path] = []
    compared: list[str] = []
    by_run: dict[str, list[Result]] = {}
    unfit: list[NotApplicable] = []
    for path, name in zip(paths, names):
        try:
            by_run[name], step = _measure(path, what, options, progress)
        except NotApplicable as error:
            unfit.append(error)
            continue
        done.append(path)
        compared.append(f"{path} {step}")
    if not done:
        raise unfit[0]
    for skipped in unfit:
        progress.note(f"skipped: {skipped.what}")
    if len(done) > 1:
        with writing(done[0]) as folder:
            write_comparison(folder, compared, compare(by_run))
    return done


def _measure(path: Path, what: Sequence[str], options: AnalyzeConfig, progress: Progress) -> tuple[list[Result], int]:
    """What came out, written down, and the checkpoint's step."""
    device = pick_device(options.device)
    subjects: dict[str, Subject] = {}
    results: list[Result] = []
    left_out: dict[str, str] = {}
    for i, name in enumerate(what, start=1):
        started = time.monotonic()
        progress.begin(f"{runs.display_name(path)}: {name} ({i} of {len(what)})", None, unit="samples")
        kind, _ = DIAGNOSTICS[name]
        if kind not in subjects:
            subjects[kind] = Subject(path, options, device=device, gradients=kind == "gradients", progress=progress)
        subject = subjects[kind]
        try:
            with _fitting_threads(subject):
                result = diagnostic(name)(subject)
            measured = _measured(subject, result, time.monotonic() - started)
            results.append(dataclasses.replace(result, run=_about(subject), measured=measured))
        except NotApplicable as error:
            if len(what) == 1:
                raise
            left_out[name] = error.what
            progress.note(f"{name} is left out: {error}")
    subject = next(iter(subjects.values()))
    with writing(path) as folder:
        for result in results:
            write_result(folder, result)
        for name in left_out:
            remove_result(folder, name)
        write_about(folder, About(lead=_lead(subject), left_out=left_out), asked=what)
    return results, subject.step


def _about(subject: Subject) -> dict[str, object]:
    return {
        "name": runs.display_name(subject.run),
        "step": subject.step,
        "method": subject.config.method,
        "model": subject.config.model,
    }


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
    dataset = subject.cache.manifest.dataset
    return f"{subject.config.model}, {method}, on {dataset.name}: its own training images are what is looked at."


def _measured(subject: Subject, result: Result, elapsed_s: float) -> str:
    every = None if result.what == "router" else len(subject.indices)
    samples = result.settings.get("samples", result.settings.get("samples measured", every))
    seen = f"{samples} samples, " if samples else ""
    return f"Step {subject.step}, block {subject.block} of {subject.depth}, {seen}{subject.device}, {time_text(elapsed_s)}."
