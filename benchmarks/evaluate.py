"""Speed and memory of evaluation: images/s through the extractor, seconds and peak memory of each metric.

    python benchmarks/evaluate.py --samples 50000 --dim 2048 --images 2000 --device cuda --name h100
    python benchmarks/evaluate.py --samples 50000 --images 64 --device cpu --name cpu

Writes `benchmarks/results/evaluate_<name>.json`. The network has seeded random weights and the activations are seeded
Gaussians: neither changes what the work costs. `whole` is what `trainer eval` does after drawing: an npz of `--images`
images judged by an npz of as many, all five metrics and KID. `stream_*` judge 2,000 and 32,000 images of 64 pixels by
embedded-FID, to see whether memory grows with their number (0.4 GB of pixels). Each metric runs in a process of its own, so that its peak memory is its
own (activations, interpreter and libraries included).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).resolve().parent / "results"
METRICS = (
    "extract_array",
    "extract_png",
    "moments",
    "frechet_distance",
    "inception_score",
    "precision_recall",
    "kid",
    "whole",
    "stream_fewer",
    "stream_more",
)
STREAMED = {"stream_fewer": 2_000, "stream_more": 32_000}


def _activations(count: int, dim: int, seed: int) -> Any:
    """float32 [count, dim], positive and correlated like pooled ReLU features."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(64, dim, generator=generator) / 8
    out = torch.empty(count, dim)
    for start in range(0, count, 5000):
        rows = out[start : start + 5000]
        noise = torch.randn(rows.shape, generator=generator) * 0.3
        rows.copy_((torch.randn(len(rows), 64, generator=generator) @ mixing + noise).relu_())
    return out


def _peak_bytes(device: str) -> dict[str, int]:
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.startswith("cuda"):
        peaks["device_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def _extract(metric: str, images: int, resolution: int, batch_size: int, device: str) -> dict[str, Any]:
    import numpy as np
    import torch
    from PIL import Image

    from trainer.evaluate.extractors import build_extractor
    from trainer.evaluate.images import ArrayImages, open_images
    from trainer.evaluate.references import compute_statistics

    extractor = build_extractor("inception", random_weights=0, device=device)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (images, resolution // 8, resolution // 8, 3), dtype=np.uint8)
    pixels = coarse.repeat(8, 1).repeat(8, 2)
    warm = torch.from_numpy(pixels[:batch_size]).permute(0, 3, 1, 2)
    extractor.features(warm)
    with tempfile.TemporaryDirectory() as folder:
        source: Any = ArrayImages(images=pixels)
        if metric == "extract_png":
            for index, image in enumerate(pixels):
                Image.fromarray(image).save(Path(folder) / f"{index:06d}.png", compress_level=1)
            source = open_images(folder)
        start = time.perf_counter()
        compute_statistics(source, extractor, batch_size=batch_size, keep_features=None)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "images_per_s": images / seconds, "images": images, "resolution": resolution}


def _npz(path: Path, images: int, resolution: int, seed: int) -> Path:
    """Blocky noise in ADM's layout, written in parts so that the process's peak is not the array's."""
    import zipfile

    import numpy as np

    rng = np.random.default_rng(seed)
    header = {"descr": "|u1", "fortran_order": False, "shape": (images, resolution, resolution, 3)}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as f,
    ):
        np.lib.format.write_array_header_1_0(f, header)
        for start in range(0, images, 256):
            count = min(256, images - start)
            coarse = rng.integers(0, 256, (count, resolution // 8, resolution // 8, 3), dtype=np.uint8)
            f.write(coarse.repeat(8, 1).repeat(8, 2).tobytes())
    return path


def _judged(metric: str, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of `judge.evaluate` from file to numbers, and of its stages."""
    from trainer.evaluate.extractors import build_extractor
    from trainer.evaluate.judge import evaluate

    streamed = STREAMED.get(metric)
    name, metrics = ("embedded", ["fid"]) if streamed else ("inception", None)
    images, resolution = streamed or options["images"], 64 if streamed else options["resolution"]
    extractor = build_extractor(name, random_weights=0, device=options["device"])
    with tempfile.TemporaryDirectory() as folder:
        samples = _npz(Path(folder) / "samples.npz", images, resolution, 0)
        reference = _npz(Path(folder) / "reference.npz", min(images, 2_000) if streamed else images, resolution, 1)
        start = time.perf_counter()
        result = evaluate(samples, reference, extractor, metrics=metrics, batch_size=options["batch_size"])
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "images": images, "stages_s": result["time_s"], "value": result["metrics"]}


def measure(metric: str, options: dict[str, Any]) -> dict[str, Any]:
    """One metric, in this process."""
    import torch

    from trainer.evaluate import metrics

    device, count, dim = options["device"], options["samples"], options["dim"]
    if metric.startswith("extract"):
        result = _extract(metric, options["images"], options["resolution"], options["batch_size"], device)
        return {**result, **_peak_bytes(device)}
    if metric == "whole" or metric in STREAMED:
        return {**_judged(metric, options), **_peak_bytes(device)}
    if metric == "frechet_distance":
        given = [metrics.moments_of(_activations(max(3 * dim, 100), dim, seed)) for seed in (0, 1)]
        start = time.perf_counter()
        value: Any = metrics.frechet_distance(*given[0], *given[1], device=device)
    elif metric == "inception_score":
        logits = _activations(count, 1008, 0)
        start = time.perf_counter()
        value = metrics.inception_score(logits)
    elif metric == "moments":
        x = _activations(count, dim, 0)
        start = time.perf_counter()
        value = float(metrics.moments_of(x, device=device)[1].trace())
    elif metric == "kid":
        x, y = _activations(count, dim, 0), _activations(count, dim, 1)
        start = time.perf_counter()
        value = metrics.kid(x, y, subset_size=min(metrics.KID_SUBSET_SIZE, count), device=device)
    else:
        x, y = _activations(count, dim, 0), _activations(count, dim, 1)
        start = time.perf_counter()
        covered = metrics.manifold_coverage(x, y, device=device)
        value = [covered.precision, covered.recall]
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "value": value, **_peak_bytes(device)}


def main(
    name: Annotated[str, typer.Option(help="Names the result file.")],
    samples: Annotated[int, typer.Option(help="Activations on either side.")] = 50_000,
    dim: Annotated[int, typer.Option(help="Features of an activation.")] = 2048,
    images: Annotated[int, typer.Option(help="Images through the network.")] = 256,
    resolution: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Images per forward pass.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[str, typer.Option(help="Comma-separated: " + ", ".join(METRICS))] = ",".join(METRICS),
    one: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure and write JSON."""
    options = {
        "samples": samples,
        "dim": dim,
        "images": images,
        "resolution": resolution,
        "batch_size": batch_size,
        "device": device,
    }
    if one:
        print(json.dumps(measure(one, options)))
        return
    from featcache.machine import describe_machine

    machine = describe_machine("torch")
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/evaluate.py", *sys.argv[1:]]),
        "options": options,
        "device": machine["gpu" if device.startswith("cuda") else "cpu"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "torch": machine["packages"]["torch"],
        "results": {},
    }
    for metric in only.split(","):
        command = [sys.executable, __file__, "--one", metric, "--name", name]
        command += [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise typer.Exit(1)
        report["results"][metric] = json.loads(done.stdout.strip().splitlines()[-1])
        print(metric, json.dumps(report["results"][metric]), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"evaluate_{name}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
