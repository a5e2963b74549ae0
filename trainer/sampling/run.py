"""Many samples of one run, without babysitting: resumable, over any number of ranks, the same images every time.

Sample `i` is a function of (seed, i, settings) alone, and its bytes depend on nothing but how it is computed: the kind
of device, the precision, whether the backbone is compiled, and on a GPU the batch size. The arithmetic is done in units
of consecutive indices, always full: on the CPU eight by one thread, whatever the batch size; on a GPU the batch size
rounded down to a power of two. So shapes, and with them the rounding, never depend on the number of samples, of threads
or of ranks, nor on where a job was cut. Finished blocks lie on the disk; the npz is put together at the end without
holding it in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from featcache.encoders.vae import LatentDecoder
from featcache.errors import UserError
from featcache.machine import pick_device
from featcache.progress import QUIET, Progress
from featcache.store import files
from featcache.store.differences import difference, flat
from trainer import distributed
from trainer.classes import Classes
from trainer.diffusion.guidance import Guidance
from trainer.interval import Interval, plain
from trainer.requests import SampleRequest
from trainer.runs import folder as runs
from trainer.runs import locks
from trainer.runs.branch import read_origins
from trainer.runs.streams import stream_config
from trainer.sampling.draw import (
    LoadedRun,
    SampleConfig,
    check_sampler,
    draw_units,
    load_run,
    sampling_times,
    save_png,
)
from trainer.sampling.inference import Arithmetic, Network, applied, choose_arithmetic
from trainer.sampling.prompts import PromptEncoder, Prompts, prompts_for, restore_prompts
from trainer.sampling.subjects import OfClasses, OfPrompts, Subjects
from trainer.sampling.trunk import Trunk, trunk_record

if TYPE_CHECKING:
    from trainer.diffusion.transport import Transport
    from trainer.runs.config import RunConfig

GROUP = 8  # samples of one arithmetic unit on the CPU
BLOCK = 256  # samples of one file on the way; a power of two, at least GROUP


# What samples are a function of, as their `settings.json` holds it.
Record = dict[str, object]


def sample_config(request: SampleRequest, loaded: LoadedRun) -> SampleConfig:
    """What decides the numbers of the samples.

    Raises:
        UserError: a sampler that the family has not, wrong steps, or guidance by streams that the run has not.
    """
    sampler = check_sampler(loaded.model.cfg.family, request.sampler)
    sampling_times(sampler, request.steps, request.shift)
    guidance = Guidance(
        scale=request.guidance,
        interval=request.interval,
        channels=request.guided_channels,
        streams=request.stream_guidance,
        representation=request.representation_guidance,
    )
    _check_streams(guidance, loaded)
    return SampleConfig(
        sampler=sampler,
        steps=request.steps,
        shift=request.shift,
        # One record for all that draw alike.
        guidance=Guidance() if guidance.scale == 1 and guidance.representation == 1 else guidance,
        pixels=request.pixels,
        seed=request.seed,
    )


def check_dropout(request: SampleRequest, run: Path, config: RunConfig) -> None:
    """What classifier-free guidance is against must have been trained, by this run or by one that it branched off.

    Raises:
        UserError: it was not; of a branch that is not known.
    """
    if request.guidance != 1 and config.label_dropout == 0 and not read_origins(run):
        raise UserError(
            f"{config.name} was trained with label_dropout 0, so never without a class or caption: guidance of scale "
            f"{request.guidance:g} has nothing to compare with",
            remedy="Type --guidance 1, or train with dropout (--set label_dropout=0.1).",
        )


def _check_streams(guidance: Guidance, loaded: LoadedRun) -> None:
    config = loaded.config
    for flag, used in (
        ("--stream-guidance", guidance.streams is not None),
        ("--representation-guidance", guidance.representation != 1),
    ):
        if used and not config.streams:
            raise UserError(
                f"{flag} is of what is diffused beside the latents, and {config.name} diffuses the latents alone",
                remedy=f"Leave {flag} out.",
            )
    if guidance.representation == 1:
        return
    always = [name for name, options in config.streams.items() if not stream_config(name, options).dropout]
    if always:
        raise UserError(
            f"{config.name} was never trained without what it diffuses beside the latents, so nothing can be guided by that",
            remedy=f"Train with dropout (--set streams.{always[0]}.dropout=0.2), or leave --representation-guidance out.",
        )
    if config.prediction != "velocity":
        raise UserError(
            f"representation guidance is of velocities, and {config.name} predicts {config.prediction}",
            remedy="Leave --representation-guidance out.",
        )


def file_name(request: SampleRequest) -> str:
    """Of the images, in their folder."""
    return f"samples_{request.num}" + {"npz": ".npz", "wds": ".tar", "png": ""}[request.format]


def grid_name(num: int) -> str:
    """Of the picture of `num` samples, in their folder."""
    return f"grid_{num}.png"


def folder_name(
    request: SampleRequest,
    step: int,
    sampler: str,
    arithmetic: Arithmetic,
    stored: str | None = None,
    prompts: Prompts | None = None,
) -> str:
    """What the samples of checkpoint `step` (a snapshot that is `stored` rounded) depend on, one name for equal settings: defaults are left out, and so are
    an interval and channels of guidance where the scale is 1.
    """
    parts = [f"step_{step:07d}", f"{sampler}{request.steps}", f"seed{request.seed}"]
    parts += [f"shift{plain(request.shift)}"] if request.shift != 1 else []
    if request.guidance != 1:
        parts.append(
            f"cfg{plain(request.guidance)}" + (f"-{request.interval}" if request.interval != Interval() else "")
        )
        parts += [f"ch{request.guided_channels}"] if request.guided_channels else []
        parts += [f"streams{plain(request.stream_guidance)}"] if request.stream_guidance is not None else []
    if request.representation_guidance != 1:
        interval = f"-{request.interval}" if request.interval != Interval() else ""
        parts.append(f"rg{plain(request.representation_guidance)}{interval}")
    parts += [_short(str(request.classes).replace(",", "_"))] if request.classes != Classes() else []
    parts += [f"prompts_{prompts.sha256[:8]}"] if prompts is not None else []
    parts += [request.pixels] if request.pixels != "round" else []
    parts += [request.weights.replace(":", "-")] if request.weights != "ema" else []
    parts += [f"{stored}-weights"] if stored is not None else []
    parts += [arithmetic.precision] if arithmetic.precision != "fp32" else []
    parts += ["compiled"] if arithmetic.compile else []
    return "-".join(parts)


def _short(text: str, most: int = 40) -> str:
    """`text`, the end of a long one replaced by a digest of it."""
    return text if len(text) <= most else f"{text[: most - 9]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """What was written, and of which run.

    images: an npz (`arr_0` uint8 [n, R, R, 3], `arr_1` int64 [n] labels: ADM's layout), a WebDataset tar (`png`,
    `cls`) or a folder of PNGs by class. grid: a picture of them (of some, where they are many) by class.

    prompts: of a model that takes text, what it drew. Then there is no `arr_1`, a tar holds `png` and `txt`, a folder PNGs
    by number, and the texts lie beside the images in `prompts.json`; the picture has them under the images.
    """

    images: Path
    grid: Path
    loaded: LoadedRun
    settings: Record
    prompts: Prompts | None = None


def sample_run(
    run: Path,
    request: SampleRequest,
    progress: Progress,
    *,
    trunk: Path | None = None,
    prompts: Prompts | None = None,
) -> SampleResult:
    """Draws `request.num` images of a run and writes them with a grid; finished work of an interrupted call is kept.

    Under torchrun all ranks call it together and draw a share each.

    Args:
        trunk: folder in which calls that differ in their guidance alone share what comes before it acts
            (`trainer.sampling.trunk`); the images do not depend on it.
        prompts: what `prompts_for` gave for this request, where it was asked before; else it is asked now.

    Raises:
        UserError: no such run or checkpoint, raw weights that it does not hold, unknown settings, guidance that it cannot
            give, or a folder that holds samples of other settings.
        WeightsUnavailable: the VAE's weights are not to be had.
    """
    device_name = pick_device(request.device)
    arithmetic = choose_arithmetic(device_name, request.precision, request.compile)
    with distributed.joined(device_name) as world:
        device = world.device(device_name)
        loaded = load_run(run, step=request.checkpoint, device=str(device), weights=request.weights)
        for note in loaded.notes if world.is_main else ():
            progress.note(note)
        check_dropout(request, run, loaded.config)
        config = sample_config(request, loaded)
        vae = loaded.decoder(request.weights_dir).to(device)
        if prompts is None:
            prompts = prompts_for(run, loaded.config, request)
        settings: Record = {**config.record(), **_asked_for(request, prompts), **asdict(arithmetic)}
        settings |= {} if request.weights == "ema" else {"weights": request.weights}
        settings |= {} if loaded.stored is None else {"stored": loaded.stored}
        record = {"run": loaded.config.name, "step": loaded.step, **settings}
        name = folder_name(request, loaded.step, config.sampler, arithmetic, loaded.stored, prompts)
        named = files.inside(run, f"samples/{name}")
        folder = request.out or _find_folder(named, record, file_name(request))
        images = files.inside(folder, file_name(request))
        _check_folder(folder, record, images)
        of_classes = _of_classes(request, loaded)
        grid = _grid_path(folder, request.num, images)
        drawn = {**settings, "num": request.num}
        result = SampleResult(images=images, grid=grid, loaded=loaded, settings=drawn, prompts=prompts)
        with _held(grid, images, world) as wanted:
            if not wanted:
                if world.is_main and prompts is not None:
                    restore_prompts(prompts, images.parent)
                return result
            draw = _Draw(
                network=Network(loaded.model, arithmetic),
                vae=vae,
                config=config,
                transport=loaded.transport,
                subjects=of_classes if prompts is None else _of_prompts(request, loaded, prompts, device),
                num=request.num,
                unit=_unit(device, request.batch_size),
                trunk=None if trunk is None else Trunk(trunk, trunk_record(record, device)),
            )
            with applied(arithmetic):
                _draw_to(images, grid, record, draw, world, progress)
        return result


def _asked_for(request: SampleRequest, prompts: Prompts | None) -> Record:
    """What of the record says what the samples are of: of prompts their digest, which decides alone; where they are from is
    in `prompts.json`."""
    return {"classes": str(request.classes)} if prompts is None else {"prompts": prompts.sha256}


def _of_classes(request: SampleRequest, loaded: LoadedRun) -> OfClasses:
    """Raises as `Classes.labels`."""
    whole_blocks = -(-request.num // BLOCK) * BLOCK
    labels = request.classes.labels(whole_blocks, len(loaded.class_names), seed=request.seed)
    return OfClasses(labels=labels, names=loaded.class_names)


def _of_prompts(request: SampleRequest, loaded: LoadedRun, prompts: Prompts, device: torch.device) -> OfPrompts:
    """Raises as `PromptEncoder`."""
    text = loaded.model.cfg.text
    assert text is not None, "prompts are of models that take text"
    encoder = PromptEncoder(
        text.name, loaded.summary["features"].get(text.name, {}), weights_dir=request.weights_dir, device=device
    )
    assert loaded.null is not None, "it is of models that take text"
    return OfPrompts(prompts=prompts, encoder=encoder, null=loaded.null)


def _grid_path(folder: Path, num: int, images: Path) -> Path:
    """Where the picture of the samples is, or is to be. Beside finished samples of earlier versions lies one of others."""
    own, earlier = files.inside(folder, grid_name(num)), files.inside(folder, "grid.png")
    return earlier if earlier.is_file() and _is_there(images) and not own.exists() else own


@contextmanager
def _held(grid: Path, images: Path, world: distributed.World) -> Iterator[bool]:
    """Holds the folder (on the main rank) while anything is to be done in it; whether there is, alike on all ranks.

    Raises:
        UserError: another process draws into it.
    """
    if distributed.from_main(world.is_main and _is_complete(grid, images)):
        yield False
        return
    remedy = (
        "Wait until it has ended: what it has drawn by then is used. Or draw to another folder: trainer sample --out."
    )
    with locks.hold(images.parent, "sampling", remedy=remedy) if world.is_main else nullcontext():
        # It may have become so before we held it.
        yield not distributed.from_main(world.is_main and _is_complete(grid, images))


def _is_complete(grid: Path, images: Path) -> bool:
    """Whether nothing is left to do: a process may have been killed after the images were there."""
    settings = files.inside(images.parent, "settings.json")
    return _is_there(images) and grid.is_file() and settings.is_file() and not _is_pending(images)


def _is_there(images: Path) -> bool:
    return images.is_file() if images.suffix else images.is_dir()


def _is_pending(images: Path) -> bool:
    """Whether blocks for these images are still there, or their folder. They may be for others, of a larger number,
    that were cut off."""
    record = files.inside(images.parent, "blocks/settings.json")
    made_for = runs.read_json(record, {}).get("file")
    return bool(made_for == images.name) or (record.parent.is_dir() and not files.names_in(record.parent))


@dataclass(frozen=True, kw_only=True)
class _Draw:
    """What is to be drawn, and with what. subjects: of whole blocks."""

    network: Network
    vae: LatentDecoder
    config: SampleConfig
    transport: Transport
    subjects: Subjects
    num: int
    unit: int
    trunk: Trunk | None = None


def _unit(device: torch.device, batch_size: int) -> int:
    """Samples computed at once: see the module."""
    if device.type == "cpu":
        return GROUP
    return max(GROUP, min(BLOCK, 1 << (batch_size.bit_length() - 1)))


def _draw_to(
    images: Path, grid: Path, record: Record, draw: _Draw, world: distributed.World, progress: Progress
) -> None:
    """This rank's share of the blocks; then, on the main rank, the files made of all of them."""
    folder = images.parent
    blocks = files.inside(folder, "blocks")
    missing: list[int] = []
    if world.is_main:
        files.remove_parts(folder, of=[images.name, grid.name, "settings.json"])
        _prepare(blocks, record, images.name)
        wanted = set(range(-(-draw.num // BLOCK)))
        if _is_there(images):  # what is missing is the grid alone
            wanted = set() if grid.is_file() else {i // BLOCK for i in draw.subjects.shown(draw.num)}
        missing = [k for k in sorted(wanted) if not _is_whole(blocks, draw.num, k)]
        left = sum(_block_count(draw.num, k) for k in missing)
        progress.begin("sampling", draw.num, done=draw.num - left)
    missing = distributed.from_main(missing)  # one list for all: another rank may be done with a block before we look
    _draw_blocks(blocks, draw, missing[world.rank :: world.size], progress if world.is_main else QUIET, world.size)
    distributed.barrier()
    if world.is_main:
        runs.write_text(
            folder / "settings.json", json.dumps(record, indent=1)
        )  # before what would be taken for others'
        draw.subjects.save(folder)
        if not _is_there(images):
            write = {".npz": _write_npz, ".tar": _write_tar, "": _write_pngs}[images.suffix]
            write(blocks, images, draw.subjects, draw.num)
        if not grid.is_file():
            tiles = {i: _sample(blocks, i) for i in draw.subjects.shown(draw.num)}
            save_png(draw.subjects.picture(tiles, draw.num), grid)
        _remove_blocks(blocks)  # last: what tells that the folder is not complete
    distributed.barrier()


def _draw_blocks(blocks: Path, draw: _Draw, numbers: Sequence[int], progress: Progress, ranks: int) -> None:
    """Draws blocks and saves each when it is full, in a thread beside the drawing of the next."""
    indices = [i for k in numbers for i in range(k * BLOCK, k * BLOCK + _padded(_block_count(draw.num, k), draw.unit))]
    units = draw_units(
        draw.network,
        draw.vae,
        draw.subjects.condition(indices),
        indices,
        draw.config,
        null=draw.subjects.null,
        transport=draw.transport,
        trunk=draw.trunk,
        unit=draw.unit,
    )
    saving: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for k in numbers:
            count = _block_count(draw.num, k)
            parts = []
            for start in range(0, count, draw.unit):
                parts.append(next(units))
                progress.update(min(draw.unit, count - start) * ranks)  # the other ranks are about as far
            if saving is not None:
                saving.result()
            saving = writer.submit(_save_block, _block_path(blocks, k), np.concatenate(parts)[:count])
        if saving is not None:
            saving.result()


def _padded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _block_path(blocks: Path, number: int) -> Path:
    return blocks / f"{number:06d}.npy"


def _block_count(num: int, number: int) -> int:
    return min(BLOCK, num - number * BLOCK)


def _is_whole(blocks: Path, num: int, number: int) -> bool:
    """Whether a block is there with as many samples as it needs: it may come from a call that asked for fewer."""
    path = _block_path(blocks, number)
    try:
        return len(np.load(path, mmap_mode="r", allow_pickle=False)) >= _block_count(num, number)
    except (OSError, ValueError, TypeError, EOFError):  # absent, or damaged: it is drawn again
        return False


def _same(saved: Record, record: Record) -> bool:
    """Whether samples with the record `saved` are those asked for; what an older record does not say is no difference."""
    now, then = _told(runs.as_json(record)), _told(saved)
    return all(now[key] == value for key, value in then.items() if key in now)


def _told(record: Record) -> Record:
    """A record with what it leaves out because there was, or is, nothing to say of it."""
    return {"shift": 1.0, "weights": "ema", "stored": None, **record} if record else {}


def _find_folder(named: Path, record: Record, file: str) -> Path:
    """`named`, or the folder beside it whose record says that it holds the same samples: names have been made by other
    rules, such as intervals as they were typed. Before all comes one that holds `file`.
    """
    if (named / file).exists():
        return named
    found = [named] if named.exists() else []
    for folder in sorted(named.parent.glob(f"step_{record['step']:07d}-*/")):
        if folder.is_symlink():
            continue
        saved: Record = {}
        with suppress(UserError):  # a damaged record says nothing
            unfinished = runs.read_json(files.inside(folder, "blocks/settings.json"), {})
            saved = runs.read_json(folder / "settings.json", unfinished)
        if folder != named and saved.keys() >= record.keys() and _same(saved, record):
            found.append(folder)
    return max(found, key=lambda folder: (folder / file).exists(), default=named)


def _check_folder(folder: Path, record: Record, images: Path) -> None:
    """Refuses a folder with finished samples of other settings: they would be taken for the ones asked for."""
    saved = runs.read_json(folder / "settings.json", {})
    if not saved and images.exists():  # earlier versions wrote the record after the images
        saved = runs.read_json(files.inside(folder, "blocks/settings.json"), {})
    if not _same(saved, record):
        now, then = _told(runs.as_json(record)), _told(saved)
        there, here = flat({key: value for key, value in then.items() if key in now}), flat(now)
        differing = [difference(k, there.get(k), here.get(k)) for k in there | here if there.get(k) != here.get(k)]
        raise UserError(
            f"{folder} holds samples of other settings ({'; '.join(differing)})",
            remedy="Pass another folder with --out, or remove this one.",
        )


def _prepare(blocks: Path, record: Record, file: str) -> None:
    """Keeps blocks of an earlier call only if it drew the same samples; notes that they are for `file`."""
    files.make_directory(blocks)
    saved = runs.read_json(blocks / "settings.json", {})
    if saved and not _same(saved, record):
        _remove_blocks(blocks)
        files.make_directory(blocks)
    files.remove_parts(blocks)
    runs.write_text(blocks / "settings.json", json.dumps({**record, "file": file}))


def _remove_blocks(blocks: Path) -> None:
    """With their record after them. What else lies in their folder is not ours: it stays, and the folder with it."""
    for name in files.names_in(blocks):
        # Under the last of these names, blocks were written by earlier versions.
        if re.fullmatch(r"[0-9]{6,}\.npy|\.[0-9]{6,}\.npy\.partial", name) or files.is_part(name):
            files.remove_file(blocks / name)
    files.remove_file(blocks / "settings.json")
    files.remove_empty_directory(blocks)


def _save_block(path: Path, pixels: np.ndarray) -> None:
    with files.atomic_file(path) as file:
        np.save(file, pixels, allow_pickle=False)


def _block_images(blocks: Path, num: int) -> Iterator[np.ndarray]:
    """The first `num` images, uint8 [b, R, R, 3] per block."""
    for k in range(-(-num // BLOCK)):
        yield np.load(_block_path(blocks, k), mmap_mode="r", allow_pickle=False)[: _block_count(num, k)]


def _sample(blocks: Path, index: int) -> np.ndarray:
    image: np.ndarray = np.load(_block_path(blocks, index // BLOCK), mmap_mode="r", allow_pickle=False)[index % BLOCK]
    return image


def _write_npz(blocks: Path, npz: Path, subjects: Subjects, num: int) -> None:
    """Joins the blocks into an uncompressed npz, one block in memory at a time."""
    shape = next(_block_images(blocks, num)).shape[1:]
    header = {"descr": "|u1", "fortran_order": False, "shape": (num, *shape)}
    with files.atomic_file(npz) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for block in _block_images(blocks, num):
                member.write(block.tobytes())
        for name, array in subjects.arrays(num).items():
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, array, allow_pickle=False)


def _pngs(blocks: Path, num: int) -> Iterator[bytes]:
    for block in _block_images(blocks, num):
        for pixels in block:
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            yield buffer.getvalue()


def _write_tar(blocks: Path, path: Path, subjects: Subjects, num: int) -> None:
    """One WebDataset shard; members carry no time, so equal samples make equal bytes."""
    import webdataset

    with files.atomic_file(path) as stream, webdataset.TarWriter(stream, mtime=0) as tar:
        for i, png in enumerate(_pngs(blocks, num)):
            tar.write({"__key__": f"{i:06d}", "png": png, **subjects.members(i)})


def _write_pngs(blocks: Path, path: Path, subjects: Subjects, num: int) -> None:
    with files.atomic_directory(path) as made:
        for name in sorted({subjects.folder(i) for i in range(num)} - {""}):
            files.make_directory(made / name)
        group = files.Group()
        try:
            for i, png in enumerate(_pngs(blocks, num)):
                group.write(made / subjects.folder(i) / f"{i:06d}.png", [png])
                if len(group) == BLOCK:
                    group.commit()
            group.commit()
        finally:
            group.abandon()
