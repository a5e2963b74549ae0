"""Images/s of a whole build, of each of its stages alone, and of two plainer ways to encode the same images.

    python benchmarks/encode.py --name cpu
    python benchmarks/encode.py --name h100 --count 8192 --size 500 --resolution 256 --vae sd-ft-ema --levels G3,G4 \\
        --encoder dinov2-b --batch-size 128 --device cuda

Writes `benchmarks/results/encode_<name>.json`. The images are JPEGs of the procedural set at `--size` px, drawn once; the
encoders other than tiny have seeded random weights, which cost what trained ones do. Loading encoders and compiling
them is left out of every rate: a first small build or pass comes before each measurement. Everything is measured in
rounds, one after the other within a round, so that what else the machine does falls on all of them; ratios are taken
within a round, and their medians over the rounds count.

What the build is set against:

- the *plain loop*: ImageFolder with the same crop, a DataLoader with one worker a core, the VAE and then the encoder in
  float32, one torch.save of float32 features a batch;
- the structure of the *extraction scripts* that come with REPA and its successors: a first pass that crops every image and
  writes it as PNG, a second that reads the PNGs one by one, encodes one at a time, and writes one .npy file per image and
  feature. Own code, and the same features as ours, of which theirs have the moments alone. On the first `--script-count`
  images.

Stages: decoding (all threads), all encoders one after another (they share a device), quantising with the copy to the
host, writing. On a CPU they share the cores: `core_bound_images_per_s` is what all of them together would reach if every core
were busy all the time, from their CPU seconds per image.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from featcache.progress import Quiet

RESULTS = Path(__file__).resolve().parent / "results"


def provenance(device: str) -> dict[str, Any]:
    """What a result says of its making: command, date, machine, threads of PyTorch, versions of packages."""
    import torch
    from loader import machine

    described = machine()
    names = ("torch", "timm", "diffusers", "transformers", "pillow")
    return {
        "command": "python " + " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            **described,
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            "threads": torch.get_num_threads(),
            "packages": described["packages"] | {name: version(name) for name in names},
        },
    }


class _Begun(Quiet):
    """Progress that notes when encoding began."""

    began_s = began_cpu_s = 0.0

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self.began_s, self.began_cpu_s = time.perf_counter(), _cpu_s()


def draw_images(folder: Path, count: int, size: int) -> None:
    from PIL import Image

    from featcache.sources.shapes import CLASS_NAMES, render

    for index in range(count):
        pixels, label = render(index, resolution=size)
        place = folder / CLASS_NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{index:06d}.jpg", quality=90)


def _synchronised(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Rate:
    """Images/s, and CPU seconds of this process (and its dead children) an image."""

    images_per_s: float
    cpu_s: float


def _cpu_s() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _rate(work: Callable[[], int], device: str, *, at_least_s: float) -> Rate:
    """Of repeated `work` (which returns how many images it did), after one repetition that does not count."""
    work()
    _synchronised(device)
    images, cpu, start = 0, _cpu_s(), time.perf_counter()
    while time.perf_counter() - start < at_least_s:
        images += work()
    _synchronised(device)
    return Rate(images / (time.perf_counter() - start), (_cpu_s() - cpu) / images)


def whole_build(request: Any, folder: Path) -> dict[str, Any]:
    """From the first image to the finished cache, and the stages' rates as the build saw them."""
    from featcache.builder.pipeline import Meter
    from featcache.builder.run import build

    build(replace(request, out=folder / "warm", limit=min(2 * request.batch_size, 64)), _Begun())
    progress, meter = _Begun(), Meter()
    result = build(replace(request, out=folder / "whole"), progress, meter=meter)
    seconds = time.perf_counter() - progress.began_s
    stored = sum(f.stat().st_size for f in (folder / "whole").rglob("*") if f.is_file())
    rates = {name: round(stage.images_per_s, 2) for name, stage in meter.stages.items()}
    rate = Rate(result.encoded / seconds, (_cpu_s() - progress.began_cpu_s) / result.encoded)
    return {"rate": rate, "bytes_per_image": stored / result.encoded, "within": rates}


