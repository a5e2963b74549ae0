"""Conversion between formats, and import of other projects' latents, checked against their own
definitions.
"""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from store_helpers import COUNT, add, base_features, build, dataset, tokens, tree

import featcache
from featcache.errors import CacheError, UserError
from featcache.share.convert import convert
from featcache.share.importers import ImportRequest, import_latents
from featcache.share.verify import verify
from featcache.store import files
from tests.told import Told


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


def test_there_and_back_gives_the_same_files(tmp_path: Path) -> None:
    specs = [*base_features(), tokens("v@1", views=2), tokens("i@1", codec="int4")]
    original = build(tmp_path / "zarr", specs, skipped=[5, 33])
    done = Told()
    convert(original, tmp_path / "wds", to="wds", progress=done)
    assert sum(done.counts) == COUNT and done.tasks == [("converting", COUNT, 0, "samples")]
    assert verify(tmp_path / "wds").ok
    convert(tmp_path / "wds", tmp_path / "back", to="zarr")
    assert tree(tmp_path / "back") == tree(original)
    convert(original, tmp_path / "again", to="wds")
    assert tree(tmp_path / "again") == tree(tmp_path / "wds")
    assert featcache.open(tmp_path / "wds").fingerprint == featcache.open(original).fingerprint


def test_other_shard_sizes_and_compression(tmp_path: Path) -> None:
    original = build(tmp_path / "a", skipped=[5])
    convert(original, tmp_path / "b", to="zarr", shard_size=7, compressor="zstd")
    convert(tmp_path / "b", tmp_path / "c", to="wds", shard_size=50)
    convert(tmp_path / "c", tmp_path / "d", to="zarr", shard_size=16)
    assert tree(tmp_path / "d") == tree(original)


def test_some_features_only_and_more_later(tmp_path: Path) -> None:
    original = build(tmp_path / "a")
    convert(original, tmp_path / "b", to="zarr", features=["label", "key"])
    assert set(featcache.open(tmp_path / "b").manifest.features) == {"label", "key"}
    add(tmp_path / "b", base_features()[2:])
    assert tree(tmp_path / "b") == tree(original)


@pytest.mark.parametrize("form", ["zarr", "wds"])
@pytest.mark.parametrize("shard_size", [None, 7, 50])
def test_damage_is_not_copied(tmp_path: Path, form: str, shard_size: int | None) -> None:
    """The copy gets checksums of its own, which would say of damaged values that they are sound."""
    original = build(tmp_path / "a")
    if form == "wds":
        original = convert(original, tmp_path / "w", to="wds") and tmp_path / "w"
    (shard,) = original.glob("00000001.tar" if form == "wds" else "vae/moments/c.1.*")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    for to in ("zarr", "wds"):
        with pytest.raises(CacheError, match="is damaged: its bytes do not match") as error:
            convert(original, tmp_path / f"copy-{to}", to=to, shard_size=shard_size)
        assert "featcache repair" in str(error.value.remedy)
        with pytest.raises(CacheError, match="unfinished build"):
            featcache.open(tmp_path / f"copy-{to}")
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    convert(original, tmp_path / "copy-zarr", to="zarr", shard_size=shard_size)
    assert verify(tmp_path / "copy-zarr").ok


def test_other_features_may_be_damaged(tmp_path: Path) -> None:
    original = build(tmp_path / "a")
    next(original.glob("vae/moments/c.1.*")).write_bytes(b"")
    convert(original, tmp_path / "b", to="zarr", features=["label", "key", "tiny@5"])
    assert verify(tmp_path / "b").ok


def test_refusals(tmp_path: Path) -> None:
    original = build(tmp_path / "a")
    with pytest.raises(CacheError, match="no cache format 'tfrecord'"):
        convert(original, tmp_path / "b", to="tfrecord")
    with pytest.raises(CacheError, match="does not hold x"):
        convert(original, tmp_path / "b", to="wds", features=["x"])
    with pytest.raises(CacheError, match="both"):
        convert(original, original, to="wds")
    other = build(tmp_path / "other", count=20)
    with pytest.raises(CacheError, match="other images"):
        convert(original, other, to="zarr")
    assert dataset().count == COUNT


