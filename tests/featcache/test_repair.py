"""Repair: damaged shards come back from the images, byte for byte, and nothing else is touched."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numcodecs.zstd import Zstd
from PIL import Image
from store_helpers import base_features, dataset, tokens

import featcache
from featcache.builder.repair import _passes, repair_shards
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from featcache.share.verify import repair_metadata, verify
from featcache.store import shards
from featcache.store.manifest import Manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(11):
        place = root / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (root / "a/broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A cache with a skipped image and a mirrored view, and one feature added later."""
    path = tmp_path_factory.mktemp("caches") / "c"
    ask = BuildRequest(
        data=str(folder),
        vae="tiny",
        levels=("G3",),
        vae_resampling="average",
        resolution=32,
        out=path,
        batch_size=4,
        shard_size=4,
        flip=True,
    )
    build(BuildRequest(**{**vars(ask), "on_bad_image": "skip"}), Quiet())
    build(
        BuildRequest(data=str(folder), into=path, encoders=(EncoderChoice(name="tiny", layers=(2, 5)),), batch_size=4),
        Quiet(),
    )
    return path


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 16
    file.write_bytes(bytes(data))


def files(path: Path) -> dict[str, bytes]:
    """All files of a cache; what was noted about it beside is none of them."""
    found = {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    return {name: data for name, data in found.items() if not name.startswith(".featcache/")}


@pytest.mark.parametrize(
    "damaged", [("label",), ("key", "content"), ("vae/moments", "tiny@5"), ("vae/G3", "vae/G3.scale", "label")]
)
def test_damaged_shards_come_back_byte_for_byte(
    sound: Path, folder: Path, tmp_path: Path, damaged: tuple[str, ...]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound, copy)
    for n, array in enumerate(damaged):
        flip_bit(sorted((copy / array).glob("c.*"))[n % 3])
    report = verify(copy)
    assert {p.path.split("/c.")[0].split("copy/")[-1] for p in report.problems} == set(damaged)
    repair_shards(copy, report.damaged, data=str(folder), weights_dir=None, device="cpu", progress=Quiet())
    assert verify(copy).ok
    assert files(copy) == files(sound)


def test_a_missing_shard_comes_back_too(
    sound: Path, folder: Path, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound, copy)
    victim = sorted((copy / "tiny@2").glob("c.*"))[1]
    victim.unlink()
    found = cli("featcache", "verify", str(copy))
    assert found.returncode == 1
    assert victim.name in found.stdout
    mended = cli("featcache", "verify", str(copy), "--repair", "--data", str(folder))
    assert mended.returncode == 0, mended.stderr
    assert files(copy) == files(sound)


@pytest.mark.parametrize("lost", [False, True], ids=["sums", "sums and a shard"])
@pytest.mark.parametrize("blocks", [True, False], ids=["with blocks", "without blocks"])
def test_a_wrong_shard_is_mended_where_the_checksums_are_lost(
    sound: Path, folder: Path, tmp_path: Path, lost: bool, blocks: bool
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sound, copy)
    array = copy / "vae" / "G3"
    shards = sorted(array.glob("c.*"))
    (array / "SHA256SUMS").unlink()
    if not blocks:
        (array / "BLOCKS").unlink()
    if lost:
        shards[2].unlink()
    flip_bit(shards[1])
    report = verify(copy)
    assert report.damaged["vae/G3"] == ([1, 2] if blocks and lost else [1] if blocks else [0, 1, 2])
    repair_metadata(copy)
    repair_shards(copy, report.damaged, data=str(folder), weights_dir=None, device="cpu", progress=Quiet())
    assert files(copy) == files(sound)


def test_other_images_are_refused(sound: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy", tmp_path / "other/a"
    shutil.copytree(sound, copy)
    other.mkdir(parents=True)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(other / "0.png")
    with pytest.raises(UserError, match="not the images"):
        repair_shards(copy, {"label": [0]}, data=str(other.parent), weights_dir=None, device="cpu", progress=Quiet())


def test_a_repair_without_images_says_how_to_repeat_it(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    with pytest.raises(UserError, match="no images to encode") as caught:
        repair_shards(sound, {"label": [0]}, data=None, weights_dir=None, device="cpu", progress=Quiet())
    assert f"featcache repair {sound} --data" in str(caught.value.remedy)
    assert f"featcache repair {sound} --from" in str(caught.value.remedy)


# Images that have changed without a difference in name or size


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(cache, its images, the same with the image in slot 5, of shard 1, exchanged for one of the same size)."""
    rng, root = np.random.default_rng(2), tmp_path_factory.mktemp("plain")
    for i in range(11):
        (root / "images/a").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8))
        image.save(root / f"images/a/{i:02d}.png", compress_level=0)
    ask = BuildRequest(
        data=str(root / "images"), vae="tiny", levels=("G3",), resolution=32, out=root / "cache", shard_size=4
    )
    build(ask, Quiet())
    shutil.copytree(root / "images", root / "changed")
    (key,) = featcache.open(root / "cache").keys(5, 6)
    victim = root / "changed" / key
    size = victim.stat().st_size
    other = Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8))
    other.save(victim, compress_level=0)
    assert victim.stat().st_size == size
    return root / "cache", root / "images", root / "changed"


@pytest.mark.parametrize("content", [0, 1], ids=["of another shard", "of the same shard"])
def test_changed_images_are_noticed_though_their_hashes_are_damaged(
    plain: tuple[Path, Path, Path], tmp_path: Path, content: int
) -> None:
    sound, images, changed = plain
    copy = tmp_path / "copy"
    shutil.copytree(sound, copy)
    flip_bit(copy / "content" / f"c.{content}")
    flip_bit(copy / "vae" / "G3" / "c.1.0.0.0")
    root = (copy / "zarr.json").read_bytes()
    report = verify(copy)
    assert report.damaged == {"content": [content], "vae/G3": [1]}
    with pytest.raises(CacheError, match=r"not the (one|images) that|the one this cache was built from"):
        repair_shards(copy, report.damaged, data=str(changed), weights_dir=None, device="cpu", progress=Quiet())
    assert not verify(copy).ok
    assert (copy / "zarr.json").read_bytes() == root
    repair_shards(copy, verify(copy).damaged, data=str(images), weights_dir=None, device="cpu", progress=Quiet())
    assert files(copy) == files(sound)


def test_another_version_of_a_compressor_is_no_other_image(
    plain: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, images, _ = plain
    path = tmp_path / "c"
    ask = BuildRequest(data=str(images), vae="tiny", resolution=32, out=path, shard_size=4, compressor="zstd")
    build(ask, Quiet())
    before = files(path)
    flip_bit(path / "content/c.1")
    monkeypatch.setattr(shards, "_numcodec", lambda *_: Zstd(level=3, checksum=True))
    report = verify(path)
    assert report.damaged == {"content": [1]}
    repair_shards(path, report.damaged, data=str(images), weights_dir=None, device="cpu", progress=Quiet())
    assert verify(path).ok
    assert (path / "content/c.1").read_bytes() != before["content/c.1"]


def test_tars_are_made_again_at_once_whatever_their_weights() -> None:
    """Labels know no weights; a tar has them all the same."""
    random = {"weights": "random", "seed": 7}
    specs = [base_features()[0], tokens("a@1", provenance=random), tokens("b@1", provenance=random)]
    manifest = Manifest(dataset=dataset(), shard_size=16, features={s.name: s for s in specs}, format="wds")
    damaged = {"label": [1], "a@1": [1], "b@1": [1]}
    assert _passes(manifest, damaged) == [(["label", "a@1", "b@1"], 7)]
    assert _passes(replace(manifest, format="zarr"), damaged) == [(["label"], None), (["a@1", "b@1"], 7)]
    other = replace(specs[2], provenance={"weights": "random", "seed": 8})
    mixed = replace(manifest, features={**manifest.features, "b@1": other})
    with pytest.raises(CacheError, match="different seeds"):
        _passes(mixed, damaged)
    assert len(_passes(replace(mixed, format="zarr"), damaged)) == 3
