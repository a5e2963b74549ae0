"""Images inside tars and zips, read by offset: ImageNet's tars as downloaded, zips, webdataset shards, also remote.

An index of all members (key, label, place) is made by one pass over the headers and kept in the user's cache folder
(`$FEATCACHE_INDEX`, else `$XDG_CACHE_HOME/featcache`), since a pass over a large archive on a spinning disk or a
remote store takes long. After that any image is one read, from any thread.

Samples are sorted by key, and keys are those that a folder of the unpacked files would give: a cache built from the
archive is the same, byte for byte, as one built from the folder.

An archive may come from anyone, and may have been cut off. It is taken whole or not at all: a tar must end with its end
mark, a zip's directory must fit its members, and what claims more than it holds is refused before it is unpacked.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from featcache.errors import CacheError, UserError
from featcache.keys import key_bytes, key_text, printable
from featcache.paths import user_cache
from featcache.redact import redact
from featcache.settings import is_number
from featcache.sources.base import EXTENSIONS, EncodedSource
from featcache.sources.opening import explained
from featcache.sources.pixels import MAX_FILE_BYTES, BadImage
from featcache.store import files
from featcache.store.places import Location, Missing
from featcache.store.remote import is_remote, open_location, open_remote_location

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_STORED, _DEFLATED = 0, 8
_TEXT_COLUMNS = ("text_offsets", "text_sizes", "json_offsets", "json_sizes")
_COLUMNS = ("keys", "labels", "archives", "offsets", "sizes", "methods", "unpacked", "checksums", *_TEXT_COLUMNS)
BLOCK_BYTES = 1 << 20
MAX_CLASSES = 1 << 20  # as many as a manifest names
MAX_TEXT_BYTES = 4 << 20  # of a .json or .txt member, or of a tar's header with its long names
MAX_NAME_CHARACTERS = 1024  # bytes that are no UTF-8 take four each in a manifest, which has room for 4096
_MAX_DIRECTORY_BYTES = 1 << 30  # of a zip: some ten million members
_MAX_ZIP_TAIL_BYTES = 22 + 65535  # the record that ends it, with a comment
_MAX_RATIO = 200  # a member's size over its packed size; noise-free PNGs stored plainly reach about 100
_SMALL_BYTES = 16 << 20  # below this any ratio will do
_BRING_AGAIN = "Bring it again: it was cut off or changed on the way."


@dataclass(frozen=True)
class Place:
    """One archive: its location (a directory or URL prefix), its name there, its size in bytes.

    version: changes when it is replaced by another one, as far as the place tells.
    """

    location: Location
    name: str
    size_bytes: int
    version: str = ""

    @property
    def where(self) -> str:
        """Path or URL, to be shown."""
        return redact(f"{self.location.url}/{self.name}")


@dataclass(frozen=True)
class Member:
    """One image of an archive as found: key as in a folder, class name or number, and where its bytes are.

    unpacked, checksum: size and CRC-32 of a zip's member once it is unpacked; 0 elsewhere. text, json: offset and size
    of the webdataset members beside it that may hold captions; (0, 0) where there are none.
    """

    key: str
    label: str
    archive: int
    offset: int
    size_bytes: int
    method: int = _STORED
    unpacked: int = 0
    checksum: int = 0
    text: tuple[int, int] = (0, 0)
    json: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class ArchiveSource(EncodedSource):
    """Images of one or more archives. Arrays have one entry per image, in order of keys.

    keys: bytes, UTF-8. labels: int32. archives: int32, an index into `places`. offsets, sizes: int64 bytes. methods:
    uint8, how the bytes are packed (0 stored, 8 deflated, as in zips). unpacked: int64 bytes, and checksums: uint32
    (CRC-32), of a zip's members. text_offsets, text_sizes, json_offsets, json_sizes: int64 bytes, of the sample's
    `.txt` and `.json` members; size 0 where there is none.
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
    unpacked: np.ndarray
    checksums: np.ndarray
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
        return key_text(self.keys[index])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def signature(self, index: int) -> str:
        return str(self.sizes[index])

    def size_bytes(self, index: int) -> int:
        # A deflated member is held packed and unpacked.
        return int(self.sizes[index]) + (int(self.unpacked[index]) if self.methods[index] == _DEFLATED else 0)

    def read(self, index: int) -> bytes:
        place, start = self.places[self.archives[index]], int(self.offsets[index])
        if self.kind == "zip":
            return self._unzipped(place, start, index)
        return self._bytes(place, start, start + int(self.sizes[index]), index)

    def _bytes(self, place: Place, start: int, stop: int, index: int) -> bytes:
        """Bytes of an archive. Where its disk fails at this place, the image is bad; other failures are the archive's."""
        try:
            return place.location.read(place.name, start, stop)
        except Missing as error:
            raise UserError(f"{place.where} is gone", remedy="Bring it again.") from error
        except CacheError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EIO:
                raise BadImage(self.key(index), f"{place.name}: {error.what}") from error
            raise

    def captions(self, index: int, key: str | None, usual: Sequence[str]) -> tuple[str, ...]:
        """Captions beside an image: the lines of its `.txt`, or what its `.json` holds under `key`.

        Without a key `.txt` comes first, then the first of the keys `usual` that the `.json` has.

        Raises `UserError` for a member that cannot be read, and for JSON with something else than text under that key.
        """
        where = f"{self.places[self.archives[index]].name}: {self.key(index)}"
        if key is None and self.text_sizes[index]:
            data = self._text(index, self.text_offsets, self.text_sizes)
            return tuple(line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip())
        if not self.json_sizes[index]:
            return ()
        data = self._text(index, self.json_offsets, self.json_sizes)
        with explained(f"{where}: its .json", "Make the shard again."):
            value = json.loads(data)
        found = value if isinstance(value, dict) else {}
        name = key or next((name for name in usual if name in found), "")
        texts = found.get(name, [])
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise UserError(
                f"{where}: its .json holds no text or list of texts under {name!r}",
                remedy="Name another key with --caption-key.",
            )
        if not all(map(is_unicode, texts)):
            raise UserError(
                f"{where}: its .json holds half of a surrogate pair under {name!r}", remedy="Make the shard again."
            )
        return tuple(text.strip() for text in texts if text.strip())

    def _text(self, index: int, offsets: np.ndarray, sizes: np.ndarray) -> bytes:
        start, size = int(offsets[index]), int(sizes[index])
        if size > MAX_TEXT_BYTES:
            raise UserError(
                f"{self.key(index)}: the text beside it has {size} bytes, more than the {MAX_TEXT_BYTES:,} that are read",
                remedy="Make the shard again with the captions alone.",
            )
        return self._bytes(self.places[self.archives[index]], start, start + size, index)

    def _unzipped(self, place: Place, start: int, index: int) -> bytes:
        """A member of a zip: the local header says where its data begin."""
        header = self._bytes(place, start, start + 30, index)
        start += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        packed, size = int(self.sizes[index]), int(self.unpacked[index])
        if header[:4] != b"PK\x03\x04" or start + packed > place.size_bytes:
            raise BadImage(self.key(index), f"{place.name}: damaged zip: no member begins where its directory says")
        data = self._bytes(place, start, start + packed, index)
        if self.methods[index] == _DEFLATED:
            try:
                # One byte more than there should be tells a member that is longer than it claims.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as error:
                raise BadImage(self.key(index), f"{place.name}: {error}") from error
        if len(data) != size or zlib.crc32(data) != int(self.checksums[index]):
            raise BadImage(self.key(index), f"{place.name}: the member is not what the zip's directory says (CRC-32)")
        return data


