"""Latents that people already have, as caches: no encoding again, and no pretending about where they come
from.

Three layouts (METHODS of the public code; each states what its numbers are):

- `repa`: a folder of `.npy` `[2C, h, w]` float32, mean then *standard deviation* of SD-VAE's posterior for
  pixels in [-1, 1], with `dataset.json` holding `{"labels": [[file, label], ...]}`; the folder itself or its
  parent with `vae-sd/` in it.
- `edm2`: the same files, folder or `.zip`, but made from pixels in **[0, 1]**. Their posterior is another
  one: the manifest says `pixel_range: [0, 1]`, and a decoder's output is in that range.
- `lightningdit`: a folder of `.safetensors` with `latents` and `latents_flip` `[n, C, h, w]` (one *sample*
  each of the posterior, unscaled; the second mirrored) and `labels` `[n]`; `latents_stats.pt` holds mean and
  std by channel.

What a cache stores is mean and log-variance. A standard deviation converts exactly (up to the codec); a
sample has lost its posterior and is stored as a mean with log-variance -30, so that drawing from it gives
the sample back.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featcache.errors import UserError
from featcache.order import epoch_order
from featcache.store.layout import recommended_shard_size
from featcache.store.manifest import DatasetSpec, FeatureSpec, Manifest
from featcache.store.writer import CacheWriter

LAYOUTS = ("repa", "edm2", "lightningdit")
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' clamp of a posterior's log-variance
_MAX_FILE_BYTES = 64 << 20
_MAX_JSON_BYTES = 1 << 30
_STATS_SAMPLES = 4096


class Latents(Protocol):
    """A source of latents. `read` gives `[views, 2C, h, w]` float32: mean, log-variance."""

    labels: np.ndarray
    views: int
    vae: dict[str, Any]
    provenance: dict[str, Any]

    def __len__(self) -> int: ...
    def key(self, index: int) -> str: ...
    def signature(self, index: int) -> str: ...
    def read(self, index: int) -> np.ndarray: ...


def moments_from_std(values: np.ndarray) -> np.ndarray:
    """`[2C, h, w]` mean and standard deviation => mean and log-variance, clamped as diffusers clamps it."""
    C = len(values) // 2
    with np.errstate(divide="ignore"):
        log_variance = 2 * np.log(np.abs(values[C:].astype(np.float64)))
    clamped = np.clip(log_variance, *LOG_VARIANCE_RANGE)
    return np.concatenate([values[:C], clamped.astype(np.float32)]).astype(np.float32)


def _load_npy(data: bytes, where: str) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{where} is not a .npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise UserError(f"{where} does not hold an array of floating-point numbers")
    return array


class _Files:
    """A folder or a zip archive, read without unpacking."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive: zipfile.ZipFile | None = None
        if path.is_file():
            try:
                self.archive = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is neither a folder nor a zip archive") from error
        elif not path.is_dir():
            raise UserError(f"there is nothing at {path}", remedy="give the folder (or .zip) with the latents")

    def names(self, suffix: str) -> list[str]:
        if self.archive is not None:
            return sorted(name for name in self.archive.namelist() if name.endswith(suffix))
        return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*" + suffix))

    def size(self, name: str) -> int:
        return self.archive.getinfo(name).file_size if self.archive else (self.path / name).stat().st_size

    def read(self, name: str, limit_bytes: int) -> bytes:
        try:
            if self.size(name) > limit_bytes:
                raise UserError(f"{self.path}: {name} is larger than the {limit_bytes} bytes it may have")
            return self.archive.read(name) if self.archive else (self.path / name).read_bytes()
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error})") from error


class _NpyLatents:
    """REPA's and EDM2's layout."""

    views = 1

    def __init__(self, path: Path, layout: str, vae_name: str | None) -> None:
        if (path / "vae-sd").is_dir():
            path = path / "vae-sd"
        self._files = _Files(path)
        self._names = self._files.names(".npy")
        if not self._names:
            raise UserError(f"{path} holds no .npy files", remedy=f"give the folder that --from {layout} means")
        try:
            listed = json.loads(self._files.read("dataset.json", _MAX_JSON_BYTES))["labels"]
            by_name = {str(name): int(label) for name, label in listed}
            self.labels = np.array([by_name[name] for name in self._names], np.int64)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"dataset.json in {path} does not give each .npy file its label ({error!r})") from error
        first = self._values(0)
        if first.ndim != 3 or len(first) % 2:
            raise UserError(f"{path}: {self._names[0]} has shape {first.shape}, not [2C, h, w]")
        self._shape = first.shape
        C = len(first)
        pixel_range = [0, 1] if layout == "edm2" else [-1, 1]
        self.vae = {
            "name": vae_name or "sd-ft-mse",
            "latent_channels": C // 2,
            "scaling_factor": 0.18215,
            "shift_factor": 0.0,
            "downsampling": 8,
            "sha256": "unknown",
            "pixel_range": pixel_range,
        }
        self.provenance = {
            "imported_from": layout,
            "stored_as": "mean and standard deviation, float32",
            "converted_to": "mean and log-variance, clamped to [-30, 20]",
            "pixel_range": pixel_range,
            "encoder": self.vae["name"],
            "weights": "unknown (not recorded by the source)",
        }

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def signature(self, index: int) -> str:
        return str(self._files.size(self._names[index]))

    def _values(self, index: int) -> np.ndarray:
        name = self._names[index]
        return _load_npy(self._files.read(name, _MAX_FILE_BYTES), name)

    def read(self, index: int) -> np.ndarray:
        values = self._values(index)
        if values.shape != self._shape:
            raise UserError(f"{self._names[index]} has shape {values.shape}, the first file {self._shape}")
        return moments_from_std(values)[None]


