"""Memory of a build over many tiny images: does it stay flat?

    OMP_NUM_THREADS=1 python benchmarks/build_memory.py

Draws 100,000 JPEGs of the procedural set at 32 px into webdataset shards (tars, so that no 100,000 files are made), builds
a cache from them with the embedded encoders, and samples the process's anonymous memory (the kernel's `RssAnon`: what it
has allocated, without files that are mapped) about every half a second. Writes `benchmarks/results/build_memory.json`:
the slope of a straight line through the samples after the first tenth of the images, in bytes per image, and about a
hundred of the samples.

A leak of one small Python object per image would show as a slope of 50 bytes or more; of its pixels, 3,072.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import typer

from featcache.progress import Quiet

RESULTS = Path(__file__).resolve().parent / "results"
SHARD_IMAGES = 10_000


def rss_anon_bytes() -> int:
    """Anonymous memory of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel does not report RssAnon")


class Sampler(Quiet):
    """Progress of a build that notes memory beside the number of images done."""

    def __init__(self, every_s: float) -> None:
        self.samples: list[tuple[int, float, int]] = []  # images done, seconds, bytes
        self._every_s = every_s
        self._done = 0
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self, name: str, total: int | None, *, done: int = 0, unit: str = "images") -> None:
        self._thread.start()

    def update(self, count: int, text: str = "") -> None:
        self._done += count

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.samples.append((self._done, round(time.monotonic() - self._start, 2), rss_anon_bytes()))

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def write_shards(folder: Path, count: int, size: int) -> str:
    """JPEGs and classes in tars of 10,000 samples. Returns the pattern that names them."""
    from PIL import Image

    from featcache.sources.shapes import render

    n_shards = -(-count // SHARD_IMAGES)
    for shard in range(n_shards):
        with tarfile.open(folder / f"tiny-{shard:04d}.tar", "w") as tar:
            for index in range(shard * SHARD_IMAGES, min(count, (shard + 1) * SHARD_IMAGES)):
                pixels, label = render(index, resolution=size)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
                for extension, data in (("jpg", buffer.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{index:08d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / f"tiny-{{0000..{n_shards - 1:04d}}}.tar")


def main(
    count: Annotated[int, typer.Option(help="Images.")] = 100_000,
    size: Annotated[int, typer.Option(help="Side of images and crops in px, a multiple of 32.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Images per batch.")] = 64,
    every_s: Annotated[float, typer.Option(help="Seconds between samples.")] = 0.5,
    name: Annotated[str, typer.Option(help="Of the result's file.")] = "build_memory",
) -> None:
    """Build from many tiny images and record memory over time."""
    import numpy as np
    from encode import provenance

    from featcache.builder.request import BuildRequest
    from featcache.builder.run import build
    from featcache.encoders import parse_encoders
    from featcache.machine import pick_device

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        os.environ["FEATCACHE_INDEX"] = str(folder / "index")
        pattern = write_shards(folder, count, size)
        sampler = Sampler(every_s)
        request = BuildRequest(
            data=pattern,
            vae="tiny",
            encoders=parse_encoders(["tiny@5"]),
            resolution=size,
            batch_size=batch_size,
            out=folder / "cache",
        )
        start = time.monotonic()
        result = build(request, sampler)
        sampler.close()
        seconds = time.monotonic() - start
    steady = np.array([(done, rss) for done, _, rss in sampler.samples if count / 10 <= done < count], np.float64)
    slope, at_zero = np.polyfit(steady[:, 0], steady[:, 1], 1)
    record = {
        **provenance(pick_device("auto")),
        "settings": {"count": count, "size": size, "batch_size": batch_size, "features": list(result.features)},
        "images_per_s": count / seconds,
        "slope_bytes_per_image": slope,
        "growth_over_the_build_bytes": slope * count,
        "mean_bytes": steady[:, 1].mean(),
        "lowest_bytes": steady[:, 1].min(),
        "highest_bytes": steady[:, 1].max(),
        "residual_bytes": float(np.std(steady[:, 1] - (at_zero + slope * steady[:, 0]))),
        # About a hundred of them tell the story.
        "samples_images_s_bytes": sampler.samples[:: max(1, len(sampler.samples) // 100)],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "samples_images_s_bytes"}, indent=1))


if __name__ == "__main__":
    typer.run(main)
