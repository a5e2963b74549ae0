"""Time and peak memory of the diagnostics' kernels once features are gathered.

    python benchmarks/analyze.py --samples 10000 --width 1152 --name cpu

Writes `benchmarks/results/analyze_<name>.json`. Features are seeded Gaussians with a decaying spectrum and a common
part: their values do not change what the work costs. Each kernel runs in a process of its own, so that its peak memory
is its own (features, interpreter and libraries included). `seconds` is wall time; `cpu_seconds`, summed over threads,
tells how much of it was waiting on a busy machine.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.machine import cpu_name, usable_cores

RESULTS = Path(__file__).resolve().parent / "results"
KERNELS = ("cknna_unbiased", "cknna_biased", "cknna_paper", "cka", "mutual_knn", "spectrum", "probe", "gsnr")
CLASSES = 1000


def _features(samples: int, width: int) -> Any:
    """Two related representations, float32 [samples, width] each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1).float().rsqrt()
    x = torch.randn(samples, width, generator=generator) * scale
    return x, x.roll(1, dims=1) + torch.randn(samples, width, generator=generator) * scale


def _run(kernel: str, samples: int, width: int) -> dict[str, Any]:
    import torch

    from trainer.analyze import kernels
    from trainer.analyze.gradients import GradientMoments, gsnr
    from trainer.analyze.probe import probe_accuracy
    from trainer.analyze.spectra import Spectrum, effective_rank

    x, y = _features(samples, width)
    start, busy = time.perf_counter(), time.process_time()
    if kernel.startswith("cknna"):
        value = kernels.cknna(x, y, k=10, estimator=kernel.removeprefix("cknna_"))  # type: ignore[arg-type]
    elif kernel == "cka":
        value = kernels.cka(x, y)
    elif kernel == "mutual_knn":
        value = kernels.mutual_knn(x, y, k=10)
    elif kernel == "spectrum":
        spectrum = Spectrum()
        for rows in x.split(256):
            spectrum.add(rows)
        value = effective_rank(spectrum.singular_values())
    elif kernel == "probe":
        labels = torch.arange(samples) % CLASSES
        (value,), _ = probe_accuracy(x[None], labels, classes=CLASSES, folds=1, epochs=90, batch=None, seed=0)
    else:
        moments = GradientMoments()
        for rows in x.split(32):
            moments.add(rows)
        value = gsnr(moments)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak, "value": value}


def main(
    samples: Annotated[int, typer.Option(help="Rows.")] = 10_000,
    width: Annotated[int, typer.Option(help="Columns.")] = 1152,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = os.cpu_count() or 1,
    name: Annotated[str, typer.Option(help="Name of the result.")] = "cpu",
    kernel: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure every kernel and write the results."""
    if kernel is not None:
        typer.echo(json.dumps(_run(kernel, samples, width)))
        return
    results = {}
    for each in KERNELS:
        words = [sys.executable, __file__, "--samples", str(samples), "--width", str(width), "--kernel", each]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        results[each] = json.loads(done.stdout.splitlines()[-1])
        typer.echo(f"{each:>15}  {results[each]['seconds']:7.2f} s  {results[each]['peak_bytes'] / 2**30:5.2f} GiB")
    document = {
        "command": f"python benchmarks/analyze.py --samples {samples} --width {width} --threads {threads} --name {name}",
        "samples": samples,
        "width": width,
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "machine": {"cpu": cpu_name(), "cores": usable_cores()},
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        "kernels": results,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"analyze_{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
