"""Repair: damaged shards come back from the images, byte for byte, and nothing else is touched."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.build.repair import repair_shards
from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.encoders import EncoderChoice
from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.share.verify import repair_metadata, verify


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
        data=str(folder), vae="tiny", levels=("G3",), resolution=32, out=path, batch_size=4, shard_size=4, flip=True
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
