"""Images/s of a whole build, of each of its stages alone, and of a plain loop over the same images, side by side.

    python benchmarks/encode.py --name cpu
    python benchmarks/encode.py --name h100 --count 8192 --size 500 --resolution 256 --vae sd-ft-ema --levels G3,G4 \\
        --encoder dinov2-b --batch-size 128 --device cuda

Writes `benchmarks/results/encode_<name>.json`. The images are JPEGs of the procedural set at `--size` px, drawn once; the
encoders other than tiny have seeded random weights, which cost what trained ones do. Loading encoders and compiling
them is left out of every rate: a first small build or pass comes before each measurement.

The plain loop is what the public extraction scripts do: ImageFolder with the same crop, a DataLoader with one worker a
core, the VAE and then the encoder in float32, one torch.save of float32 features a batch.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).resolve().parent / "results"


class _Silent:
    """Progress that notes when encoding began."""

    began_s = 0.0

    def start(self, *, total: int, done: int, note: str) -> None:
        self.began_s = time.perf_counter()

    def advance(self, images: int) -> None: ...

    def warn(self, text: str) -> None: ...


def _draw(folder: Path, count: int, size: int) -> None:
    from PIL import Image

    from featcache.shapes import CLASS_NAMES, render

    for index in range(count):
        pixels, label = render(index, resolution=size)
        place = folder / CLASS_NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index:06d}.jpg", quality=90)


def _synchronised(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _rate(work: Callable[[], int], device: str, *, at_least_s: float) -> float:
    """Images/s of repeated `work` (which returns how many it did), after one repetition that does not count."""
    work()
    _synchronised(device)
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < at_least_s:
        images += work()
    _synchronised(device)
    return images / (time.perf_counter() - start)


def whole_build(request: Any, folder: Path) -> dict[str, Any]:
    """Images/s from the first image to the finished cache, and the stages' rates as the build saw them."""
    from featcache.build import build
    from featcache.pipeline import Meter

    build(replace(request, out=folder / "warm", limit=min(2 * request.batch_size, 64)), _Silent())
    progress, meter = _Silent(), Meter()
    result = build(replace(request, out=folder / "whole"), progress, meter=meter)
    seconds = time.perf_counter() - progress.began_s
    stored = sum(f.stat().st_size for f in (folder / "whole").rglob("*") if f.is_file())
    rates = {name: round(stage.images_per_s, 2) for name, stage in meter.stages.items()}
    return {"images_per_s": result.encoded / seconds, "bytes_per_image": stored / result.encoded, "within": rates}


