"""How exports are written: samples in an order, and the layouts of REPA, EDM2 and LightningDiT."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch

from featcache.errors import CacheError
from featcache.read.decoded import Decoder
from featcache.read.order import epoch_order
from featcache.read.reader import Cache
from featcache.share.exported import KEYS, keys_json
from featcache.share.latents import LOG_VARIANCE_RANGE
from featcache.store import files

MOMENTS = "vae/moments"
_BATCH = 32
_FOLDER = 1000  # samples in one folder of .npy files: what five of eight digits number
_SHARD = 10_000  # samples in one .safetensors file, as LightningDiT writes them
_STATS_SAMPLES = 10_000  # as many as LightningDiT takes


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an export that is written at once: its name in the folder, and which rows of the export it holds."""

    name: str
    rows: range


class Layout(Protocol):
    """How one layout is written."""

    def pieces(self) -> list[Piece]: ...
    def write(self, path: Path, piece: Piece) -> None:
        """Puts the piece at `path`, at once and whole."""

    def is_whole(self, path: Path, piece: Piece) -> bool:
        """Whether what an earlier run put at `path` is all of the piece."""

    def finish(self, folder: Path) -> None:
        """Writes what says of all pieces what they are."""


class Samples:
    """A cache's samples in an export's order, decoded.

    order: sample index of each row. views: those that are read; both of them are an axis of each feature.
    """

    def __init__(self, cache: Cache, names: Sequence[str], order: np.ndarray, views: tuple[int, ...]) -> None:
        self.cache, self.names, self.order, self.views = cache, tuple(names), order, views
        self._decoder = Decoder(cache, self.names, all_views=len(views) > 1)

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, rows: range) -> Iterator[tuple[range, dict[str, Any]]]:
        """The samples of some rows, a few at a time: features by name (float32 arrays, raw ones as they are, keys as a
        list)."""
        for start in range(rows.start, rows.stop, _BATCH):
            part = range(start, min(start + _BATCH, rows.stop))
            yield part, self.read(self.order[part.start : part.stop])

    def read(self, indices: np.ndarray) -> dict[str, Any]:
        """Some samples, by their indices in the cache. Raises `CacheError` for values that are not finite."""
        views = np.full(len(indices), self.views[0], np.int64) if self.views == (1,) else None
        found = {
            name: value.numpy() if isinstance(value, torch.Tensor) else value
            for name, value in self._decoder.read(indices, views=views).items()
        }
        for name, value in found.items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
                raise CacheError(
                    f"{name} in {self.cache.path} holds values that are not finite", remedy="Build that feature again."
                )
        return found

    def close(self) -> None:
        self._decoder.close()


def std_from_moments(moments: np.ndarray) -> np.ndarray:
    """Mean and log-variance, `[..., 2C, h, w]` => mean and standard deviation, float32; the log-variance is clamped first,
    as diffusers clamps it."""
    mean, log_variance = np.split(moments, 2, axis=-3)
    std = np.exp(0.5 * np.clip(log_variance.astype(np.float64), *LOG_VARIANCE_RANGE))
    return np.concatenate([mean, std], axis=-3).astype(np.float32)