def is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


class _Window(io.RawIOBase):
    """Bytes `start` to `stop` of a file at a location as a seekable file."""

    def __init__(self, place: Place, start: int, stop: int) -> None:
        self._place, self._start, self._stop, self._at = place, start, stop, 0
        self.length = stop - start

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

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        out = memoryview(buffer)
        start = self._start + self._at
        stop = min(self._stop, start + len(out))
        if stop <= start:
            return 0
        data = self._place.location.read(self._place.name, start, stop)
        out[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Bounded(io.BufferedReader):
    """A file of which nobody reads more than so much at once: lengths that archives claim become allocations."""

    def __init__(self, window: _Window, block: int, limit_bytes: int) -> None:
        super().__init__(window, block)
        self._length, self._limit = window.length, limit_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = max(0, self._length - self.tell()) if size in (None, -1) else size
        if not 0 <= wanted <= self._limit:
            raise ValueError(f"a header claims {wanted} bytes")
        return super().read(wanted)


def opened(
    place: Place, start: int = 0, stop: int | None = None, *, limit_bytes: int | None = None
) -> io.BufferedReader:
    """Bytes `start` to `stop` of a file, wherever it lies, as a file to read and to seek in.

    limit_bytes: at most so many in one read, or it raises `ValueError`.
    """
    # Large blocks where every request costs a round trip; small ones on a disk, where skipping is cheap.
    block = BLOCK_BYTES if is_remote(place.location.url) else 8192
    window = _Window(place, start, place.size_bytes if stop is None else stop)
    return io.BufferedReader(window, block) if limit_bytes is None else _Bounded(window, block, limit_bytes)


def _tar_members(
    place: Place, start: int = 0, stop: int | None = None
) -> Iterator[tuple[tarfile.TarInfo, io.BufferedReader]]:
    """Plain files of a tar in order, and the tar as a file, without keeping them (tarfile collects members otherwise).

    Raises `UserError` if it is no whole tar, or one of its images or samples is a link or something else than a file.
    """
    stop = place.size_bytes if stop is None else stop
    length = stop - start
    file = opened(place, start, stop, limit_bytes=MAX_TEXT_BYTES)
    with explained(place.where, _BRING_AGAIN, wrong="is not a whole tar"):
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (a window onto another file: nothing to close)
        after = 0
    while True:
        with explained(place.where, _BRING_AGAIN, wrong="is not a whole tar"):
            member = tar.next()
        if member is None:
            break
        if member.size < 0 or member.offset < after or (member.isreg() and member.offset_data + member.size > length):
            raise UserError(
                f"{place.where} is not a whole tar: {member.name!r} claims {member.size} bytes", remedy=_BRING_AGAIN
            )
        after = member.offset_data
        tar.members = []  # type: ignore[attr-defined]  # where tarfile collects them
        if member.isreg() and not member.issparse():
            yield member, file
        elif _is_image(member.name) and not member.isdir():
            _refuse_kind(place, member.name, "tar --dereference --hard-dereference -cf")
    _check_tar_end(place, file, tar.offset)


def _refuse_kind(place: Place, name: str, command: str) -> NoReturn:
    raise UserError(
        f"{place.where}: {name!r} is a link or something else that holds no bytes of its own",
        remedy=f"Pack the files again with links followed: {command} ...",
    )


def _check_tar_end(place: Place, file: io.BufferedReader, at: int) -> None:
    """tarfile ends at the first header that it does not understand, as if nothing followed. Raises `UserError`."""
    with explained(place.where, _BRING_AGAIN):
        file.seek(at)
        mark = file.read(1024)
        if mark.strip(b"\0") or at % 512:
            raise UserError(f"{place.where} is not a whole tar: no header at byte {at}", remedy=_BRING_AGAIN)
        if len(mark) < 1024:
            raise UserError(
                f"{place.where} is not a whole tar: its end mark, two blocks of zeros, is missing at byte {at}",
                remedy=f"{_BRING_AGAIN} Some programs leave the mark out; if you know that this one did, add it: "
                "head -c 1024 /dev/zero >> FILE.tar",
            )
        while rest := file.read(BLOCK_BYTES):
            if rest.strip(b"\0"):
                raise UserError(
                    f"{place.where} goes on after its end mark at byte {at}: several tars joined to one file?",
                    remedy="Join tars with: tar --concatenate --file=FIRST.tar NEXT.tar",
                )


def _image_name(place: Place, name: str) -> str:
    """A member's name as a key: relative, without `.` and empty parts. Raises `UserError` for names that lead out."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise UserError(
            f"{place.where}: the member {name!r} has an absolute name, or one with '..' or NUL",
            remedy="Pack the files again with names relative to their folder.",
        )
    return str(path)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not PurePosixPath(name).name.startswith(".")


def class_tars(places: Sequence[Place]) -> Iterator[Member]:
    """ImageNet's layout: tars of one class each (`n01440764.tar`), or a tar of such tars."""
    for a, place in enumerate(places):
        stem = place.name.removesuffix(".tar")
        for member, _ in _tar_members(place):
            if member.name.endswith(".tar"):
                inner = PurePosixPath(member.name).name.removesuffix(".tar")
                for image, _ in _tar_members(place, member.offset_data, member.offset_data + member.size):
                    if _is_image(image.name):
                        name = PurePosixPath(_image_name(place, image.name)).name
                        yield Member(f"{inner}/{name}", inner, a, member.offset_data + image.offset_data, image.size)
            elif _is_image(member.name):
                name = PurePosixPath(_image_name(place, member.name)).name
                yield Member(f"{stem}/{name}", stem, a, member.offset_data, member.size)


def plain_tars(places: Sequence[Place]) -> Iterator[Member]:
    """A packed folder of class folders."""
    for a, place in enumerate(places):
        for member, _ in _tar_members(place):
            if _is_image(member.name):
                yield Member(_image_name(place, member.name), "", a, member.offset_data, member.size)


def zips(places: Sequence[Place]) -> Iterator[Member]:
    """A zipped folder of class folders; members stored or deflated."""
    for a, place in enumerate(places):
        with explained(place.where, _BRING_AGAIN, wrong="is not a whole zip"):
            # Reads the directory at once: 46 bytes or more for each member.
            archive = zipfile.ZipFile(opened(place, limit_bytes=_MAX_DIRECTORY_BYTES))
        with archive:
            members = archive.infolist()
            _check_zip_directory(place, archive, members)
            for member in members:
                name = _zip_name(member)
                if not _is_image(name):
                    continue
                _check_zip_member(place, member)
                where = (a, member.header_offset, member.compress_size, member.compress_type)
                yield Member(_image_name(place, name), "", *where, member.file_size, member.CRC)


def _zip_name(member: zipfile.ZipInfo) -> str:
    """A member's name, whole (`filename` ends at a NUL), as unpacking it gives it.

    Programs on Unix write the bytes of file names without the mark that they are UTF-8, and zipfile takes all such names
    for those of DOS.
    """
    unix, macos = 3, 19
    if member.flag_bits & 0x800 or member.create_system not in (unix, macos):
        return member.orig_filename
    return key_text(member.orig_filename.encode("cp437"))


def _check_zip_directory(place: Place, archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo]) -> None:
    """Raises `UserError` if entries are missing, or members overlap each other or the directory."""
    with explained(place.where, _BRING_AGAIN):
        tail = place.location.read(place.name, max(0, place.size_bytes - _MAX_ZIP_TAIL_BYTES), place.size_bytes)
        last = tail[-22:]
        record = last if last[:4] == b"PK\5\6" and last[-2:] == b"\0\0" else tail[tail.rindex(b"PK\5\6") :]
        (count,) = struct.unpack_from("<H", record, 10)
    # Beyond 65,535 members the number here is all ones, or what is left of the true one.
    if count not in (0xFFFF, len(members) & 0xFFFF):
        raise UserError(
            f"{place.where} is not a whole zip: its directory holds {len(members)} entries instead of {count}",
            remedy=_BRING_AGAIN,
        )
    free = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < free:
            raise UserError(
                f"{place.where} is damaged: {member.filename!r} lies on top of another member",
                remedy="Do not use it: honest programs write no such zips.",
            )
        free = member.header_offset + 30 + len(member.orig_filename) + member.compress_size
    if free > archive.start_dir:
        raise UserError(f"{place.where} is not a whole zip: its last member is cut", remedy=_BRING_AGAIN)


