"""Captions of images: from a table or COCO's annotations, from the members beside webdataset's images, or of an embedded set.

Captions belong to a source: `of(i)` gives those of its sample `i`. What a cache's manifest records of them is
`description` (where they are from, no paths) and `identity` (a digest by which other captions are noticed);
`remark` is for the user alone.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol, TextIO

import numpy as np

from featcache.errors import UserError, first_line
from featcache.keys import printable
from featcache.sources.archives import ArchiveSource
from featcache.sources.base import Source
from featcache.sources.coco import read_annotations
from featcache.sources.shapes import ShapesSource
from featcache.sources.shapes_text import CAPTIONS_PER_IMAGE, WORDINGS, ShapesTextSource

KEY_COLUMNS = ("key", "path", "file", "filename", "file_name", "image")
JSON_KEYS = ("caption", "captions", "text")
MAX_LINE_CHARACTERS = 8 << 20
COUNT_THREADS = 16
COUNT_AT_ONCE = 4096  # samples per task: one task for each would take gigabytes for a large set


class Captions(Protocol):
    """The captions of a source's samples."""

    @property
    def description(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def remark(self) -> str | None: ...

    def of(self, index: int) -> tuple[str, ...]:
        """Captions of sample `index`, in order; none is possible. Raises `UserError` if they cannot be read."""
        ...

    def most(self, indices: Sequence[int] | np.ndarray) -> int:
        """The largest number of captions of one of these samples."""
        ...


@dataclass(frozen=True, kw_only=True)
class ShapesCaptions:
    """Two captions for every image of the embedded set, from its class."""

    source: ShapesSource
    description: str = "the embedded set's own"
    identity: str = "a CLASS; a picture of a CLASS"
    remark: str | None = None

    def of(self, index: int) -> tuple[str, ...]:
        name = self.source.class_names[self.source.label(index)]
        return f"a {name}", f"a picture of a {name}"

    def most(self, indices: Sequence[int] | np.ndarray) -> int:
        return 2


@dataclass(frozen=True, kw_only=True)
class ShapesTextCaptions:
    """Four captions for every image of the embedded set that has captions, from its attributes."""

    source: ShapesTextSource
    description: str = "the embedded set's own"
    identity: str = f"{CAPTIONS_PER_IMAGE} of: {'; '.join(WORDINGS)}"
    remark: str | None = None

    def of(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index)

    def most(self, indices: Sequence[int] | np.ndarray) -> int:
        return CAPTIONS_PER_IMAGE


@dataclass(frozen=True, kw_only=True)
class TableCaptions:
    """Captions of a file as one run of bytes, so that millions of them cost little more than their letters.

    text: uint8, UTF-8. starts: int64 [captions + 1] into `text`. firsts: int64 [samples + 1] into `starts`.
    remark: what to tell the user of captions that name no image of the source, and of images without captions, where the
    file should have some; None where there are neither.
    """

    description: str
    identity: str
    text: np.ndarray
    starts: np.ndarray
    firsts: np.ndarray
    remark: str | None = None

    def of(self, index: int) -> tuple[str, ...]:
        bounds = self.starts[self.firsts[index] : self.firsts[index + 1] + 1]
        return tuple(bytes(self.text[a:b]).decode() for a, b in itertools.pairwise(bounds))

    def most(self, indices: Sequence[int] | np.ndarray) -> int:
        counts = np.diff(self.firsts)
        return int(counts[np.asarray(indices)].max(initial=0))


@dataclass(frozen=True, kw_only=True)
class MemberCaptions:
    """Captions in webdataset's shards: the lines of `.txt`, or a string or list of strings in `.json`."""

    kind: ClassVar[str] = "webdataset"
    source: ArchiveSource
    key: str | None
    remark: str | None = None

    @property
    def description(self) -> str:
        return f"{self.kind}, {f'.json under {self.key!r}' if self.key else '.txt or .json'}"

    @property
    def identity(self) -> str:
        """Over the samples' keys, their members' sizes and the key in `.json`: reading them all would cost a pass."""
        source = self.source
        digest = hashlib.sha256(b"\n".join(source.keys.tolist()))
        for column in (source.text_sizes, source.json_sizes):
            digest.update(column.tobytes())
        if self.key is not None:
            digest.update(self.key.encode())
        return digest.hexdigest()

    def of(self, index: int) -> tuple[str, ...]:
        return self.source.captions(index, self.key, JSON_KEYS)

    def most(self, indices: Sequence[int] | np.ndarray) -> int:
        if self.source.is_remote:
            raise UserError(
                "counting the captions of remote shards would read each of them",
                remedy="Type --captions-per-image with the number to keep.",
            )
        parts = [indices[first : first + COUNT_AT_ONCE] for first in range(0, len(indices), COUNT_AT_ONCE)]
        with ThreadPoolExecutor(COUNT_THREADS) as pool:
            return max(pool.map(lambda part: max(len(self.of(int(i))) for i in part), parts), default=0)


def open_captions(source: Source, *, table: Path | None, key: str | None) -> Captions:
    """The captions of `source`: from `table` where one is given, else its own.

    Args:
        table: a CSV file with a header (see `read_table`), or COCO's annotations (see `read_coco`).
        key: of webdataset's `.json` members; None takes `.txt`, else the first of `JSON_KEYS` there is.

    Raises `UserError` if the source has no captions of its own, or the table cannot be used.
    """
    if table is not None:
        return (read_coco if _is_json(table) else read_table)(table, source)
    if isinstance(source, ShapesSource):
        return ShapesCaptions(source=source)
    if isinstance(source, ShapesTextSource):
        return ShapesTextCaptions(source=source)
    if isinstance(source, ArchiveSource) and source.kind == "webdataset":
        captions = MemberCaptions(source=source, key=key)
        if not (source.json_sizes if key else source.text_sizes + source.json_sizes).any():
            raise UserError(
                f"{source.name} has no {'.json' if key else '.txt or .json'} members to take captions from",
                remedy="Pass a table of captions: --captions FILE.csv",
            )
        return captions
    raise UserError(
        f"{source.description} has no captions of its own",
        remedy="Pass a table of captions: --captions FILE.csv, or COCO's annotations: --captions captions_train2014.json",
    )


def _is_json(path: Path) -> bool:
    """By the name, else by the first letter: no table's header begins with a bracket. What cannot be read is no JSON."""
    if path.suffix.lower() == ".json":
        return True
    with contextlib.suppress(OSError):
        if path.is_file() and path.suffix.lower() != ".csv":
            with path.open("rb") as file:
                return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
    return False


class _Names:
    """Samples of a source by their keys (as `featcache.keys.printable` writes them), with or without extensions."""

    def __init__(self, source: Source) -> None:
        self._numbers = {printable(source.key(i)): i for i in range(len(source))}
        self._stems: dict[str, list[int]] = {}
        for name, i in self._numbers.items():
            stem, extension = os.path.splitext(name)  # noqa: PTH122 (keys are no paths of this machine)
            if extension:
                self._stems.setdefault(stem, []).append(i)

    def find(self, name: str) -> list[int]:
        """The samples that a name may mean: several only where it is that of several without the extension."""
        return [self._numbers[name]] if name in self._numbers else self._stems.get(name, [])


class _Files:
    """Samples of a source by the names of their files: folders and extensions are passed over where they differ."""

    def __init__(self, source: Source) -> None:
        self._names, self._files = _Names(source), dict[str, list[int]]()
        for i in range(len(source)):
            self._files.setdefault(_stem(printable(source.key(i))), []).append(i)

    def find(self, name: str) -> list[int]:
        return self._names.find(name) or self._files.get(_stem(name), [])


def _stem(name: str) -> str:
    return os.path.splitext(name.rpartition("/")[2])[0]  # noqa: PTH122


def read_coco(path: Path, source: Source) -> TableCaptions:
    """COCO's annotations: captions of each image by rising id of the annotation; blank ones are none.

    Images are named by `file_name`: the sample's key, or else the last part of the key, its extension aside (so that keys
    of shards and of folders above fit, too). Captions of images that the source lacks and images without captions are
    counted in the remark.

    Raises `UserError` if there is no such file, or one of another form (see `featcache.sources.coco`); if none of its images
    is of the source, or one may be several of them, or two are the same.
    """
    annotations, names = read_annotations(path), _Files(source)
    places = np.full(len(annotations.files), -1, np.int64)
    taken: dict[int, str] = {}
    for i, file in enumerate(annotations.files):
        found = names.find(file)
        if len(found) > 1:
            raise _ambiguous(path, file, source, found)
        if not found:
            continue
        if found[0] in taken:
            raise UserError(
                f"--captions {path}: {taken[found[0]]!r} and {file!r} are both {printable(source.key(found[0]))!r}",
                remedy="Name each image once.",
            )
        places[i], taken[found[0]] = found[0], file
    if not taken:
        example = f", such as {annotations.files[0]!r:.200}" if annotations.files else ""
        raise UserError(
            f"--captions {path} names none of the images of {source.description}, such as {printable(source.key(0))!r}, but "
            f"{len(annotations.files):,} others{example}",
            remedy="Take the annotations of the same part: captions_train2014.json with train2014, and so on.",
        )
    text, lengths, owners = bytearray(), [0], list[int]()
    strays, stray = 0, ""
    for _, image, caption in annotations.captions:
        owner = -1 if image < 0 else int(places[image])
        if owner < 0:
            stray = stray or (annotations.files[image] if image >= 0 else f"id {annotations.unknown}")
            strays += 1
            continue
        text += caption.encode()
        lengths.append(len(text))
        owners.append(owner)
    description = f"COCO annotations {path.name}"
    packed = _packed(description, source, text, np.array(lengths, np.int64), np.array(owners, np.int64))
    bare = np.flatnonzero(np.diff(packed.firsts) == 0)
    remarks = []
    if strays:
        count = len(annotations.captions)
        remarks.append(
            f"{strays:,} of {count:,} captions in {path} are of no image of {source.description}, such as {stray!r}"
        )
    if len(bare):
        example = printable(source.key(int(bare[0])))
        remarks.append(
            f"{len(bare):,} of {len(source):,} images of {source.description} have no caption, such as {example!r}"
        )
    return replace(packed, remark="; ".join(remarks) or None)


def _ambiguous(path: Path, name: str, source: Source, found: Sequence[int]) -> UserError:
    return UserError(
        f"--captions {path}: {name!r} may be {source.key(found[0])!r} or {source.key(found[1])!r}",
        remedy="Name such images with their extensions.",
    )


def read_table(path: Path, source: Source) -> TableCaptions:
    """A CSV file: one column that names the image (one of `KEY_COLUMNS`), every other one holds captions.

    Images are named by key (as `featcache.keys.printable` writes it), with or without its extension. Several captions
    of an image are several columns, several rows, or both; empty cells are none. Rows of images that the source lacks
    are passed over and counted in the remark.

    Raises `UserError` if there is no such file or column; for a line that is not CSV in UTF-8, holds NUL or
    has more cells than the header; if no row names an image of the source, or a name without extension is that
    of several images.
    """
    names = _Names(source)
    text, lengths, owners = bytearray(), [0], list[int]()
    rows_seen, strays, stray = 0, 0, ""
    lines = _rows(path)
    _, header = next(lines, (0, []))
    column = _key_column(path, header)
    for line, row in lines:
        rows_seen += 1
        if len(row) > len(header):
            raise UserError(
                f"--captions {path}, line {line}: {len(row)} cells under a header of {len(header)}",
                remedy='Put captions that hold commas between quotes: key,"one, two"',
            )
        name = row[column].strip() if len(row) > column else ""
        found = names.find(name)
        if not found:
            stray = name if not strays else stray
            strays += 1
            continue
        if len(found) > 1:
            raise _ambiguous(path, name, source, found)
        for i, cell in enumerate(row):
            if i != column and (caption := cell.strip()):
                text += caption.encode()
                lengths.append(len(text))
                owners.append(found[0])
    if strays == rows_seen:
        raise UserError(
            f"--captions {path} names none of the images of {source.description}, such as {printable(source.key(0))!r}",
            remedy=f"Its column {header[column].strip()!r} must hold such keys, with or without the extension.",
        )
    packed = _packed(f"table {path.name}", source, text, np.array(lengths, np.int64), np.array(owners, np.int64))
    if not strays:
        return packed
    remark = f"{strays} of {rows_seen} rows of {path} name no image of {source.description}, such as {stray!r}"
    return replace(packed, remark=remark)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines of a CSV file that are not empty, with their numbers. Raises `UserError` for what is no CSV in UTF-8."""
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(_lines(file), strict=True)  # else a quote that is never closed swallows what follows
            for row in rows:
                line = rows.line_num
                if any("\0" in cell for cell in row):
                    raise UserError(
                        f"--captions {path}, line {line} holds a NUL byte", remedy="Write it again as text."
                    )
                if row:
                    yield line, row
    except OSError as error:
        raise UserError(f"--captions {path}: {first_line(error)}", remedy="Pass a CSV file.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"--captions {path} is not a CSV file in UTF-8: after line {line}: {first_line(error)}",
            remedy="Write it again in UTF-8, each quote closed, and quotes inside of quotes doubled.",
        ) from error


def _lines(file: TextIO) -> Iterator[str]:
    """Lines of a file. Raises `csv.Error` for one so long that it would fill the memory (a device, a binary file)."""
    while line := file.readline(MAX_LINE_CHARACTERS):
        if len(line) == MAX_LINE_CHARACTERS:
            raise csv.Error(f"a line of {MAX_LINE_CHARACTERS:,} characters or more")
        yield line


def _key_column(path: Path, header: Sequence[str]) -> int:
    """Which column names the images. Raises `UserError` if none does, two do, or it is the only one."""
    cells = [cell.strip() for cell in header]
    named = next((name for name in KEY_COLUMNS if name in cells), None)
    if named is None or len(cells) < 2:
        raise UserError(
            f"--captions {path} must have a header with a column named {', '.join(KEY_COLUMNS[:-1])} or "
            f"{KEY_COLUMNS[-1]} and at least one of captions, but has {', '.join(map(repr, cells))[:300] or 'nothing'}",
            remedy="Write for example: key,caption",
        )
    if cells.count(named) > 1:
        raise UserError(f"--captions {path} has two columns named {named!r}", remedy="Rename or remove one of them.")
    return cells.index(named)


def _packed(description: str, source: Source, text: bytearray, ends: np.ndarray, owners: np.ndarray) -> TableCaptions:
    """Captions in order of samples, each sample's in the order of the file."""
    order = np.argsort(owners, kind="stable")
    raw, lengths = np.frombuffer(bytes(text), np.uint8), np.diff(ends)[order]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sorted_text = np.empty_like(raw)
    for at, i in enumerate(order):
        sorted_text[starts[at] : starts[at + 1]] = raw[ends[i] : ends[i + 1]]
    firsts = np.searchsorted(owners[order], np.arange(len(source) + 1))
    digest = hashlib.sha256(sorted_text.tobytes() + starts.tobytes() + firsts.tobytes()).hexdigest()
    return TableCaptions(description=description, identity=digest, text=sorted_text, starts=starts, firsts=firsts)