def sample_from_moments(moments: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """A sample of the posterior of mean and log-variance `[..., 2C, h, w]` => `[..., C, h, w]` float32. Where the
    log-variance is the lowest there is, of latents that are samples themselves, the mean as it is."""
    mean, std = np.split(std_from_moments(moments), 2, axis=-3)
    _, log_variance = np.split(moments, 2, axis=-3)
    sampled: np.ndarray = np.where(log_variance <= LOG_VARIANCE_RANGE[0], mean, mean + std * noise).astype(np.float32)
    return sampled


class NpyLayout:
    """REPA's and EDM2's layout."""

    def __init__(self, samples: Samples, labels: np.ndarray, keys: Sequence[str]) -> None:
        self._samples, self._labels, self._keys = samples, labels, keys

    def pieces(self) -> list[Piece]:
        n = len(self._samples)
        return [
            Piece(name=digits(start)[:5], rows=range(start, min(start + _FOLDER, n))) for start in range(0, n, _FOLDER)
        ]

    def write(self, path: Path, piece: Piece) -> None:
        with files.atomic_directory(path) as folder:
            for rows, batch in self._samples.batches(piece.rows):
                for row, values in zip(rows, std_from_moments(batch[MOMENTS])):
                    files.write_new(folder / _npy_name(row), [_npy_bytes(values)])

    def is_whole(self, path: Path, piece: Piece) -> bool:
        # The files are on the disk at the end only: where the power went, some are shorter.
        n_bytes = len(_npy_bytes(np.zeros(self._samples.cache.features[MOMENTS].shape, np.float32)))
        with files.explained(path, "read"):
            found = {entry.name: entry.stat().st_size for entry in path.iterdir()} if path.is_dir() else {}
        return found == {_npy_name(row): n_bytes for row in piece.rows}

    def finish(self, folder: Path) -> None:
        files.sync_all()
        names = [f"{digits(row)[:5]}/{_npy_name(row)}" for row in range(len(self._samples))]
        listed = [[name, int(self._labels[index])] for name, index in zip(names, self._samples.order)]
        files.atomic_write(folder / KEYS, [keys_json(self._keys)])
        files.atomic_write(folder / "dataset.json", [json.dumps({"labels": listed}).encode()])


def digits(row: int) -> str:
    return f"{row:08d}"


def _npy_name(row: int) -> str:
    return f"img-mean-std-{digits(row)}.npy"


def _npy_bytes(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


class SafetensorsLayout:
    """LightningDiT's layout. Noise of sample `i`, view `v` is drawn from (seed, i, v), so any part can be made alone."""

    def __init__(self, samples: Samples, keys: Sequence[str], seed: int) -> None:
        self._samples, self._keys, self._seed = samples, keys, seed
        self._shape = samples.cache.features[MOMENTS].shape

    def pieces(self) -> list[Piece]:
        n = len(self._samples)
        return [
            Piece(name=f"latents_rank00_shard{shard:03d}.safetensors", rows=range(start, min(start + _SHARD, n)))
            for shard, start in enumerate(range(0, n, _SHARD))
        ]

    def write(self, path: Path, piece: Piece) -> None:
        channels, h, w = self._shape
        latents, flipped = (torch.empty((len(piece.rows), channels // 2, h, w)) for _ in range(2))
        labels = torch.empty(len(piece.rows), dtype=torch.int64)
        for rows, batch in self._samples.batches(piece.rows):
            here = slice(rows.start - piece.rows.start, rows.stop - piece.rows.start)
            drawn = self._drawn(batch[MOMENTS], self._samples.order[rows.start : rows.stop])
            latents[here], flipped[here] = map(torch.from_numpy, drawn)
            labels[here] = torch.from_numpy(batch["label"])
        tensors = {"latents": latents, "latents_flip": flipped, "labels": labels}
        # Without metadata, which nobody reads: the library writes it in another order each time.
        files.atomic_write(path, [safetensors.torch.save(tensors)])

    def is_whole(self, path: Path, piece: Piece) -> bool:
        return path.is_file()

    def _drawn(self, moments: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """`[B, (2,) 2C, h, w]` => a sample for each of the two places, `[2, B, C, h, w]`. Where there is one view only,
        both are of it."""
        views = np.moveaxis(moments, 1, 0) if len(self._samples.views) > 1 else np.stack([moments, moments])
        shape = (views.shape[2] // 2, *views.shape[3:])
        noise = [
            [np.random.default_rng((self._seed, int(i), v)).standard_normal(shape, np.float32) for i in indices]
            for v in range(2)
        ]
        return sample_from_moments(views, np.stack([np.stack(of_view) for of_view in noise]))

    def finish(self, folder: Path) -> None:
        buffer = io.BytesIO()
        torch.save({name: values.reshape(1, -1, 1, 1) for name, values in self._statistics().items()}, buffer)
        files.atomic_write(folder / KEYS, [keys_json(self._keys)])
        files.atomic_write(folder / "latents_stats.pt", [buffer.getvalue()])

    def _statistics(self) -> dict[str, torch.Tensor]:
        """Mean and std of each channel, float32 `[C]`: those that came with the latents, else of samples of them."""
        vae = self._samples.cache.manifest.dataset.vae or {}
        if "channel_mean" in vae and "channel_std" in vae:
            return {
                "mean": torch.tensor(vae["channel_mean"], dtype=torch.float32),
                "std": torch.tensor(vae["channel_std"], dtype=torch.float32),
            }
        n = len(self._samples)
        chosen = np.sort(epoch_order(self._seed, 0, n)[: min(n, _STATS_SAMPLES)])
        count, total, squares = 0, np.zeros(()), np.zeros(())
        for start in range(0, len(chosen), _BATCH):
            indices = chosen[start : start + _BATCH]
            values = self._drawn(self._samples.read(indices)[MOMENTS], indices)[0].astype(np.float64)
            count += values.size // values.shape[1]
            total, squares = total + values.sum((0, 2, 3)), squares + np.square(values).sum((0, 2, 3))
        mean = total / count
        variance = np.maximum(squares - count * np.square(mean), 0) / max(1, count - 1)  # torch's, without bias
        return {"mean": torch.from_numpy(mean).float(), "std": torch.from_numpy(np.sqrt(variance)).float()}
