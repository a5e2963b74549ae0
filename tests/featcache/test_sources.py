"""Archives and parquet files give the samples that a folder of the same files gives."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web_server import serve

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.sources.archives import _expanded, index_folder
from featcache.sources.base import Source, fingerprint
from featcache.sources.folder import open_folder, refuse_splits
from featcache.sources.open import open_source
from featcache.sources.pixels import BadImage

CLASSES = {"n01": 3, "n02": 2, "n03": 4}


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATCACHE_INDEX", str(tmp_path / "index"))
    return tmp_path / "index"


def jpeg(seed: int, width: int = 50, height: int = 40) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for c, (name, count) in enumerate(CLASSES.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}_{i}.JPEG").write_bytes(jpeg(10 * c + i))
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def tar_bytes(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            add(tar, name, data)
    return buffer.getvalue()


def class_files(folder: Path, name: str) -> dict[str, bytes]:
    # In another order than the sorted one, as tars have.
    return {p.name: p.read_bytes() for p in sorted((folder / name).iterdir(), reverse=True)}


def imagenet_tar(folder: Path, target: Path) -> str:
    inner = {f"{name}.tar": tar_bytes(class_files(folder, name)) for name in reversed(CLASSES)}
    (target / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    return str(target / "ILSVRC2012_img_train.tar")


def folder_of_class_tars(folder: Path, target: Path) -> str:
    (target / "train").mkdir()
    for name in CLASSES:
        (target / f"train/{name}.tar").write_bytes(tar_bytes(class_files(folder, name)))
    return str(target / "train")


def packed_folder(folder: Path, target: Path) -> str:
    long = "a_rather_long_name_of_a_folder/" * 5  # over the 100 characters of a plain header
    files = {f"{long}{p.relative_to(folder).as_posix()}": p.read_bytes() for p in folder.rglob("*.JPEG")}
    (target / "packed.tar").write_bytes(tar_bytes(files, tarfile.PAX_FORMAT))
    return str(target / "packed.tar")


def zipped(folder: Path, target: Path) -> str:
    with zipfile.ZipFile(target / "packed.zip", "w") as archive:
        for i, file in enumerate(sorted(folder.rglob("*.JPEG"))):
            packing = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            archive.write(file, f"train/{file.relative_to(folder).as_posix()}", packing)
        archive.writestr("train/readme.txt", "no image")
        archive.writestr("__MACOSX/train/n01/._n01_0.txt", "no image")
    return str(target / "packed.zip")


PACKINGS: dict[str, Callable[[Path, Path], str]] = {
    "imagenet": imagenet_tar,
    "class tars": folder_of_class_tars,
    "tar": packed_folder,
    "zip": zipped,
}


def samples(source: Source) -> list[tuple[str, int, bytes, int]]:
    loaded = [source.load(i, 32) for i in range(len(source))]
    return [(source.key(i), source.label(i), p.tobytes(), c) for i, (p, c) in enumerate(loaded)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_archive_is_the_folder_it_was_made_of(folder: Path, tmp_path: Path, packing: str) -> None:
    plain = open_source(str(folder), resolution=32)
    packed = open_source(PACKINGS[packing](folder, tmp_path), resolution=32)
    assert packed.class_names == plain.class_names == tuple(CLASSES)
    assert samples(packed) == samples(plain)
    if packing != "zip":  # a deflated member's size is not its file's
        assert fingerprint(packed, range(9)) == fingerprint(plain, range(9))


def wds_shards(folder: Path, target: Path, label: str = "cls") -> str:
    files = sorted(folder.rglob("*.JPEG"), key=lambda p: p.stem[::-1])
    for shard in range(2):
        members = {}
        for file in files[shard::2]:
            number = sorted(CLASSES).index(file.parent.name)
            members[f"{file.stem}.jpg"] = file.read_bytes()
            if label == "cls":
                members[f"{file.stem}.cls"] = str(number).encode()
            elif label == "json":
                members[f"{file.stem}.json"] = json.dumps({"label": number, "width": 3}).encode()
        (target / f"set-{shard:04d}.tar").write_bytes(tar_bytes(members))
    return str(target / "set-{0000..0001}.tar")


@pytest.mark.parametrize("label", ["cls", "json"])
def test_webdataset_shards(folder: Path, tmp_path: Path, label: str) -> None:
    source = open_source(wds_shards(folder, tmp_path, label), resolution=32)
    plain = open_source(str(folder), resolution=32)
    assert source.class_names == ("0", "1", "2")
    expected = {Path(k).stem: (label, pixels, content) for k, label, pixels, content in samples(plain)}
    got = {Path(k).stem: (label, pixels, content) for k, label, pixels, content in samples(source)}
    assert got == expected
    with pytest.raises(UserError, match=r"neither \.cls nor"):
        open_source(wds_shards(folder, tmp_path, "none").replace("{0000..0001}", "*"), resolution=32)
    (tmp_path / "gap.tar").write_bytes(tar_bytes({"a.jpg": jpeg(0), "a.cls": b"1", "b.jpg": jpeg(1), "c.cls": b"0"}))
    with pytest.raises(UserError, match="sample 'b'"):
        open_source(str(tmp_path / "gap.tar"), resolution=32)


def test_shards_behind_a_url_are_read_by_range(folder: Path, tmp_path: Path) -> None:
    pattern = wds_shards(folder, tmp_path)
    with serve(tmp_path) as server:
        source = open_source(f"{server.url}/set-{{0000..0001}}.tar", resolution=32)
        assert samples(source) == samples(open_source(pattern, resolution=32))


def test_a_replaced_archive_behind_a_url_is_indexed_again(tmp_path: Path) -> None:
    """Tars have lengths in steps of ten kilobytes: another one is often as long."""
    with serve(tmp_path) as server:
        url = f"{server.url}/a.tar"
        for number, etag in ((0, '"first"'), (1, '"second"')):
            server.etag = etag
            files = {"x.jpg": jpeg(number), "x.cls": b"%d" % number}
            (tmp_path / "a.tar").write_bytes(tar_bytes(dict(sorted(files.items(), reverse=bool(number)))))
            (image,) = samples(open_source(url, resolution=32))
            (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes())
            assert (image,) == tuple(samples(open_source(str(tmp_path / "b.tar"), resolution=32)))


def test_a_signed_url_is_used_whole_and_kept_nowhere(tmp_path: Path, own_index: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"x.jpg": jpeg(1), "x.cls": b"0"}))
    with serve(tmp_path) as server:
        source = open_source(f"{server.url}/a.tar?signature=hidden%2F", resolution=32)
        assert len(samples(source)) == 1
        assert server.asked and set(server.asked) == {"/a.tar?signature=hidden%2F"}
        with pytest.raises(UserError, match=r"signature=\*\*\* cannot be read: there is nothing") as caught:
            open_source(f"{server.url}/none.tar?signature=hidden", resolution=32)
    assert "hidden" not in f"{source.name} {source.description} {caught.value}"
    assert not any(b"hidden" in path.read_bytes() for path in own_index.iterdir())


NAMES = [b"cl\xe9/a\xe9.jpg", "cl\u00e9/\u00e9.jpg".encode(), "cl\u00e9/e\u0301.jpg".encode(), b"x/A.jpg", b"x/a.jpg"]


def test_names_in_zips_made_on_unix_are_those_of_the_files(tmp_path: Path) -> None:
    """Info-ZIP and macOS write names as they are, without the mark that they are UTF-8."""
    files = {name: jpeg(number) for number, name in enumerate(NAMES)}
    for name, data in files.items():
        path = Path(os.fsdecode(os.fsencode(tmp_path / "folder") + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "raw.zip").write_bytes(raw_zip(files))
    expected = samples(open_source(str(tmp_path / "folder"), resolution=32))
    assert samples(open_source(str(tmp_path / "raw.zip"), resolution=32)) == expected
    with zipfile.ZipFile(tmp_path / "marked.zip", "w") as archive:
        for name, data in files.items():
            if b"\xe9" not in name:
                archive.writestr(name.decode(), data)
    marked = open_source(str(tmp_path / "marked.zip"), resolution=32)
    assert [key for key, *_ in samples(marked)] == [key for key, *_ in expected if key.isascii() or "\u00e9/" in key]


def raw_zip(files: dict[bytes, bytes]) -> bytes:
    """A zip of stored members as Info-ZIP writes it: by Unix, names as bytes, no flags."""
    members, directory = b"", b""
    for name, data in files.items():
        common = struct.pack("<HHHHIIIHH", 0, 0, 0, 0x21, zlib.crc32(data), len(data), len(data), len(name), 0)
        directory += b"PK\1\2" + struct.pack("<HH", 3 << 8 | 30, 10) + common
        directory += struct.pack("<HHHII", 0, 0, 0, 0o100644 << 16, len(members)) + name
        members += b"PK\3\4" + struct.pack("<H", 10) + common + name + data
    end = struct.pack("<HHHHIIH", 0, 0, len(files), len(files), len(directory), len(members), 0)
    return members + directory + b"PK\5\6" + end


def parquet_files(folder: Path, target: Path, *, names: bool = True) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folder.rglob("*.JPEG"))
    (target / "hub").mkdir()
    for part, chosen in enumerate((files[:5], files[5:])):
        images = [{"bytes": f.read_bytes(), "path": f.name} for f in chosen]
        labels = [sorted(CLASSES).index(f.parent.name) for f in chosen]
        table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
        if names:
            info = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(table, target / f"hub/train-{part:05d}-of-00002.parquet", row_group_size=2)
    return str(target / "hub")


def test_parquet_files_of_the_hub(folder: Path, tmp_path: Path) -> None:
    source = open_source(parquet_files(folder, tmp_path), resolution=32)
    plain = samples(open_source(str(folder), resolution=32))
    assert source.class_names == tuple(CLASSES)
    got = samples(source)
    assert [s[1:] for s in got] == [s[1:] for s in plain]
    assert len({s[0] for s in got}) == 9
    assert fingerprint(source, range(9)) == fingerprint(open_source(str(tmp_path / "hub"), resolution=32), range(9))


@pytest.mark.parametrize("scheme", ["http", "hf"])
def test_parquet_files_behind_a_url_are_read_by_range_and_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    local = parquet_files(folder, tmp_path)
    plain = open_source(local, resolution=32)
    files = "train-{00000..00001}-of-00002.parquet"
    with serve(tmp_path) as server:
        if scheme == "hf":
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
            server.prefix = "/datasets/owner/name/resolve/main"
            source = open_source(f"hf://datasets/owner/name/hub/{files}", resolution=32)
        else:
            source = open_source(f"{server.url}/hub/{files}", resolution=32)
        opening = server.sent_bytes
        assert samples(source) == samples(plain)
        first = server.sent_bytes
        assert samples(source) == samples(plain)
        assert server.sent_bytes == first, "unpacked row groups are not fetched again"
    assert fingerprint(source, range(9)) == fingerprint(plain, range(9))
    # Small as these files are, a block holds a whole one: one for each opening, that is for each of five row groups.
    sizes = [file.stat().st_size for file in sorted((tmp_path / "hub").iterdir())]
    assert first - opening <= 3 * sizes[0] + 2 * sizes[1] + 5 * 65536


def test_a_parquet_file_that_breaks_off_is_explained(folder: Path, tmp_path: Path) -> None:
    hub = Path(parquet_files(folder, tmp_path))
    file = sorted(hub.iterdir())[1]
    data = file.read_bytes()
    file.write_bytes(data[:-20])
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet is damaged"):
        open_source(str(hub), resolution=32)
    # The footer is whole, the images are not.
    file.write_bytes(data[:64] + bytes(2000) + data[2064:])
    source = open_source(str(hub), resolution=32)
    with pytest.raises(UserError, match="damaged"):
        source.load(5, 32)


def test_a_full_temporary_folder_is_not_taken_for_a_damaged_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = parquet_files(folder, tmp_path)
    expected = samples(open_source(hub, resolution=32))
    real = os.pwrite

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(UserError, match=r"\$TMPDIR \(.*\): No space left") as caught:
            open_source(hub, resolution=32).load(0, 32)
        assert "Download" not in str(caught.value)
        # A disk that takes a part of what it is given is given the rest.
        patch.setattr("os.pwrite", lambda file, data, at: real(file, bytes(data[:100]), at))
        assert samples(open_source(hub, resolution=32)) == expected


def test_unpacking_a_row_group_takes_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """32 MB of images in one row group of many pages: what pyarrow holds at once stays far below."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    images = [{"bytes": rng.bytes(1 << 18), "path": ""} for _ in range(128)]
    table = pa.table({"image": images, "label": pa.array([0] * 128, pa.int64())})
    pq.write_table(table, tmp_path / "one.parquet", row_group_size=128, data_page_size=1 << 18, write_batch_size=4)
    expected = images[77]["bytes"]
    del table, images
    source = open_source(str(tmp_path / "one.parquet"), resolution=32)
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    real = os.pwrite

    def watched(*arguments: Any) -> int:
        nonlocal peak
        peak = max(peak, pool.bytes_allocated() - before)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.pwrite", watched)
        assert source.read(77) == expected  # type: ignore[attr-defined]
    assert peak < 16 << 20


