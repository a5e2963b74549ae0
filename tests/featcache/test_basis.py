"""Features stored as principal components: the algebra, the build, and what a manifest may say."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache
from featcache.builder.lead import remarks
from featcache.builder.prepare import prepare
from featcache.builder.repair import repair_shards
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.codecs import FeatureCodec
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.inspect import read_feature
from featcache.progress import Quiet
from featcache.read.components import Components
from featcache.store.basis import Basis
from featcache.store.manifest import FeatureSpec, feature_from_json
from tests.featcache.store_helpers import tree_digest
from tests.told import Told


def request(out: Path | None, **changes: Any) -> BuildRequest:
    base = BuildRequest(
        data="shapes",
        encoders=(EncoderChoice(name="tiny", layers=(5,)),),
        vae="tiny",
        levels=("G4",),
        levels_basis=24,
        tokens_basis=32,
        limit=40,
        batch_size=8,
        shard_size=8,
        out=out,
        workers=1,
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exact") / "c"
    plain = {"levels_basis": None, "tokens_basis": None, "levels_codec": "fp32", "tokens_codec": "fp32"}
    build(request(path, **plain), Quiet())
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "c"
    build(request(path), Quiet())
    return path


def spec_of(shape: tuple[int, ...], basis: Basis, codec: str = "fp32") -> FeatureSpec:
    return FeatureSpec(name="x", shape=shape, codec=codec, basis=basis)


def through(spec: FeatureSpec, x: torch.Tensor) -> torch.Tensor:
    codec = FeatureCodec(spec)
    return codec.decode({spec.name + suffix: t for suffix, t in codec.encode(x).items()})


@settings(deadline=None, max_examples=25)
@given(layers=st.integers(0, 3), width=st.integers(2, 12), places=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_what_a_basis_leaves_out_is_what_its_eigenvalues_say(layers: int, width: int, places: int, seed: int) -> None:
    """Mean squared error over the tokens it was fitted on = sum of the eigenvalues left out (of numpy's covariance)."""
    rng = np.random.default_rng(seed)
    shape = (layers, places, width) if layers else (places, width)
    n, D = 60, max(layers, 1) * width
    tokens = rng.normal(size=(n * places, D)) @ rng.normal(size=(D, D)) + 3 * rng.normal(size=D)
    split = tokens.reshape(n, places, max(layers, 1), width)
    x = (split.swapaxes(1, 2) if layers else split[:, :, 0]).astype(np.float32)
    components = Components()
    components.add("x", x, seed=0)
    rank = int(rng.integers(1, D + 1))
    back = through(spec_of(shape, components.basis("x", rank)), torch.from_numpy(x)).numpy().astype(np.float64)
    values = np.linalg.eigvalsh(np.cov(tokens.T, bias=True).reshape(D, D))
    error = np.square(back - x).sum() / (n * places)
    assert error == pytest.approx(values[: D - rank].sum(), rel=2e-2, abs=1e-5 * values.sum())
    # Coefficients have variance 1 each.
    coefficients = FeatureCodec(spec_of(shape, components.basis("x", rank))).encode(torch.from_numpy(x))[""]
    assert coefficients.reshape(-1, rank).var(0, correction=0).numpy() == pytest.approx(np.ones(rank), rel=2e-2)


def test_mixtures_of_layers_are_linear_in_the_coefficients() -> None:
    x = torch.randn(5, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    components = Components()
    components.add("x", x.numpy(), seed=0)
    spec = spec_of((3, 4, 8), components.basis("x", 10))
    codec = FeatureCodec(spec)
    assert codec.basis is not None
    c = codec.basis.project(x)
    a, b = c[:2], c[2:4]
    mixed = codec.basis.expand(0.3 * a + 0.7 * b, torch.float32)
    apart = 0.3 * codec.basis.expand(a, torch.float32) + 0.7 * codec.basis.expand(b, torch.float32)
    torch.testing.assert_close(mixed, apart, rtol=1e-5, atol=1e-5)
    # Twice through is once: the projection of what lies in the basis is itself.
    torch.testing.assert_close(codec.basis.project(codec.basis.expand(c, torch.float32)), c, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_compiles_whole_and_agrees(dtype: torch.dtype) -> None:
    x = torch.randn(12, 2, 4, 16, generator=torch.Generator().manual_seed(1))
    components = Components()
    components.add("x", x.numpy(), seed=0)
    codec = FeatureCodec(spec_of((2, 4, 16), components.basis("x", 32), "int4"))
    batch = {"x" + suffix: t for suffix, t in codec.encode(x).items()}
    compiled = torch.compile(lambda b: codec.decode(b, dtype), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(batch), codec.decode(batch, dtype))
    assert codec.decode(batch, dtype).dtype == dtype
    assert not codec.state_dict()


def test_a_build_stores_components_and_reads_them_back(stored: Path, exact: Path) -> None:
    cache, plain = featcache.open(stored), featcache.open(exact)
    manifest = cache.manifest
    assert json.loads((stored / "zarr.json").read_text())["attributes"]["featcache"]["format_version"] == 3
    assert json.loads((exact / "zarr.json").read_text())["attributes"]["featcache"]["format_version"] == 2
    level, token = manifest.features["vae/G4"], manifest.features["tiny@5"]
    assert level.arrays["vae/G4"][1] == (16, 24) and token.arrays["tiny@5"][1] == (16, 32)
    assert level.shape == plain.manifest.features["vae/G4"].shape
    indices = range(40)
    for name, rank in (("vae/G4", 24), ("tiny@5", 32)):
        a, b = read_feature(plain, name, indices), read_feature(cache, name, indices)
        assert a.shape == b.shape
        tokens = (a if a.ndim == 3 else a.swapaxes(1, 2)).reshape(40 * 16, -1).astype(np.float64)
        # All images and places are within the sample: what is left out is the smallest eigenvalues, and a little rounding.
        left_out = np.linalg.eigvalsh(np.cov(tokens.T, bias=True))[:-rank].sum()
        assert np.square(a - b).sum() / len(tokens) == pytest.approx(left_out, rel=0.02), name
    # The same images, labels and moments: only what was asked for is stored otherwise.
    assert np.array_equal(read_feature(plain, "vae/moments", indices), read_feature(cache, "vae/moments", indices))
    from typer.testing import CliRunner

    from featcache.cli import app

    told = CliRunner().invoke(app, ["info", str(stored)], env={"COLUMNS": "200"})
    assert "int8, 24 components" in told.stdout
    assert CliRunner().invoke(app, ["verify", str(stored)]).exit_code == 0


def test_the_same_command_again_takes_the_basis_that_is_there(stored: Path) -> None:
    before = tree_digest(stored)
    told = Told()
    assert build(request(stored), told).encoded == 0
    assert tree_digest(stored) == before
    assert not any("finding" in text for text in told.notes)


def test_features_added_later_have_a_basis_of_their_own(stored: Path, tmp_path: Path) -> None:
    import shutil

    path = shutil.copytree(stored, tmp_path / "c")
    build(request(None, into=path, levels=("G3",), encoders=()), Quiet())
    grown = featcache.open(path).manifest.features
    assert grown["vae/G3"].basis is not None and grown["vae/G3"].basis != grown["vae/G4"].basis
    assert grown["vae/G4"] == featcache.open(stored).manifest.features["vae/G4"]
    again = prepare(request(None, into=path, levels=("G3",), levels_basis=12, encoders=()), device="cpu")
    assert any("components: 24 there, 12 here" in remark for remark in remarks(again))


def test_a_damaged_shard_is_made_again_to_the_same_bytes(stored: Path, tmp_path: Path) -> None:
    import shutil

    path = shutil.copytree(stored, tmp_path / "c")
    before = tree_digest(path)
    shard = path / "vae/G4" / "c.1.0.0"
    shard = shard if shard.is_file() else next((path / "vae/G4").glob("c*"))
    number = int(shard.name.split(".")[1])
    shard.write_bytes(b"\0" * shard.stat().st_size)
    repair_shards(path, {"vae/G4": [number]}, data=None, weights_dir=None, device="cpu", progress=Quiet())
    assert tree_digest(path) == before


@pytest.mark.slow
@pytest.mark.parametrize("format", ["zarr", "wds"])
def test_killed_builds_go_on_in_the_basis_that_they_began_with(tmp_path: Path, format: str) -> None:
    words = [
        *[
            "build",
            "--data",
            "shapes",
            "--encoder",
            "tiny@5",
            "--vae",
            "tiny",
            "--vae-levels",
            "G4",
            "--levels-basis",
            "24",
            "--limit",
            "160",
        ]
    ]
    words += ["--batch-size", "4", "--shard-size", "8", "--workers", "1", "--format", format]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "featcache.cli", *words, "--out", out],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert start("whole").wait() == 0
    killed = 0
    process = start("c")
    for _ in range(3):
        place, before = tmp_path / "c/.featcache/building/vae+G4", time.monotonic()
        known = len(list(place.glob("0*.json")))
        while process.poll() is None and time.monotonic() < before + 120:
            if len(list(place.glob("0*.json"))) > known:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        if process.wait() == -signal.SIGKILL:
            killed += 1
            process = start("c")
    assert killed and process.wait() == 0, process.stderr.read() if process.stderr else ""
    assert tree_digest(tmp_path / "c") == tree_digest(tmp_path / "whole")


@pytest.mark.slow
def test_two_ranks_write_in_the_basis_of_the_first(tmp_path: Path) -> None:
    words = [
        *[
            "build",
            "--data",
            "shapes",
            "--vae",
            "tiny",
            "--vae-levels",
            "G4",
            "--levels-basis",
            "24",
            "--limit",
            "64",
            "--batch-size",
            "4",
        ]
    ]
    words += ["--shard-size", "4", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    for command, out in (([sys.executable, "-m"], "one"), (launch, "two")):
        done = subprocess.run(
            [*command, "featcache.cli", *words, "--out", out],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels_basis": 100_000}, "a basis of 100000 components was asked for, and its tokens have"),
        ({"tokens_basis": 20, "tokens_codec": "int4"}, "groups of 32"),
        ({"levels_basis": 200, "limit": 2, "levels_codec": "int8"}, "tokens to find them in"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(request(tmp_path / "c", **changes), Quiet())
    assert not (tmp_path / "c").exists()


def test_another_number_of_components_of_a_begun_build_is_refused(tmp_path: Path) -> None:
    from featcache.builder.bases import settle_bases
    from featcache.builder.lead import lead

    with lead(settle_bases(prepare(request(tmp_path / "c"), device="cpu"), Quiet())):
        pass
    with pytest.raises(CacheError, match="begun"):
        build(request(tmp_path / "c", levels_basis=12), Quiet())


def _texts(width: int, rank: int) -> dict[str, Any]:
    return dict(vars(Basis.of(np.zeros(width), np.ones(rank), np.eye(rank, width))))


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": "!"},
        {"mean": 3},
        {"vectors": "AAAA"},
        {"rank": 0},
        {"rank": 9},
        {"scale": base64.b64encode(np.full(4, np.nan, "<f4").tobytes()).decode()},
        {"vectors": "é" * 12},
        {"more": 1},
    ],
)
def test_a_damaged_basis_is_an_error_of_the_cache(damage: dict[str, Any]) -> None:
    sound = FeatureSpec(name="x", shape=(3, 8), codec="int8", basis=Basis(**_texts(8, 4))).to_json()
    assert feature_from_json(sound).basis == Basis(**_texts(8, 4))
    with pytest.raises(CacheError, match="basis of x"):
        feature_from_json({**sound, "basis": {**sound["basis"], **damage}})


@pytest.mark.parametrize("changes", [{"codec": "raw"}, {"shape": [8]}, {"shape": [2, 2, 3, 8]}])
def test_a_basis_is_for_tokens(changes: dict[str, Any]) -> None:
    sound = FeatureSpec(name="x", shape=(3, 8), codec="int8", basis=Basis(**_texts(8, 4))).to_json()
    with pytest.raises(CacheError, match="basis of x"):
        feature_from_json({**sound, **changes})
