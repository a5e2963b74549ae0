"""Images in parquet files as the Hugging Face hub keeps data sets: a column of encoded images, one of labels.

Parquet has no access to single rows: a row group is decoded whole. Shuffled access would decode each of them once an
image, so the images of a row group are unpacked to a temporary file when the first of them is asked for, and read from
there. It needs as much disk as the images that are used (``$TMPDIR``), and little memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UserError
from featcache.images import BadImage, EncodedSource

IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")


@dataclass(kw_only=True)
class _Spool:
    """Unpacked row groups: an unlinked temporary file and, per row group, where its images are."""

    # Lives as long as its source; the kernel frees it with the last descriptor.
    file: Any = field(default_factory=lambda: tempfile.TemporaryFile(prefix="featcache-"))  # noqa: SIM115
    lock: threading.Lock = field(default_factory=threading.Lock)
    places: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    end: int = 0


@dataclass(frozen=True, kw_only=True)
class ParquetSource(EncodedSource):
    """Rows of parquet files, in order. groups: (file, row group); starts: first row of each, int64 [groups + 1]."""

    name: str
    class_names: tuple[str, ...]
    files: Sequence[Path]
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
        return f"{self.files[file].stem}/{number:05d}/{index - int(self.starts[group]):06d}"

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
        offset, size = spool.places[group][index - int(self.starts[group])]
        if size < 0:
            raise BadImage(self.key(index), "the row holds no image")
        return os.pread(spool.file.fileno(), size, offset)

    def _unpack(self, group: int) -> list[tuple[int, int]]:
        import pyarrow.parquet as pq

        file, number = self.groups[group]
        try:
            with pq.ParquetFile(self.files[file]) as parquet:
                column = parquet.read_row_group(number, columns=[self.image_column]).column(0)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.files[file]} is damaged: {error}", remedy="Download it again.") from error
        places = []
        for value in column:
            data = value.get("bytes") if hasattr(value, "keys") else value
            data = data.as_py() if data is not None else None
            places.append((self._spool.end, len(data) if data is not None else -1))
            if data is not None:
                os.pwrite(self._spool.file.fileno(), data, self._spool.end)
                self._spool.end += len(data)
        return places


def open_parquet(pattern: str, *, name: str) -> ParquetSource:
    """The rows of the parquet files that a path with ``*`` or ``{000..009}`` names.

    Raises:
        UserError: pyarrow is missing, no such files, or no columns of images and labels.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(
            "parquet files need pyarrow, which is not installed", remedy="pip install 'featcache-trainer[parquet]'"
        ) from error
    from featcache.remote import is_remote
    from featcache.sources.archives import find_places

    if is_remote(pattern):
        raise UserError(f"{pattern}: parquet files must be local", remedy="Download them, or use webdataset shards.")
    files = [Path(place.location.url) / place.name for place in find_places(pattern)]
    groups: list[tuple[int, int]] = []
    rows: list[int] = []
    labels: list[np.ndarray] = []
    identities = []
    image_column, class_names = "", None
    for f, path in enumerate(files):
        try:
            parquet = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a parquet file: {error}", remedy="Download it again.") from error
        with parquet:
            names = parquet.schema_arrow.names
            image_column = _column(names, IMAGE_COLUMNS, path, "images")
            label_column = _column(names, LABEL_COLUMNS, path, "labels")
            class_names = class_names or _class_names(parquet.schema_arrow, label_column)
            identities.append(_identity(path))
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
        files=tuple(files),
        identities=tuple(identities),
        groups=tuple(groups),
        starts=np.concatenate([[0], np.cumsum(rows)]),
        labels=every,
        image_column=image_column,
    )


def _column(names: Sequence[str], usual: Sequence[str], path: Path, what: str) -> str:
    for name in usual:
        if name in names:
            return name
    raise UserError(f"{path} has no column of {what} (it has {', '.join(names)})", remedy=f"Name it {usual[0]}.")


def _class_names(schema: Any, label_column: str) -> tuple[str, ...] | None:
    """Names of classes from the description that the `datasets` library writes into the file, where there is one."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _identity(path: Path) -> str:
    """SHA-256 (16 hex digits) of the file's footer and size."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        return hashlib.sha256(file.read(length) + size.to_bytes(8, "big")).hexdigest()[:16]
