"""Latents that people already have, as caches: no encoding again, and no pretending about where they come from.

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

An export of `featcache.share.exporters` brings its keys, class names and VAE along (`featcache.share.exported`).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open

from featcache.codecs import encode, numpy_view
from featcache.errors import UserError, first_line
from featcache.keys import key_bytes, printable
from featcache.progress import QUIET, Progress
from featcache.read.order import epoch_order
from featcache.share.exported import MARKER, Exported, read_exported
from featcache.sources.opening import Unreadable, explained, file_size, read_file
from featcache.store.layout import recommended_shard_size
from featcache.store.manifest import UNKNOWN, DatasetSpec, FeatureSpec, Manifest
from featcache.store.writers import create_writer

LAYOUTS = ("repa", "edm2", "lightningdit")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' clamp of a posterior's log-variance
_MAX_FILE_BYTES = 64 << 20
_MAX_JSON_BYTES = 256 << 20
_MAX_STATS_BYTES = 256 << 10
_MAX_CLASSES = 1 << 20  # as many as a manifest names
_STATS_SAMPLES = 4096


class Latents(Protocol):
    """A source of latents. `read` gives `[views, 2C, h, w]` float32: mean, log-variance."""

    labels: np.ndarray
    views: int
    vae: dict[str, Any]
    provenance: dict[str, Any]
    exported: Exported | None

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


def parse_npy(data: bytes, where: str) -> np.ndarray:
    """The array of a `.npy` file in memory, which must hold as many bytes as its header claims; never an object.

    Raises `UserError` if it is something else.
    """
    file = io.BytesIO(data)
    with explained(where, "Make the file again.", wrong="is not a .npy file"):
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        count = (len(data) - file.tell()) // max(1, dtype.itemsize)
        # In Python's integers, which do not overflow.
        if math.prod(shape) != count or count * dtype.itemsize != len(data) - file.tell():
            raise ValueError(f"its header claims {shape} of {dtype}, but {len(data) - file.tell()} bytes follow")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


class _Files:
    """A folder or a zip archive that somebody made, read without unpacking. Links may not lead out of the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive: zipfile.ZipFile | None = None
        if path.is_file():
            with explained(
                str(path), "Give the folder (or .zip) with the latents.", wrong="is not a whole zip archive"
            ):
                self.archive = zipfile.ZipFile(path)
        elif not path.is_dir():
            raise UserError(f"there is nothing at {path}", remedy="Give the folder (or .zip) with the latents.")
        self._root = path.resolve()

    def names(self, suffix: str) -> list[str]:
        """Files of that suffix, sorted, in all folders that are no links."""
        if self.archive is not None:
            found = sorted(name for name in self.archive.namelist() if name.endswith(suffix))
            if twice := next((a for a, b in itertools.pairwise(found) if a == b), None):
                raise UserError(f"{self.path} holds two files {twice!r:.200}", remedy="Pack it again.")
            return found

        def refuse(error: OSError) -> None:
            raise UserError(f"{self.path}: {first_line(error)}", remedy="Check the folder's permissions.") from error

        return sorted(
            (Path(folder).relative_to(self.path) / name).as_posix()
            for folder, _, names in os.walk(self.path, onerror=refuse)
            for name in names
            if name.endswith(suffix)
        )

    def size(self, name: str) -> int:
        """Bytes of a file. Raises `UserError` if it is missing or no file."""
        if self.archive is not None:
            try:
                return self.archive.getinfo(name).file_size
            except KeyError as error:
                raise self._unreadable(name, "there is no such member") from error
        try:
            return file_size(self._inside(name))
        except Unreadable as error:
            raise self._unreadable(name, str(error)) from error

    def __contains__(self, name: str) -> bool:
        if self.archive is not None:
            return name in self.archive.NameToInfo
        return os.path.lexists(self.path / name)

    def read(self, name: str, limit_bytes: int) -> bytes:
        """The bytes of a file. Raises `UserError` if it is missing, no file, damaged, or larger than `limit_bytes`."""
        if self.size(name) > limit_bytes:
            raise self._unreadable(name, f"it has more than the {limit_bytes} bytes it may have")
        if self.archive is not None:
            if self.archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise self._unreadable(name, "it is packed by an unusual method")
            with explained(f"{self.path}: {name}", "Bring it again.", wrong="cannot be read"):
                return self.archive.read(name)
        try:
            return read_file(self._inside(name), limit_bytes)
        except Unreadable as error:
            raise self._unreadable(name, str(error)) from error

    def _inside(self, name: str) -> Path:
        path = self.path / name
        if not path.resolve().is_relative_to(self._root):
            raise self._unreadable(name, "it is a link that leads out of the folder")
        return path

    def _unreadable(self, name: str, why: str) -> UserError:
        return UserError(f"{self.path}: {name} cannot be read: {why}", remedy="Bring the folder again, as a whole.")


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
        data = self._files.read("dataset.json", _MAX_JSON_BYTES)
        with explained(
            f"dataset.json in {path}",
            'It must hold {"labels": [[file, number], ...]}.',
            wrong="does not give each .npy file its label",
        ):
            labels = json.loads(data)["labels"]
            by_name = dict(labels)
            if len(by_name) != len(labels):
                raise ValueError("a file is listed twice")
            found = [by_name[name] for name in self._names]
            wrong = [label for label in found if type(label) is not int]
            if wrong:
                raise ValueError(f"{wrong[0]!r:.40} is no integer")
        if gone := sorted(set(by_name) - set(self._names)):
            raise UserError(
                f"{path}: dataset.json lists {len(gone)} files that are not there, such as {gone[0]!r:.200}",
                remedy="Bring the folder again, as a whole, or take them out of dataset.json.",
            )
        self.labels = _checked_labels(found, path)
        first = self._values(0)
        if first.ndim != 3 or len(first) % 2 or not first.size:
            raise UserError(f"{path}: {self._names[0]} has shape {first.shape}, not [2C, h, w]")
        self._shape = first.shape
        C = len(first)
        self.exported = _exported(self._files, path, layout, len(self._names))
        pixel_range = [0, 1] if layout == "edm2" else [-1, 1]
        self.vae = _described(self.exported, vae_name) or {
            "name": vae_name or "sd-ft-mse",
            "latent_channels": C // 2,
            "scaling_factor": 0.18215,
            "shift_factor": 0.0,
            "downsampling": 8,
            "sha256": UNKNOWN,
            "pixel_range": pixel_range,
        }
        self.provenance = {
            "imported_from": layout,
            "stored_as": "mean and standard deviation, float32",
            "converted_to": "mean and log-variance, clamped to [-30, 20]",
            "pixel_range": self.vae.get("pixel_range") or [-1, 1],
            "encoder": self.vae["name"],
            "weights": "unknown (not recorded by the source)",
        }

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index] if self.exported is None else self.exported.keys[index]

    def signature(self, index: int) -> str:
        return str(self._files.size(self._names[index]))

    def _values(self, index: int) -> np.ndarray:
        name = self._names[index]
        values = parse_npy(self._files.read(name, _MAX_FILE_BYTES), name)
        if values.dtype.kind != "f":
            raise UserError(
                f"{name} holds {values.dtype}, no floating-point numbers", remedy="Store the latents as float32."
            )
        return values

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
        for file in self._paths:
            _check_inside(path, file)
        labels: list[np.ndarray] = []
        self._starts = [0]
        self._shape: list[int] = []
        for file in self._paths:
            # Numbers only come out of here; whatever is wrong with the file, the library says.
            with explained(str(file), "Bring the file again.", wrong="is not a safetensors file of latents"):
                tensors = _open_safetensors(file)
                missing = {"latents", "latents_flip", "labels"} - set(tensors.keys())
                if missing:
                    raise UserError(f"{file} lacks {', '.join(sorted(missing))}", remedy="Bring the file again.")
                shape = tensors.get_slice("latents").get_shape()
                flipped, count = tensors.get_slice("latents_flip").get_shape(), tensors.get_slice("labels").get_shape()
                kinds = {tensors.get_slice(name).get_dtype() for name in ("latents", "latents_flip")}
                found = tensors.get_tensor("labels")
            if len(shape) != 4 or 0 in shape or shape != flipped or not kinds <= _FLOATS:
                raise UserError(
                    f"{file}: latents are {shape} and {flipped} of {', '.join(sorted(kinds))}, not [n, C, h, w] twice "
                    "of floating-point numbers",
                    remedy="Bring the file again.",
                )
            if count not in ([shape[0]], [shape[0], 1]) or found.is_floating_point() or found.is_complex():
                raise UserError(
                    f"{file}: labels are {count} of {found.dtype}, not {shape[0]} integers", remedy="Bring it again."
                )
            labels.append(_checked_labels(found.reshape(-1).tolist(), file))
            if len(labels) > 1 and shape[1:] != self._shape:
                raise UserError(f"{file} does not fit together with the first file", remedy="Bring files of one set.")
            self._shape = shape[1:]
            self._starts.append(self._starts[-1] + len(labels[-1]))
        self.labels = np.concatenate(labels)
        mean, std = self._channel_statistics(path)
        self.exported = _exported(_Files(path), path, layout, len(self.labels))
        self.vae = _described(self.exported, vae_name) or {
            "name": vae_name or UNKNOWN,
            "latent_channels": self._shape[0],
            # One number for all channels (root mean square of the channels' std): the exact ones are beside it.
            "scaling_factor": float(1 / np.sqrt(np.mean(std**2))),
            "shift_factor": float(np.mean(mean)),
            "downsampling": 16,
            "sha256": UNKNOWN,
            "pixel_range": [-1, 1],
        }
        self.vae |= {"channel_mean": [float(x) for x in mean], "channel_std": [float(x) for x in std]}
        self.provenance = {
            "imported_from": layout,
            "stored_as": "one sample of the posterior, unscaled; view 1 = of the mirrored image",
            "converted_to": "mean = the sample, log-variance = -30: the posterior is lost",
            "sampled": True,
            "pixel_range": self.vae.get("pixel_range") or [-1, 1],
            "encoder": self.vae["name"],
            "weights": "unknown (not recorded by the source)",
        }

    def __len__(self) -> int:
        return len(self.labels)

    def _place(self, index: int) -> tuple[Path, int]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._paths[file], index - self._starts[file]

    def key(self, index: int) -> str:
        if self.exported is not None:
            return self.exported.keys[index]
        path, row = self._place(index)
        return f"{path.name}:{row}"

    def signature(self, index: int) -> str:
        path, _ = self._place(index)
        return str(path.stat().st_size)

    def read(self, index: int) -> np.ndarray:
        path, row = self._place(index)
        with explained(str(path), "Bring the file again."):
            tensors = _cached_safetensors(path)
            means = [tensors.get_slice(name)[row : row + 1].float().numpy() for name in ("latents", "latents_flip")]
        mean = np.concatenate(means)  # [2, C, h, w]
        return np.concatenate([mean, np.full_like(mean, LOG_VARIANCE_RANGE[0])], axis=1)

    def _channel_statistics(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std by channel (float64 `[C]`): from the statistics file, else of the first samples."""
        stats = path / "latents_stats.pt"
        if stats.is_file():
            _check_inside(path, stats)
            with explained(str(stats), "Bring it again, or remove it.", wrong="cannot be read"):
                try:
                    data = read_file(stats, _MAX_STATS_BYTES)
                except Unreadable as error:
                    raise ValueError(str(error)) from error
                found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                mean, std = (found[name].double().numpy().reshape(-1) for name in ("mean", "std"))
            if len(mean) != self._shape[0] or len(std) != self._shape[0] or not ((std > 0) & np.isfinite(mean)).all():
                raise UserError(
                    f"{stats} is for {len(mean)} channels, the latents have {self._shape[0]}; or it holds a standard "
                    "deviation of zero or less",
                    remedy="Remove it: the statistics are then taken from the latents.",
                )
            return mean, std
        pick = epoch_order(0, 0, len(self))[: min(len(self), _STATS_SAMPLES)]
        C = self._shape[0]
        values = np.stack([self.read(int(i))[0, :C] for i in np.sort(pick)]).astype(np.float64)
        if not np.isfinite(values).all() or values.min() == values.max():
            raise UserError(
                f"{path}: the latents hold values that are not finite, or are all the same",
                remedy="Make the latents again.",
            )
        return values.mean(axis=(0, 2, 3)), values.std(axis=(0, 2, 3))


def _exported(found: _Files, path: Path, layout: str, count: int) -> Exported | None:
    """What an export of ours says of itself; None for files that are somebody else's. Raises `UserError`."""
    return read_exported(found.read, path, layout, count) if MARKER in found else None


def _described(exported: Exported | None, vae_name: str | None) -> dict[str, Any] | None:
    """The VAE of an export, by its own name or another one."""
    return None if exported is None else exported.vae | ({"name": vae_name} if vae_name else {})


def _open_safetensors(path: Path) -> safe_open:
    file_size(path)  # a FIFO would be waited for
    return safe_open(path, framework="pt")


@lru_cache(maxsize=8)
def _cached_safetensors(path: Path) -> safe_open:
    return _open_safetensors(path)


def _check_inside(folder: Path, file: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file} is a link that leads out of the folder", remedy="Bring the folder again, as a whole.")


def _checked_labels(labels: Sequence[int], where: Path) -> np.ndarray:
    """Labels as int64. Raises `UserError` for one that no class has."""
    wrong = next((label for label in labels if not 0 <= label < _MAX_CLASSES), None)
    if wrong is not None:
        raise UserError(
            f"{where}: a label is {wrong!s:.20}, but classes are numbered from 0 to {_MAX_CLASSES - 1:,}",
            remedy="Number the classes from 0.",
        )
    return np.array(labels, np.int64)


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


def open_latents(path: Path, layout: str, *, vae: str | None = None) -> Latents:
    """The latents at `path`; raises `UserError` for an unknown layout or files that do not follow it."""
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}", remedy=f"use one of {', '.join(LAYOUTS)}")
    return _SafetensorsLatents(path, layout, vae) if layout == "lightningdit" else _NpyLatents(path, layout, vae)


