"""Many samples of one run, without babysitting: resumable, over any number of ranks, the same images every time.

Sample ``i`` is a function of (seed, i, settings) alone. On the CPU the arithmetic is done in groups of eight consecutive
indices, always full, so that shapes (and with them the rounding) never depend on batch size, ranks or where a job was cut.
Finished blocks lie on the disk; the npz is put together at the end without holding it in memory.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from featcache.build import pick_device
from featcache.errors import UserError
from trainer import distributed, runs
from trainer.diffusion.guidance import Guidance
from trainer.sample import (
    LoadedRun,
    SampleConfig,
    check_sampler,
    choose_labels,
    class_grid,
    draw_images,
    load_decoder,
    load_run,
    save_png,
)

GROUP = 8  # samples of one arithmetic unit on the CPU
BLOCK = 256  # samples of one file on the way; a multiple of GROUP
FORMATS = ("npz", "wds", "png")


class Bar(Protocol):
    """Who is told how far it is."""

    def begin(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """What ``trainer sample`` was asked for.

    sampler: None takes the family's default. interval: LOW,HIGH. checkpoint: a step, None the latest.
    """

    num: int
    sampler: str | None = None
    steps: int = 250
    guidance: float = 1.0
    interval: str = "0,1"
    guided_channels: int | None = None
    classes: str = "balanced"
    pixels: str = "round"
    seed: int = 0
    checkpoint: int | None = None
    batch_size: int = 64
    device: str = "auto"
    weights_dir: str | None = None
    format: str = "npz"
    out: Path | None = None

    def config(self, family: str) -> SampleConfig:
        """Raises UserError for a sampler that the family of backbones has not, an unknown pixel rule or interval."""
        if self.pixels not in ("round", "truncate"):
            raise UserError(f"--pixels {self.pixels!r} is not known", remedy="Type one of: round, truncate")
        if self.format not in FORMATS:
            raise UserError(f"--format {self.format!r} is not known", remedy=f"Type one of: {', '.join(FORMATS)}")
        try:
            low, high = (float(part) for part in self.interval.split(","))
        except ValueError:
            raise UserError(
                f"--interval {self.interval!r} is not LOW,HIGH", remedy="Type for example --interval 0,0.7"
            ) from None
        return SampleConfig(
            sampler=check_sampler(family, self.sampler),
            steps=self.steps,
            guidance=Guidance(scale=self.guidance, low=low, high=high, channels=self.guided_channels),
            pixels=self.pixels,
            seed=self.seed,
            batch_size=self.batch_size,
        )

    def folder_name(self, step: int, sampler: str) -> str:
        parts = [f"step_{step:07d}", f"{sampler}{self.steps}", f"seed{self.seed}"]
        if self.guidance != 1:
            parts.append(f"cfg{self.guidance:g}" + (f"-{self.interval}" if self.interval != "0,1" else ""))
            parts += [f"ch{self.guided_channels}"] if self.guided_channels else []
        parts += [self.classes.replace(",", "_")[:40]] if self.classes != "balanced" else []
        parts += [self.pixels] if self.pixels != "round" else []
        return "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """What was written, and of which run.

    images: an npz (``arr_0`` uint8 [n, R, R, 3], ``arr_1`` int64 [n] labels: ADM's layout), a WebDataset tar (``png``,
    ``cls``) or a folder of PNGs by class. grid: one row a class.
    """

    images: Path
    grid: Path
    loaded: LoadedRun
    settings: dict[str, Any]


def sample_run(run: Path, request: SampleRequest, bar: Bar) -> SampleResult:
    """Draws ``request.num`` images of a run and writes npz and grid; finished work of an earlier, interrupted call is kept.

    Raises:
        UserError: no such run or checkpoint, unknown settings.
        WeightsUnavailable: the VAE's weights are not to be had.
    """
    device_name = pick_device(request.device)
    world = distributed.join(device_name)
    device = torch.device(device_name, world.local_rank) if device_name == "cuda" else torch.device(device_name)
    loaded = load_run(run, step=request.checkpoint, device=str(device))
    config = request.config(loaded.model.cfg.family)
    vae = load_decoder(
        loaded.summary["dataset"]["vae"], loaded.summary["features"]["vae/moments"], request.weights_dir
    ).to(device)
    classes = len(loaded.class_names)
    labels = choose_labels(request.classes, request.num, classes, seed=request.seed)

    folder = request.out or run / "samples" / request.folder_name(loaded.step, config.sampler)
    blocks = folder / "blocks"
    images = folder / (f"samples_{request.num}" + {"npz": ".npz", "wds": ".tar", "png": ""}[request.format])
    grid = folder / "grid.png"
    settings = {
        **{k: v for k, v in asdict(config).items() if k != "batch_size"},
        "num": request.num,
        "classes": request.classes,
    }
    if not images.exists():
        if world.is_main:
            _prepare(blocks, settings)
        distributed.barrier()
        todo = [k for k in range(-(-request.num // BLOCK)) if not _block_path(blocks, k).exists()]
        bar.begin("sampling", request.num, done=request.num - sum(_block_count(request.num, k) for k in todo))
        for k in todo[world.rank :: world.size]:
            pixels = list(_draw_block(loaded, vae, labels, k, request, config, device, bar))
            _save_block(_block_path(blocks, k), np.concatenate(pixels)[: _block_count(request.num, k)])
        distributed.barrier()
        if world.is_main:
            write = {"npz": _write_npz, "wds": _write_tar, "png": _write_pngs}[request.format]
            write(blocks, images, labels)
            shutil.rmtree(blocks)
            save_png(class_grid(loaded.model, vae, path=loaded.config.path, seed=request.seed, config=config), grid)
            runs.write_text(folder / "settings.json", json.dumps({"step": loaded.step, **settings}, indent=1))
        distributed.barrier()
    return SampleResult(images=images, grid=grid, loaded=loaded, settings=settings)


def _block_path(blocks: Path, number: int) -> Path:
    return blocks / f"{number:06d}.npy"


def _block_count(num: int, number: int) -> int:
    return min(BLOCK, num - number * BLOCK)


def _prepare(blocks: Path, settings: dict[str, Any]) -> None:
    """Keeps blocks of an earlier call only if it drew the same labels with the same settings."""
    blocks.mkdir(parents=True, exist_ok=True)
    record = blocks / "settings.json"
    if runs.read_json(record, settings) != settings:
        shutil.rmtree(blocks)
        blocks.mkdir()
    runs.write_text(record, json.dumps(settings))


def _draw_block(
    loaded: LoadedRun,
    vae: Any,
    labels: np.ndarray,
    number: int,
    request: SampleRequest,
    config: SampleConfig,
    device: torch.device,
    bar: Bar,
) -> Iterator[np.ndarray]:
    unit = GROUP if device.type == "cpu" else max(GROUP, request.batch_size - request.batch_size % GROUP)
    first, count = number * BLOCK, _block_count(request.num, number)
    for start in range(first, first + count, unit):
        indices = np.arange(start, min(start + unit, first + BLOCK))
        wanted = torch.from_numpy(labels[np.minimum(indices, len(labels) - 1)]).to(
            device
        )  # the last group is filled up
        yield draw_images(loaded.model, vae, wanted, indices.tolist(), config, path=loaded.config.path)
        bar.advance(min(len(indices), first + count - start))


def _save_block(path: Path, pixels: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        np.save(file, pixels, allow_pickle=False)
    partial.replace(path)


def _write_npz(blocks: Path, npz: Path, labels: np.ndarray) -> None:
    """Joins the blocks into an uncompressed npz, one block in memory at a time."""
    files = sorted(blocks.glob("[0-9]*.npy"))
    first = np.load(files[0], mmap_mode="r", allow_pickle=False)
    partial = npz.with_name(f".{npz.name}.partial")
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(np.load(file, allow_pickle=False).tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.save(member, labels.astype(np.int64), allow_pickle=False)
    partial.replace(npz)


def _pngs(blocks: Path) -> Iterator[bytes]:
    for file in sorted(blocks.glob("[0-9]*.npy")):
        for pixels in np.load(file, allow_pickle=False):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield buffer.getvalue()


def _write_tar(blocks: Path, path: Path, labels: np.ndarray) -> None:
    """One WebDataset shard; members carry no time, so equal samples make equal bytes."""
    import webdataset

    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream, webdataset.TarWriter(stream, mtime=0) as tar:
        for i, (png, label) in enumerate(zip(_pngs(blocks), labels)):
            tar.write({"__key__": f"{i:06d}", "png": png, "cls": str(label).encode()})
    partial.replace(path)


def _write_pngs(blocks: Path, path: Path, labels: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for i, (png, label) in enumerate(zip(_pngs(blocks), labels)):
        folder = partial / f"{label:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:06d}.png").write_bytes(png)
    partial.replace(path)
