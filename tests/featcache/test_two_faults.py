"""Two things wrong at once, in every combination: mended to the very bytes, or said to be beyond it. Never called sound."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from store_helpers import base_features, dataset, tokens, tree, values, write_all

from featcache.errors import CacheError
from featcache.share.verify import repair_metadata, verify
from featcache.store import CacheWriter, files
from featcache.store.writers import create_writer, repair_writer

COUNT, SHARD_SIZE, SKIPPED = 10, 4, (3,)
KINDS: dict[str, dict[str, Any]] = {
    "zarr": {},
    "zarr, version 1": {},
    "zstd": {"compressor": "zstd"},
    "wds": {"format": "wds"},
}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


@pytest.fixture(scope="module", params=KINDS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "cache"
    specs = [spec for spec in base_features() if spec.name in ("label", "tiny@5")]
    old = [spec.name for spec in specs] if "version 1" in request.param else []
    with create_writer(path, dataset(COUNT), shard_size=SHARD_SIZE, **KINDS[request.param]) as writer:
        writer.begin(specs, without_blocks=old)
        write_all(writer, specs, SKIPPED)
        writer.finish()
    assert verify(path).ok
    return path


def lose(file: Path) -> None:
    file.unlink()


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(data)


def repair(path: Path, write: Callable[[CacheWriter, list], None]) -> bool:
    """What `featcache verify --repair` does: whether it ends in a sound cache."""
    report = verify(path)
    repair_metadata(path)
    if report.damaged:
        with repair_writer(path, report.damaged) as writer:
            write(writer, [writer.manifest.features[name] for name in report.damaged])
            writer.finish()
    return verify(path).ok


def same_bytes(writer: CacheWriter, specs: list) -> None:
    write_all(writer, specs, SKIPPED)


def last_bits_differ(writer: CacheWriter, specs: list) -> None:
    """Encoding on other hardware."""
    for shard in writer.pending():
        for spec in specs:
            arrays = {
                array[len(spec.name) :]: values(array, dtype, shape, writer.slots(shard), SKIPPED)
                for array, (dtype, shape) in spec.arrays.items()
            }
            for found in arrays.values() if spec.name != "label" else ():
                found[-1] += found.dtype.type(1)
            writer.write_shard(spec.name, shard, arrays)


def victims(path: Path) -> list[str]:
    """One file of each kind, and two of the shards of each array."""
    names = sorted(tree(path))
    shards = [n for n in names if n.endswith(".tar") or Path(n).name.startswith("c.")]
    return sorted(
        {*shards} - {n for n in shards if n.split("/")[-1].startswith(("c.2", "00000002"))} | {*names} - {*shards}
    )


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(37, id="some")])
def test_every_two_faults(sound: Path, tmp_path: Path, step: int) -> None:
    before = tree(sound)
    names = victims(sound)
    root = next(n for n in names if n in ("zarr.json", "featcache.json"))
    done = 0
    faults = [(n, f) for n in names for f in (lose, flip)]
    pairs = [(a, b) for a, b in itertools.combinations(faults, 2) if a[0] != b[0]]
    for (first, break_first), (second, break_second) in pairs[::step]:
        path = tmp_path / "cache"
        shutil.copytree(sound, path)
        break_first(path / first)
        break_second(path / second)
        what = f"{break_first.__name__} {first}, {break_second.__name__} {second}"
        if root in (first, second):
            # Nothing else says what the cache is.
            with pytest.raises(CacheError):
                repair(path, same_bytes)
        else:
            assert not verify(path).ok, what
            assert repair(path, same_bytes), what
            assert tree(path) == before, what
        shutil.rmtree(path)
        done += 1
    assert done >= 40 // step


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(5, id="some")])
def test_a_flipped_shard_is_never_taken_for_right(sound: Path, tmp_path: Path, step: int) -> None:
    """All checksum files gone, one shard wrong, and encoding again gives other bits: the wrong one must go, too."""
    names = [n for n in victims(sound) if n.endswith(".tar") or Path(n).name.startswith("c.")]
    cases = list(itertools.product(names, (("SHA256SUMS",), ("BLOCKS",), ("SHA256SUMS", "BLOCKS"))))
    for victim, gone in cases[::step]:
        path = tmp_path / "cache"
        shutil.copytree(sound, path)
        wrong = bytearray((path / victim).read_bytes())
        wrong[len(wrong) // 3] ^= 16
        (path / victim).write_bytes(wrong)
        for name in names_of_sums(sound):
            if name.endswith(gone):
                (path / name).unlink()
        assert repair(path, last_bits_differ), (victim, gone)
        assert (path / victim).read_bytes() != wrong, (victim, gone)
        shutil.rmtree(path)


def names_of_sums(path: Path) -> list[str]:
    return [name for name in tree(path) if name.endswith(("SHA256SUMS", "BLOCKS"))]


def verified_manifest(path: Path):
    from featcache.store.root import read_root

    return read_root(path)


def test_without_any_checksum_nothing_is_taken_for_right(sound: Path, tmp_path: Path) -> None:
    """A repair of too few shards is refused before it publishes anything."""
    path = tmp_path / "cache"
    shutil.copytree(sound, path)
    manifest = verified_manifest(path)
    for name in names_of_sums(path):
        (path / name).unlink()
    root = {n: data for n, data in tree(path).items() if n in ("zarr.json", "featcache.json")}
    with repair_writer(path, {name: [1] for name in manifest.features}) as writer:
        last_bits_differ(writer, list(manifest.features.values()))
        with pytest.raises(CacheError, match="cannot be told sound from damaged"):
            writer.finish()
    assert root.items() <= tree(path).items()
    assert not verify(path).ok
    assert repair(path, same_bytes)
    assert tree(path) == tree(sound)


def test_only_what_is_damaged_is_encoded_again_where_block_hashes_are_left(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with create_writer(path, dataset(COUNT), shard_size=SHARD_SIZE) as writer:
        writer.begin([tokens()])
        write_all(writer, [tokens()])
        writer.finish()
    (path / "tiny@5" / "SHA256SUMS").unlink()
    flip(path / "tiny@5" / "c.1.0.0")
    assert verify(path).damaged == {"tiny@5": [1]}
    (path / "tiny@5" / "BLOCKS").unlink()
    assert verify(path).damaged == {"tiny@5": [0, 1, 2]}
