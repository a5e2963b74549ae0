"""Images, archives, tables and latents that are damaged, cut off or made to harm: refused in one line, or harmless."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.errors import UserError
from featcache.keys import from_printable, key_bytes, key_text, printable
from featcache.progress import Quiet
from featcache.share.importers import ImportRequest, import_latents, open_latents
from featcache.share.verify import verify
from featcache.sources import base as base_module
from featcache.sources import pixels as pixels_module
from featcache.sources.archives import LISTERS, Place
from featcache.sources.base import fingerprint
from featcache.sources.captions import open_captions, read_table
from featcache.sources.decoders import decode_pil, decode_turbo
from featcache.sources.open import open_source
from featcache.sources.pixels import MAX_PIXELS, BadImage, Budget, decode
from featcache.store import files
from featcache.store.places import Location


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_INDEX", str(tmp_path / "index"))
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


def built(data: Path, out: Path, **changes: Any) -> featcache.Cache:
    request = BuildRequest(data=str(data), vae="tiny", resolution=32, batch_size=4, out=out, workers=2, **changes)
    build(request, Quiet())
    return featcache.open(out)


def picture(
    kind: str = "PNG", size: tuple[int, int] = (9, 8), mode: str = "RGB", seed: int = 0, **options: Any
) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def flat_png(width: int, height: int) -> bytes:
    """A grey PNG of any size in a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer, rows = zlib.compressobj(9), b""
    for _ in range(height):
        rows += packer.compress(bytes(1 + width))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows + packer.flush()) + chunk(b"IEND", b"")