def import_latents(request: ImportRequest, progress: Progress = QUIET) -> Manifest:
    """Turn latents of another project into a cache with `label`, `key` and `vae/moments`; returns its manifest.

    Resumable by shard; `progress` advances with each finished one. The images
    themselves are unknown: the fingerprint is over the latents' names, labels and sizes, so features of
    images cannot be added.

    Raises `UserError` for an unknown layout or files that do not follow it.
    """
    latents = open_latents(Path(request.source), request.layout, vae=request.vae)
    n, views = len(latents), latents.views
    sample = latents.read(0)
    _, channels, h, w = sample.shape
    n_classes = int(latents.labels.max()) + 1
    exported = latents.exported
    class_names = request.class_names or (exported and exported.class_names) or tuple(str(i) for i in range(n_classes))
    if len(class_names) < n_classes:
        raise UserError(f"there are {n_classes} classes, but only {len(class_names)} names")
    digest = hashlib.sha256(request.layout.encode())
    for i in range(n):
        digest.update(key_bytes(f"{latents.key(i)}\0{latents.labels[i]}\0{latents.signature(i)}\n"))
    dataset = DatasetSpec(
        name=printable(request.name or (exported.name if exported else Path(request.source).name)),
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
    longest = max(len(key_bytes(latents.key(i))) for i in range(n))
    provenance = {"imported_from": request.layout} | ({"cache": exported.fingerprint} if exported else {})
    specs = [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64", provenance=provenance),
        FeatureSpec(name="key", shape=(longest,), codec="raw", dtype="uint8", provenance=provenance),
        FeatureSpec(
            name="vae/moments",
            shape=(channels, h, w),
            codec=request.codec,
            views=views,
            provenance=latents.provenance | provenance,
        ),
    ]
    shard_size = request.shard_size or min(n, recommended_shard_size(specs[2].bytes_per_sample))
    order = epoch_order(request.order_seed, 0, n)
    with create_writer(request.out, dataset, shard_size=shard_size) as writer:
        writer.begin(specs)
        pending = writer.pending()
        progress.begin("importing", n, done=n - sum(len(writer.slots(s)) for s in pending), unit="samples")
        for shard in pending:
            indices = [order[slot] for slot in writer.slots(shard)]
            keys = np.zeros((len(indices), longest), np.uint8)
            for row, index in enumerate(indices):
                key = key_bytes(latents.key(index))
                keys[row, : len(key)] = np.frombuffer(key, np.uint8)
            moments = np.stack([latents.read(index) for index in indices])  # [n, views, 2C, h, w]
            stored = _encode(moments if views > 1 else moments[:, 0], request.codec)
            writer.write_shard("label", shard, {"": latents.labels[indices]})
            writer.write_shard("key", shard, {"": keys})
            writer.write_shard("vae/moments", shard, stored)
            progress.update(len(indices))
        return writer.finish()


def _encode(values: np.ndarray, codec: str) -> dict[str, np.ndarray]:
    if not np.isfinite(values).all():
        raise UserError("the latents hold values that are not finite", remedy="Make the latents again.")
    return {suffix: numpy_view(tensor) for suffix, tensor in encode(codec, torch.from_numpy(values)).items()}