def stages_alone(request: Any, folder: Path, *, at_least_s: float) -> dict[str, float]:
    """Images/s of decoding, of each encoder, of quantising with copying, and of writing, each with nothing beside it."""
    import torch

    from featcache.build import lead, pick_device, prepare
    from featcache.codecs import encode, numpy_view
    from featcache.pipeline import Meter, encoder_name, run_shards

    device = pick_device(request.device)
    plan = prepare(replace(request, out=folder / "stages"), device=device)
    work = plan.work
    rates: dict[str, float] = {}
    n = min(work.batch_size, len(work.order))
    batch = [int(i) for i in work.order[:n]]

    with ThreadPoolExecutor(work.threads) as pool:

        def decode() -> int:
            return len(list(pool.map(lambda i: work.source.load(i, work.resolution, work.decoder), batch)))

        rates["decode"] = _rate(decode, device, at_least_s=at_least_s)
        rows = [pixels for pixels, _ in pool.map(lambda i: work.source.load(i, work.resolution), batch)]
    pixels = torch.stack([torch.from_numpy(row.copy()) for row in rows]).permute(0, 3, 1, 2).to(device)
    features: dict[str, Any] = {}
    for encoder in work.encoders:

        def run(encoder: Any = encoder) -> int:
            features.update(encoder(pixels))
            return n

        rates[f"encode {encoder_name(encoder)}"] = _rate(run, device, at_least_s=at_least_s)
    features = {name: value for name, value in features.items() if name in work.specs}

    def quantise() -> int:
        for name, value in features.items():
            for stored in encode(work.specs[name].codec, value).values():
                numpy_view(stored)
        return n

    rates["quantise and copy"] = _rate(quantise, device, at_least_s=at_least_s)

    # Writing: the shards of a finished cache again, under another name.
    class Recorded:
        def __init__(self) -> None:
            self.shards: list[tuple[str, int, Any]] = []

        def skip(self, shard: int, slots: Any) -> None: ...

        def write_shard(self, feature: str, shard: int, arrays: Any) -> None:
            self.shards.append((feature, shard, {k: v.copy() for k, v in arrays.items()}))

        def commit(self) -> None: ...

    few = list(range(min(2, -(-len(work.order) // work.shard_size))))
    recorded = Recorded()
    run_shards(work, few, recorded, meter=Meter(), advance=lambda _: None, warn=print)
    images = sum(len(work.slots(shard)) for shard in few)
    written, seconds = 0, 0.0
    while seconds < at_least_s:
        shutil.rmtree(folder / "stages", ignore_errors=True)
        with lead(plan) as writer:
            start = time.perf_counter()
            for feature, shard, arrays in recorded.shards:
                writer.write_shard(feature, shard, arrays)
            writer.commit()
            seconds += time.perf_counter() - start
        written += images
    rates["write"] = written / seconds
    return rates


def plain_loop(request: Any, folder: Path) -> float:
    """Images/s of ImageFolder, DataLoader, the encoders as their libraries give them one after another, torch.save."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from featcache.build import pick_device, prepare
    from featcache.encoders.base import WeightsSource
    from featcache.encoders.vae import encoder_layers, load_vae
    from featcache.images import center_crop

    device = pick_device(request.device)
    work = prepare(replace(request, out=folder / "unused", compile=False, precision="fp32"), device=device).work
    vision = work.encoders[1]
    vae: Any = load_vae(request.vae, WeightsSource(random_seed=0))[0].to(device)
    kept: list[Any] = []
    for layer in encoder_layers(vae):
        if layer.level in request.levels:
            layer.module.register_forward_hook(lambda _m, _i, out: kept.append(out))

    @torch.inference_mode()
    def latents(seen: Any) -> dict[str, Any]:
        kept.clear()
        moments = vae.encode(seen.float() / 127.5 - 1).latent_dist.parameters
        size = (vision.grid, vision.grid)
        levels = [torch.nn.functional.interpolate(out, size=size, mode="bilinear") for out in kept]
        return {"moments": moments.cpu(), "levels": [level.cpu() for level in levels]}

    def transform(image: Any) -> Any:
        return torch.from_numpy(np.array(center_crop(image.convert("RGB"), work.resolution)))

    images = ImageFolder(request.data, transform=transform)
    loader = DataLoader(images, request.batch_size, num_workers=os.cpu_count() or 1, pin_memory=device != "cpu")
    (folder / "plain").mkdir()
    blank = torch.zeros(request.batch_size, 3, work.resolution, work.resolution, dtype=torch.uint8, device=device)
    latents(blank)
    vision(blank)
    _synchronised(device)
    start, count = time.perf_counter(), 0
    for number, (pixels, labels) in enumerate(loader):
        seen = pixels.to(device).permute(0, 3, 1, 2).contiguous()
        tokens = {name: value.cpu() for name, value in vision(seen).items()}
        torch.save({"labels": labels, **latents(seen), **tokens}, folder / f"plain/{number:06d}.pt")
        count += len(labels)
    return count / (time.perf_counter() - start)


def main(
    name: Annotated[str, typer.Option(help="Of the machine; names the result.")] = "cpu",
    count: Annotated[int, typer.Option(help="Images.")] = 512,
    size: Annotated[int, typer.Option(help="Side of the JPEGs in px.")] = 200,
    resolution: Annotated[int, typer.Option(help="Side of the crop in px.")] = 64,
    vae: Annotated[str, typer.Option(help="VAE.")] = "tiny",
    levels: Annotated[str, typer.Option(help="VAE levels.")] = "G3,G4",
    encoder: Annotated[str, typer.Option(help="Vision encoder.")] = "tiny",
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    decode: Annotated[str, typer.Option(help="pil, turbo or nvjpeg.")] = "pil",
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or auto.")] = "auto",
    seconds: Annotated[float, typer.Option(help="How long to measure each stage.")] = 5.0,
    repeats: Annotated[int, typer.Option(help="Of build and plain loop, alternating; the medians count.")] = 3,
) -> None:
    """Measure and write benchmarks/results/encode_<name>.json."""
    import statistics

    import torch

    from featcache.build import BuildRequest, pick_device
    from featcache.encoders import parse_encoders, parse_levels

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        _draw(folder / "images", count, size)
        request = BuildRequest(
            data=str(folder / "images"),
            encoders=parse_encoders([encoder]),
            vae=vae,
            levels=parse_levels(levels),
            resolution=resolution,
            batch_size=batch_size,
            device=device,
            decode=decode,
            precision=precision,
            random_weights=0,
        )
        builds, loops = [], []
        for _ in range(repeats):
            for part in ("whole", "warm", "plain"):
                shutil.rmtree(folder / part, ignore_errors=True)
            builds.append(whole_build(request, folder))
            loops.append(plain_loop(request, folder))
        alone = stages_alone(request, folder, at_least_s=seconds)
    rate = statistics.median(result["images_per_s"] for result in builds)
    plain = statistics.median(loops)
    slowest = min(alone, key=lambda stage: alone[stage])
    kind = pick_device(device)
    record = {
        "settings": {
            "count": count, "size": size, "resolution": resolution, "vae": vae, "levels": levels, "encoder": encoder,
            "batch_size": batch_size, "decode": decode, "precision": precision, "repeats": repeats,
        },
        "machine": {
            "device": torch.cuda.get_device_name() if kind.startswith("cuda") else platform.processor() or "cpu",
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()[0],
            "torch": version("torch"),
        },
        "build_images_per_s": rate,
        "builds_images_per_s": [result["images_per_s"] for result in builds],
        "stages_within_images_per_s": builds[-1]["within"],
        "stages_alone_images_per_s": alone,
        "slowest_stage": slowest,
        "build_over_slowest_stage": rate / alone[slowest],
        "plain_loop_images_per_s": plain,
        "plain_loops_images_per_s": loops,
        "build_over_plain_loop": rate / plain,
        "bytes_per_image": builds[-1]["bytes_per_image"],
        "imagenet_minutes": 1_281_167 / rate / 60,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"encode_{name}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    typer.run(main)