def with_size(png: bytes, width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def tar_of(members: list[tuple[str | tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    return buffer.getvalue()[: end + 1024]


def opened(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return open_source(str(path), resolution=32)


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in error.value.what
    assert len(error.value.what) < 1000
    return error.value.what


# Tars


class Memory:
    """A location with one file."""

    url = "memory"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def size(self, name: str) -> int:
        return len(self.data)

    def read(self, name: str, start: int, stop: int) -> bytes:
        assert stop <= len(self.data)
        return self.data[start:stop]

    def directories(self) -> list[str]:
        return []


def listed(data: bytes, kind: str) -> list[str]:
    place = cast(Location, Memory(data))
    return [member.key for member in LISTERS[kind]([Place(place, "set", len(data))])]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, form: int) -> None:
    long = "a_long_name_" * 12
    whole = tar_of([(f"n{i % 2}/{long * (i == 1)}{i}.png", picture(seed=i, size=(4, 4))) for i in range(3)], form)
    assert len(listed(whole, "tar")) == len(opened(tmp_path / "set.tar", whole)) == 3
    for length in range(len(whole)):
        with pytest.raises(UserError, match="not a whole tar") as error:
            listed(whole[:length], "tar")
        one_line(error)
    for length in range(0, len(whole), 101):
        with pytest.raises(UserError):
            opened(tmp_path / "set.tar", whole[:length])
    assert len(listed(whole + bytes(9216), "tar")) == 3  # padded to whole records, as tar does
    inner = tar_of([("n0.tar", whole)])
    assert len(listed(inner, "class tars")) == 3
    for length in range(0, len(inner), 3):
        with pytest.raises(UserError, match="not a whole tar"):
            listed(inner[:length], "class tars")
    for length in range(0, len(whole), 64):
        with pytest.raises(UserError, match="not a whole tar"):
            listed(tar_of([("n0.tar", whole[:length])]), "class tars")


def test_a_tar_without_its_end_mark_is_refused_until_it_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    whole = tar_of([("n0/a.png", picture())])
    with pytest.raises(UserError, match="end mark") as error:
        opened(path, whole[:-1024])
    assert error.value.remedy is not None
    command = error.value.remedy[error.value.remedy.index("head -c") :].replace("FILE.tar", str(path))
    subprocess.run(["bash", "-c", command], check=True)
    assert len(open_source(str(path), resolution=32)) == 1


def test_a_tar_that_goes_on_after_its_end_or_breaks_in_the_middle_is_refused(tmp_path: Path) -> None:
    one, two = (tar_of([(f"n0/{i}.png", picture(seed=i))]) for i in range(2))
    with pytest.raises(UserError, match="goes on after its end mark"):
        opened(tmp_path / "set.tar", one + two)
    both = bytearray(tar_of([(f"n0/{i}.png", picture(seed=i, size=(4, 4))) for i in range(3)]))
    second = both.index(b"n0/1.png")
    both[second : second + 100] = bytes(100)  # its header's checksum is wrong now
    with pytest.raises(UserError, match="no header at byte"):
        opened(tmp_path / "set.tar", bytes(both))


def test_tars_made_to_hang_or_to_fill_the_memory_are_refused_at_once(tmp_path: Path) -> None:
    back = tarfile.TarInfo("n0/a.png")
    data = bytearray(tar_of([(back, picture())]))
    data[124:136] = b"\xff" * 12  # a size of -1, or of -512 and so on: the next header is this one again
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    huge = tarfile.TarInfo("x")
    huge.type, huge.size = tarfile.XHDTYPE, 8 << 30
    chain = b"".join(tarfile.TarInfo("y").tobuf().replace(b"0ustar", b"xustar") for _ in range(3))
    nested = tarfile.TarInfo("y")
    nested.type = tarfile.GNUTYPE_LONGNAME
    for case in (bytes(data), huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024), chain, nested.tobuf() * 5000 + bytes(1024)):
        start = time.monotonic()
        with pytest.raises(UserError) as error:
            opened(tmp_path / "set.tar", case)
        one_line(error)
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["n0/../../x.png", "/n0/x.png", "../n0/x.png", "n0/a\0b.png"])
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path: Path, name: str) -> None:
    form = tarfile.PAX_FORMAT if "\0" in name else tarfile.GNU_FORMAT
    member = tarfile.TarInfo(name.replace("\0", "-"))
    member.pax_headers = {"path": name} if "\0" in name else {}
    with pytest.raises(UserError, match=r"absolute name, or one with '\.\.' or NUL") as error:
        opened(tmp_path / "set.tar", tar_of([("n0/1.png", picture()), (member, picture(seed=1))], form))
    one_line(error)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("n0/a-b.png" if "\0" in name else name, picture())
    data = buffer.getvalue().replace(b"a-b.png", b"a\0b.png")
    with pytest.raises(UserError, match=r"absolute name, or one with '\.\.' or NUL"):
        opened(tmp_path / "set.zip", data)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_refused_and_folders_passed_over(tmp_path: Path, kind: bytes) -> None:
    folder, link = tarfile.TarInfo("n0/folder.png"), tarfile.TarInfo("n0/link.png")
    folder.type, link.type, link.linkname = tarfile.DIRTYPE, kind, "n0/1.png"
    assert len(opened(tmp_path / "set.tar", tar_of([("n0/1.png", picture()), (folder, b"")]))) == 1
    with pytest.raises(UserError, match=r"'n0/link\.png' is a link or something else") as error:
        opened(tmp_path / "set.tar", tar_of([("n0/1.png", picture()), (link, b"")]))
    assert "tar --dereference --hard-dereference" in str(error.value.remedy)


# Zips


def zip_of(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue()


def test_a_zip_cut_or_changed_in_its_directory_is_refused(tmp_path: Path) -> None:
    whole = zip_of([(f"n{i % 2}/{i}.png", picture(seed=i)) for i in range(3)])
    path = tmp_path / "set.zip"
    assert len(opened(path, whole)) == 3
    for length in range(len(whole)):
        with pytest.raises(UserError):
            listed(whole[:length], "zip")
    fewer = bytearray(whole)
    fewer[-12:-10] = (2).to_bytes(2, "little")
    with pytest.raises(UserError, match="holds 3 entries instead of 2"):
        opened(path, bytes(fewer))


def test_a_zip_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path: Path) -> None:
    bomb = zip_of([("n0/a.png", picture()), ("n0/b.png", bytes(64 << 20))])
    assert len(bomb) < 100_000
    with pytest.raises(UserError, match=r"'n0/b\.png' claims 67108864 bytes in \d+"):
        opened(tmp_path / "set.zip", bomb)
    # One that lies about it: unpacking stops where it should have ended.
    lying = bytearray(bomb)
    directory = lying.index(b"PK\1\2", lying.index(b"PK\1\2") + 1)
    lying[directory + 24 : directory + 28] = (1000).to_bytes(4, "little")
    source = opened(tmp_path / "set.zip", bytes(lying))
    before = peak_bytes()
    with pytest.raises(BadImage, match="CRC-32") as error:
        source.load(1, 32)
    one_line(error)
    assert peak_bytes() - before < 16 << 20
    assert source.load(0, 32)[0].shape == (32, 32, 3)


def peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_members_on_top_of_each_other_are_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of([(f"n0/{i}.png", picture(seed=i)) for i in range(2)]))
    second = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    data[second + 42 : second + 46] = bytes(4)  # the first one's bytes again
    with pytest.raises(UserError, match="lies on top of another member"):
        opened(tmp_path / "set.zip", bytes(data))


