"""Planning: sizes are those of a real build, and codec figures those of the formula."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from featcache.build import BuildRequest, build
from featcache.encoders import EncoderChoice
from featcache.fidelity import fidelity
from featcache.plan import estimate
from featcache.store.manage import cache_bytes


class Quiet:
    def start(self, *, total: int, done: int, note: str) -> None: ...

    def advance(self, images: int) -> None: ...

    def warn(self, text: str) -> None: ...


@pytest.mark.parametrize("flip", [False, True])
def test_planned_bytes_are_built_bytes(tmp_path: Path, flip: bool) -> None:
    ask = BuildRequest(
        data="shapes", encoders=(EncoderChoice(name="tiny"),), limit=12, resolution=32, flip=flip, out=tmp_path / "c"
    )
    planned = estimate(ask)
    assert not (tmp_path / "c").exists(), "a plan writes nothing"
    build(ask, Quiet())
    manifest = featcache.open(tmp_path / "c").manifest
    assert {s.name for s in planned.specs} == set(manifest.features)
    index = sum(len(spec.arrays) for spec in manifest.features.values()) * (16 * manifest.shard_size + 4)
    assert planned.bytes_per_image * 12 == cache_bytes(manifest) - index
    assert planned.seconds > 0


def test_fidelity_of_int8_against_numpy() -> None:
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / 127
    y = np.round(x / scale) * scale
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    found = fidelity("int8", torch.from_numpy(x))
    assert found["mean_cosine"] == pytest.approx(cosine.mean(), abs=1e-6)
    assert found["worst_cosine"] == pytest.approx(cosine.min(), abs=1e-6)
    assert found["relative_error"] == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
    assert found["bytes_per_image"] == 5 * (64 + 4)


def test_as_typed(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli(
        "featcache",
        "plan",
        "--data",
        "shapes",
        "--encoder",
        "tiny",
        "--limit",
        "8",
        "--resolution",
        "32",
        "--measure",
        "--images",
        "2",
    )
    assert done.returncode == 0, done.stderr
    for expected in ("vae/moments", "GB/s", "free on its disk", "mean cosine", "images in about"):
        assert expected in done.stdout


@pytest.mark.parametrize(("words", "format_name"), [(("--format", "wds"), "wds"), (("--compressor", "zstd"), "zarr")])
def test_build_in_other_formats(
    cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, words: tuple[str, ...], format_name: str
) -> None:
    plain = [
        "build",
        "--data",
        "shapes",
        "--encoder",
        "tiny@5",
        "--vae",
        "tiny",
        "--limit",
        "9",
        "--resolution",
        "32",
        "--shard-size",
        "4",
    ]
    for name, extra in (("plain", ()), ("other", words)):
        done = cli("featcache", *plain, *extra, "--out", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    caches = [featcache.open(tmp_path / name) for name in ("plain", "other")]
    assert caches[1].manifest.format == format_name
    read = []
    for cache in caches:
        with cache.reader(["tiny@5", "vae/moments", "label"]) as reader:
            out = reader.allocate(9)
            reader.read(np.arange(9), out)
        read.append(out)
    assert all(np.array_equal(read[0][name], read[1][name]) for name in read[0])