# Import


def repa_like(folder: Path, n: int = 12) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, 8, 4, 4)).astype(np.float32)
    values[:, 4:] = np.exp(rng.normal(size=(n, 4, 4, 4)) - 3)
    values[0, 4, 0, 0] = 0.0
    labels = [int(x) for x in rng.integers(0, 3, n - 1)] + [2]
    listed = []
    for i in range(n):
        name = f"{i // 5:05d}/img-mean-std-{i:08d}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, values[i])
        listed.append([name, labels[i]])
    (folder / "dataset.json").write_text(json.dumps({"labels": listed[::-1]}))
    return values, labels


def read_all(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    cache = featcache.open(path)
    with cache.reader(["vae/moments"]) as reader:
        out = reader.allocate(len(cache))
        reader.read(range(len(cache)), out)
    return out["vae/moments"], cache.labels(), cache.keys()


def test_repa(tmp_path: Path) -> None:
    values, labels = repa_like(tmp_path / "data" / "vae-sd")
    request = ImportRequest(source=tmp_path / "data", out=tmp_path / "cache", layout="repa", codec="fp32", shard_size=5)
    manifest = import_latents(request)
    moments, got_labels, keys = read_all(tmp_path / "cache")
    which = [int(key[-12:-4]) for key in keys]
    assert sorted(which) == list(range(12))
    assert which != list(range(12))
    assert got_labels.tolist() == [labels[i] for i in which]
    assert np.array_equal(moments[:, :4], values[which, :4])
    expected = np.clip(2 * np.log(np.maximum(values[which, 4:].astype(np.float64), 1e-30)), -30, 20)
    np.testing.assert_allclose(moments[:, 4:], expected, rtol=1e-6)
    # Drawing from the posterior with its own convention gives mean + std * noise again.
    std = np.exp(0.5 * moments[:, 4:].astype(np.float64))
    np.testing.assert_allclose(std, np.maximum(values[which, 4:], np.exp(-15)), rtol=1e-5)
    assert manifest.dataset.vae is not None
    assert manifest.dataset.vae["pixel_range"] == [-1, 1]
    assert manifest.dataset.preprocessing["resolution"] == 32
    assert manifest.features["vae/moments"].provenance["imported_from"] == "repa"
    assert verify(tmp_path / "cache").ok
    before = tree(tmp_path / "cache")
    import_latents(request)
    assert tree(tmp_path / "cache") == before


def test_edm2_zip_says_its_pixel_range(tmp_path: Path) -> None:
    values, _ = repa_like(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path / "folder").as_posix())
    request = ImportRequest(source=tmp_path / "data.zip", out=tmp_path / "cache", layout="edm2")
    manifest = import_latents(request)
    assert manifest.dataset.vae is not None
    assert manifest.dataset.vae["pixel_range"] == [0, 1]
    moments, _, keys = read_all(tmp_path / "cache")
    which = [int(key[-12:-4]) for key in keys]
    assert moments.dtype == np.float16
    assert np.array_equal(moments[:, :4], values[which, :4].astype(np.float16))


