"""Images in parquet files as the Hugging Face hub keeps data sets: a column of encoded images, one of labels.

Parquet has no access to single rows: a row group is decoded whole. Shuffled access would decode each of them once per
image, so the images of a row group are unpacked to a temporary file when the first of them is asked for, and read
from there. It needs as much disk as the images that are used (`$TMPDIR`), and little memory: a row group is read
page by page and a few rows at a time. Files may be remote: their footers, labels and then whole row groups are read
by range, each once.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featcache.errors import UserError
from featcache.keys import printable
from featcache.redact import redact
from featcache.sources.archives import (
    BLOCK_BYTES,
    MAX_CLASSES,
    MAX_NAME_CHARACTERS,
    Place,
    find_places,
    is_unicode,
    opened,
)
from featcache.sources.base import EncodedSource
from featcache.sources.opening import explained
from featcache.sources.pixels import BadImage

ROWS_AT_ONCE = 16
MAX_GROUP_ROWS = 1 << 24
_MAX_RATIO = 100  # of the images in a row group to the file
_SMALL_BYTES = 256 << 20  # below this any ratio will do
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")


@dataclass(kw_only=True)
class _Spool:
    """Unpacked row groups: an unlinked temporary file and, per row group, where its images are."""

    # Lives as long as its source; the kernel frees it with the last descriptor.
    file: IO[bytes] = field(default_factory=lambda: tempfile.TemporaryFile(prefix="featcache-"))  # noqa: SIM115
    lock: threading.Lock = field(default_factory=threading.Lock)
    places: dict[int, np.ndarray] = field(default_factory=dict)  # int64 [rows, 2]: offset, size (-1: no image)
    end: int = 0

    def append(self, data: bytes) -> None:
        """Raises `UserError` if the disk refuses: a plain `OSError` would pass for damage of the parquet file."""
        rest, at = memoryview(data), self.end
        try:
            while rest:
                written = os.pwrite(self.file.fileno(), rest, at)
                rest, at = rest[written:], at + written
        except OSError as error:
            raise UserError(
                f"images cannot be unpacked into $TMPDIR ({tempfile.gettempdir()}): {error.strerror}",
                remedy="Set TMPDIR to a folder with room for them; the same command then continues the build.",
            ) from error
        self.end = at


@dataclass(frozen=True, kw_only=True)
class ParquetSource(EncodedSource):
    """Rows of parquet files, in order. groups: (file, row group); starts: first row of each, int64 [groups + 1]."""

    name: str
    class_names: tuple[str, ...]
    places: Sequence[Place]
    identities: Sequence[str]
    groups: Sequence[tuple[int, int]]
    starts: np.ndarray
    labels: np.ndarray
    image_column: str
    _spool: _Spool = field(default_factory=_Spool)

    @property
    def description(self) -> str:
        return f"parquet {self.name}"

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, index: int) -> str:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, number = self.groups[group]
        return f"{Path(self.places[file].name).stem}/{number:05d}/{index - int(self.starts[group]):06d}"

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def signature(self, index: int) -> str:
        """Row number and the file's own identity (a digest of its footer, which describes every column's pages)."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.identities[self.groups[group][0]]}:{index - int(self.starts[group])}"

    def size_bytes(self, index: int) -> int:
        return self._place(index)[1]

    def read(self, index: int) -> bytes:
        offset, size = self._place(index)
        return os.pread(self._spool.file.fileno(), size, offset)

    def _place(self, index: int) -> tuple[int, int]:
        """Where a row's image lies in the temporary file: offset and size; its row group is unpacked if it was not yet."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        spool = self._spool
        with spool.lock:
            if group not in spool.places:
                spool.places[group] = self._unpack(group)
        offset, size = map(int, spool.places[group][index - int(self.starts[group])])
        if size < 0:
            raise BadImage(self.key(index), "the row holds no image")
        return offset, size

    def _unpack(self, group: int) -> np.ndarray:
        file, number = self.groups[group]
        place, expected = self.places[file], int(self.starts[group + 1] - self.starts[group])
        places: list[tuple[int, int]] = []
        with _opened_parquet(place) as parquet:
            limit = self._spool.end + max(_SMALL_BYTES, _MAX_RATIO * place.size_bytes)
            rows = parquet.iter_batches(ROWS_AT_ONCE, row_groups=[number], columns=[self.image_column])
            for value in itertools.chain.from_iterable(batch.column(0) for batch in rows):
                data = value.get("bytes") if hasattr(value, "keys") else value
                data = data.as_py() if data is not None else None
                places.append((self._spool.end, len(data) if data is not None else -1))
                if data is None:
                    continue
                if self._spool.end + len(data) > limit:
                    raise UserError(
                        f"{place.where}: the images of row group {number} alone are {_MAX_RATIO} times as large as "
                        "the file",
                        remedy="Do not use it if it comes from others; else unpack it into a folder.",
                    )
                self._spool.append(data)
        if len(places) != expected:
            raise UserError(
                f"{place.where} is damaged: row group {number} holds {len(places)} images in {expected} rows",
                remedy="Download it again.",
            )
        return np.array(places, np.int64)


@contextlib.contextmanager
def _opened_parquet(place: Place) -> Iterator[pq.ParquetFile]:
    """The file as pyarrow's, read by range where it lies. Raises `UserError` whatever goes wrong inside."""
    # Column chunks are streamed in blocks instead of being read whole.
    with (
        explained(place.where, "Download it again."),
        pq.ParquetFile(pa.PythonFile(opened(place), mode="r"), buffer_size=BLOCK_BYTES) as parquet,
    ):
        yield parquet


