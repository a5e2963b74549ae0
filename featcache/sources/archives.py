"""Images inside tars and zips, read by offset: ImageNet's tars as downloaded, zips, webdataset shards, also remote.

An index of all members (key, label, place) is made by one pass over the headers and kept in the user's cache folder
(``$FEATCACHE_INDEX``, else ``$XDG_CACHE_HOME/featcache``), since a pass over a large archive on a spinning disk or a
remote store takes long. After that any image is one read, from any thread.

Samples are sorted by key, and keys are those that a folder of the unpacked files would give: a cache built from the
archive is the same, byte for byte, as one built from the folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from featcache.errors import CacheError, UserError
from featcache.images import EXTENSIONS, BadImage, EncodedSource
from featcache.remote import Location, Missing, is_remote, open_location
from featcache.store import files

_STORED, _DEFLATED = 0, 8
_TEXT_COLUMNS = ("text_offsets", "text_sizes", "json_offsets", "json_sizes")
_COLUMNS = ("keys", "labels", "archives", "offsets", "sizes", "methods", *_TEXT_COLUMNS)
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """One archive: its location (a directory or URL prefix), its name there, its size in bytes."""

    location: Location
    name: str
    size_bytes: int


@dataclass(frozen=True)
class Member:
    """One image of an archive as found: key as in a folder, class name or number, and where its bytes are.

    text, json: offset and size of the webdataset members beside it that may hold captions; (0, 0) where there are none.
    """

    key: str
    label: str
    archive: int
    offset: int
    size_bytes: int
    method: int = _STORED
    text: tuple[int, int] = (0, 0)
    json: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class ArchiveSource(EncodedSource):
    """Images of one or more archives. Arrays have one entry an image, in order of keys.

    keys: bytes, UTF-8. labels: int32. archives: int32, an index into ``places``. offsets, sizes: int64 bytes.
    methods: uint8, how the bytes are packed (0 stored, 8 deflated, as in zips). text_offsets, text_sizes, json_offsets,
    json_sizes: int64 bytes, of the sample's ``.txt`` and ``.json`` members; size 0 where there is none.
    """

    name: str
    kind: str
    class_names: tuple[str, ...]
    places: Sequence[Place]
    keys: np.ndarray
    labels: np.ndarray
    archives: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    methods: np.ndarray
    text_offsets: np.ndarray
    text_sizes: np.ndarray
    json_offsets: np.ndarray
    json_sizes: np.ndarray

    @property
    def description(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def is_remote(self) -> bool:
        return any(is_remote(place.location.url) for place in self.places)

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return self.keys[index].decode("utf-8", "surrogateescape")

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def signature(self, index: int) -> str:
        return str(self.sizes[index])

    def read(self, index: int) -> bytes:
        place = self.places[self.archives[index]]
        start = int(self.offsets[index])
        try:
            if self.kind == "zip":
                return self._unzipped(place, start, index)
            return place.location.read(place.name, start, start + int(self.sizes[index]))
        except (CacheError, Missing, zlib.error) as error:
            raise BadImage(self.key(index), f"{place.name}: {error}") from error

    def captions(self, index: int, key: str | None, usual: Sequence[str]) -> tuple[str, ...]:
        """Captions beside an image: the lines of its ``.txt``, or what its ``.json`` holds under ``key``.

        Without a key ``.txt`` comes first, then the first of the keys ``usual`` that the ``.json`` has.

        Raises:
            UserError: a member that cannot be read, or JSON with something else than text under that key.
        """
        where = f"{self.places[self.archives[index]].name}: {self.key(index)}"
        if key is None and self.text_sizes[index]:
            data = self._member(index, self.text_offsets, self.text_sizes)
            return tuple(line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip())
        if not self.json_sizes[index]:
            return ()
        try:
            value = json.loads(self._member(index, self.json_offsets, self.json_sizes))
        except ValueError as error:
            raise UserError(f"{where}: its .json is damaged: {error}", remedy="Make the shard again.") from error
        found = value if isinstance(value, dict) else {}
        name = key or next((name for name in usual if name in found), "")
        texts = found.get(name, [])
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: its .json holds no text or list of texts under {name!r}",
                remedy="Name another key with --caption-key.",
            )
        return tuple(text.strip() for text in texts if text.strip())

    def _member(self, index: int, offsets: np.ndarray, sizes: np.ndarray) -> bytes:
        place, start = self.places[self.archives[index]], int(offsets[index])
        try:
            return place.location.read(place.name, start, start + int(sizes[index]))
        except Missing as error:
            raise UserError(f"{place.location.url}/{place.name} is gone", remedy="Bring it again.") from error

    def _unzipped(self, place: Place, start: int, index: int) -> bytes:
        """A member of a zip: the local header says where its data begin."""
        header = place.location.read(place.name, start, start + 30)
        if header[:4] != b"PK\x03\x04":
            raise CacheError("damaged zip: no member begins there")
        start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        packed = int(self.sizes[index])
        data = place.location.read(place.name, start, start + packed)
        return data if self.methods[index] == _STORED else zlib.decompress(data, -zlib.MAX_WBITS)


class _Window(io.RawIOBase):
    """Bytes ``start`` to ``stop`` of a file at a location as a seekable file."""

    def __init__(self, place: Place, start: int, stop: int) -> None:
        self._place, self._start, self._stop, self._at = place, start, stop, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._stop - self._start}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        start = self._start + self._at
        stop = min(self._stop, start + len(buffer))
        if stop <= start:
            return 0
        data = self._place.location.read(self._place.name, start, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def opened(place: Place, start: int = 0, stop: int | None = None) -> io.BufferedReader:
    """Bytes ``start`` to ``stop`` of a file, wherever it lies, as a file to read and to seek in."""
    # Large blocks where every request costs a round trip; small ones on a disk, where skipping is cheap.
    block = BLOCK_BYTES if is_remote(place.location.url) else 8192
    return io.BufferedReader(_Window(place, start, place.size_bytes if stop is None else stop), block)


def _tar_members(
    place: Place, start: int = 0, stop: int | None = None
) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Plain files of a tar in order, without keeping them (tarfile collects members otherwise)."""
    try:
        with tarfile.open(fileobj=opened(place, start, stop), mode="r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    yield member, tar
                tar.members = []  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise UserError(
            f"{place.location.url}/{place.name} is not a whole tar: {error}", remedy="Download it again."
        ) from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not PurePosixPath(name).name.startswith(".")


def class_tars(places: Sequence[Place]) -> Iterator[Member]:
    """ImageNet's layout: tars of one class each (``n01440764.tar``), or a tar of such tars."""
    for a, place in enumerate(places):
        stem = place.name.removesuffix(".tar")
        for member, _ in _tar_members(place):
            if member.name.endswith(".tar"):
                inner = PurePosixPath(member.name).name.removesuffix(".tar")
                for image, _ in _tar_members(place, member.offset_data, member.offset_data + member.size):
                    if _is_image(image.name):
                        name = PurePosixPath(image.name).name
                        yield Member(f"{inner}/{name}", inner, a, member.offset_data + image.offset_data, image.size)
            elif _is_image(member.name):
                name = PurePosixPath(member.name).name
                yield Member(f"{stem}/{name}", stem, a, member.offset_data, member.size)


def plain_tars(places: Sequence[Place]) -> Iterator[Member]:
    """A packed folder of class folders."""
    for a, place in enumerate(places):
        for member, _ in _tar_members(place):
            if _is_image(member.name):
                yield Member(member.name.removeprefix("./"), "", a, member.offset_data, member.size)


def zips(places: Sequence[Place]) -> Iterator[Member]:
    """A zipped folder of class folders; members stored or deflated."""
    for a, place in enumerate(places):
        try:
            with zipfile.ZipFile(opened(place)) as archive:
                for member in archive.infolist():
                    if not _is_image(member.filename):
                        continue
                    if member.compress_type not in (_STORED, _DEFLATED) or member.flag_bits & 1:
                        raise UserError(
                            f"{place.name}: {member.filename} is encrypted or packed by an unusual method",
                            remedy="Unpack it, or zip it again without a password.",
                        )
                    where = (a, member.header_offset, member.compress_size, member.compress_type)
                    yield Member(member.filename, "", *where)
        except zipfile.BadZipFile as error:
            raise UserError(f"{place.name} is not a whole zip: {error}", remedy="Download it again.") from error


def webdataset(places: Sequence[Place]) -> Iterator[Member]:
    """Shards of samples: files of one stem belong together; an image, and its class in ``.cls`` or ``.json``."""
    for a, place in enumerate(places):
        stem = ""
        labels: dict[str, str | None] = {}
        found: dict[str, tuple[str, int, int]] = {}  # what a member is -> its name, offset and size
        for member, tar in _tar_members(place):
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            name, _, extension = base.partition(".")
            name = f"{folder}/{name}" if folder else name
            if name != stem:
                yield from _wds_sample(a, found, labels)
                stem, labels, found = name, {}, {}
            kind = "image" if _is_image(base) else extension
            found[kind] = (f"{name}.{extension}", member.offset_data, member.size)
            if kind in ("cls", "json"):
                data = tar.extractfile(member)
                assert data is not None
                labels[kind] = _wds_label(data.read(), extension)
        yield from _wds_sample(a, found, labels)


def _wds_label(data: bytes, extension: str) -> str | None:
    text = data.decode("utf-8", "replace").strip()
    if extension == "cls":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return None
    label = value.get("label", value.get("cls")) if isinstance(value, dict) else None
    return str(label) if isinstance(label, int | str) else None


def _wds_sample(
    a: int, found: Mapping[str, tuple[str, int, int]], labels: Mapping[str, str | None]
) -> Iterator[Member]:
    if "image" not in found:
        return
    name, offset, size = found["image"]
    text, beside = (found[kind][1:] if kind in found else (0, 0) for kind in ("txt", "json"))
    label = labels.get("cls") or labels.get("json") or ""
    yield Member(name, label, a, offset, size, text=text, json=beside)


def _wds_labels(members: Sequence[Member], name: str) -> list[str]:
    """The samples' labels. Where none has one but all have text, they are all of class 0."""
    labelled = any(member.label for member in members)
    bare = next((m for m in members if not (m.label if labelled else m.text[1] or m.json[1])), None)
    if bare is None:
        return [member.label or "0" for member in members]
    raise UserError(
        f"{name}: sample {bare.key.rpartition('.')[0]!r} has an image but neither .cls nor a label in .json",
        remedy="Use shards with labels, or with a .txt or .json beside every image.",
    )


Lister = Callable[[Sequence[Place]], Iterator[Member]]
LISTERS: dict[str, Lister] = {"class tars": class_tars, "tar": plain_tars, "zip": zips, "webdataset": webdataset}


def find_places(data: str) -> list[Place]:
    """Archives named by a path or URL with ``{000..146}`` ranges, ``{a,b}`` choices or (local) ``*``, sorted.

    Raises:
        UserError: nothing is there.
    """
    places = []
    for text in _expanded(data):
        if is_remote(text):
            prefix, _, name = text.rpartition("/")
            location = open_location(prefix)
            try:
                places.append(Place(location, name, location.size(name)))
            except (Missing, CacheError) as error:
                raise UserError(f"{text} cannot be read: {error}", remedy="Check the URL and the pattern.") from error
            continue
        found = sorted(Path(text).parent.glob(Path(text).name)) if "*" in text else [Path(text)]
        for path in found:
            if not path.is_file():
                raise UserError(f"there is no archive {str(path)!r}", remedy="Check --data.")
            places.append(Place(open_location(str(path.parent)), path.name, path.stat().st_size))
    if not places:
        raise UserError(f"no archive matches {data!r}", remedy="Check --data.")
    return places


def _expanded(pattern: str) -> list[str]:
    """Brace patterns as shells and webdataset write them; the longest width pads numbers."""
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    if not opened or not closed:
        return [pattern]
    first, dots, last = inside.partition("..")
    if dots:
        if not (first.isdigit() and last.isdigit()):
            raise UserError(f"{{{inside}}} is not a range", remedy="Write for example {000000..000146}.")
        choices = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    else:
        choices = inside.split(",")
    tails = _expanded(after)
    return [before + choice + tail for choice in choices for tail in tails]


def kind_of(places: Sequence[Place], *, folder: bool) -> str:
    """Which layout the archives have: a key of :data:`LISTERS`. Looks at the first few members.

    Tars of images without folders or labels are classes only where they are all tars of a local ``folder``.
    """
    if all(place.name.lower().endswith(".zip") for place in places):
        return "zip"
    images: set[PurePosixPath] = set()
    texts: set[PurePosixPath] = set()
    for i, (member, _) in enumerate(_tar_members(places[0])):
        name = PurePosixPath(member.name)
        if _is_image(member.name):
            images.add(name.with_suffix(""))
        elif name.suffix == ".txt":
            texts.add(name.with_suffix(""))
        if name.suffix in (".cls", ".json") or images & texts:
            return "webdataset"
        if name.suffix == ".tar":
            return "class tars"
        if i == 8:
            break
    if not _is_flat(places[0]):
        return "tar"
    if not folder:
        raise UserError(
            f"{places[0].name}: its images lie in no class folders and have neither .cls nor .json beside them",
            remedy="Use shards with labels, or pass a folder that holds one tar per class.",
        )
    return "class tars"


def _is_flat(place: Place) -> bool:
    """Whether the first image of a tar lies in no folder (then the tar itself is the class)."""
    for member, _ in _tar_members(place):
        if _is_image(member.name):
            return "/" not in member.name.removeprefix("./")
    raise UserError(f"{place.location.url}/{place.name} holds no images ({', '.join(EXTENSIONS)})")


def open_archives(places: Sequence[Place], *, name: str, folder: bool = False) -> ArchiveSource:
    """The images of some archives, from the kept index or by a pass over them.

    folder: they are all archives of one local folder.

    Raises:
        UserError: no images, an archive that is cut off, samples without labels, or two images of one key.
    """
    kind = kind_of(places, folder=folder)
    lines = [f"version 2, {kind}"] + [f"{p.location.url}/{p.name}\t{p.size_bytes}\t{_modified(p)}" for p in places]
    kept = index_folder() / f"{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:32]}.npz"
    columns = _kept_index(kept)
    if columns is None:
        columns = _index(LISTERS[kind](places), kind, name)
        _keep_index(kept, columns)
    return ArchiveSource(
        name=name,
        kind=kind,
        class_names=tuple(columns["class_names"].tobytes().decode("utf-8", "surrogateescape").split("\n")),
        places=tuple(places),
        **{key: columns[key] for key in _COLUMNS},
    )


def _modified(place: Place) -> int:
    path = Path(place.location.url) / place.name
    return path.stat().st_mtime_ns if path.is_file() else 0


def index_folder() -> Path:
    """Where indices of archives are kept."""
    chosen = os.environ.get("FEATCACHE_INDEX")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featcache"


def _index(members: Iterator[Member], kind: str, name: str) -> dict[str, np.ndarray]:
    found = list(members)
    if not found:
        raise UserError(f"{name} holds no images ({', '.join(EXTENSIONS)})", remedy="Check --data.")
    keys = [member.key for member in found]
    labels = _wds_labels(found, name) if kind == "webdataset" else [member.label for member in found]
    if kind in ("tar", "zip"):
        keys = _without_common_folders(keys)
        flat = next((key for key in keys if "/" not in key), None)
        if flat is not None:
            raise UserError(
                f"{name}: {flat} lies in no class folder, so it has no label",
                remedy="Put the images of each class in a folder of its own.",
            )
        labels = [key.split("/")[0] for key in keys]
    numbers = kind == "webdataset" and all(label.isdigit() for label in labels)
    if numbers:
        class_names = [str(i) for i in range(max(map(int, labels)) + 1)]
        codes = np.array([int(label) for label in labels], np.int32)
    else:
        class_names = sorted(set(labels))
        code = {label: i for i, label in enumerate(class_names)}
        codes = np.array([code[label] for label in labels], np.int32)
    packed = np.array([key.encode("utf-8", "surrogateescape") for key in keys])
    order = np.argsort(packed, kind="stable")
    packed = packed[order]
    twice = np.flatnonzero(packed[1:] == packed[:-1])
    if len(twice):
        raise UserError(f"{name}: two images have the key {packed[twice[0]].decode('utf-8', 'replace')!r}")
    return {
        "class_names": np.frombuffer("\n".join(class_names).encode("utf-8", "surrogateescape"), np.uint8),
        "keys": packed,
        "labels": codes[order],
        "archives": np.array([m.archive for m in found], np.int32)[order],
        "offsets": np.array([m.offset for m in found], np.int64)[order],
        "sizes": np.array([m.size_bytes for m in found], np.int64)[order],
        "methods": np.array([m.method for m in found], np.uint8)[order],
        "text_offsets": np.array([m.text[0] for m in found], np.int64)[order],
        "text_sizes": np.array([m.text[1] for m in found], np.int64)[order],
        "json_offsets": np.array([m.json[0] for m in found], np.int64)[order],
        "json_sizes": np.array([m.json[1] for m in found], np.int64)[order],
    }


def _without_common_folders(keys: Sequence[str]) -> list[str]:
    """Leading folders that all keys share are dropped as long as each keeps a folder: ``train/n01/a`` => ``n01/a``."""
    split = [key.split("/") for key in keys]
    drop = 0
    while all(len(parts) > drop + 2 for parts in split) and len({parts[drop] for parts in split}) == 1:
        drop += 1
    return ["/".join(parts[drop:]) for parts in split]


def _kept_index(path: Path) -> dict[str, np.ndarray] | None:
    """A kept index, or None where there is none or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            columns = {key: data[key] for key in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    wanted = {"class_names", *_COLUMNS}
    lengths = {len(column) for key, column in columns.items() if key != "class_names"}
    return columns if set(columns) == wanted and len(lengths) == 1 else None


def _keep_index(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Best effort: without it the next build passes over the archives again."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(path, [buffer.getvalue()])
    except (OSError, CacheError):
        return
