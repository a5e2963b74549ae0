"""Statistics for normalising latents: against numpy, in every convention of a file, and what is refused."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from store_helpers import build, dataset, tokens

import featcache
from featcache.errors import CacheError, UserError
from featcache.paths import last_name
from featcache.read.normalization import compute, load, save
from featcache.store import FeatureSpec
from featcache.store.writers import create_writer

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
COUNT, C, SIDE = 90, 3, 4


def cache_of(path: Path, values: np.ndarray, *, name: str = "vae/moments", views: int = 1) -> featcache.Cache:
    spec = FeatureSpec(name=name, shape=values.shape[1 + (views > 1) :], codec="fp32", views=views)
    with create_writer(path, dataset(COUNT, flip=views > 1), shard_size=16) as writer:
        writer.begin([spec])
        for shard in writer.pending():
            slots = writer.slots(shard)
            writer.write_shard(name, shard, {"": values[slots.start : slots.stop]})
        writer.finish()
    return featcache.open(path)


def some_moments(seed: int = 0, *views: int) -> np.ndarray:
    """[COUNT, *views, 2C, h, w]: means with a place and a spread per channel, then log-variances."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(COUNT, *views, C, SIDE, SIDE)) * [[[1.0]], [[3.0]], [[0.2]]] + [[[0.5]], [[-2.0]], [[0.0]]]
    logvar = rng.normal(size=mean.shape) - 1
    return np.concatenate([mean, logvar], axis=-3).astype(np.float32)


@pytest.mark.parametrize("over", ["channel", "position"])
@pytest.mark.parametrize("views", [1, 2])
def test_moments_give_the_mean_and_spread_of_drawn_latents(tmp_path: Path, over: str, views: int) -> None:
    values = some_moments(0, *([2] if views == 2 else []))
    found = compute(cache_of(tmp_path / "c", values, views=views), "vae/moments", over)  # type: ignore[arg-type]
    flat = values.reshape(-1, 2 * C, SIDE, SIDE).astype(np.float64)
    mean, logvar = flat[:, :C], flat[:, C:]
    axes = (0, 2, 3) if over == "channel" else (0,)
    expected_mean = mean.mean(axes, keepdims=True)[0]
    variance = (mean**2).mean(axes, keepdims=True)[0] - expected_mean**2 + np.exp(logvar).mean(axes, keepdims=True)[0]
    np.testing.assert_allclose(found.mean, expected_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std, np.sqrt(variance), rtol=1e-5)
    assert found.over == over and found.count == views * COUNT

    rng = np.random.default_rng(1)
    drawn = np.concatenate([mean + np.exp(logvar / 2) * rng.normal(size=mean.shape) for _ in range(200)])
    z = (drawn - found.mean.numpy()) / found.std.numpy()
    np.testing.assert_allclose(z.std(axes), 1, atol=0.02)


@pytest.mark.parametrize("over", ["channel", "position"])
def test_tokens(tmp_path: Path, over: str) -> None:
    values = np.random.default_rng(0).normal(size=(COUNT, 6, 5)).astype(np.float32) * np.arange(1, 6)
    values = values.astype(np.float32)
    found = compute(cache_of(tmp_path / "c", values, name="e@1"), "e@1", over)  # type: ignore[arg-type]
    axes = (0, 1) if over == "channel" else (0,)
    np.testing.assert_allclose(found.mean, values.astype(np.float64).mean(axes), atol=1e-6)
    np.testing.assert_allclose(found.std, values.astype(np.float64).std(axes), rtol=1e-5)
    assert found.over == over


@given(
    mean=st.lists(st.floats(-10, 10, width=32), min_size=4, max_size=4),
    std=st.lists(st.floats(0.125, 10, width=32), min_size=4, max_size=4),
)
@settings(max_examples=20, deadline=None)
def test_every_convention_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, mean: list[float], std: list[float]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    m, s = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    column = (1, 4, 1, 1)
    torch.save({"latents_scale": (1 / s).view(column), "latents_bias": m.view(column)}, folder / "irepa-stats.pt")
    torch.save({"mean": m.view(column).float(), "std": s.view(column).float()}, folder / "latents_stats.pt")
    torch.save({"mean": m.view(4, 1, 1), "var": s.view(4, 1, 1) ** 2 - 1e-5}, folder / "stat.pt")
    save_file({"mean": m.view(4, 1, 1), "std": s.view(4, 1, 1)}, folder / "stats.safetensors")
    for file in folder.iterdir():
        found = load(file)
        assert found.mean.shape == (4, 1, 1) and found.mean.dtype == torch.float32 and found.over == "channel", file
        np.testing.assert_allclose(found.mean.flatten(), mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.std.flatten(), std, rtol=1e-5)