def test_a_cache_built_from_the_tar_equals_one_built_from_the_folder(folder: Path, tmp_path: Path) -> None:
    caches: list[featcache.Cache] = []
    for data in (str(folder), imagenet_tar(folder, tmp_path)):
        out = tmp_path / f"cache{len(caches)}"
        build(
            BuildRequest(data=data, vae="tiny", resolution=32, batch_size=4, shard_size=4, out=out, workers=2),
            Quiet(),
        )
        caches.append(featcache.open(out))
    arrays = [p.relative_to(caches[0].path) for p in Path(caches[0].path).rglob("c.*")]
    assert len(arrays) >= 3
    for array in arrays:
        assert (caches[0].path / array).read_bytes() == (caches[1].path / array).read_bytes()
    assert caches[0].manifest.dataset.fingerprint == caches[1].manifest.dataset.fingerprint


def test_the_index_is_kept_and_a_changed_archive_is_indexed_again(
    folder: Path, tmp_path: Path, own_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = imagenet_tar(folder, tmp_path)
    first = samples(open_source(path, resolution=32))
    assert index_folder() == own_index
    (kept,) = own_index.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("featcache.sources.archives._index", lambda *_: pytest.fail("indexed again"))
        assert samples(open_source(path, resolution=32)) == first
    kept.write_bytes(kept.read_bytes()[:-30])
    assert samples(open_source(path, resolution=32)) == first
    (folder / "n01/n01_9.JPEG").write_bytes(jpeg(99))
    imagenet_tar(folder, tmp_path)
    os.utime(path, ns=(1, 1))
    assert len(open_source(path, resolution=32)) == len(first) + 1


def test_an_image_cut_out_of_an_archive_is_bad_by_name(folder: Path, tmp_path: Path) -> None:
    (folder / "n02/n02_0.JPEG").write_bytes(jpeg(1)[:120])
    source = open_source(imagenet_tar(folder, tmp_path), resolution=32)
    index = [source.key(i) for i in range(9)].index("n02/n02_0.JPEG")
    with pytest.raises(BadImage, match=r"n02/n02_0\.JPEG"):
        source.load(index, 32)


def test_unusable_archives_are_explained(folder: Path, tmp_path: Path) -> None:
    whole = Path(imagenet_tar(folder, tmp_path)).read_bytes()
    cases = {
        "short.tar": (whole[: len(whole) // 2 + 100], "not a whole tar|unexpected end|holds"),
        "empty.tar": (tar_bytes({"a.txt": b"x"}), "no images"),
        "flat.zip": (b"", "not a whole zip"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            open_source(str(tmp_path / name), resolution=32)
    with pytest.raises(UserError, match="no archive"):
        open_source(str(tmp_path / "absent-{00..01}.tar"), resolution=32)
    with zipfile.ZipFile(tmp_path / "nofolder.zip", "w") as archive:
        archive.writestr("a.jpg", jpeg(0))
    with pytest.raises(UserError, match="no class folder"):
        open_source(str(tmp_path / "nofolder.zip"), resolution=32)


def test_brace_patterns() -> None:
    assert list(_expanded("a-{08..11}.tar")) == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert list(_expanded("{x,y}/{1..2}")) == ["x/1", "x/2", "y/1", "y/2"]
    assert list(_expanded("plain.tar")) == ["plain.tar"]
    with pytest.raises(UserError, match="not a range"):
        list(_expanded("a-{0..x}.tar"))


def test_turbo_is_exact_where_it_does_not_scale_and_near_where_it_does(imagenet_sample: Path) -> None:
    from featcache.sources.decoders import decode_pil, decode_turbo

    for file in sorted(imagenet_sample.rglob("*.JPEG"))[::12]:
        data = file.read_bytes()
        with Image.open(file) as image:
            small = min(image.size) < 512
        exact, fast = decode_pil(data, "x", 256).astype(int), decode_turbo(data, "x", 256).astype(int)
        assert fast.shape == exact.shape
        if small:
            assert np.abs(exact - fast).max() <= 1
        else:
            assert 10 * np.log10(255**2 / np.mean((exact - fast) ** 2)) > 30


def test_turbo_decodes_other_formats_the_exact_way() -> None:
    from featcache.sources.decoders import decode_pil, decode_turbo

    noise = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 80, 3), dtype=np.uint8))
    for kind, mode in (("PNG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB")):
        buffer = io.BytesIO()
        noise.convert(mode).save(buffer, kind)
        assert np.array_equal(decode_turbo(buffer.getvalue(), "x", 32), decode_pil(buffer.getvalue(), "x", 32))
    with pytest.raises(BadImage, match=r"x\.jpg"):
        decode_turbo(jpeg(0, 300, 300)[:600], "x.jpg", 32)


def test_difference_of_decoders_on_known_errors() -> None:
    from featcache.sources.difference import difference

    class Two:
        def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
            if index == 2:
                raise BadImage("bad", "for the test")
            pixels = np.full((4, 4, 3), 100, np.uint8)
            return (pixels if decoder == "pil" else pixels + np.uint8(4 * index)), 0

    found = difference(Two(), [0, 1, 2], 4, "turbo")  # type: ignore[arg-type]
    assert (found.images, found.mean, found.largest) == (2, 2.0, 4)
    assert found.psnr_db == pytest.approx(10 * np.log10(255**2 / 8))


def test_profile_prints_stages_and_the_decoders_difference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.cli import app
    from featcache.console import run_app

    words = ["featcache", "build", "--data", str(folder), "--vae", "tiny", "--resolution", "32", "--profile"]
    monkeypatch.setattr("sys.argv", [*words, "--decode", "turbo", "--out", str(tmp_path / "c")])
    assert run_app(app) == 0
    text = capsys.readouterr().out
    assert "encode vae tiny" in text
    assert "--decode turbo against pil on 9 images" in text
    assert featcache.open(tmp_path / "c").manifest.dataset.preprocessing["decode"] == "turbo"
    monkeypatch.setattr("sys.argv", [*words, "--decode", "pil", "--into", str(tmp_path / "c"), "--encoder", "tiny"])
    assert run_app(app) == 2


def _split_folder(root: Path, splits: dict[str, tuple[str, ...]]) -> Path:
    for split, classes in splits.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (40, 40), "red").save(folder / "a.png")
    return root


@pytest.mark.parametrize("splits", [("train", "val"), ("Train", "test", "validation")])
def test_folders_of_splits_are_no_classes(tmp_path: Path, splits: tuple[str, ...]) -> None:
    source = open_folder(_split_folder(tmp_path / "my photos", dict.fromkeys(splits, ("cat", "dog"))))
    with pytest.raises(UserError, match="parts of a data set") as caught:
        refuse_splits(source)
    for split in splits:
        assert f"featcache build --data '{tmp_path}/my photos/{split}' ...   (2 classes)" in (caught.value.remedy or "")


def test_cocos_folders_are_no_classes(tmp_path: Path) -> None:
    source = open_folder(_split_folder(tmp_path / "coco", {"train2014": ("",), "val2014": ("",)}))
    with pytest.raises(UserError, match="parts of a data set") as caught:
        refuse_splits(source)
    assert f"featcache build --data {tmp_path}/coco/train2014 ...   --text clip-l --captions FILE" in str(caught.value)


@pytest.mark.parametrize(
    "splits",
    [
        {"train": ("",), "val": ("",)},  # images without class folders below: these are the only labels there are
        {"train": ("cat", "dog")},
        {"train": ("steam", "cargo"), "bicycle": ("",)},
        {"train2014": ("",), "val": ("",)},
    ],
)
def test_classes_that_are_called_like_splits_stay(tmp_path: Path, splits: dict[str, tuple[str, ...]]) -> None:
    refuse_splits(open_folder(_split_folder(tmp_path, splits)))
