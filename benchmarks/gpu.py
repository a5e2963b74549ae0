"""Everything that is to be measured on a GPU, in order of importance, in whatever time there is.

    python benchmarks/gpu.py --list                                    # the stages
    python benchmarks/gpu.py --out results --minutes 9                 # type it again to go on
    python benchmarks/gpu.py --out results --only step-ahpa,profile    # these, again if need be
    python benchmarks/gpu.py --out /tmp/tried --small                  # all of it, tiny, on the CPU
    python benchmarks/gpu.py --table results                           # Markdown for docs/performance.md
    python benchmarks/gpu.py --pack .gpu                               # what a machine without a network lacks

Each stage runs in a process of its own with a time limit; what it measures is in `OUT/gpu.json` as soon as it is known,
so that nothing is lost when the machine is taken away. A stage that fails leaves its last lines there and the next one
begins. Stages that are done are left out, those that failed come last; a stage that would not fit into the remaining time
is left for another call, and a shorter one takes its place.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from gpu_record import CUT, DONE, FAILED, NAME, RUNNING, Record

from featcache.console import console, run_app, safe
from featcache.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ROOT.parent / "shared/data/imagenet-sample"
PACKED_PHOTOGRAPHS = ROOT / ".gpu/photographs"
LAST_LINES = 25
RESERVE_S = 5.0  # for ending a stage and writing the summary


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A function of `gpu_stages` of the same name (`-` for `_`).

    seconds: what it is thought to take on an H100, compiling included; what it took before counts instead. limit_s: after
    which it is ended. about: one line.
    """

    name: str
    about: str
    seconds: float
    limit_s: float


STAGES = (
    Stage(name="machine", about="GPU, driver, packages; rates of matrix products and copies", seconds=40, limit_s=120),
    Stage(name="tests", about="the tests that need a GPU", seconds=180, limit_s=300),
    Stage(name="end-to-end", about="build, train with AHPA, sample, evaluate, as typed", seconds=180, limit_s=330),
    Stage(name="step-ahpa", about="SiT-XL/2, batch 128: none, AHPA", seconds=260, limit_s=500),
    Stage(name="peer", about="plain loop beside ours, batch 64; with DINOv2 online", seconds=170, limit_s=360),
    Stage(name="profile", about="kernels of a step: none, AHPA, plain loop", seconds=130, limit_s=300),
    Stage(name="step-repa", about="batch 128: none, REPA, SRA 2", seconds=330, limit_s=530),
    Stage(name="encode", about="moments, G3, G4, DINOv2-B: fp32, tf32, bf16, errors", seconds=90, limit_s=240),
    Stage(name="encode-compiled", about="the same, compiled", seconds=200, limit_s=420),
    Stage(name="build", about="a whole build from JPEGs, and its stages", seconds=150, limit_s=300),
    Stage(name="feeding", about="AHPA's bytes from a cold disk: rates, waiting", seconds=170, limit_s=300),
    Stage(name="step-dya", about="batch 128: none, DyA, SARA", seconds=400, limit_s=540),
    Stage(name="sampling", about="XL/2, 250 steps, bf16, without and with guidance", seconds=150, limit_s=300),
    Stage(name="evaluation", about="Inception's rate; metrics of 50,000 samples", seconds=120, limit_s=300),
    Stage(name="step-sra", about="batch 128: none, SRA", seconds=300, limit_s=500),
    Stage(name="demo", about="make demo", seconds=150, limit_s=300),
    Stage(name="step-256", about="batch 256: none, AHPA", seconds=270, limit_s=500),
    Stage(name="step-64", about="batch 64: none, AHPA", seconds=220, limit_s=450),
    Stage(name="step-32", about="batch 32: none, AHPA", seconds=200, limit_s=450),
    Stage(name="step-reg", about="batch 64: none, REG", seconds=250, limit_s=500),
    Stage(name="step-redi", about="batch 64: none, ReDi", seconds=250, limit_s=500),
    Stage(name="experiment", about="methods side by side, SiT-S/2 on photographs", seconds=480, limit_s=540),
)

# The words that run a stage, with what is left of the time.
Command = Callable[[Stage], Sequence[str]]


def chosen(stages: Sequence[Stage], only: str | None) -> list[Stage]:
    """Those named in `only`, in their own order.

    Raises:
        UserError: a name that there is not.
    """
    if only is None:
        return list(stages)
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = {stage.name for stage in stages}
    for name in names:
        if name not in known:
            raise UserError(f"there is no stage {name!r}", remedy=f"Stages: {', '.join(s.name for s in stages)}")
    return [stage for stage in stages if stage.name in names]


def order(stages: Sequence[Stage], record: Record, *, again: bool) -> list[Stage]:
    """What is to be run: never tried or cut off first, failed last; those done only where they are asked for `again`."""
    status = {stage.name: record.status(stage.name) for stage in stages}
    first = [s for s in stages if status[s.name] not in (DONE, FAILED)]
    return [*first, *(s for s in stages if status[s.name] == FAILED or (again and status[s.name] == DONE))]