def encoders_and_pixels(request: Any, precision: str, *, compiled: bool) -> tuple[list[Any], Any]:
    """The encoders of a request, and its first batch on their device, uint8 [B, 3, R, R]."""
    import torch

    from featcache.builder.prepare import prepare
    from featcache.machine import pick_device

    device = pick_device(request.device)
    asked = replace(request, precision=precision, compile=compiled, out=Path("unused"))
    work = prepare(asked, device=device).work
    batch = [int(i) for i in work.order[: min(work.batch_size, len(work.order))]]
    with ThreadPoolExecutor(work.threads) as pool:
        rows = list(pool.map(lambda i: work.source.load(i, work.resolution)[0].copy(), batch))
    pixels = torch.stack([torch.from_numpy(row) for row in rows]).permute(0, 3, 1, 2).to(device)
    return list(work.encoders), pixels


def encoding_rate(encoders: list[Any], pixels: Any, device: str, *, at_least_s: float) -> float:
    """Images/s of the encoders one after another on one batch again and again."""

    def run() -> int:
        for encoder in encoders:
            encoder(pixels)
        return len(pixels)

    return _rate(run, device, at_least_s=at_least_s).images_per_s


def stages_alone(request: Any, folder: Path, *, at_least_s: float) -> tuple[dict[str, Rate], dict[str, float]]:
    """Decoding, encoding, quantising with copying, and writing, each with nothing beside it; and encoder by encoder."""
    import torch

    from featcache.builder.lead import lead
    from featcache.builder.pipeline import Meter, run_shards
    from featcache.builder.prepare import prepare
    from featcache.codecs import FeatureCodec, numpy_view
    from featcache.machine import pick_device

    device = pick_device(request.device)
    plan = prepare(replace(request, out=folder / "stages"), device=device)
    work = plan.work
    rates: dict[str, Rate] = {}
    n = min(work.batch_size, len(work.order))
    batch = [int(i) for i in work.order[:n]]

    with ThreadPoolExecutor(work.threads) as pool:

        def decode() -> int:
            return len(list(pool.map(lambda i: work.source.load(i, work.resolution, work.decoder), batch)))

        rates["decode"] = _rate(decode, device, at_least_s=at_least_s)
        rows = [pixels for pixels, _ in pool.map(lambda i: work.source.load(i, work.resolution), batch)]
    pixels = torch.stack([torch.from_numpy(row.copy()) for row in rows]).permute(0, 3, 1, 2).to(device)
    features: dict[str, Any] = {}

    def run(encoders: Any) -> int:
        for encoder in encoders:
            features.update(encoder(pixels))
        return n

    rates["encode"] = _rate(lambda: run(work.encoders), device, at_least_s=at_least_s)
    single = {
        e.title: _rate(functools.partial(run, [e]), device, at_least_s=at_least_s / 2).images_per_s
        for e in work.encoders
    }
    features = {name: value for name, value in features.items() if name in work.specs}

    codecs = {name: FeatureCodec(work.specs[name]).to(device) for name in features}

    def quantise() -> int:
        for name, value in features.items():
            for stored in codecs[name].encode(value).values():
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
    run_shards(work, few, recorded, meter=Meter(), progress=Quiet())
    images = sum(len(work.slots(shard)) for shard in few)
    written, seconds, cpu = 0, 0.0, 0.0
    while seconds < at_least_s:
        shutil.rmtree(folder / "stages", ignore_errors=True)
        with lead(plan) as writer:
            start, cpu_start = time.perf_counter(), _cpu_s()
            for feature, shard, arrays in recorded.shards:
                writer.write_shard(feature, shard, arrays)
            writer.commit()
            seconds += time.perf_counter() - start
            cpu += _cpu_s() - cpu_start
        written += images
    shutil.rmtree(folder / "stages", ignore_errors=True)
    rates["write"] = Rate(written / seconds, cpu / written)
    return rates, single