def _check_zip_member(place: Place, member: zipfile.ZipInfo) -> None:
    """Raises `UserError` for an image that cannot be had, or that is smaller than what it unpacks to by too much."""
    if member.compress_type not in (_STORED, _DEFLATED) or member.flag_bits & 0x41:
        raise UserError(
            f"{place.where}: {member.filename!r} is encrypted or packed by an unusual method",
            remedy="Unpack it, or zip it again without a password.",
        )
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.create_system == 3 and kind not in (0, stat.S_IFREG):
        _refuse_kind(place, member.filename, "zip -r (without -y)")
    size, packed = member.file_size, member.compress_size
    grows = size > _SMALL_BYTES and size > _MAX_RATIO * packed
    if size > MAX_FILE_BYTES or grows or (member.compress_type == _STORED and size != packed):
        raise UserError(
            f"{place.where}: {member.filename!r} claims {size} bytes in {packed}; images have at most "
            f"{MAX_FILE_BYTES:,}, and no more than {_MAX_RATIO} times what they are packed to",
            remedy="Do not use it if it comes from others; else unpack it, and pass the folder.",
        )


def webdataset(places: Sequence[Place]) -> Iterator[Member]:
    """Shards of samples: files of one stem belong together; an image, and its class in `.cls` or `.json`."""
    for a, place in enumerate(places):
        stem = ""
        labels: dict[str, str | None] = {}
        found: dict[str, tuple[str, int, int]] = {}  # what a member is -> its name, offset and size
        for member, file in _tar_members(place):
            folder, _, base = member.name.removeprefix("./").rpartition("/")
            name, _, extension = base.partition(".")
            name = f"{folder}/{name}" if folder else name
            if name != stem:
                yield from _wds_sample(a, place, found, labels)
                stem, labels, found = name, {}, {}
            kind = "image" if f".{extension.lower()}" in EXTENSIONS else extension
            if kind in found:
                raise UserError(
                    f"{place.where}: sample {name!r} has two members {base!r} and {found[kind][0]!r}",
                    remedy="Make the shard again with one image, and one file of a kind, for each sample.",
                )
            found[kind] = (f"{name}.{extension}", member.offset_data, member.size)
            if kind in ("cls", "json"):
                if member.size > MAX_TEXT_BYTES:
                    raise UserError(
                        f"{place.where}: {member.name!r} has {member.size} bytes, more than the {MAX_TEXT_BYTES:,} "
                        "that are read",
                        remedy="Make the shard again with small .cls and .json members.",
                    )
                with explained(place.where, _BRING_AGAIN):
                    file.seek(member.offset_data)
                    data = file.read(member.size)
                labels[kind] = key_text(data.strip()) if kind == "cls" else _json_label(data)
        yield from _wds_sample(a, place, found, labels)