def run_stages(
    stages: Sequence[Stage],
    record: Record,
    command: Command,
    *,
    until: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> list[Stage]:
    """Runs what fits before `until` (of `time.monotonic`); those that did not fit. environment: set beside this one's."""
    left = []
    for stage in stages:
        remaining = until - time.monotonic() - RESERVE_S
        if min(_expected(stage, record), stage.limit_s) > remaining:
            left.append(stage)
            continue
        console.print(f"[bold]{stage.name}[/bold]  {safe(stage.about)}")
        _run(stage, record, command(stage), min(stage.limit_s, remaining), log, environment or {})
        found = record.read()["stages"][stage.name]
        console.print(f"  {found['status']} after {found['seconds']:.0f} s")
    return left


def _expected(stage: Stage, record: Record) -> float:
    """Seconds: what it took before if it came to its end, else the estimate."""
    before = record.read()["stages"].get(stage.name, {})
    return float(before["seconds"]) if before.get("status") == DONE else stage.seconds


def _run(
    stage: Stage, record: Record, words: Sequence[str], limit_s: float, log: Path, environment: Mapping[str, str]
) -> None:
    """One stage in a session of its own, which is ended whole where its time is over."""
    record.update(stage.name, status=RUNNING, seconds=0.0, figures={}, error="")
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"\n===== {stage.name}\n".encode())
        file.flush()
        begins = file.tell()
        process = subprocess.Popen(
            words,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, **environment},
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # what it started and left, too
            _end(process)
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        record.update(stage.name, status=DONE, seconds=seconds)
        return
    with log.open("rb") as file:
        file.seek(begins)
        lines = file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    status = CUT if code is None else FAILED
    record.update(stage.name, status=status, seconds=seconds, error="\n".join(lines))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process group that `process` leads, itself included."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def main(
    out: Annotated[Path, typer.Option(help="Folder of gpu.json and gpu.log; what is there is gone on with.")] = Path(
        "gpu-results"
    ),
    minutes: Annotated[float, typer.Option(help="For everything; no stage begins that would not fit.", min=0.05)] = 9.0,
    only: Annotated[
        str | None, typer.Option(help="Stages, joined by commas, done or not. [default: what is left]")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the stages and their times, and do nothing.")] = False,
    small: Annotated[bool, typer.Option("--small", help="Tiny sizes on the CPU, to try the script.")] = False,
    photographs: Annotated[
        Path | None, typer.Option(help="Folder of JPEGs, one folder a class. [default: the packed ones, else shapes]")
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="gpu.json of an earlier call, to go on from in a new --out.")
    ] = None,
    table: Annotated[Path | None, typer.Option(help="Print the tables of this folder, and do nothing.")] = None,
    pack: Annotated[Path | None, typer.Option(help="Download wheels and copy photographs into this folder.")] = None,
    stage: Annotated[str, typer.Option(hidden=True)] = "",
    work: Annotated[str, typer.Option(hidden=True)] = "",
    parent: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Measure on a GPU what can be measured in the time that there is."""
    if table is not None:
        from gpu_tables import markdown

        print(markdown(Record(table).read()))
        return
    if list_:
        for one in chosen(STAGES, only):
            console.print(safe(f"{one.name:<16} {one.seconds:>4.0f} s  {one.about}"))
        return
    photographs = photographs or next((p for p in (PACKED_PHOTOGRAPHS, PHOTOGRAPHS) if p.is_dir()), None)
    if pack is not None:
        from gpu_pack import pack as packed

        console.print(safe(packed(pack, ROOT, photographs)))
        return
    if stage:
        from gpu_stages import end_with, run_stage

        if parent:
            end_with(parent, Path(work))
        run_stage(stage, Record(out), small=small, photographs=photographs, work=Path(work))
        return
    until = time.monotonic() + 60 * minutes
    _measure(Record(out.resolve()), only, until=until, small=small, photographs=photographs, start=start)


def _measure(
    record: Record, only: str | None, *, until: float, small: bool, photographs: Path | None, start: Path | None
) -> None:
    if photographs is not None and not photographs.is_dir():
        raise UserError(f"there is no folder {photographs}", remedy="Name a folder of JPEGs, one folder a class.")
    stages = chosen([replace(s, seconds=30) for s in STAGES] if small else STAGES, only)
    if start is not None:
        if record.path.exists():
            raise UserError(f"{record.path} is there already", remedy="Leave out --start to go on with it.")
        if start.name != NAME:
            raise UserError(f"{start} is not called {NAME}", remedy=f"Name the {NAME} of an earlier call.")
        record._write(Record(start.parent).read())
    record.begin(small=small)
    with tempfile.TemporaryDirectory(prefix="featcache-gpu-") as work:

        def command(one: Stage) -> list[str]:
            words = [sys.executable, __file__, "--stage", one.name, "--out", str(record.folder), "--work", work]
            words += ["--parent", str(os.getpid())]
            words += ["--photographs", str(photographs.resolve())] if photographs is not None else []
            return [*words, *(["--small"] if small else [])]

        environment = {"PYTHONUNBUFFERED": "1", "FEATCACHE_DEBUG": "1"}  # whole tracebacks in the log
        # Ahead of what is there, for the commands that stages type.
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if small else {}
        todo = order(stages, record, again=only is not None)
        log = record.folder / "gpu.log"
        left = run_stages(todo, record, command, until=until, log=log, environment=environment)
        for folder in Path(work).iterdir():
            shutil.rmtree(folder, ignore_errors=True)
    from gpu_tables import summary

    console.print(summary(record.read(), [one.name for one in stages], [one.name for one in left]))
    console.print(f"figures: [bold]{safe(record.path)}[/bold]")


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    sys.exit(run_app(app))