class Plain:
    """The encoders as their libraries give them, in float32, channels first, not compiled."""

    def __init__(self, request: Any, folder: Path) -> None:
        from featcache.builder.prepare import prepare
        from featcache.encoders.base import WeightsSource
        from featcache.encoders.vae import encoder_layers, load_vae
        from featcache.machine import pick_device

        self.device = pick_device(request.device)
        plain = replace(request, out=folder / "unused", compile=False, precision="fp32")
        self.work = prepare(plain, device=self.device).work
        self.vision = self.work.encoders[1]
        self.vae: Any = load_vae(request.vae, WeightsSource(random_seed=0))[0].to(self.device)
        self._kept: list[Any] = []
        for layer in encoder_layers(self.vae):
            if layer.level in request.levels:
                layer.module.register_forward_hook(lambda _m, _i, out: self._kept.append(out))

    def features(self, seen: Any) -> dict[str, Any]:
        """uint8 [B, 3, R, R] => moments, levels and tokens, float32 on the CPU."""
        import torch

        self._kept.clear()
        with torch.inference_mode():
            moments = self.vae.encode(seen.float() / 127.5 - 1).latent_dist.parameters
            size = (self.vision.grid, self.vision.grid)
            levels = [torch.nn.functional.interpolate(out, size=size, mode="bilinear") for out in self._kept]
        tokens = {name: value.cpu() for name, value in self.vision(seen).items()}
        return {"moments": moments.cpu(), **{f"level{i}": level.cpu() for i, level in enumerate(levels)}, **tokens}


def plain_loop(plain: Plain, request: Any, folder: Path) -> Rate:
    """ImageFolder, DataLoader, the encoders one after another, torch.save."""
    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder

    from featcache.sources.pixels import center_crop

    device, R = plain.device, plain.work.resolution

    def transform(image: Any) -> Any:
        return torch.from_numpy(np.array(center_crop(image.convert("RGB"), R)))

    images = ImageFolder(request.data, transform=transform)
    loader = DataLoader(images, request.batch_size, num_workers=os.cpu_count() or 1, pin_memory=device != "cpu")
    (folder / "plain").mkdir()
    plain.features(torch.zeros(request.batch_size, 3, R, R, dtype=torch.uint8, device=device))
    _synchronised(device)
    start, cpu, count = time.perf_counter(), _cpu_s(), 0
    for number, (pixels, labels) in enumerate(loader):
        seen = pixels.to(device).permute(0, 3, 1, 2).contiguous()
        torch.save({"labels": labels, **plain.features(seen)}, folder / f"plain/{number:06d}.pt")
        count += len(labels)
    return Rate(count / (time.perf_counter() - start), (_cpu_s() - cpu) / count)


def extraction_scripts(plain: Plain, request: Any, folder: Path, *, count: int) -> Rate:
    """Two passes, one image at a time, one file per image and feature."""
    import numpy as np
    import torch
    from PIL import Image

    from featcache.sources.pixels import center_crop

    R = plain.work.resolution
    files = sorted(Path(request.data).rglob("*.jpg"))[:count]
    crops, features = folder / "scripts/crops", folder / "scripts/features"
    crops.mkdir(parents=True)
    features.mkdir()
    plain.features(torch.zeros(1, 3, R, R, dtype=torch.uint8, device=plain.device))
    _synchronised(plain.device)
    start, cpu = time.perf_counter(), _cpu_s()
    for number, file in enumerate(files):
        with Image.open(file) as image:
            crop = Image.fromarray(center_crop(image.convert("RGB"), R))
        crop.save(crops / f"{number:08d}.png", compress_level=0)
    for crop_file in sorted(crops.iterdir()):
        with Image.open(crop_file) as image:
            pixels = torch.from_numpy(np.array(image)).to(plain.device).permute(2, 0, 1)[None].contiguous()
        for name, value in plain.features(pixels).items():
            np.save(features / f"{crop_file.stem}-{name}.npy", value[0].numpy())
    return Rate(len(files) / (time.perf_counter() - start), (_cpu_s() - cpu) / len(files))