def test_zip_members_that_are_encrypted_twice_or_links_are_refused(tmp_path: Path) -> None:
    data = bytearray(zip_of([("n0/a.png", picture())]))
    data[data.index(b"PK\1\2") + 8] |= 1
    with pytest.raises(UserError, match="encrypted"):
        opened(tmp_path / "set.zip", bytes(data))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zip_of([("n0/a.png", picture()), ("n0/a.png", picture(seed=1))])
    with pytest.raises(UserError, match=r"two images have the key 'n0/a\.png'"):
        opened(tmp_path / "set.zip", twice)
    link = zipfile.ZipInfo("n0/b.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="is a link"):
        opened(tmp_path / "set.zip", buffer.getvalue())


def test_a_damaged_member_of_a_zip_is_a_bad_image(tmp_path: Path) -> None:
    data = bytearray(zip_of([("n0/a.png", picture(size=(40, 40))), ("n0/b.png", picture())], zipfile.ZIP_STORED))
    data[data.index(b"IDAT") + 900] ^= 1
    source = opened(tmp_path / "set.zip", bytes(data))
    with pytest.raises(BadImage, match="CRC-32"):
        source.load(0, 32)
    assert source.load(1, 32)[0].shape == (32, 32, 3)


# Webdataset


@pytest.mark.parametrize("label", ["3000000000", "1048576", "9" * 5000, "²", "a\0b", "x" * 5000])
def test_labels_that_are_no_classes_are_refused(tmp_path: Path, label: str) -> None:
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [("a.png", picture()), ("a.cls", label.encode())]
    if label == "²":  # a digit to Python, but no number
        assert opened(tmp_path / "set.tar", tar_of(members)).class_names == ("²",)
        return
    with pytest.raises(UserError, match="is of class") as error:
        opened(tmp_path / "set.tar", tar_of(members))
    one_line(error)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"label": true}', b'{"label": 1.5}', b"\xff", b'{"label":' + b"9" * 5000]
)
def test_json_members_that_give_no_label_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"the \.json beside 'a\.png' is damaged, or its label") as error:
        opened(tmp_path / "set.tar", tar_of([("a.json", content), ("a.png", picture())]))
    one_line(error)
    with pytest.raises(UserError, match=r"has 5000000 bytes, more than"):
        opened(tmp_path / "set.tar", tar_of([("a.json", b" " * 5_000_000), ("a.png", picture())]))


def test_a_sample_of_two_images_is_refused_and_one_beside_its_image_passed_over(tmp_path: Path) -> None:
    one, mask = picture(seed=1), picture(seed=2)
    both = tar_of([("a.cls", b"0"), ("a.jpg", one), ("a.png", mask)])
    with pytest.raises(UserError, match=r"sample 'a' has two members"):
        opened(tmp_path / "set.tar", both)
    source = opened(tmp_path / "set.tar", tar_of([("a.cls", b"0"), ("a.jpg", one), ("a.mask.png", mask)]))
    assert [source.key(i) for i in range(len(source))] == ["a.jpg"]
    assert source.read(0) == one


@pytest.mark.parametrize(
    "content", [b'{"caption": "\\ud800"}', b'{"caption": ' + b"[" * 50_000, b'{"caption": 5}', b"{"]
)
def test_captions_in_hostile_json_are_refused(tmp_path: Path, content: bytes) -> None:
    source = opened(tmp_path / "set.tar", tar_of([("a.cls", b"0"), ("a.json", content), ("a.png", picture())]))
    with pytest.raises(UserError, match=r"its \.json") as error:
        open_captions(source, table=None, key=None).of(0)
    one_line(error)


# Names

NAMES = [
    b"caf\xe9.png",
    b"\xff\xfe.png",
    b"\xc3\xa9.png",  # composed and decomposed: two files
    b"e\xcc\x81.png",
    b"line\nbreak.png",
    b"[red]markup[-red].png",
    b"\x1b[31mred\x1b[0m.png",
    b"\\xe9.png",
    b"\\x5c\xe9.png",
    "\N{GRINNING FACE}.png".encode(),
    b"tab\there .png",
    b"n" * 251 + b".png",
]


def test_keys_keep_the_bytes_of_any_file_name() -> None:
    rng = np.random.default_rng(0)
    alphabet = np.array([0x5C, *b"xabce59", 0xE9, 0xC3, 0xA9, 0xFF, *b"5c"], np.uint8)
    names = [*NAMES, *(bytes(rng.choice(alphabet, size=rng.integers(1, 12))) for _ in range(20_000))]
    texts = [key_text(name) for name in names]
    assert [key_bytes(text) for text in texts] == names
    shown = [printable(text) for text in texts]
    assert all(text.encode() and json.loads(json.dumps(text)) == text for text in shown)
    assert [from_printable(text) for text in shown] == texts
    assert printable("a\\b/ü.png") == "a\\b/ü.png"


