"""Latents that other projects store in files of their own: REPA's, EDM2's and LightningDiT's. See `featcache.share.importers`."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open

from featcache.errors import UserError, first_line
from featcache.read.order import epoch_order
from featcache.share.exported import MARKER, Exported, read_exported
from featcache.sources.opening import Unreadable, explained, file_size, read_file
from featcache.store.manifest import UNKNOWN

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' clamp of a posterior's log-variance
MAX_FILE_BYTES = 64 << 20
MAX_JSON_BYTES = 256 << 20
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


class Files:
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


class NpyLatents:
    """REPA's and EDM2's layout."""

    views = 1

    def __init__(self, path: Path, layout: str, vae_name: str | None) -> None:
        if (path / "vae-sd").is_dir():
            path = path / "vae-sd"
        self._files = Files(path)
        self._names = self._files.names(".npy")
        if not self._names:
            raise UserError(f"{path} holds no .npy files", remedy=f"give the folder that --from {layout} means")
        data = self._files.read("dataset.json", MAX_JSON_BYTES)
        self.labels = listed_labels(data, self._names, path)
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
        self.provenance = from_std(layout, self.vae)

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index] if self.exported is None else self.exported.keys[index]

    def signature(self, index: int) -> str:
        return str(self._files.size(self._names[index]))

    def _values(self, index: int) -> np.ndarray:
        name = self._names[index]
        values = parse_npy(self._files.read(name, MAX_FILE_BYTES), name)
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


class SafetensorsLatents:
    """LightningDiT's layout."""

    views = 2

    def __init__(self, path: Path, layout: str, vae_name: str | None) -> None:
        self._paths = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if not self._paths:
            raise UserError(f"{path} holds no .safetensors files", remedy=f"give the folder that --from {layout} means")
        for file in self._paths:
            check_inside(path, file)
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
            labels.append(checked_labels(found.reshape(-1).tolist(), file))
            if len(labels) > 1 and shape[1:] != self._shape:
                raise UserError(f"{file} does not fit together with the first file", remedy="Bring files of one set.")
            self._shape = shape[1:]
            self._starts.append(self._starts[-1] + len(labels[-1]))
        self.labels = np.concatenate(labels)
        stats = path / "latents_stats.pt"
        if stats.is_file():
            check_inside(path, stats)
            mean, std = read_statistics(stats, self._shape[0])
        else:
            mean, std = channel_statistics(self, path)
        self.exported = _exported(Files(path), path, layout, len(self.labels))
        self.vae = _described(self.exported, vae_name) or described_by_channel(mean, std, vae_name, downsampling=16)
        self.vae |= by_channel(mean, std)
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


def listed_labels(data: bytes, names: Sequence[str], path: Path) -> np.ndarray:
    """The labels (int64) of files in a `dataset.json`, in the order of `names`. Raises `UserError` unless it lists just
    these."""
    with explained(
        f"dataset.json in {path}",
        'It must hold {"labels": [[file, number], ...]}.',
        wrong="does not give each .npy file its label",
    ):
        labels = json.loads(data)["labels"]
        by_name = dict(labels)
        if len(by_name) != len(labels):
            raise ValueError("a file is listed twice")
        found = [by_name[name] for name in names]
        wrong = [label for label in found if type(label) is not int]
        if wrong:
            raise ValueError(f"{wrong[0]!r:.40} is no integer")
    if gone := sorted(set(by_name) - set(names)):
        raise UserError(
            f"{path}: dataset.json lists {len(gone)} files that are not there, such as {gone[0]!r:.200}",
            remedy="Bring the folder again, as a whole, or take them out of dataset.json.",
        )
    return checked_labels(found, path)


def from_std(layout: str, vae: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance of moments that were mean and standard deviation."""
    return {
        "imported_from": layout,
        "stored_as": "mean and standard deviation, float32",
        "converted_to": "mean and log-variance, clamped to [-30, 20]",
        "pixel_range": vae.get("pixel_range") or [-1, 1],
        "encoder": vae["name"],
        "weights": "unknown (not recorded by the source)",
    }


def _exported(found: Files, path: Path, layout: str, count: int) -> Exported | None:
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


def check_inside(folder: Path, file: Path) -> None:
    if not file.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file} is a link that leads out of the folder", remedy="Bring the folder again, as a whole.")


def checked_labels(labels: Sequence[int], where: Path) -> np.ndarray:
    """Labels as int64. Raises `UserError` for one that no class has."""
    wrong = next((label for label in labels if not 0 <= label < _MAX_CLASSES), None)
    if wrong is not None:
        raise UserError(
            f"{where}: a label is {wrong!s:.20}, but classes are numbered from 0 to {_MAX_CLASSES - 1:,}",
            remedy="Number the classes from 0.",
        )
    return np.array(labels, np.int64)


def read_statistics(file: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std by channel (float64 `[C]`) of a statistics file: LightningDiT's `mean` and `std`, or REPA-E's
    `latents_bias` and `latents_scale`, one over the std. Raises `UserError`."""
    with explained(str(file), "Bring it again, or remove it.", wrong="cannot be read"):
        try:
            data = read_file(file, _MAX_STATS_BYTES)
        except Unreadable as error:
            raise ValueError(str(error)) from error
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        inverse = "latents_scale" in found
        names = ("latents_bias", "latents_scale") if inverse else ("mean", "std")
        mean, std = (found[name].double().numpy().reshape(-1) for name in names)
        if inverse:
            with np.errstate(divide="ignore"):
                std = 1 / std
    if len(mean) != channels or len(std) != channels or not ((std > 0) & np.isfinite(std) & np.isfinite(mean)).all():
        raise UserError(
            f"{file} is for {len(mean)} channels, the latents have {channels}; or it holds a standard "
            "deviation of zero or less",
            remedy="Remove it: the statistics are then taken from the latents.",
        )
    return mean, std


def channel_statistics(latents: Latents, where: Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std by channel (float64 `[C]`) of samples of the first latents' posteriors. Raises `UserError`."""
    pick = epoch_order(0, 0, len(latents))[: min(len(latents), _STATS_SAMPLES)]
    moments = np.stack([latents.read(int(i))[0] for i in np.sort(pick)]).astype(np.float64)
    means, log_variances = np.split(moments, 2, axis=1)
    if not np.isfinite(means).all() or means.min() == means.max():
        raise UserError(
            f"{where}: the latents hold values that are not finite, or are all the same",
            remedy="Make the latents again.",
        )
    noise = np.where(log_variances > LOG_VARIANCE_RANGE[0], np.exp(log_variances), 0)
    axes = (0, 2, 3)
    return means.mean(axes), np.sqrt(means.var(axes) + noise.mean(axes))


def by_channel(mean: np.ndarray, std: np.ndarray) -> dict[str, Any]:
    """Statistics as a manifest's `dataset.vae` has them."""
    return {"channel_mean": [float(x) for x in mean], "channel_std": [float(x) for x in std]}


def described_by_channel(mean: np.ndarray, std: np.ndarray, name: str | None, *, downsampling: int) -> dict[str, Any]:
    """A manifest's `dataset.vae` of latents of which the statistics are known."""
    return {
        "name": name or UNKNOWN,
        "latent_channels": len(mean),
        # One number for all channels (root mean square of the channels' std): the exact ones are beside it.
        "scaling_factor": float(1 / np.sqrt(np.mean(std**2))),
        "shift_factor": float(np.mean(mean)),
        "downsampling": downsampling,
        "sha256": UNKNOWN,
        "pixel_range": [-1, 1],
        **by_channel(mean, std),
    }
