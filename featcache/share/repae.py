"""Latents of REPA-E and iREPA: files in an HDF5 file, and a folder that `datasets` saved. See `featcache.share.importers`.

Both hold mean and standard deviation of the posterior; their trainers normalise latents by channel, with the numbers of a
`...-latents-stats.pt` that lies with the VAE's weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featcache.errors import UserError
from featcache.share.exported import Exported
from featcache.share.latents import (
    MAX_FILE_BYTES,
    MAX_JSON_BYTES,
    Latents,
    channel_statistics,
    check_inside,
    checked_labels,
    described_by_channel,
    from_std,
    listed_labels,
    moments_from_std,
    read_statistics,
)
from featcache.sources.opening import Unreadable, explained, file_size, read_file

STATISTICS = "-latents-stats.pt"
_AGAIN = "Bring it again."
_DOWNSAMPLING = {4: 8}  # by channels: f8d4; all others of theirs are f16d32
# What their files call VAEs that `featcache build --vae` knows.
_NAMES = {
    "sdvae-ft-mse-f8d4": "sd-ft-mse",
    "sdvae": "sd-ft-mse",
    "vavae": "va-vae",
    "invae": "in-vae",
    "e2e-vavae": "e2e-va-vae",
    "e2e-invae": "e2e-in-vae",
}


def _describe(
    latents: Latents, path: Path, channels: int, known_as: str, vae: str | None, given: Path | None
) -> dict[str, Any]:
    """A manifest's `dataset.vae`. given: the statistics file; None: those of the latents themselves."""
    mean, std = read_statistics(given, channels) if given is not None else channel_statistics(latents, path)
    name = vae or _NAMES.get(known_as)
    return described_by_channel(mean, std, name, downsampling=_DOWNSAMPLING.get(channels, 16))


def _moments_shape(shape: Sequence[int], where: str) -> tuple[int, int, int]:
    """`[2C, h, w]`, or that with an axis of one before it. Raises `UserError` for another shape."""
    found = tuple(shape[1:] if len(shape) == 4 and shape[0] == 1 else shape)
    if len(found) != 3 or found[0] % 2 or not math.prod(found) or math.prod(found) * 8 > MAX_FILE_BYTES:
        raise UserError(f"{where} has shape {tuple(shape)!s:.80}, not [2C, h, w]", remedy=_AGAIN)
    return found[0], found[1], found[2]