def test_a_cache_of_files_with_any_names(tmp_path: Path) -> None:
    """Latin-1 and worse: built, verified, read back, skipped, and joined by a feature."""
    data = tmp_path / "images"
    folders = [os.fsencode(data) + b"/" + name for name in (b"stra\xdfe", b"two\nlines[bold]")]
    expected = []
    for folder in folders:
        Path(os.fsdecode(folder)).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            with open(folder + b"/" + name, "wb") as file:  # noqa: PTH123 (names of bytes)
                file.write(picture(seed=i))
            expected.append(folder.rpartition(b"/")[2] + b"/" + name)
    with open(folders[0] + b"/b\xe4d.png", "wb") as file:  # noqa: PTH123
        file.write(b"no image")
    cache = built(data, tmp_path / "cache", on_bad_image="skip")
    assert sorted(key_bytes(key) for key in cache.keys(0)) == sorted(expected)
    assert verify(tmp_path / "cache").ok
    manifest = json.loads((tmp_path / "cache/zarr.json").read_bytes())["attributes"]["featcache"]
    assert [entry["key"] for entry in manifest["skipped"]] == ["stra\\xdfe/b\\xe4d.png"]
    assert manifest["dataset"]["class_names"] == ["stra\\xdfe", "two\nlines[bold]"]
    request = BuildRequest(data=str(data), into=tmp_path / "cache", encoders=(tiny_choice(),), workers=1)
    build(request, Quiet())
    assert verify(tmp_path / "cache").ok
    # The same, from archives.
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(data, ".")
    source = open_source(str(tmp_path / "set.tar"), resolution=32)
    assert [source.key(i) for i in range(len(source))] == sorted(
        map(key_text, [*expected, b"stra\xdfe/b\xe4d.png"]), key=key_bytes
    )
    assert source.class_names == tuple(manifest["dataset"]["class_names"])
    again = open_source(str(tmp_path / "set.tar"), resolution=32)  # from the kept index
    assert again.class_names == source.class_names
    assert fingerprint(source, range(len(source))) == cache.manifest.dataset.fingerprint
    # And named in a table of captions.
    (tmp_path / "captions.csv").write_text("key,caption\nstra\\xdfe/caf\\xe9.png,coffee\n", encoding="utf-8")
    captions = read_table(tmp_path / "captions.csv", source)
    (index,) = [i for i in range(len(source)) if key_bytes(source.key(i)) == b"stra\xdfe/caf\xe9.png"]
    assert captions.of(index) == ("coffee",)


def tiny_choice() -> Any:
    from featcache.encoders import EncoderChoice

    return EncoderChoice(name="tiny", layers=(2,))


# Images


def test_other_formats_are_bad_images_whatever_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []

    def start(*words: object, **_: object) -> None:
        started.append(words)
        pytest.fail("a program was started")

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("subprocess.check_call", start)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (eps, picture("BMP"), picture("GIF"), picture("TIFF"), picture("PPM"), b"<svg/>", b""):
        for read in (decode_pil, decode_turbo):
            with pytest.raises(BadImage, match="not an image of a known format"):
                read(data, "n0/x.jpg", 32)
    assert not started


