"""The demo behind `make demo`: the whole path on the embedded default, offline, on the CPU, in a few minutes.

It types what a user would type, says so, and stops at the first command that fails. Run again, it continues.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from featcache.console import console, safe, time_text
from featcache.errors import UserError

CACHE = Path("caches/demo")
RUNS = Path("runs/demo")
STEPS = 1000

# A small SiT learns the ten shapes in about a thousand small steps at a high rate; the papers' settings are in the recipes.
BUILD = f"featcache build --data shapes --encoder tiny --limit 1000 --batch-size 64 --out {CACHE}"
TRAIN = (
    f"trainer run --method {{method}} --name demo/{{method}} --cache {CACHE} --model SiT-Ti/2 --steps {STEPS} --batch-size 32 "
    "--lr 2e-3 --set warmup_steps=50 --set betas=[0.9,0.95] --set time_sampling=lognormal --set ema_decay=0.995 "
    f"--set ema_warmup=true --set sample_every={STEPS // 2} --set checkpoint_every={STEPS // 4} --set keep_checkpoints=4 "
    "--set clip=1.0 --set log_every=25"
)
TITLES = {"none": "without alignment", "ahpa": "with AHPA"}
# The embedded judge always: which extractor is at hand must not decide which numbers a first user sees.
EVAL = "trainer eval runs/demo/{method} --num 256 --sampler ode --steps 25 --guidance 2.5 --extractor embedded"


def train_command(method: str) -> str:
    """The line that starts a run, or continues it where an earlier demo was interrupted."""
    resume = " --resume" if (RUNS / method / "config.yaml").exists() else ""
    return TRAIN.format(method=method) + resume


def installed(program: str) -> list[str]:
    """The words that run `featcache` or `trainer`: the script beside the interpreter, else the package from where it lies."""
    script = Path(sys.executable).parent / program
    return [str(script)] if script.is_file() else [sys.executable, "-m", f"{program}.cli"]


def run_all(commands: Sequence[str], names: Sequence[str] = tuple(TITLES)) -> None:
    """Runs commands side by side, the cores shared out among them; where there are several, `names` prefix their output.

    Raises:
        UserError: one of them failed.
    """
    for command in commands:
        console.print(f"[bold]$ {safe(command)}[/bold]")
    cores = os.cpu_count() or 1
    # Alone, a command leaves one core to its decoding threads: OpenMP's barriers spin, and suffer when cores are short.
    threads = max(1, cores // len(commands) if len(commands) > 1 else cores - 1)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    processes = []
    for command in commands:
        program, *words = command.split()
        processes.append(
            subprocess.Popen(
                [*installed(program), *words],
                env=environment,
                stdout=subprocess.PIPE if len(commands) > 1 else None,
                stderr=subprocess.STDOUT if len(commands) > 1 else None,
                text=True,
            )
        )

    def relay(name: str, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            console.print(f"[dim]{name:>5} |[/dim] ", end="")
            console.print(safe(line.rstrip()))

    readers = [threading.Thread(target=relay, args=(n, p)) for n, p in zip(names, processes) if p.stdout is not None]
    for reader in readers:
        reader.start()
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            process.wait()
        raise
    for reader in readers:
        reader.join()
    for command, code in zip(commands, codes):
        if code:
            raise UserError(f"this command failed (exit code {code}): {command}", remedy="Type it alone to see why.")


def draw_picture(out: Path, columns: int = 6) -> None:
    """Real images and the first of both runs' judged samples side by side, one row per class."""
    from PIL import Image, ImageDraw, ImageFont

    import featcache
    from featcache.inspect import images_of

    cache = featcache.open(CACHE)
    labels = cache.labels()
    side = int(cache.manifest.dataset.preprocessing["resolution"])
    rows = [
        images_of(cache, None, np.flatnonzero(labels == c)[:columns].tolist())
        for c in range(len(cache.manifest.dataset.class_names))
    ]
    panels = {"real": np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)}
    for method in TITLES:
        (images,) = (RUNS / method / "samples").glob("*-cfg*/samples_*.npz")
        with np.load(images) as drawn:
            of_class = [drawn["arr_0"][drawn["arr_1"] == c][:columns] for c in range(len(rows))]
        panels[f"samples, {method}"] = np.concatenate([np.concatenate(list(row), axis=1) for row in of_class], axis=0)
    width, height = columns * side, panels["real"].shape[0]
    sheet = Image.new("RGB", (len(panels) * (width + 12) - 12, height + 22), "white")
    for i, (title, pixels) in enumerate(panels.items()):
        ImageDraw.Draw(sheet).text((i * (width + 12), 2), title, fill="black", font=ImageFont.load_default(size=14))
        sheet.paste(Image.fromarray(pixels), (i * (width + 12), 22))
    sheet.save(out, quality=88)


def scores() -> str:
    """What the runs were judged to be, in a sentence: whichever wins."""
    from trainer.runs.folder import read_metrics

    found = {method: read_metrics(RUNS / method)[-1]["metrics"]["embedded-FID"] for method in TITLES}
    said = ", ".join(f"{found[method]:.2f} {TITLES[method]}" for method in TITLES)
    return (
        f"Distance to the real images by the embedded judge, lower is better: {said}. That is not FID, and a difference "
        "between single runs of this size may be chance: python -m pipelines.experiments.methods takes several seeds."
    )


def run_demo(stages: Sequence[tuple[str, Sequence[str]]], report: Callable[[], Path], *, again: str) -> int:
    """Runs the commands of each stage, says how long each took, and where the page is that `report` writes; returns the exit
    code. again: what continues it."""
    from featcache.console import print_error

    started, told = time.monotonic(), []
    try:
        for name, commands in stages:
            before = time.monotonic()
            run_all(commands)
            told.append(f"{name} {time_text(time.monotonic() - before)}")
    except UserError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        console.print(f"interrupted; {again} continues")
        return 130
    page = report()
    console.print(f"{', '.join(told)}; {time_text(time.monotonic() - started)} in all")
    console.print(f"report: [bold]{safe(page.resolve())}[/bold]   (open it in a browser)")
    return 0


def write_page() -> Path:
    """The report of both runs, and the picture in the README."""
    from trainer.report.run import write_run_report

    report = write_run_report(
        [RUNS / m for m in TITLES],
        RUNS / "report.html",
        title="Demo: a small SiT without alignment and with AHPA",
        lead="Both runs start from the same weights and see the same images, noise and timesteps; the second also aligns an "
        f"early block with a routed mixture of VAE levels from the cache, at the paper's settings. {scores()}",
    )
    draw_picture(RUNS / "samples.jpg")
    return report


def main() -> int:
    """Builds, trains, samples, judges and reports; returns the exit code."""
    stages = [
        ("cache", [BUILD]),
        ("training", [train_command(method) for method in TITLES]),
        ("evaluation", [EVAL.format(method=method) for method in TITLES]),
    ]
    return run_demo(stages, write_page, again="make demo")


if __name__ == "__main__":
    sys.exit(main())
