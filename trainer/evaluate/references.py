"""Activation statistics of an image set: computed, saved with their provenance, loaded, told apart."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from featcache.errors import UserError
from featcache.paths import check_output
from featcache.precision import tensor_float32
from featcache.progress import QUIET, Progress
from featcache.store import files
from trainer.evaluate.extractors import Extractor
from trainer.evaluate.images import (
    CacheImages,
    ImageSet,
    NpzImages,
    check_batch,
    open_images,
    open_npz,
    prefetch,
    read_arrays,
)
from trainer.evaluate.metrics import InceptionScore, Moments
from trainer.runs import locks

if TYPE_CHECKING:
    from trainer.evaluate.shelf import Shelf

# As many reference images as ADM's own batches hold: precision and recall compare all pairs.
DEFAULT_KEPT_FEATURES = 10_000
KEPT_AT_ONCE = 2_048  # rows that wait on the device
KEPT_SEED = 0  # of the draw of those that are kept

_REMAKE = "Make the statistics again: trainer stats"
_STORED = ("mu", "sigma", "mu_s", "sigma_s", "pool", "provenance")


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What is known of one image set through one extractor.

    Attributes:
        mean, covariance: of `pool`, [D] and [D, D], float64, ddof = 1.
        spatial_mean, spatial_covariance: of `spatial`, or None where the extractor has none.
        features: `pool` of all images, or of a fair draw of them, float32 [M, D], for precision, recall and KID; None if
            not kept.
        logits: class logits of all images, float32 [N, K], only where they were asked for.
        inception: accumulated Inception score, or None.
        count: images behind the moments; None if the file does not say (ADM's).
        resolution: side of the images in pixels; None if the file does not say.
        provenance: JSON-able: extractor, source, versions.
    """

    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    features: Tensor | None = None
    spatial_features: Tensor | None = None
    logits: Tensor | None = None
    inception: InceptionScore | None = None
    count: int | None = None
    resolution: int | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def full_precision() -> AbstractContextManager[None]:
    """Float32 that is float32: TF32, on by default in cuDNN, moves FID in the third digit."""
    return tensor_float32(False)