@pytest.mark.parametrize("with_stats", [True, False])
def test_lightningdit(tmp_path: Path, with_stats: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "data"
    folder.mkdir()
    latents, flips, labels = [], [], []
    for i, n in enumerate((5, 3)):
        a, b = (torch.randn(n, 6, 4, 4, generator=generator) * 3 + 1 for _ in range(2))
        y = torch.randint(0, 4, (n,), generator=generator)
        save_file(
            {"latents": a, "latents_flip": b, "labels": y},
            folder / f"latents_rank00_shard{i:03d}.safetensors",
        )
        latents.append(a)
        flips.append(b)
        labels.append(y)
    whole = torch.stack([torch.cat(latents), torch.cat(flips)], dim=1).numpy()
    if with_stats:
        stats = {"mean": torch.full((1, 6, 1, 1), 0.5), "std": torch.full((1, 6, 1, 1), 2.0)}
        torch.save(stats, folder / "latents_stats.pt")
    request = ImportRequest(source=folder, out=tmp_path / "cache", layout="lightningdit", codec="fp32", shard_size=3)
    manifest = import_latents(request)
    moments, got_labels, keys = read_all(tmp_path / "cache")
    which = [int(key.split(":")[1]) + (5 if "shard001" in key else 0) for key in keys]
    assert moments.shape == (8, 2, 12, 4, 4)
    assert np.array_equal(moments[:, :, :6], whole[which])
    assert (moments[:, :, 6:] == -30).all()
    assert got_labels.tolist() == torch.cat(labels)[which].tolist()
    vae = manifest.dataset.vae
    assert vae is not None
    assert manifest.dataset.flip
    assert manifest.features["vae/moments"].provenance["sampled"] is True
    if with_stats:
        assert vae["scaling_factor"] == 0.5
        assert vae["shift_factor"] == 0.5
    else:
        std = whole[:, 0].astype(np.float64).std(axis=(0, 2, 3))
        np.testing.assert_allclose(vae["channel_std"], std, rtol=1e-6)


def test_latents_listed_twice_or_missing_are_not_passed_over(tmp_path: Path) -> None:
    """A folder that came in part, and archives that hold two files of one name."""

    def refused(source: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            import_latents(ImportRequest(source=source, out=tmp_path / "cache", layout="edm2"))
        assert not (tmp_path / "cache").exists()

    _, labels = repa_like(tmp_path / "data")
    listed = json.loads((tmp_path / "data/dataset.json").read_text())["labels"]
    (tmp_path / "data" / listed[0][0]).unlink()
    refused(tmp_path / "data", "lists 1 files that are not there, such as")
    (tmp_path / "data/dataset.json").write_text(json.dumps({"labels": [*listed[1:], [listed[1][0], labels[1]]]}))
    refused(tmp_path / "data", "a file is listed twice")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(tmp_path / "data" / listed[1][0], listed[1][0])
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.write(tmp_path / "data" / listed[1][0], listed[1][0])
    refused(tmp_path / "data.zip", "holds two files")


def test_malformed_sources(tmp_path: Path) -> None:
    def attempt(source: Path, layout: str = "repa") -> None:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        import_latents(ImportRequest(source=source, out=tmp_path / "cache", layout=layout))

    with pytest.raises(UserError, match="there is nothing at"):
        attempt(tmp_path / "missing")
    with pytest.raises(UserError, match="no layout 'npz'"):
        attempt(tmp_path, "npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no \.npy files"):
        attempt(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no \.safetensors files"):
        attempt(tmp_path / "empty", "lightningdit")
    repa_like(tmp_path / "data")
    victim = tmp_path / "data" / "00001" / "img-mean-std-00000007.npy"
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for content, message in (
        (buffer.getvalue(), "not a .npy file"),
        (b"\x93NUMPY", "not a .npy file"),
        (b"", "not a"),
    ):
        victim.write_bytes(content)
        with pytest.raises(UserError, match=message):
            attempt(tmp_path / "data")
    np.save(victim, np.zeros((8, 4, 5), np.float32))
    with pytest.raises(UserError, match="has shape"):
        attempt(tmp_path / "data")
    np.save(victim, np.full((8, 4, 4), np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        attempt(tmp_path / "data")
    (tmp_path / "data" / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match="does not give each"):
        attempt(tmp_path / "data")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(UserError, match="not a safetensors file"):
        attempt(tmp_path / "bad", "lightningdit")
