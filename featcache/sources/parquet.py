"""Images in parquet files as the Hugging Face hub keeps data sets: a column of encoded images, one of labels.

Parquet has no access to single rows: a row group is decoded whole. Shuffled access would decode each of them once an
image, so the images of a row group are unpacked to a temporary file when the first of them is asked for, and read from
there. It needs as much disk as the images that are used (``$TMPDIR``), and little memory: a row group is read page by
page and a few rows at a time. Files may be remote: their footers, labels and then whole row groups are read by range, each
once.
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
from typing import Any

import numpy as np

from featcache.errors import UserError
from featcache.images import BadImage, EncodedSource
from featcache.remote import Missing
from featcache.sources.archives import BLOCK_BYTES, Place, find_places, opened

ROWS_AT_ONCE = 16
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")


@dataclass(kw_only=True)
class _Spool:
    """Unpacked row groups: an unlinked temporary file and, per row group, where its images are."""

    # Lives as long as its source; the kernel frees it with the last descriptor.
    file: Any = field(default_factory=lambda: tempfile.TemporaryFile(prefix="featcache-"))  # noqa: SIM115
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

    def read(self, index: int) -> bytes:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        spool = self._spool
        with spool.lock:
            if group not in spool.places:
                spool.places[group] = self._unpack(group)
        offset, size = map(int, spool.places[group][index - int(self.starts[group])])
        if size < 0:
            raise BadImage(self.key(index), "the row holds no image")
        return os.pread(spool.file.fileno(), size, offset)

    def _unpack(self, group: int) -> np.ndarray:
        file, number = self.groups[group]
        places = []
        with _opened_parquet(self.places[file]) as parquet:
            rows = parquet.iter_batches(ROWS_AT_ONCE, row_groups=[number], columns=[self.image_column])
            for value in itertools.chain.from_iterable(batch.column(0) for batch in rows):
                data = value.get("bytes") if hasattr(value, "keys") else value
                data = data.as_py() if data is not None else None
                places.append((self._spool.end, len(data) if data is not None else -1))
                if data is not None:
                    self._spool.append(data)
        return np.array(places, np.int64)


@contextlib.contextmanager
def _opened_parquet(place: Place) -> Iterator[Any]:
    """The file as pyarrow's, read by range where it lies. Raises `UserError` whatever goes wrong inside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"{place.location.url}/{place.name}"
    try:
        # Column chunks are streamed in blocks instead of being read whole.
        with pq.ParquetFile(pa.PythonFile(opened(place), mode="r"), buffer_size=BLOCK_BYTES) as parquet:
            yield parquet
    except UserError:
        raise
    except Missing as error:
        raise UserError(f"{where} is gone", remedy="Check --data.") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where} is damaged, or no parquet file: {str(error).splitlines()[0]}", remedy="Download it again."
        ) from error


def open_parquet(pattern: str, *, name: str) -> ParquetSource:
    """The rows of the parquet files that a path or URL with ``*`` (local only) or ``{000..009}`` names.

    Raises:
        UserError: pyarrow is missing, no such files, or no columns of images and labels.
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
            image_column = _column(names, IMAGE_COLUMNS, place, "images")
            label_column = _column(names, LABEL_COLUMNS, place, "labels")
            class_names = class_names or _class_names(parquet.schema_arrow, label_column)
            identities.append(_identity(place))
            for number in range(parquet.num_row_groups):
                groups.append((f, number))
                rows.append(parquet.metadata.row_group(number).num_rows)
                column = parquet.read_row_group(number, columns=[label_column]).column(0)
                labels.append(np.asarray(column.to_numpy(), np.int64))
    every = np.concatenate(labels) if labels else np.empty(0, np.int64)
    if not len(every):
        raise UserError(f"{pattern} holds no rows", remedy="Check --data.")
    if every.min() < 0:
        raise UserError(f"{pattern} has rows without a label (-1)", remedy="Use a split with labels, such as train.")
    count = int(every.max()) + 1
    if class_names is None or len(class_names) < count:
        class_names = tuple(str(i) for i in range(count))
    return ParquetSource(
        name=name,
        class_names=class_names,
        places=tuple(places),
        identities=tuple(identities),
        groups=tuple(groups),
        starts=np.concatenate([[0], np.cumsum(rows)]),
        labels=every,
        image_column=image_column,
    )


def _column(names: Sequence[str], usual: Sequence[str], place: Place, what: str) -> str:
    for name in usual:
        if name in names:
            return name
    raise UserError(f"{place.name} has no column of {what} (it has {', '.join(names)})", remedy=f"Name it {usual[0]}.")


def _class_names(schema: Any, label_column: str) -> tuple[str, ...] | None:
    """Names of classes from the description that the `datasets` library writes into the file, where there is one."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _identity(place: Place) -> str:
    """SHA-256 (16 hex digits) of the file's footer and size."""
    size, read = place.size_bytes, place.location.read
    length = int.from_bytes(read(place.name, size - 8, size - 4), "little")
    footer = read(place.name, size - 8 - length, size - 8)
    return hashlib.sha256(footer + size.to_bytes(8, "big")).hexdigest()[:16]