class _Kept:
    """Rows of activations in CPU memory: all, or a fair draw of `limit` of them, in the order in which they came.

    Each row gets a number of a fixed seed, and those with the smallest are kept: a set that is sorted by class gives rows
    of all its classes. Many batches are copied at a time: a copy makes a GPU wait.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit, self._random = limit, np.random.default_rng(KEPT_SEED)
        self._highest = 1.0  # rows from this number on are not among the smallest
        self._pending: list[Tensor] = []  # on the network's device
        self._blocks: list[Tensor] = []
        self._numbers: list[np.ndarray] = []  # of the rows in `_blocks` and `_pending`, where there is a limit
        self._waiting = 0  # rows in `_pending`

    def add(self, x: Tensor) -> None:
        if self._limit == 0:
            return
        if self._limit is not None:
            numbers = self._random.random(len(x))
            small = numbers < self._highest
            if not small.any():
                return
            if not small.all():
                x, numbers = x[_on_device(small.nonzero()[0], x.device)], numbers[small]
            self._numbers.append(numbers)
        self._pending.append(x)
        self._waiting += len(x)
        if self._waiting >= KEPT_AT_ONCE:
            self._fetch()

    def _fetch(self) -> None:
        if self._pending:
            self._blocks.append(torch.cat(self._pending).to("cpu", torch.float32))
            self._pending, self._waiting = [], 0
        if self._limit is not None and sum(map(len, self._numbers)) > self._limit:
            numbers, rows = np.concatenate(self._numbers), torch.cat(self._blocks)
            kept = np.sort(np.argpartition(numbers, self._limit - 1)[: self._limit])
            self._blocks, self._numbers = [rows[torch.from_numpy(kept)]], [numbers[kept]]
            self._highest = float(numbers[kept].max())

    def result(self) -> Tensor | None:
        self._fetch()
        count = sum(map(len, self._blocks))
        if not count:
            return None
        out = torch.empty(count, self._blocks[0].shape[1])
        start = 0
        while self._blocks:  # frees each block once copied: the peak is one copy, not two
            block = self._blocks.pop(0)
            out[start : start + len(block)] = block
            start += len(block)
        return out


def _on_device(indices: np.ndarray, device: torch.device) -> Tensor:
    """Without making a GPU wait for it."""
    rows = torch.from_numpy(indices)
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


def _checked(images: ImageSet, batch_size: int, resolution: int | None, *, pin: bool) -> Iterator[Tensor]:
    """The batches as uint8 [B, R, R, 3], each judged before it is used; pinned, so that their copies need not wait."""
    for batch in images.batches(batch_size):
        resolution = check_batch(batch, resolution, images.description)
        pixels = torch.from_numpy(batch if batch.flags.writeable else batch.copy())
        yield pixels.pin_memory() if pin else pixels


class _Sums:
    """What is added up over batches of activations.

    limit: rows of `pool` to keep, None for all. keep_all: keep all rows of the others, too.
    """

    def __init__(self, extractor: Extractor, limit: int | None, *, keep_all: bool) -> None:
        # Float64 matrix products: on the network's device where it has them (not on Apple's).
        device = torch.device("cpu") if extractor.device.type == "mps" else extractor.device
        dims = extractor.feature_dims
        self._moments = Moments(dims["pool"], device=device)
        self._spatial = Moments(dims["spatial"], device=device) if "spatial" in dims else None
        self._inception = InceptionScore() if "logits" in dims else None
        self._features, self._spatial_features, self._logits = _Kept(limit), _Kept(None), _Kept(None)
        self._keep_all = keep_all

    def add(self, activations: Mapping[str, Tensor | None], start: int) -> None:
        """One batch, of the images from number `start` on."""
        pool, maps, classes = activations["pool"], activations["spatial"], activations["logits"]
        assert pool is not None
        self._moments.update(pool)
        self._features.add(pool)
        if self._spatial is not None and maps is not None:
            self._spatial.update(maps)
            if self._keep_all:
                self._spatial_features.add(maps)
        if self._inception is not None and classes is not None:
            self._inception.update(classes, start)
            if self._keep_all:
                self._logits.add(classes)

    def result(self) -> Statistics:
        """Without count, resolution and provenance."""
        mean, covariance = self._moments.result()
        spatial_mean, spatial_covariance = self._spatial.result() if self._spatial is not None else (None, None)
        return Statistics(
            mean=mean,
            covariance=covariance,
            spatial_mean=spatial_mean,
            spatial_covariance=spatial_covariance,
            features=self._features.result(),
            spatial_features=self._spatial_features.result(),
            logits=self._logits.result(),
            inception=self._inception,
        )


def compute_statistics(
    images: ImageSet,
    extractor: Extractor,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    keep_features: int | None = DEFAULT_KEPT_FEATURES,
    keep_all: bool = False,
    resolution: int | None = None,
    name: str = "features",
    progress: Progress = QUIET,
) -> Statistics:
    """Run the extractor over the images once; memory does not grow with their number, but for what is kept.

    Args:
        images: read in order.
        batch_size: images per forward pass.
        limit: stop after so many images, which of a folder are a fair draw.
        keep_features: `pool` rows kept for precision, recall and KID, a fair draw of all; 0 for none, None for all; 8 KB each
            with Inception.
        keep_all: keep `pool`, `spatial` and `logits` of all images, for bootstrap intervals (20 KB per image).
        resolution: expected side of the images; None takes the first image's.
        name: of the task that `progress` is told of, batch by batch.

    Raises:
        UserError: images that cannot be read, of another size or type, or fewer than two.
    """
    device = extractor.device
    sums = _Sums(extractor, None if keep_all else keep_features, keep_all=keep_all)
    progress.begin(name, images.count if limit is None else min(limit, images.count or limit))
    done = 0
    with full_precision():
        for batch in prefetch(_checked(images, batch_size, resolution, pin=device.type == "cuda")):
            if limit is not None:
                batch = batch[: limit - done]
            resolution = batch.shape[1]
            pixels = batch.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()  # [B, 3, R, R]
            sums.add(extractor.features(pixels), done)
            done += len(batch)
            progress.update(len(batch))
            if limit is not None and done >= limit:
                break
    if done < 2:
        raise UserError(
            f"{images.description} holds {done} images: statistics need at least 2",
            remedy="Pass more images.",
        )
    provenance: dict[str, Any] = {
        "extractor": extractor.provenance,
        "source": images.description,
        "versions": _versions(),
    }
    provenance |= {"drawn": KEPT_SEED, **({"images": images.identity} if isinstance(images, CacheImages) else {})}
    return replace(sums.result(), count=done, resolution=resolution, provenance=provenance)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "timm", "torch-fidelity", "numpy", "pillow")}


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write an npz in ADM's layout (`mu`, `sigma`, `mu_s`, `sigma_s`), plus `pool` and a JSON `provenance`.

    Written whole or not at all. Float64 moments, float32 features.

    Raises:
        UserError: the disk refuses.
    """
    arrays: dict[str, np.ndarray] = {"mu": statistics.mean, "sigma": statistics.covariance}
    if statistics.spatial_mean is not None and statistics.spatial_covariance is not None:
        arrays |= {"mu_s": statistics.spatial_mean, "sigma_s": statistics.spatial_covariance}
    if statistics.features is not None:
        arrays["pool"] = statistics.features.numpy()
    record = {
        "format": 1,
        "count": statistics.count,
        "resolution": statistics.resolution,
        **statistics.provenance,
    }
    arrays["provenance"] = np.frombuffer(json.dumps(record, sort_keys=True).encode(), dtype=np.uint8)
    with locks.alone(path), files.atomic_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_statistics(path: Path) -> Statistics:
    """Read what `save_statistics` wrote, or the moments of an ADM reference npz (whose provenance is empty).

    Raises:
        UserError: not an npz, no moments in it, or arrays of other shapes.
    """
    with open_npz(path) as archive:
        names = {n.removesuffix(".npy") for n in archive.namelist()}
    if not {"mu", "sigma"} <= names:
        raise UserError(
            f"{path} holds no statistics (it has {', '.join(sorted(names))})",
            remedy="Make them: trainer stats IMAGES --out FILE.npz",
        )
    arrays = read_arrays(path, _STORED)
    for name, array in arrays.items():
        if name != "provenance" and (array.dtype.kind != "f" or not np.isfinite(array).all()):
            raise UserError(f"{path}: {name} does not hold finite real numbers", remedy=_REMAKE)
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean not in arrays:
            continue
        length = arrays[mean].shape[0] if arrays[mean].ndim == 1 else -1
        if covariance not in arrays or arrays[covariance].shape != (length, length):
            shape = arrays[covariance].shape if covariance in arrays else "missing"
            raise UserError(f"{path}: {covariance} is {shape}, {mean} {arrays[mean].shape}", remedy=_REMAKE)
        spread = arrays[covariance]
        if (
            not np.allclose(spread, spread.T, rtol=1e-3, atol=1e-6 * np.abs(spread).max(initial=0))
            or (np.diag(spread) < 0).any()
        ):
            raise UserError(f"{path}: {covariance} is no covariance: it is not symmetric, or negative", remedy=_REMAKE)
    if "pool" in arrays and (arrays["pool"].ndim != 2 or arrays["pool"].shape[1:] != arrays["mu"].shape):
        raise UserError(f"{path}: pool is {arrays['pool'].shape}, mu {arrays['mu'].shape}", remedy=_REMAKE)
    record = _provenance(arrays.get("provenance"), path)
    resolution, count = record.pop("resolution", None), record.pop("count", None)
    if resolution is None and "arr_0" in names:
        images = NpzImages(path=path)
        resolution = images.resolution
    record.pop("format", None)
    return Statistics(
        mean=arrays["mu"].astype(np.float64),
        covariance=arrays["sigma"].astype(np.float64),
        spatial_mean=arrays["mu_s"].astype(np.float64) if "mu_s" in arrays else None,
        spatial_covariance=arrays["sigma_s"].astype(np.float64) if "mu_s" in arrays else None,
        features=torch.from_numpy(arrays["pool"].astype(np.float32, copy=False)) if "pool" in arrays else None,
        count=count,
        resolution=resolution,
        provenance=record,
    )