class H5Latents:
    """REPA-E's layout: `<name>.h5` with `00000/img-mean-std-00000000.npy`, ... and `dataset.json` in it.

    An HDF5 file may say that its data lie in other files: such a one is refused.
    """

    views = 1
    exported: Exported | None = None

    def __init__(self, path: Path, vae: str | None, statistics: Path | None) -> None:
        try:
            import h5py
        except ImportError:
            raise UserError("HDF5 files are read by h5py, which is not installed", remedy="pip install h5py") from None
        self._h5 = h5py
        self.path = _only_h5(path)
        _size_of(self.path)
        with explained(str(self.path), _AGAIN, wrong="is no HDF5 file of latents"):
            self._file = h5py.File(self.path, "r")
            self._names = sorted(self._found())
        if not self._names:
            raise UserError(f"{self.path} holds no .npy", remedy="Give the file that REPA-E's cache_latents.py wrote.")
        said = self._values("dataset.json", MAX_JSON_BYTES)
        self.labels = listed_labels(said.tobytes().rstrip(b"\0"), self._names, self.path)
        self._shape = _moments_shape(self._values(self._names[0]).shape, self._names[0])
        beside = self.path.with_name(self.path.stem + STATISTICS)
        given = statistics or (beside if beside.is_file() else None)
        self.vae = _describe(self, self.path, self._shape[0] // 2, self.path.stem, vae, given)
        self.provenance = from_std("repae", self.vae)

    def _found(self) -> list[str]:
        """Names of the arrays, at the top and in the groups there."""
        found = []
        for name in self._file:
            if name.endswith(".npy"):
                found.append(name)
            elif isinstance(self._member(name), self._h5.Group):
                found += [f"{name}/{inner}" for inner in self._member(name) if inner.endswith(".npy")]
        return found

    def _member(self, name: str) -> Any:
        """A group or an array. Raises `UserError` for one that lies elsewhere."""
        parts = name.split("/")
        for i in range(len(parts)):
            link = self._file.get("/".join(parts[: i + 1]), getlink=True)
            if not isinstance(link, self._h5.HardLink):
                raise UserError(f"{self.path}: {name!r:.80} is a link", remedy="Write the file again, without links.")
        return self._file[name]

    def _values(self, name: str, limit_bytes: int = MAX_FILE_BYTES) -> np.ndarray:
        with explained(f"{self.path}: {name!r:.80}", _AGAIN, wrong="cannot be read"):
            array = self._member(name)
            if not isinstance(array, self._h5.Dataset) or array.is_virtual or array.external:
                raise ValueError("its numbers are not in this file")
            if math.prod(array.shape) * array.dtype.itemsize > limit_bytes or array.dtype.kind not in "fS":
                raise ValueError(f"it is {array.shape} of {array.dtype}")
            return np.asarray(array[()])

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        return self._names[index]

    def signature(self, index: int) -> str:
        return str(self.path.stat().st_size)

    def read(self, index: int) -> np.ndarray:
        values, name = self._values(self._names[index]), self._names[index]
        if values.dtype.kind != "f" or _moments_shape(values.shape, name) != self._shape:
            raise UserError(f"{name} is {values.shape} of {values.dtype}, the first one {self._shape}", remedy=_AGAIN)
        return moments_from_std(values.reshape(self._shape))[None]


def _only_h5(path: Path) -> Path:
    """The file itself, or the only one in a folder beside REPA-E's images. Raises `UserError`."""
    if not path.is_dir():
        return path
    found = sorted(p for p in path.glob("*.h5") if p.name != "images.h5")
    if len(found) != 1:
        raise UserError(
            f"{path} holds {len(found)} .h5 files of latents",
            remedy="Name the file: featcache import FILE.h5 --from repae",
        )
    return found[0]


def _size_of(path: Path) -> int:
    """Bytes of a file. Raises `UserError` if it is missing or no file: a FIFO would be waited for."""
    try:
        return file_size(path)
    except Unreadable as error:
        raise UserError(f"{path} cannot be read: {error}", remedy="Check the path.") from error


class ArrowLatents:
    """iREPA's layout: a folder `imagenet-latents-<vae>` that `datasets` saved, column `data`.

    Labels: a column `label`, else `imagenet_train_labels.txt` (`val` for a folder of that name) beside the folder, a number
    a line, else the column `label` of `imagenet-latents-images` beside it.
    """

    views = 1
    exported: Exported | None = None

    def __init__(self, path: Path, vae: str | None, statistics: Path | None) -> None:
        self.path = path
        self._table = _ArrowFolder(path)
        if "data" not in self._table.columns:
            raise UserError(
                f"{path} has the columns {', '.join(self._table.columns)!s:.200}, and none is called data",
                remedy="Give the folder of latents, such as data/imagenet-latents-sdvae-ft-mse-f8d4.",
            )
        self._shape = _moments_shape(self._table.shape("data", 0), f"the first row of {path}")
        self._size = str(sum(_size_of(file) for file in self._table.files))
        folder = path.resolve()
        split = "val" if folder.name == "val" else "train"
        whole = folder.parent if split == "val" else folder
        self.labels = checked_labels(self._labels(whole.parent, split), path)
        known_as = whole.name.removeprefix("imagenet-latents-")
        beside = whole.parent.parent / "pretrained_models" / (known_as + STATISTICS)
        given = statistics or (beside if beside.is_file() else None)
        self.vae = _describe(self, path, self._shape[0] // 2, known_as, vae, given)
        self.provenance = from_std("irepa", self.vae)

    def _labels(self, data: Path, split: str) -> list[int]:
        n, text, images = len(self._table), data / f"imagenet_{split}_labels.txt", data / "imagenet-latents-images"
        images = images / "val" if split == "val" else images
        if "label" in self._table.columns:
            where, labels = self.path, self._table.integers("label")
        elif text.is_file():
            where = text
            with explained(str(text), _AGAIN, wrong="does not hold a number a line"):
                try:
                    labels = [int(line) for line in read_file(text, MAX_JSON_BYTES).split()]
                except Unreadable as error:
                    raise ValueError(str(error)) from error
        elif images.is_dir():
            where, labels = images, _ArrowFolder(images).integers("label")
        else:
            raise UserError(
                f"{self.path} has no labels, and neither {text} nor {images} is there",
                remedy=f"Bring one of them: imagenet_{split}_labels.txt, or the folder imagenet-latents-images.",
            )
        if len(labels) != n:
            raise UserError(f"{where} has {len(labels)} labels for {n} latents", remedy="Bring files of one set.")
        return labels

    def __len__(self) -> int:
        return len(self._table)

    def key(self, index: int) -> str:
        return f"{index:08d}"

    def signature(self, index: int) -> str:
        return self._size

    def read(self, index: int) -> np.ndarray:
        return moments_from_std(self._table.numbers("data", index, self._shape))[None]


class _ArrowFolder:
    """A folder that `datasets` saved: Arrow streams, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.files = self._listed() if (path / "state.json").is_file() else sorted(path.glob("*.arrow"))
        if not self.files:
            raise UserError(f"{path} holds no .arrow files", remedy="Give the folder that `datasets` saved.")
        self._batches: list[pa.RecordBatch] = []
        self._starts = [0]
        self.columns: list[str] = []
        for file in self.files:
            check_inside(path, file)
            size = _size_of(file)
            with explained(str(file), _AGAIN, wrong="is no Arrow stream"):
                for batch in pa.ipc.open_stream(pa.memory_map(str(file))):
                    batch.validate(full=True)  # before anything else: it would believe its own offsets
                    if batch.nbytes > size:
                        raise ValueError("it is compressed, or claims more than it holds")
                    if self.columns not in ([], names := batch.schema.names):
                        raise ValueError(f"it has other columns than the first file: {names!s:.80}")
                    self.columns = names
                    if batch.num_rows:
                        self._batches.append(batch)
                        self._starts.append(self._starts[-1] + batch.num_rows)
        if not self._batches:
            raise UserError(f"{path} holds no rows", remedy=_AGAIN)

    def _listed(self) -> list[Path]:
        """The files in their order, as `state.json` has them."""
        with explained(str(self._path / "state.json"), _AGAIN, wrong="does not list the files"):
            try:
                said = json.loads(read_file(self._path / "state.json", MAX_JSON_BYTES))
            except Unreadable as error:
                raise ValueError(str(error)) from error
            names = [entry["filename"] for entry in said["_data_files"]]
            odd = next((n for n in names if not isinstance(n, str) or Path(n).name != n or n in ("", ".", "..")), None)
            if odd is not None or len(set(names)) != len(names) or said.get("_indices_files"):
                raise ValueError(f"{odd!r:.80} is no file in this folder" if odd is not None else "it is a selection")
        return [self._path / name for name in names]

    def __len__(self) -> int:
        return self._starts[-1]

    def _row(self, column: str, index: int) -> pa.Array:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        array = self._batches[number].column(column)
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        return array.slice(index - self._starts[number], 1)

    def _flat(self, column: str, index: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """The numbers of a row of nested lists, and its shape. Raises `UserError` for lists of different lengths."""
        array, shape = self._row(column, index), []
        with explained(f"{self._path}: row {index}", _AGAIN, wrong="is no array of numbers"):
            while pa.types.is_nested(array.type):
                lengths = pc.unique(pc.list_value_length(array)).to_pylist()
                if len(lengths) != 1 or lengths[0] is None:
                    raise ValueError(f"its lists have the lengths {lengths!s:.80}")
                shape.append(lengths[0])
                array = array.flatten()
            if not pa.types.is_floating(array.type):
                raise ValueError(f"it holds {array.type}")
            return array.to_numpy(zero_copy_only=True), tuple(shape)

    def shape(self, column: str, index: int) -> tuple[int, ...]:
        return self._flat(column, index)[1]

    def numbers(self, column: str, index: int, shape: tuple[int, ...]) -> np.ndarray:
        """A row as an array `[*shape]`. Raises `UserError` if it has another one."""
        values, found = self._flat(column, index)
        if _moments_shape(found, f"row {index}") != shape:
            raise UserError(f"{self._path}: row {index} has shape {found}, the first one {shape}", remedy=_AGAIN)
        return values.reshape(shape)

    def integers(self, column: str) -> list[int]:
        """A column of whole numbers. Raises `UserError` if it is something else."""
        if column not in self.columns:
            raise UserError(f"{self._path} has no column {column}", remedy="Bring the labels of these latents.")
        found: list[int] = []
        for number in range(len(self._batches)):
            array = self._batches[number].column(column)
            if not pa.types.is_integer(array.type) or array.null_count:
                raise UserError(f"{self._path}: {column} is {array.type}, no whole numbers", remedy=_AGAIN)
            found += array.to_pylist()
        return found
