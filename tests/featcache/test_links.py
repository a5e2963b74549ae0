"""Nothing is written or read through a link inside a cache, and temporary names cannot be foreseen."""

import contextlib
import errno
import functools
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from store_helpers import add, base_features, build, moments, tokens, tree, write_all

import featcache
from featcache.errors import CacheError
from featcache.share.manage import remove_features
from featcache.share.restore import restore
from featcache.share.verify import Report, repair_metadata, verify
from featcache.store import files
from featcache.store.contents import read_checksums
from featcache.store.places import LocalLocation
from featcache.store.root import read_root
from featcache.store.writers import repair_writer


def test_names_of_temporary_files() -> None:
    for name, final in (
        ("c.0.0.part", "c.0.0"),
        ("c.0.0.0123456789abcdef.part", "c.0.0"),
        ("zarr.json.0123456789ABCDEF.part", "zarr.json.0123456789ABCDEF"),
        ("zarr.json", None),
        (".part", None),
        ("c.0.part.x", None),
    ):
        assert files.part_of(name) == final, name


def test_a_temporary_file_has_a_name_of_its_own(tmp_path: Path) -> None:
    group = files.Group()
    for _ in range(3):
        group.write(tmp_path / "c.0", [b"x"])
    names = [p.name for p in tmp_path.iterdir()]
    assert len(names) == 3 and {files.part_of(name) for name in names} == {"c.0"}
    group.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["c.0"]


def test_inside(tmp_path: Path) -> None:
    (tmp_path / "real" / "vae").mkdir(parents=True)
    (tmp_path / "root").symlink_to("real")
    root = tmp_path / "root"
    assert files.inside(root, "vae/moments/c.0") == root / "vae/moments/c.0"
    (tmp_path / "real" / "other").symlink_to("/tmp")
    (tmp_path / "real" / "vae" / "dangling").symlink_to("nowhere")
    for name in ("other", "other/x/y", "vae/dangling"):
        with pytest.raises(CacheError, match="symbolic link"):
            files.inside(root, name)
    for name in ("../x", "vae/../../x", "/etc"):
        with pytest.raises(CacheError, match="no path inside"):
            files.inside(root, name)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder with a file outside any cache, which nothing may touch."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_bytes(b"mine")
    return folder


def untouched(victim: Path) -> bool:
    return tree(victim) == {"file": b"mine"}


def test_links_under_temporary_names_of_earlier_versions(tmp_path: Path, victim: Path) -> None:
    path = build(tmp_path / "cache")
    before = tree(path)
    for name in ("zarr.json", "tiny@5/c.1.0.0", "tiny@5/SHA256SUMS", "tiny@5/zarr.json", "vae/zarr.json"):
        (path / (name + ".part")).symlink_to(victim / "file")
    (path / "tiny@5" / "c.1.0.0").unlink()
    repair_metadata(path)
    with repair_writer(path, {"tiny@5": [1]}) as writer:
        write_all(writer, [tokens()])
        writer.finish()
    remove_features(path, ["label"])
    assert untouched(victim)
    build(path)
    assert untouched(victim)
    assert verify(path).ok
    assert before.items() <= tree(path).items()
    (tmp_path / "other" / ".featcache").mkdir(parents=True)
    (tmp_path / "other" / ".featcache" / "dataset.json.part").symlink_to(victim / "file")
    build(tmp_path / "other")
    assert untouched(victim) and verify(tmp_path / "other").ok


@pytest.mark.parametrize(
    "name", [".featcache", ".featcache/lock", ".featcache/building", ".featcache/building/new@1", "new@1", "vae"]
)
@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_written_through_a_link(tmp_path: Path, victim: Path, name: str, dangling: bool) -> None:
    path = build(tmp_path / "cache", base_features()[:2])
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).symlink_to(tmp_path / "nowhere" if dangling else victim / "file" if name.endswith("lock") else victim)
    before = tree(path)
    with pytest.raises(CacheError, match="symbolic link"):
        add(path, [tokens("new@1"), moments()])
    assert untouched(victim) and not (tmp_path / "nowhere").exists()
    assert before.items() <= tree(path).items()