def open_parquet(pattern: str, *, name: str, folder: bool) -> ParquetSource:
    """The rows of the parquet files that a path or URL with `*` (local only) or `{000..009}` names.

    Raises `UserError` if pyarrow is missing, or there are no such files, or no columns of images and labels.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet files need pyarrow, which is not installed", remedy="pip install pyarrow")
    places = find_places(pattern)
    groups: list[tuple[int, int]] = []
    rows: list[int] = []
    labels: list[np.ndarray] = []
    identities = []
    image_column, class_names = "", None
    for f, place in enumerate(places):
        with _opened_parquet(place) as parquet:
            names = parquet.schema_arrow.names
            found = _column(names, IMAGE_COLUMNS, place, "images")
            label_column = _column(names, LABEL_COLUMNS, place, "labels")
            if f and found != image_column:
                raise UserError(
                    f"{place.where} has its images in {found!r}, the first file in {image_column!r}",
                    remedy="Pass files of one data set.",
                )
            image_column = found
            _check_types(parquet.schema_arrow, image_column, label_column, place)
            class_names = class_names or _class_names(parquet.schema_arrow, label_column)
            identities.append(_identity(place))
            _check_rows(parquet.metadata, place)
            for number in range(parquet.num_row_groups):
                groups.append((f, number))
                labels.append(_labels(parquet, number, label_column, place))
                rows.append(len(labels[-1]))
    every = np.concatenate(labels) if labels else np.empty(0, np.int64)
    if not len(every):
        raise UserError(f"{redact(pattern)} holds no rows", remedy="Check --data.")
    if every.min() < 0:
        raise UserError(
            f"{redact(pattern)} has rows without a label ({every.min()})",
            remedy="Use a split with labels, such as train.",
        )
    count = int(every.max()) + 1
    if class_names is None or len(class_names) < count:
        class_names = tuple(str(i) for i in range(count))
    return ParquetSource(
        name=printable(name),
        class_names=class_names,
        places=tuple(places),
        identities=tuple(identities),
        groups=tuple(groups),
        starts=np.concatenate([[0], np.cumsum(rows)]),
        labels=every,
        image_column=image_column,
    )


def _check_types(schema: pa.Schema, image_column: str, label_column: str, place: Place) -> None:
    """Raises `UserError` unless images are bytes, or structures with a field of bytes, and labels are integers."""
    kind = schema.field(image_column).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        raise UserError(
            f"{place.where}: the column {image_column!r} holds {kind}, no encoded images",
            remedy="Store each image as a PNG or JPEG file's bytes.",
        )
    kind = schema.field(label_column).type
    if not pa.types.is_integer(kind):
        raise UserError(
            f"{place.where}: the column {label_column!r} holds {kind}, no integers",
            remedy="Store each image's class as an integer, from 0.",
        )


def _check_rows(metadata: pq.FileMetaData, place: Place) -> None:
    """Raises `UserError` for more rows than the file can hold images: their labels alone would fill the memory."""
    most = max([metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)], default=0)
    if most > MAX_GROUP_ROWS or not 0 <= metadata.num_rows <= place.size_bytes:
        raise UserError(
            f"{place.where} claims {metadata.num_rows} rows, {most} in one row group, in {place.size_bytes} bytes",
            remedy=f"Write at least a byte for each image, and row groups of at most {MAX_GROUP_ROWS:,} rows.",
        )


def _labels(parquet: pq.ParquetFile, number: int, column: str, place: Place) -> np.ndarray:
    """Labels int64 of a row group. Raises `UserError` for missing ones and for numbers that no class has."""
    found = parquet.read_row_group(number, columns=[column]).column(0)
    rows = parquet.metadata.row_group(number).num_rows
    if found.null_count or len(found) != rows:
        raise UserError(
            f"{place.where}: row group {number} has {len(found) - found.null_count} labels for {rows} rows",
            remedy="Use a split with labels, such as train.",
        )
    labels = found.to_numpy()
    if len(labels) and labels.max() >= MAX_CLASSES:
        raise UserError(
            f"{place.where}: row group {number} has the label {labels.max()}, but classes are numbered from 0 to "
            f"{MAX_CLASSES - 1:,}",
            remedy="Number the classes from 0.",
        )
    return np.asarray(labels, np.int64)


def _column(names: Sequence[str], usual: Sequence[str], place: Place, what: str) -> str:
    for name in usual:
        if name in names:
            return name
    raise UserError(f"{place.name} has no column of {what} (it has {', '.join(names)})", remedy=f"Name it {usual[0]}.")


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Names of classes from the description that the `datasets` library writes into the file, where there is one."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (TypeError, KeyError, ValueError, RecursionError):
        return None
    usable = isinstance(names, list) and len(names) <= MAX_CLASSES and all(map(_is_class_name, names))
    return tuple(names) if usable else None


def _is_class_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= MAX_NAME_CHARACTERS and is_unicode(name)


def _identity(place: Place) -> str:
    """SHA-256 (16 hex digits) of the file's footer and size."""
    size, read = place.size_bytes, place.location.read
    length = int.from_bytes(read(place.name, size - 8, size - 4), "little")
    footer = read(place.name, size - 8 - length, size - 8)
    return hashlib.sha256(footer + size.to_bytes(8, "big")).hexdigest()[:16]