def test_what_is_saved_is_loaded_with_where_it_came_from(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "c", some_moments())
    found = compute(cache, "vae/moments", "position")
    save(found, tmp_path / "s.safetensors")
    again = load(tmp_path / "s.safetensors")
    assert torch.equal(again.mean, found.mean) and torch.equal(again.std, found.std)
    assert (again.feature, again.fingerprint, again.count) == ("vae/moments", cache.fingerprint, COUNT)


def test_what_cannot_be_divided_by_is_refused(tmp_path: Path) -> None:
    dead = some_moments()
    dead[:, 0], dead[:, C] = 3.7, -200.0  # log-variances are clamped at -30: a spread of 3e-7 remains, and is none
    with pytest.raises(UserError, match="zero beside the others"):
        compute(cache_of(tmp_path / "dead", dead), "vae/moments", "channel")
    save_file({"mean": torch.zeros(2), "std": torch.full((2,), 1e-40)}, tmp_path / "tiny.safetensors")
    with pytest.raises(UserError, match="zero beside the others"):
        load(tmp_path / "tiny.safetensors")
    broken = some_moments()
    broken[5, 1, 0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        compute(cache_of(tmp_path / "broken", broken), "vae/moments", "channel")
    levels = cache_of(tmp_path / "l", np.zeros((COUNT, 2, 4, 5), np.float32), name="vae/G3")
    with pytest.raises(UserError, match="statistics are of"):
        compute(levels, "vae/G3", "channel")
    with pytest.raises(CacheError, match="does not hold"):
        compute(levels, "vae/moments", "channel")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    "content",
    [
        {"mean": torch.zeros(4), "std": torch.zeros(4)},
        {"mean": torch.zeros(4), "std": torch.ones(3)},
        {"mean": torch.full((4,), torch.inf), "std": torch.ones(4)},
        {"weight": torch.ones(4)},
        {"mean": Evil(), "std": Evil()},
        [1, 2],
    ],
    ids=["zero", "shapes", "infinite", "names", "pickle", "list"],
)
def test_files_that_hold_no_statistics_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(UserError) as error:
        load(tmp_path / "s.pt")
    assert "s.pt" in error.value.what


@pytest.mark.parametrize("name", ["s.safetensors", "s.pt"])
@pytest.mark.parametrize("data", [b"", b"\xff" * 40, b"[]", b"{}", b'{"mean": [1], "std": "x"}'])
def test_files_of_other_bytes_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError):
        load(tmp_path / name)


def test_a_file_that_unpacks_to_more_than_it_should_is_refused(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "s.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("s/data/0", "w") as member,
    ):
        for _ in range(300):
            member.write(bytes(1 << 20))
    assert (tmp_path / "s.pt").stat().st_size < 1 << 20
    with pytest.raises(UserError, match="would take more than"):
        load(tmp_path / "s.pt")


def test_the_command(tmp_path: Path, cli: Cli) -> None:
    cache_of(tmp_path / "c", some_moments())
    done = cli("featcache", "stats", str(tmp_path / "c"), "--out", str(tmp_path / "s.safetensors"))
    assert done.returncode == 0, done.stderr
    assert load(tmp_path / "s.safetensors").mean.shape == (C, 1, 1)
    assert done.stdout.count("channel ") == C
    again = cli(
        "featcache", "stats", str(tmp_path / "c"), "--over", "position", "--out", str(tmp_path / "s.safetensors")
    )
    assert again.returncode == 0 and load(tmp_path / "s.safetensors").over == "position"
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for words, said in (
        (["--over", "chanel"], "Did you mean 'channel'"),
        (["--out", str(tmp_path / "model.safetensors")], "holds no statistics"),
        (["--out", str(tmp_path / "s.pt")], ".safetensors"),
        (["--feature", "tiny@5"], "does not hold"),
    ):
        refused = cli("featcache", "stats", str(tmp_path / "c"), *words)
        assert refused.returncode == 2 and said in refused.stderr.replace("\n", " "), refused.stderr
    build(tmp_path / "other", [tokens()])
    assert cli("featcache", "stats", str(tmp_path / "other")).returncode == 2


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(2), (2,), check_invariants=True),
        torch.ones(1).expand(10**12),
        torch.ones(4, device="meta"),
    ],
    ids=["sparse", "expanded", "meta"],
)
def test_tensors_that_are_no_plain_numbers_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"mean": tensor, "std": tensor}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="no pair of statistics"):
        load(tmp_path / "odd.pt")


def test_files_are_named_after_the_cache_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert last_name(".") == "mine"
    assert last_name("s3://bucket/caches/shapes/") == "shapes"
    assert last_name("https://host/shapes?X-Amz-Signature=abc") == "shapes"