def test_images_of_too_many_pixels_are_told_by_their_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    side = 1 + int(MAX_PIXELS**0.5)
    jpeg = bytearray(picture("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    webp = bytearray(picture("WEBP", mode="RGBA", lossless=True, exif=b"x"))
    webp[24:30] = (side - 1).to_bytes(3, "little") * 2
    simple = bytearray(picture("WEBP"))
    simple[26:30] = struct.pack("<HH", side, side)
    lossless = bytearray(picture("WEBP", lossless=True))
    lossless[21:25] = (side - 1 | side - 1 << 14).to_bytes(4, "little")
    cases = [bytes(jpeg), with_size(picture(), side, side), bytes(webp), bytes(simple), bytes(lossless)]
    before = peak_bytes()
    for data in cases:
        for read in (decode_pil, decode_turbo):
            with pytest.raises(BadImage, match=rf"has {side} x {side} pixels, more than the 178,000,000") as error:
                read(data, "n0/x.jpg", 32)
            one_line(error)
    assert peak_bytes() - before < 64 << 20


def test_a_large_photograph_is_decoded_without_a_word(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """PIL warns of an attack from 89 megapixels, and refuses from 179: its bound is not ours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in ("JPEG", "PNG"):
        data = picture(kind, size=(100, 100))
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(data))
        assert decode_pil(data, "x", 32).shape == (32, 32, 3)
    assert not recwarn.list


def test_narrow_images_are_cropped_as_long_as_that_is_possible() -> None:
    assert decode_pil(picture(size=(1, 1)), "x", 32).shape == (32, 32, 3)
    assert decode_pil(picture(size=(1, 3000)), "x", 32).shape == (32, 32, 3)
    with pytest.raises(BadImage, match="1 x 60000 pixels are too narrow to crop at 256"):
        decode_pil(picture(size=(1, 60_000)), "x", 256)
    with pytest.raises(BadImage, match="60000 x 1 pixels are too narrow to crop at 256"):
        decode_turbo(picture("JPEG", size=(60_000, 1)), "x", 256)


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def test_unusual_images_are_decoded_as_documented() -> None:
    deep = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    buffer = io.BytesIO()
    deep.save(buffer, "PNG")
    cases = {
        "16 bit": buffer.getvalue(),
        "cmyk": picture("JPEG", mode="CMYK"),
        "large exif": picture("JPEG", exif=b"Exif\0\0" + bytes(60_000)),
        "large profile": picture("JPEG", icc_profile=bytes(500_000)),
    }
    for name, data in cases.items():
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(decode(data, name)), np.asarray(image.convert("RGB"))), name
    for kind in ("WEBP", "PNG"):
        assert (np.asarray(decode(animation(kind), kind)) == (255, 0, 0)).all()  # the first frame
    cut = picture("JPEG", size=(200, 200))
    for data in (cut[:900], picture(size=(200, 200))[:900], picture("WEBP", size=(200, 200))[:900]):
        with pytest.raises(BadImage) as error:
            decode(data, "n0/x.jpg")
        one_line(error)


def test_a_budget_lets_in_what_fits_and_what_is_alone() -> None:
    budget, inside, most = Budget(10), 0, 0
    lock = threading.Lock()

    def work(size: int) -> None:
        nonlocal inside, most
        with budget.claim(size):
            with lock:
                inside += size
                most = max(most, inside)
            time.sleep(0.002)
            with lock:
                inside -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in [1, 4, 3, 25, 7, 2] * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert most == 25  # the one that is larger than the budget, by itself


BOMBS = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from featcache.sources import pixels
from featcache.sources.decoders import decode_pil
pixels.PIXELS_IN_FLIGHT = pixels.Budget(int(sys.argv[2]))
data = Path(sys.argv[1]).read_bytes()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
before = peak()
with ThreadPoolExecutor(16) as pool:
    assert all(crop.shape == (32, 32, 3) for crop in pool.map(lambda i: decode_pil(data, str(i), 32), range(13)))
print(peak() - before)
"""


def growth_bytes(file: Path, budget_bytes: int) -> int:
    command = [sys.executable, "-c", BOMBS, str(file), str(budget_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("decoder", ["pil", "turbo"])
def test_many_workers_decode_no_more_at_once_than_the_budget_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
) -> None:
    (tmp_path / "images/n0").mkdir(parents=True)
    for i in range(20):
        (tmp_path / f"images/n0/{i}.jpg").write_bytes(picture("JPEG", size=(100, 100), seed=i))
    source = open_source(str(tmp_path / "images"), resolution=32)
    busy, most, lock = 0, 0, threading.Lock()
    crop = pixels_module.center_crop

    def slow_crop(image: Image.Image, size: int) -> np.ndarray:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.005)
        with lock:
            busy -= 1
        return crop(image, size)

    monkeypatch.setattr("featcache.sources.decoders.center_crop", slow_crop)
    # An image takes 5 bytes a pixel in PIL and 8 in libjpeg-turbo, and 4 a pixel of what is cut from.
    for budget, expected in ((170_000, {"pil": 3, "turbo": 2}[decoder]), (1, 1)):
        most = 0
        monkeypatch.setattr(pixels_module, "PIXELS_IN_FLIGHT", Budget(budget))
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: source.load(i, 32, decoder), range(len(source))))
        assert most == expected
    most = 0
    monkeypatch.setattr(pixels_module, "PIXELS_IN_FLIGHT", Budget(1 << 40))
    monkeypatch.setattr(base_module, "FILES_IN_FLIGHT", Budget(1))
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: source.load(i, 32, decoder), range(len(source))))
    assert most == 1