class _SafetensorsLatents:
    """LightningDiT's layout."""

    views = 2

    def __init__(self, path: Path, layout: str, vae_name: str | None) -> None:
        self._paths = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if not self._paths:
            raise UserError(f"{path} holds no .safetensors files", remedy=f"give the folder that --from {layout} means")
        labels: list[np.ndarray] = []
        self._starts = [0]
        self._shape: list[int] = []
        for file in self._paths:
            with _open_safetensors(file) as tensors:
                missing = {"latents", "latents_flip", "labels"} - set(tensors.keys())
                if missing:
                    raise UserError(f"{file} lacks {', '.join(sorted(missing))}")
                labels.append(tensors.get_tensor("labels").numpy().astype(np.int64).reshape(-1))
                shape = tensors.get_slice("latents").get_shape()
                if len(shape) != 4 or shape != tensors.get_slice("latents_flip").get_shape():
                    raise UserError(f"{file}: latents have shape {shape}, not [n, C, h, w] twice")
                if shape[0] != len(labels[-1]) or (len(labels) > 1 and shape[1:] != self._shape):
                    raise UserError(f"{file} does not fit together with its labels or with the first file")
                self._shape = shape[1:]
            self._starts.append(self._starts[-1] + len(labels[-1]))
        self.labels = np.concatenate(labels)
        mean, std = self._channel_statistics(path)
        self.vae = {
            "name": vae_name or "unknown",
            "latent_channels": self._shape[0],
            # One number for all channels (root mean square of the channels' std): the exact ones are beside
            # it.
            "scaling_factor": float(1 / np.sqrt(np.mean(std**2))),
            "shift_factor": float(np.mean(mean)),
            "downsampling": 16,
            "sha256": "unknown",
            "pixel_range": [-1, 1],
            "channel_mean": [float(x) for x in mean],
            "channel_std": [float(x) for x in std],
        }
        self.provenance = {
            "imported_from": layout,
            "stored_as": "one sample of the posterior, unscaled; view 1 = of the mirrored image",
            "converted_to": "mean = the sample, log-variance = -30: the posterior is lost",
            "sampled": True,
            "pixel_range": [-1, 1],
            "encoder": self.vae["name"],
            "weights": "unknown (not recorded by the source)",
        }

    def __len__(self) -> int:
        return len(self.labels)

    def _place(self, index: int) -> tuple[Path, int]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._paths[file], index - self._starts[file]

    def key(self, index: int) -> str:
        path, row = self._place(index)
        return f"{path.name}:{row}"

    def signature(self, index: int) -> str:
        path, _ = self._place(index)
        return str(path.stat().st_size)

    def read(self, index: int) -> np.ndarray:
        path, row = self._place(index)
        tensors = _cached_safetensors(path)
        means = [tensors.get_slice(name)[row : row + 1].float().numpy() for name in ("latents", "latents_flip")]
        mean = np.concatenate(means)  # [2, C, h, w]
        return np.concatenate([mean, np.full_like(mean, LOG_VARIANCE_RANGE[0])], axis=1)

    def _channel_statistics(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std by channel (float64 `[C]`): from the statistics file, else of the first samples."""
        stats = path / "latents_stats.pt"
        if stats.is_file():
            import torch

            try:
                found = torch.load(stats, map_location="cpu", weights_only=True)
                mean, std = (found[name].double().numpy().reshape(-1) for name in ("mean", "std"))
            except Exception as error:  # torch raises many kinds for a malformed file
                raise UserError(f"{stats} cannot be read: {error!s:.200}") from error
            if len(mean) != self._shape[0] or len(std) != self._shape[0] or not (std > 0).all():
                raise UserError(f"{stats} is for {len(mean)} channels, the latents have {self._shape[0]}")
            return mean, std
        pick = epoch_order(0, 0, len(self))[: min(len(self), _STATS_SAMPLES)]
        C = self._shape[0]
        values = np.stack([self.read(int(i))[0, :C] for i in np.sort(pick)]).astype(np.float64)
        return values.mean(axis=(0, 2, 3)), values.std(axis=(0, 2, 3))


def _open_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error


@lru_cache(maxsize=8)
def _cached_safetensors(path: Path) -> Any:
    return _open_safetensors(path).__enter__()


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What `featcache import` was asked for.

    layout: one of `LAYOUTS`. codec: of the moments. vae: name of the VAE that made the latents, where it is
    not the layout's usual one. order_seed: of the permutation of samples.
    """

    source: Path
    out: Path
    layout: str
    codec: str = "fp16"
    vae: str | None = None
    name: str | None = None
    class_names: tuple[str, ...] | None = None
    order_seed: int = 0
    shard_size: int | None = None


def import_latents(request: ImportRequest, progress: Callable[[int], None] | None = None) -> Manifest:
    """Turn latents of another project into a cache with `label`, `key` and `vae/moments`; returns its
    manifest.

    Resumable by shard. `progress` is called with the number of samples of each finished shard. The images
    themselves are unknown: the fingerprint is over the latents' names, labels and sizes, so features of
    images cannot be added.

    Raises `UserError` for an unknown layout or files that do not follow it.
    """
    from featcache.codecs import encode, numpy_view

    if request.layout not in LAYOUTS:
        raise UserError(f"there is no layout {request.layout!r}", remedy=f"use one of {', '.join(LAYOUTS)}")
    make = _SafetensorsLatents if request.layout == "lightningdit" else _NpyLatents
    latents: Latents = make(Path(request.source), request.layout, request.vae)
    n, views = len(latents), latents.views
    sample = latents.read(0)
    _, channels, h, w = sample.shape
    n_classes = int(latents.labels.max()) + 1
    if latents.labels.min() < 0:
        raise UserError(f"{request.source}: a label is negative ({latents.labels.min()})")
    class_names = request.class_names or tuple(str(i) for i in range(n_classes))
    if len(class_names) < n_classes:
        raise UserError(f"there are {n_classes} classes, but only {len(class_names)} names")
    digest = hashlib.sha256(request.layout.encode())
    for i in range(n):
        digest.update(f"{latents.key(i)}\0{latents.labels[i]}\0{latents.signature(i)}\n".encode())
    dataset = DatasetSpec(
        name=request.name or Path(request.source).name,
        count=n,
        class_names=class_names,
        fingerprint=digest.hexdigest(),
        preprocessing={
            "resolution": h * latents.vae["downsampling"],
            "crop": "unknown (imported)",
            "decode": "unknown (imported)",
            "available": n,
            "imported_from": request.layout,
        },
        order_seed=request.order_seed,
        flip=views == 2,
        source=f"{request.layout} latents",
        vae=latents.vae,
        grid=max(1, h * latents.vae["downsampling"] // 16),
    )
    key_bytes = max(len(latents.key(i).encode()) for i in range(n))
    provenance = {"imported_from": request.layout}
    specs = [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64", provenance=provenance),
        FeatureSpec(name="key", shape=(key_bytes,), codec="raw", dtype="uint8", provenance=provenance),
        FeatureSpec(
            name="vae/moments",
            shape=(channels, h, w),
            codec=request.codec,
            views=views,
            provenance=latents.provenance,
        ),
    ]
    shard_size = request.shard_size or min(n, recommended_shard_size(specs[2].bytes_per_sample))
    order = epoch_order(request.order_seed, 0, n)
    with CacheWriter.create(request.out, dataset, shard_size=shard_size) as writer:
        writer.begin(specs)
        for shard in writer.pending():
            indices = [order[slot] for slot in writer.slots(shard)]
            keys = np.zeros((len(indices), key_bytes), np.uint8)
            for row, index in enumerate(indices):
                key = latents.key(index).encode()
                keys[row, : len(key)] = np.frombuffer(key, np.uint8)
            moments = np.stack([latents.read(index) for index in indices])  # [n, views, 2C, h, w]
            stored = _encode(moments if views > 1 else moments[:, 0], request.codec, encode, numpy_view)
            writer.write_shard("label", shard, {"": latents.labels[indices]})
            writer.write_shard("key", shard, {"": keys})
            writer.write_shard("vae/moments", shard, stored)
            if progress is not None:
                progress(len(indices))
        return writer.finish()


def _encode(values: np.ndarray, codec: str, encode: Callable, numpy_view: Callable) -> dict[str, np.ndarray]:
    import torch

    if not np.isfinite(values).all():
        raise UserError("the latents hold values that are not finite")
    return {suffix: numpy_view(tensor) for suffix, tensor in encode(codec, torch.from_numpy(values)).items()}