def _provenance(stored: np.ndarray | None, path: Path) -> dict[str, Any]:
    """The JSON beside the arrays, empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    if stored is None:
        return {}
    try:
        record: dict[str, Any] = json.loads(stored.tobytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its provenance is damaged: {error!s:.200}", remedy=_REMAKE) from error
    whole = [record.get(name) for name in ("resolution", "count")] if isinstance(record, dict) else [""]
    known = isinstance(record, dict) and isinstance(record.get("extractor", {}), dict)
    if not known or not all(value is None or (type(value) is int and 0 <= value < 2**53) for value in whole):
        raise UserError(f"{path}: its provenance is not what trainer stats writes", remedy=_REMAKE)
    return record


def write_statistics(
    where: str | Path,
    out: Path,
    extractor: Extractor,
    *,
    resolution: int | None = None,
    crop: str | None = None,
    features: int = DEFAULT_KEPT_FEATURES,
    limit: int | None = None,
    batch_size: int = 64,
    data: str | None = None,
    progress: Progress = QUIET,
) -> Statistics:
    """What `trainer stats` does: images => a file of reference statistics.

    Args:
        where: anything `open_images` opens.
        out: npz file to write.
        resolution: side to which a folder's images are cropped; needed unless they are all of one size.
        crop: how, as a cache's manifest names it; None is ADM's.
        features: activations kept for precision, recall and KID, a fair draw of all.
        limit: stop after so many images, which of a folder are a fair draw.
        batch_size, data, progress: as for `reference_statistics`.

    Raises:
        UserError: as `open_images` and `compute_statistics`; `out` not ending in .npz.
    """
    check_output(out, (".npz",), example="reference.npz")
    images = open_images(where, resolution=resolution, crop=crop, data=data)
    statistics = compute_statistics(
        images,
        extractor,
        batch_size=batch_size,
        limit=limit,
        keep_features=features,
        name="features of the reference",
        progress=progress,
    )
    save_statistics(out, statistics)
    return statistics


def open_reference(
    where: str | Path,
    extractor: Extractor,
    *,
    resolution: int,
    need_features: bool,
    crop: str | None = None,
    data: str | None = None,
) -> tuple[Statistics | None, ImageSet | None]:
    """What `reference_statistics` works with: stored statistics, images, or both (ADM's reference npz).

    Reads no image, so that a wrong reference is found before hours of sampling.

    Raises:
        UserError: as `reference_statistics`, but for images that cannot be read.
    """
    path = Path(where)
    stored = None
    if path.suffix == ".npz" and path.is_file():
        with open_npz(path) as archive:
            names = {n.removesuffix(".npy") for n in archive.namelist()}
        if {"mu", "sigma"} <= names:
            stored = load_statistics(path)
            _check_resolution(stored.resolution, resolution, str(where))
        if stored is not None and "arr_0" not in names:
            _check_extractor(stored, extractor, str(where))
            if need_features and stored.features is None:
                raise UserError(
                    f"{where} holds moments only; precision, recall and KID need activations",
                    remedy="Make the statistics with --features 10000, or leave these metrics out.",
                )
            return stored, None
    images = open_images(where, resolution=resolution, crop=crop, data=data)
    if isinstance(images, NpzImages):
        _check_resolution(images.resolution, resolution, str(where))
    if isinstance(images, CacheImages):
        _check_resolution(images.cache.manifest.dataset.resolution, resolution, str(where))
    return stored, images


def reference_statistics(
    where: str | Path,
    extractor: Extractor,
    *,
    resolution: int,
    need_features: bool,
    batch_size: int = 64,
    crop: str | None = None,
    data: str | None = None,
    shelf: Shelf | None = None,
    progress: Progress = QUIET,
) -> Statistics:
    """Statistics to judge by, from whatever `--reference` names.

    - saved statistics: as they are, if they were made with this extractor;
    - ADM's reference npz: its stored moments for the standard Inception (features from its images); for any
      other extractor everything from its images;
    - images (npz, tar, folder, cache): computed. Folders are brought to `resolution` by a centre crop.

    Args:
        resolution: side of the samples in pixels.
        need_features: precision, recall or KID was asked for.
        crop: of a folder's images, as a cache's manifest names it; None is ADM's.
        data: for a cache, the folder it was built from.
        shelf: where statistics of a cache's images are kept; None computes them.

    Raises:
        UserError: nothing there; made with another extractor; for another resolution; features needed and not kept.
    """
    stored, images = open_reference(
        where, extractor, resolution=resolution, need_features=need_features, crop=crop, data=data
    )
    if images is None:
        assert stored is not None
        return stored
    if stored is not None and extractor.name == "inception" and extractor.is_standard:
        if not need_features:
            return replace(stored, provenance={"source": images.description, **stored.provenance})
        computed = compute_statistics(
            images,
            extractor,
            batch_size=batch_size,
            keep_features=DEFAULT_KEPT_FEATURES,
            resolution=resolution,
            name="features of the reference",
            progress=progress,
        )
        provenance = {**computed.provenance, "moments": "stored in the file"}
        return Statistics(
            mean=stored.mean,
            covariance=stored.covariance,
            spatial_mean=stored.spatial_mean,
            spatial_covariance=stored.spatial_covariance,
            features=computed.features,
            count=None,
            resolution=stored.resolution,
            provenance=provenance,
        )

    def compute(kept: int) -> Statistics:
        return compute_statistics(
            images,
            extractor,
            batch_size=batch_size,
            keep_features=kept,
            resolution=resolution,
            name="features of the reference",
            progress=progress,
        )

    if shelf is not None and isinstance(images, CacheImages):
        # Kept with activations also where these metrics need none: other metrics of the same images will.
        key = images_key(images, extractor, batch_size)
        return shelf.get(key, lambda: compute(DEFAULT_KEPT_FEATURES), progress)
    return compute(DEFAULT_KEPT_FEATURES if need_features else 0)


def images_key(images: CacheImages, extractor: Extractor, batch_size: int) -> dict[str, Any]:
    """All that the bits of a cache's statistics depend on, but for the number of the CPU's threads. JSON-able."""
    dataset = images.cache.manifest.dataset
    slots = images.cache.slots(np.arange(images.count))
    device = extractor.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    content = images.cache.content() if "content" in images.cache.manifest.arrays else np.empty(0)
    return {
        "source": images.description,
        "fingerprint": dataset.fingerprint,
        "order_seed": dataset.order_seed,
        "preprocessing": dict(dataset.preprocessing),
        "content": hashlib.sha256(np.ascontiguousarray(content).tobytes()).hexdigest(),
        "slots": hashlib.sha256(np.ascontiguousarray(slots, "<i8").tobytes()).hexdigest(),
        "extractor": dict(extractor.provenance),
        "kept": [DEFAULT_KEPT_FEATURES, KEPT_SEED],
        "batch_size": batch_size,
        "device": f"{device.type} {name}",
        "versions": _versions(),
    }


def _check_resolution(found: int | None, expected: int, where: str) -> None:
    if found is not None and found != expected:
        raise UserError(
            f"the reference {where} is for images of {found} pixels, the samples have {expected}",
            remedy="Pass a reference of the samples' resolution; resizing either would change FID.",
        )


def _check_extractor(stored: Statistics, extractor: Extractor, where: str) -> None:
    made_with = stored.provenance.get("extractor")
    if made_with is None:
        if extractor.name == "inception" and extractor.is_standard and stored.mean.shape == (2048,):
            return
        raise UserError(
            f"{where} does not say which extractor made it, and holds no images to judge by",
            remedy="Pass images, or statistics made by trainer stats with this extractor.",
        )
    if dict(made_with) != extractor.provenance:
        differing = [k for k in extractor.provenance if made_with.get(k) != extractor.provenance[k]]
        raise UserError(
            f"{where} was made with another extractor than {extractor.name} (differing: {', '.join(differing)})",
            remedy=f"Make it again: trainer stats IMAGES --extractor {extractor.name} --out FILE.npz",
        )