@pytest.mark.slow
def test_thirteen_small_files_of_110_megapixels_stay_in_bounds(tmp_path: Path) -> None:
    """14 GB if sixteen workers decoded them together."""
    (tmp_path / "bomb.png").write_bytes(flat_png(11_000, 10_000))
    assert growth_bytes(tmp_path / "bomb.png", 2 << 30) < 3 << 30


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("n0", "n1"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(picture(seed=i))
    return tmp_path / "images"


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return "it is a FIFO, no file"


def unix_socket(path: Path) -> str:
    here = Path.cwd()
    os.chdir(path.parent)  # the path would be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)
    return "it is a socket, no file"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "it is a device, no file"


def dangling(path: Path) -> str:
    path.symlink_to("nowhere")
    return "No such file or directory"


def circle(path: Path) -> str:
    path.symlink_to(path.name)
    return "Too many levels of symbolic links"


@pytest.mark.parametrize("make", [fifo, unix_socket, device, dangling, circle])
def test_what_is_no_file_is_a_bad_image(folder: Path, tmp_path: Path, make: Callable[[Path], str]) -> None:
    reason = make(folder / "n0/x.jpg")
    with pytest.raises(BadImage, match=rf"'n0/x\.jpg': {reason}") as error:
        built(folder, tmp_path / "cache")
    one_line(error)
    cache = built(folder, tmp_path / "cache2", on_bad_image="skip")
    assert [(s.key, s.reason) for s in cache.manifest.skipped] == [("n0/x.jpg", reason)]
    assert len(cache) == 4


def test_a_folder_may_have_the_name_of_an_image(folder: Path) -> None:
    (folder / "n0/x.jpg").mkdir()
    (folder / "n0/x.jpg/y.png").write_bytes(picture())
    source = open_source(str(folder), resolution=32)
    assert "n0/x.jpg/y.png" in [source.key(i) for i in range(len(source))]


def test_links_are_followed_and_circles_of_folders_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(picture())
    (folder / "n2").symlink_to(tmp_path / "elsewhere")
    (folder / "n0/link.png").symlink_to(tmp_path / "elsewhere/a.png")
    (folder / "n1/up").symlink_to(folder)
    (folder / "n1/self").symlink_to(folder / "n1")
    source = open_source(str(folder), resolution=32)
    names = ["n0/0.png", "n0/1.png", "n0/link.png", "n1/0.png", "n1/1.png", "n2/a.png"]
    assert [source.key(i) for i in range(len(source))] == names


def test_links_that_multiply_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    """Twenty folders, each with two links to the next: a million ways to the last."""
    steps = [tmp_path / f"step{i}" for i in range(20)]
    for step in steps:
        step.mkdir()
    for here, there in itertools.pairwise(steps):
        (here / "a").symlink_to(there)
        (here / "b").symlink_to(there)
    (folder / "n0/in").symlink_to(steps[0])
    start = time.monotonic()
    with pytest.raises(UserError, match="more than 64 links lead to the folder"):
        open_source(str(folder), resolution=32)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENAMETOOLONG])
def test_errors_of_the_disk_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    source = open_source(str(folder), resolution=32)
    real = os.open

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith("n0/1.png"):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **named)

    monkeypatch.setattr("os.open", failing)
    # Nothing is wrong with the image where the network file system has lost it for now: skipping it would be wrong.
    with pytest.raises(UserError if code == errno.ESTALE else BadImage, match=os.strerror(code)) as error:
        source.load(1, 32)
    assert isinstance(error.value, BadImage) == (code != errno.ESTALE)
    one_line(error)