def _json_label(data: bytes) -> str | None:
    """The class in a `.json` member: "" where it has none, None where it is damaged or the class is no class."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    label = value.get("label", value.get("cls", "")) if isinstance(value, dict) else ""
    return str(label) if isinstance(label, int | str) and not isinstance(label, bool) else None


def _wds_sample(
    a: int, place: Place, found: Mapping[str, tuple[str, int, int]], labels: Mapping[str, str | None]
) -> Iterator[Member]:
    # A member like `a.small.jpg` is the sample's image where there is no `a.jpg`.
    image = found.get("image") or next((member for member in found.values() if _is_image(member[0])), None)
    if image is None:
        return
    name, offset, size = image
    text, beside = (found[kind][1:] if kind in found else (0, 0) for kind in ("txt", "json"))
    label = labels.get("cls") or labels.get("json", "")
    if label is None:
        raise UserError(
            f"{place.where}: the .json beside {name!r} is damaged, or its label is neither a number nor a name",
            remedy="Make the shard again, with the label as an integer; or put it into .cls.",
        )
    yield Member(_image_name(place, name), label, a, offset, size, text=text, json=beside)


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
    """Archives named by a path or URL with `{000..146}` ranges, `{a,b}` choices or (local) `*`, sorted.

    Raises `UserError` if nothing is there.
    """
    places = []
    for text in _expanded(data):
        if is_remote(text):
            # The query of a signed URL belongs to every request.
            base, mark, query = text.partition("?")
            prefix, _, name = base.rpartition("/")
            location = open_remote_location(f"{prefix}{mark}{query}")
            try:
                places.append(Place(location, name, *location.size_and_version(name)))
            except (Missing, CacheError) as error:
                why = error.what if isinstance(error, UserError) else "there is nothing of that name"
                raise UserError(
                    f"{redact(text)} cannot be read: {why}", remedy="Check the URL and the pattern."
                ) from error
            continue
        found = sorted(Path(text).parent.glob(Path(text).name)) if "*" in text else [Path(text)]
        for path in found:
            if not path.is_file():
                raise UserError(f"there is no archive {str(path)!r}", remedy="Check --data.")
            found_now = path.stat()
            places.append(
                Place(open_location(str(path.parent)), path.name, found_now.st_size, str(found_now.st_mtime_ns))
            )
    if not places:
        raise UserError(f"no archive matches {data!r}", remedy="Check --data.")
    return places


def _expanded(pattern: str) -> Iterator[str]:
    """Brace patterns as shells and webdataset write them, one after the other; the first number's width pads all."""
    before, opened, rest = pattern.partition("{")
    inside, closed, after = rest.partition("}")
    if not opened or not closed:
        yield pattern
        return
    first, dots, last = inside.partition("..")
    if dots:
        if not (is_number(first) and is_number(last)):
            raise UserError(f"{{{inside}}} is not a range", remedy="Write for example {000000..000146}.")
        choices: Iterable[str] = (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
    else:
        choices = inside.split(",")
    for choice in choices:
        for tail in _expanded(after):
            yield before + choice + tail


def kind_of(places: Sequence[Place], *, folder: bool) -> str:
    """Which layout the archives have: a key of `LISTERS`. Looks at the first few members.

    Tars of images without folders or labels are classes only where they are all tars of a local `folder`.
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
    raise UserError(f"{place.where} holds no images ({', '.join(EXTENSIONS)})", remedy="Check --data.")


def open_archives(pattern: str, *, name: str, folder: bool) -> ArchiveSource:
    """The images of the archives that a path, URL or pattern names, from the kept index or by a pass over them.

    folder: they are all archives of one local folder.

    Raises `UserError` if there are no archives, no images, an archive is cut off, samples lack labels, or two images
    have one key.
    """
    places = find_places(pattern)
    kind = kind_of(places, folder=folder)
    lines = [f"version 4, {kind}"] + [f"{p.location.url}/{p.name}\t{p.size_bytes}\t{p.version}" for p in places]
    kept = index_folder() / f"{hashlib.sha256(key_bytes(chr(10).join(lines))).hexdigest()[:32]}.npz"
    columns = _kept_index(kept)
    if columns is None:
        columns = _index(LISTERS[kind](places), kind, name)
        _keep_index(kept, columns)
    return ArchiveSource(
        name=printable(name),
        kind=kind,
        class_names=tuple(map(printable, key_text(columns["class_names"].tobytes()).split("\0"))),
        places=tuple(places),
        **{key: columns[key] for key in _COLUMNS},
    )


def index_folder() -> Path:
    """Where indices of archives are kept."""
    chosen = os.environ.get("FEATCACHE_INDEX")
    if chosen:
        return Path(chosen)
    return user_cache("FEATCACHE_INDEX")


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
                f"{name}: {flat!r:.200} lies in no class folder, so it has no label",
                remedy="Put the images of each class in a folder of its own.",
            )
        labels = [key.split("/")[0] for key in keys]
    numbers = kind == "webdataset" and all(label.isascii() and label.isdigit() for label in labels)
    _check_labels(labels, keys, name, numbers=numbers)
    if numbers:
        class_names = [str(i) for i in range(max(map(int, labels)) + 1)]
        codes = np.array([int(label) for label in labels], np.int32)
    else:
        class_names = sorted(set(labels))
        code = {label: i for i, label in enumerate(class_names)}
        codes = np.array([code[label] for label in labels], np.int32)
    packed = np.array([key_bytes(key) for key in keys])
    order = np.argsort(packed, kind="stable")
    packed = packed[order]
    twice = np.flatnonzero(packed[1:] == packed[:-1])
    if len(twice):
        raise UserError(
            f"{name}: two images have the key {key_text(packed[twice[0]])!r}",
            remedy="Give each image a name of its own, and pack them again.",
        )
    return {
        "class_names": np.frombuffer(key_bytes("\0".join(class_names)), np.uint8),
        "keys": packed,
        "labels": codes[order],
        "archives": np.array([m.archive for m in found], np.int32)[order],
        "offsets": np.array([m.offset for m in found], np.int64)[order],
        "sizes": np.array([m.size_bytes for m in found], np.int64)[order],
        "methods": np.array([m.method for m in found], np.uint8)[order],
        "unpacked": np.array([m.unpacked for m in found], np.int64)[order],
        "checksums": np.array([m.checksum for m in found], np.uint32)[order],
        "text_offsets": np.array([m.text[0] for m in found], np.int64)[order],
        "text_sizes": np.array([m.text[1] for m in found], np.int64)[order],
        "json_offsets": np.array([m.json[0] for m in found], np.int64)[order],
        "json_sizes": np.array([m.json[1] for m in found], np.int64)[order],
    }


def _check_labels(labels: Sequence[str], keys: Sequence[str], name: str, *, numbers: bool) -> None:
    """Raises `UserError` for a class that no manifest can name, by number or by text."""
    for label, key in zip(labels, keys):
        if numbers and (len(label) > 20 or int(label) >= MAX_CLASSES):
            wrong = f"{label[:20]}, but classes are numbered from 0 to {MAX_CLASSES - 1:,}"
        elif len(label) > MAX_NAME_CHARACTERS or "\0" in label or not _is_name(label):
            wrong = f"{label[:20]!r}..., which is no name: too long, with NUL, or half of a surrogate pair"
        else:
            continue
        raise UserError(f"{name}: {key!r} is of class {wrong}", remedy="Number the classes from 0, or use short names.")
    if len(set(labels)) > MAX_CLASSES:
        raise UserError(f"{name} has {len(set(labels))} classes, more than {MAX_CLASSES:,}", remedy="Check --data.")


def _is_name(label: str) -> bool:
    try:
        return bool(key_bytes(label))
    except UnicodeEncodeError:
        return False


def _without_common_folders(keys: Sequence[str]) -> list[str]:
    """Leading folders that all keys share are dropped as long as each keeps a folder: `train/n01/a` => `n01/a`."""
    split = [key.split("/") for key in keys]
    drop = 0
    while all(len(parts) > drop + 2 for parts in split) and len({parts[drop] for parts in split}) == 1:
        drop += 1
    return ["/".join(parts[drop:]) for parts in split]


def _kept_index(path: Path) -> dict[str, np.ndarray] | None:
    """A kept index, or None where there is none or it is damaged."""
    if not path.is_file():
        return None
    try:
        with explained(str(path), ""), np.load(path, allow_pickle=False) as data:
            columns = {key: data[key] for key in data.files}
    except UserError:
        return None  # it is made again
    wanted = {"class_names", *_COLUMNS}
    lengths = {len(column) for key, column in columns.items() if key != "class_names"}
    return columns if set(columns) == wanted and len(lengths) == 1 else None


def _keep_index(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Best effort: without it the next build passes over the archives again."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.atomic_write(path, [buffer.getvalue()])
    except (OSError, CacheError):
        return