def main(
    name: Annotated[str, typer.Option(help="Of the machine; names the result.")] = "cpu",
    count: Annotated[int, typer.Option(help="Images.")] = 1024,
    size: Annotated[int, typer.Option(help="Side of the JPEGs in px.")] = 200,
    resolution: Annotated[int, typer.Option(help="Side of the crop in px.")] = 64,
    vae: Annotated[str, typer.Option(help="VAE.")] = "tiny",
    levels: Annotated[str, typer.Option(help="VAE levels.")] = "G3,G4",
    encoder: Annotated[str, typer.Option(help="Vision encoder.")] = "tiny",
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    decode: Annotated[str, typer.Option(help="pil or turbo.")] = "pil",
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or auto.")] = "auto",
    seconds: Annotated[float, typer.Option(help="How long to measure each stage, in each round.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Of everything; the medians count.")] = 5,
    script_count: Annotated[int, typer.Option(help="Images for the extraction scripts' structure.")] = 256,
) -> None:
    """Measure and write benchmarks/results/encode_<name>.json."""
    from featcache.builder.request import BuildRequest
    from featcache.encoders import parse_encoders, parse_levels
    from featcache.machine import pick_device

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        draw_images(folder / "images", count, size)
        request = BuildRequest(
            data=str(folder / "images"),
            encoders=parse_encoders([encoder]),
            vae=vae,
            levels=parse_levels(levels),
            resolution=resolution,
            batch_size=batch_size,
            device=device,
            decode=decode,
            precision=precision,  # type: ignore[arg-type]  # checked there
            random_weights=0,
        )
        plain = Plain(request, folder)
        measured = []
        for _ in range(rounds):
            for part in ("whole", "warm", "plain", "scripts"):
                shutil.rmtree(folder / part, ignore_errors=True)
            build = whole_build(request, folder)
            alone, single = stages_alone(request, folder, at_least_s=seconds)
            loop = plain_loop(plain, request, folder)
            scripts = extraction_scripts(plain, request, folder, count=script_count)
            measured.append(_round(build, alone, single, loop, scripts))
            print(json.dumps(measured[-1]), flush=True)
    record = {
        **provenance(pick_device(device)),
        "settings": {
            "count": count, "size": size, "resolution": resolution, "vae": vae, "levels": levels, "encoder": encoder,
            "batch_size": batch_size, "decode": decode, "precision": precision, "rounds": rounds,
            "script_count": script_count,
        },
        "medians": _medians(measured),
        "rounds": measured,
    }  # fmt: skip
    record["imagenet_minutes"] = 1_281_167 / record["medians"]["build_images_per_s"] / 60
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"encode_{name}.json"
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "rounds"}, indent=1))


def _round(build: dict[str, Any], alone: dict[str, Rate], single: dict[str, float], loop: Rate, scripts: Rate) -> Any:
    """One round's figures, and the ratios within it."""
    rate: Rate = build["rate"]
    slowest = min(alone, key=lambda stage: alone[stage].images_per_s)
    bound = (os.cpu_count() or 1) / sum(stage.cpu_s for stage in alone.values())
    return {
        "build_images_per_s": rate.images_per_s,
        "bytes_per_image": build["bytes_per_image"],
        "stages_within_images_per_s": build["within"],
        "stages_alone_images_per_s": {name: stage.images_per_s for name, stage in alone.items()},
        "encoders_alone_images_per_s": single,
        "slowest_stage": slowest,
        "build_over_slowest_stage": rate.images_per_s / alone[slowest].images_per_s,
        "core_bound_images_per_s": bound,
        "build_over_core_bound": rate.images_per_s / bound,
        "plain_loop_images_per_s": loop.images_per_s,
        "build_over_plain_loop": rate.images_per_s / loop.images_per_s,
        "extraction_scripts_images_per_s": scripts.images_per_s,
        "build_over_extraction_scripts": rate.images_per_s / scripts.images_per_s,
        "cpu_s_per_image": {
            "build": rate.cpu_s,
            **{name: stage.cpu_s for name, stage in alone.items()},
            "plain loop": loop.cpu_s,
            "extraction scripts": scripts.cpu_s,
        },
    }


def _medians(measured: list[Any]) -> Any:
    """Median over the rounds of every number, dictionaries entry by entry; of words, the most frequent."""
    first = measured[0]
    if isinstance(first, dict):
        return {key: _medians([entry[key] for entry in measured]) for key in first}
    return statistics.mode(measured) if isinstance(first, str) else statistics.median(measured)


if __name__ == "__main__":
    typer.run(main)