def test_a_folder_that_cannot_be_listed_is_not_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def failing(path: Any) -> Any:
        if str(path).rstrip("/").endswith("n1"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr("os.scandir", failing)
    with pytest.raises(UserError, match=r"n1.*Permission denied"):
        open_source(str(folder), resolution=32)


def test_a_name_that_is_too_long_is_one_line() -> None:
    with pytest.raises(UserError, match="File name too long"):
        open_source("x" * 5000, resolution=32)


def test_files_larger_than_any_image_are_bad(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "n0/0.png").open("r+b") as file:
        file.truncate(pixels_module.MAX_FILE_BYTES + 1)
    with pytest.raises(BadImage, match="more than the 268,435,456 that are read"):
        open_source(str(folder), resolution=32).load(0, 32)


def test_a_network_that_fails_is_no_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --on-bad-image skip the whole archive would be left out."""
    from featcache.errors import CacheError
    from featcache.store.places import LocalLocation

    source = opened(tmp_path / "set.tar", tar_of([("n0/a.png", picture())]))

    def failing(*_: object) -> bytes:
        raise CacheError("it failed 6 times")

    monkeypatch.setattr(LocalLocation, "read", failing)
    with pytest.raises(CacheError, match="6 times"):
        source.load(0, 32)


# Tables


def parquet(path: Path, labels: Any, images: Any = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [{"bytes": picture(seed=i), "path": ""} for i in range(len(labels))] if images is None else images
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return open_source(str(path), resolution=32)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1.5, 2.5], "holds double, no integers"),
        ([1.0, float("nan")], "holds double, no integers"),
        ([True, False], "holds bool, no integers"),
        (["a", "b"], "holds string, no integers"),
        ([1, None], "has 1 labels for 2 rows"),
        ([0, 3_000_000_000], "has the label 3000000000"),
        ([0, -1], "rows without a label"),
        (np.array([0, 2**63 + 5], np.uint64), "has the label 9223372036854775813"),
        ([[1], [2]], "no integers"),
    ],
)
def test_labels_of_parquet_files_are_integers_of_classes(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parquet(tmp_path / "set.parquet", labels)
    one_line(error)


def test_images_of_parquet_files_are_bytes(tmp_path: Path) -> None:
    for images in (["a", "b"], [1, 2], [{"path": "a"}, {"path": "b"}], [[1], [2]]):
        with pytest.raises(UserError, match="no encoded images"):
            parquet(tmp_path / "set.parquet", [0, 1], images)
    source = parquet(tmp_path / "set.parquet", [0, 1], [{"bytes": None, "path": "x"}, {"bytes": picture(), "path": ""}])
    with pytest.raises(BadImage, match="the row holds no image"):
        source.load(0, 32)
    assert source.load(1, 32)[0].shape == (32, 32, 3)


def test_a_parquet_file_of_more_rows_than_bytes_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = 3_000_000
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([b"x"])).cast(pa.binary())
    with pytest.raises(UserError, match="claims 3000000 rows"):
        parquet(tmp_path / "set.parquet", pa.array(np.zeros(rows, np.int64)), images)


def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.sources.parquet._SMALL_BYTES", 1 << 20)
    source = parquet(tmp_path / "set.parquet", [0] * 40, [bytes(1 << 20)] * 40)
    with pytest.raises(UserError, match="are 100 times as large as the file"):
        source.load(0, 32)


CSV_CASES = {
    b"key,caption\nshapes/0/00000001,one, two\n": "line 2: 3 cells under a header of 2",
    b'key,caption\nshapes/0/00000001,"one\nshapes/0/00000002,two\n': "unexpected end of data",
    b'key,caption\nshapes/0/00000001,"one"two\n': "after line 1",
    b"key,caption\nshapes/0/00000001,a\0b\n": "line 2 holds a NUL byte",
    "key,caption\nshapes/0/00000001,über\n".encode("latin-1"): "not a CSV file in UTF-8",
    "key,caption\nshapes/0/00000001,x\n".encode("utf-16"): "not a CSV file in UTF-8",
    b"key,caption\nshapes/0/00000001," + b"x" * 10_000_000: "not a CSV file in UTF-8",
    b"x" * 20_000_000: "a line of 8,388,608 characters or more",
    b"name,caption\nshapes/0/00000001,x\n": "must have a header",
    b"key,key,caption\na,b,c\n": "two columns named 'key'",
    b"key\nshapes/0/00000001\n": "must have a header",
    b"": "must have a header",
}


@pytest.mark.parametrize("number", range(len(CSV_CASES)))
def test_tables_of_captions_that_are_no_tables_are_refused(tmp_path: Path, number: int) -> None:
    data, message = list(CSV_CASES.items())[number]
    (tmp_path / "captions.csv").write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_table(tmp_path / "captions.csv", open_source("shapes", resolution=32, limit=5))
    one_line(error)
    assert error.value.remedy


# Imports


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    place = tmp_path / "latents"
    place.mkdir()
    for i in range(3):
        (place / f"{i}.npy").write_bytes(npy(np.ones((8, 2, 2), np.float32)))
    (place / "dataset.json").write_text(json.dumps({"labels": [[f"{i}.npy", i] for i in range(3)]}))
    return place


@pytest.mark.parametrize(
    "labels",
    [
        '{"labels": [["0.npy", 1.5], ["1.npy", 1], ["2.npy", 1]]}',
        '{"labels": [["0.npy", true], ["1.npy", 1], ["2.npy", 1]]}',
        '{"labels": [["0.npy", "1"], ["1.npy", 1], ["2.npy", 1]]}',
        '{"labels": [["0.npy", 3000000000], ["1.npy", 1], ["2.npy", 1]]}',
        '{"labels": [["0.npy", -1], ["1.npy", 1], ["2.npy", 1]]}',
        '{"labels": [["0.npy", 1e400], ["1.npy", 1], ["2.npy", 1]]}',
        '{"labels": [["0.npy", 1], ["1.npy", 1]]}',
        '{"labels": [["0.npy"], 5]}',
        "[" * 100_000,
        '{"labels":' * 100_000,
        "",
    ],
)
def test_labels_of_latents_are_integers_of_classes(latents: Path, labels: str) -> None:
    (latents / "dataset.json").write_text(labels)
    with pytest.raises(UserError, match="label") as error:
        open_latents(latents, "repa")
    one_line(error)


def test_latents_that_are_missing_or_no_files_are_told(latents: Path) -> None:
    (latents / "dataset.json").rename(latents / "other.json")
    with pytest.raises(UserError, match=r"dataset\.json cannot be read: No such file"):
        open_latents(latents, "repa")
    os.mkfifo(latents / "dataset.json")
    with pytest.raises(UserError, match="it is a FIFO, no file"):
        open_latents(latents, "repa")


@pytest.mark.parametrize("layout", ["repa", "lightningdit"])
def test_links_out_of_received_latents_are_refused(latents: Path, tmp_path: Path, layout: str) -> None:
    name = "0.npy" if layout == "repa" else "a.safetensors"
    secret = tmp_path / "secret"
    secret.write_bytes((latents / "0.npy").read_bytes())
    (latents / name).unlink(missing_ok=True)
    (latents / name).symlink_to(secret)
    with pytest.raises(UserError, match="a link that leads out of the folder"):
        open_latents(latents, layout)
    if layout == "repa":
        (latents / name).unlink()
        (latents / name).symlink_to("1.npy")  # within it they are
        assert open_latents(latents, layout).read(0).shape == (1, 8, 2, 2)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-8, 2, 2), }",
        "(" * 9000,
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (32,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (8, 2, 2), }",
    ],
)
def test_headers_of_arrays_that_lie_are_refused(latents: Path, header: str) -> None:
    data = b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + bytes(128)
    (latents / "0.npy").write_bytes(data)
    before = peak_bytes()
    with pytest.raises(UserError, match=r"not a \.npy file|no floating-point numbers|has shape") as error:
        open_latents(latents, "repa").read(0)
    one_line(error)
    assert peak_bytes() - before < 64 << 20


def test_a_zip_of_latents_may_be_a_bomb(latents: Path, tmp_path: Path) -> None:
    def attempt(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
        with zipfile.ZipFile(tmp_path / "latents.zip", "w", method) as archive:
            for name, data in {"dataset.json": b'{"labels": [["0.npy", 0]]}', **members}.items():
                archive.writestr(name, data)
        open_latents(tmp_path / "latents.zip", "edm2").read(0)

    good = (latents / "0.npy").read_bytes()
    attempt({"0.npy": good})
    before = peak_bytes()
    with pytest.raises(UserError, match=r"0\.npy cannot be read: it has more than"):
        attempt({"0.npy": bytes(80 << 20)})
    with pytest.raises(UserError, match="packed by an unusual method"):
        attempt({"0.npy": good}, zipfile.ZIP_LZMA)
    assert peak_bytes() - before < 200 << 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "float"}, "labels are"),
        ({"labels": "short"}, "labels are"),
        ({"labels": "large"}, "a label is 3000000000"),
        ({"latents": "int"}, "floating-point numbers"),
        ({"labels": None}, "lacks labels"),
        ({"cut": True}, "not a safetensors file"),
    ],
)
def test_safetensors_of_other_kinds_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    import torch
    from safetensors.torch import save

    labels = {"float": torch.ones(3), "short": torch.ones(2).long(), "large": torch.full((3,), 3_000_000_000)}
    tensors = {"latents": torch.ones(3, 4, 2, 2), "latents_flip": torch.ones(3, 4, 2, 2), "labels": torch.arange(3)}
    if "labels" in changes:
        tensors["labels"] = labels.get(changes["labels"])  # type: ignore[assignment]
    if "latents" in changes:
        tensors["latents"] = tensors["latents"].int()
    data = save({name: tensor for name, tensor in tensors.items() if tensor is not None})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.safetensors").write_bytes(data[:-8] if "cut" in changes else data)
    with pytest.raises(UserError, match=message) as error:
        import_latents(ImportRequest(source=tmp_path / "set", out=tmp_path / "cache", layout="lightningdit"))
    one_line(error)


# All of it, at random


@pytest.mark.parametrize(
    "kind",
    ["tar", "webdataset", "zip", "parquet", "jpeg", "png", "webp", "csv", "npy", "json", "npz", "safetensors"],
)
def test_mutated_files_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    from tests.attacks.fuzz_inputs import run

    assert run(kind, 200, seed=0, folder=tmp_path) == []


def test_the_fuzzers_begin_with_files_that_are_read(tmp_path: Path) -> None:
    from tests.attacks.fuzz_inputs import KINDS

    for kind, (make, _, read) in KINDS.items():
        for i, data in enumerate(make()):
            place = tmp_path / f"{kind}{i}"
            place.mkdir()
            if kind == "csv" and i > 1:  # UTF-16 and Latin-1
                with pytest.raises(UserError):
                    read(data, place)
            else:
                read(data, place)