@pytest.mark.parametrize("name", ["vae", "vae/moments", "vae/moments/c.0.0.0.0", "vae/moments/SHA256SUMS", "zarr.json"])
def test_nothing_is_read_through_a_link(tmp_path: Path, name: str) -> None:
    """Not even through one that leads to the very same bytes."""
    path = build(tmp_path / "cache")
    (path / name).rename(tmp_path / "elsewhere")
    (path / name).symlink_to(tmp_path / "elsewhere")
    if name != "zarr.json":
        assert not verify(path).ok
    with pytest.raises(CacheError, match="symbolic link"):
        if name.endswith("SHA256SUMS"):
            read_checksums(LocalLocation(path), read_root(path), "vae/moments")
        cache = featcache.open(path)
        with cache.reader(["vae/moments"], threads=0) as reader:
            reader.read([0], reader.allocate(1))


def test_nothing_is_written_through_a_hard_link(tmp_path: Path, victim: Path) -> None:
    """Where a file is written in place: what has come of a shard so far, the journal of a push."""
    sound = build(tmp_path / "sound")
    path = tmp_path / "cache"
    shutil.copytree(sound, path)
    (path / "tiny@5" / "c.1.0.0").write_bytes(b"damaged")
    partial = path / ".featcache/restored/tiny@5+c.1.0.0.fetched"
    partial.parent.mkdir(parents=True)
    os.link(victim / "file", partial)
    with pytest.raises(CacheError, match="hard link") as found:
        restore(path, str(sound))
    assert untouched(victim) and found.value.remedy == f"remove it: rm -r {partial}"
    subprocess.run(found.value.remedy.partition(": ")[2].split(), check=True)
    restore(path, str(sound))
    assert untouched(victim) and verify(path).ok


def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def refuse(error: int, fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(error, os.strerror(error))
        fsync(fd)

    monkeypatch.setattr(files, "_fsync", functools.partial(refuse, errno.EINVAL))
    assert verify(build(tmp_path / "cache", count=4)).ok
    # One that knows how and fails is another matter.
    monkeypatch.setattr(files, "_fsync", functools.partial(refuse, errno.EIO))
    with pytest.raises(CacheError, match="Input/output error"):
        build(tmp_path / "other", count=4)


def test_a_cache_may_itself_be_a_link(tmp_path: Path) -> None:
    real = build(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    add(tmp_path / "link", [tokens("new@1")])
    assert verify(tmp_path / "link").ok and "new@1" in featcache.open(real).manifest.features


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["zarr.json", "label/c.0", "label/SHA256SUMS", "label/BLOCKS", ".featcache/lock"])
def test_a_pipe_or_folder_in_place_of_a_file_holds_nobody_up(tmp_path: Path, name: str) -> None:
    for make in (os.mkfifo, os.mkdir):
        path = build(tmp_path / make.__name__)
        (path / name).unlink(missing_ok=True)
        (path / name).parent.mkdir(exist_ok=True)
        make(path / name)
        done = []
        for use in (read_label, verify, lambda path: add(path, [tokens("new@1")]), repair_metadata):
            with contextlib.suppress(CacheError):
                done.append(use(path))
        assert name == ".featcache/lock" or not any(isinstance(report, Report) and report.ok for report in done)


def read_label(path: Path) -> None:
    with featcache.open(path).reader(["label"], threads=0) as reader:
        reader.read([0], reader.allocate(1))


ERRNOS = ["EIO", "ESTALE", "ENAMETOOLONG", "ENOTDIR", "ELOOP", "EACCES", "EISDIR", "ENXIO", "EBUSY", "EMFILE", "EFBIG"]


@pytest.mark.parametrize("name", ERRNOS)
def test_whatever_the_system_answers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    code = getattr(errno, name)

    def refuse(*_args, **_options):
        raise OSError(code, os.strerror(code))

    target = tmp_path / "file"
    target.write_bytes(b"x")
    uses: dict[str, list[Callable[..., object]]] = {
        "open": [files.read_bounded, files.sha256_of, files.hashes_of, files.open_to_read, files.atomic_write],
        "mkdir": [files.make_directory],
        "unlink": [files.remove_file],
        "fsync": [files.atomic_write],
        "write": [files.atomic_write],
        "replace": [files.atomic_write],
        "listdir": [files.names_in],
    }
    arguments: dict[Callable[..., object], tuple[object, ...]] = {
        files.read_bounded: (100,),
        files.atomic_write: ([b"data"],),
    }
    for primitive, functions in uses.items():
        for use in functions:
            path = tmp_path / "new" if use is files.make_directory else target
            with monkeypatch.context() as patch, pytest.raises(CacheError) as found:
                patch.setattr(os, primitive, refuse)
                use(path, *arguments.get(use, ()))
            assert str(path) in found.value.what and "\n" not in found.value.what
    assert target.read_bytes() == b"x" and [p.name for p in tmp_path.iterdir()] == ["file"]
