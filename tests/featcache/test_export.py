"""Exports: what is read back from another project's layout is what the cache holds, whatever happened on the way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from store_helpers import base_features, build, dataset, moments, tokens, tree

import featcache
from featcache.cli import app
from featcache.console import run_app
from featcache.errors import CacheError, UserError
from featcache.keys import key_bytes
from featcache.share import exporters, layouts, parquet
from featcache.share.exporters import LAYOUTS, ExportRequest, export
from featcache.share.importers import ImportRequest, import_latents
from featcache.store import FeatureSpec, files
from featcache.store.writers import create_writer
from tests.told import Told

VAE = {
    "name": "other-vae",
    "latent_channels": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
    "downsampling": 16,
    "sha256": "0" * 64,
}
HOSTILE = (
    "../../escaped.png",
    "/etc/passwd",
    "a/../../b",
    "..",
    ".",
    "x\n\x1b[31m\r\t.png",
    "con\udcff\udc80bytes",
    "\\x80",
    "-rf",
    "l" * 400,
    "имя/‮gnp.exe",
    "00000/img-mean-std-00000000.npy",
)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)
    monkeypatch.setattr(files, "sync_all", lambda: None)


def latents(n: int, views: int = 1, seed: int = 0) -> np.ndarray:
    """Moments as VAEs give them, float32 `[n, views, 8, 4, 4]`."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, views, 8, 4, 4)).astype(np.float32)
    values[:, :, 4:] = 2 * values[:, :, 4:] - 9
    return values


def cache_of(
    path: Path,
    values: np.ndarray,
    *,
    codec: str = "fp32",
    keys: Sequence[str] | None = None,
    shard_size: int = 4,
    **described: Any,
) -> Path:
    """A cache of moments `[n, views, 8, 4, 4]`, with labels 0, 1, 2, 0, ... and tokens."""
    from featcache.codecs import encode, numpy_view

    n, views = values.shape[:2]
    keys = keys or [f"class/{(7 * i) % n:04d}.jpg" for i in range(n)]
    longest = max(len(key_bytes(key)) for key in keys)
    stored_keys = np.stack([np.frombuffer(key_bytes(key).ljust(longest, b"\0"), np.uint8) for key in keys])
    tokens_of = np.random.default_rng(5).normal(size=(n, views, 6, 8)).astype(np.float32)
    specs = [
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64"),
        FeatureSpec(name="key", shape=(longest,), codec="raw", dtype="uint8"),
        moments(codec=codec, views=views),
        FeatureSpec(name="tiny@5", shape=(6, 8), codec="int8", views=views),
        FeatureSpec(name="tiny@5.cls", shape=(8,), codec="fp32", views=views),
    ]

    def encoded(codec: str, whole: np.ndarray, slots: range) -> dict[str, np.ndarray]:
        part = torch.from_numpy(whole[slots.start : slots.stop])
        return {suffix: numpy_view(t) for suffix, t in encode(codec, part if views > 1 else part[:, 0]).items()}

    spec = dataset(count=n, vae=VAE, flip=views > 1, **described)
    with create_writer(path, spec, shard_size=shard_size) as writer:
        writer.begin(specs)
        for shard in writer.pending():
            slots = writer.slots(shard)
            writer.write_shard("label", shard, {"": np.array([slot % 3 for slot in slots], np.int64)})
            writer.write_shard("key", shard, {"": stored_keys[slots.start : slots.stop]})
            writer.write_shard("vae/moments", shard, encoded(codec, values, slots))
            writer.write_shard("tiny@5", shard, encoded("int8", tokens_of, slots))
            writer.write_shard("tiny@5.cls", shard, encoded("fp32", tokens_of[:, :, 0], slots))
        writer.finish()
    return path


def by_key(path: Path, name: str = "vae/moments") -> dict[str, np.ndarray]:
    """A feature's stored values, by key."""
    cache = featcache.open(path)
    with cache.reader([name]) as reader:
        out = reader.allocate(len(cache))
        reader.read(np.arange(len(cache)), out)
    return dict(zip(cache.keys(), out[name], strict=True))


def labels_by_key(path: Path) -> dict[str, int]:
    cache = featcache.open(path)
    return dict(zip(cache.keys(), cache.labels().tolist(), strict=True))


def there_and_back(cache: Path, layout: str, tmp: Path, codec: str, **options: Any) -> Path:
    export(ExportRequest(cache=str(cache), out=tmp / layout, layout=layout, **options))
    import_latents(ImportRequest(source=tmp / layout, out=tmp / "back", layout=layout, codec=codec))
    return tmp / "back"


@pytest.mark.parametrize("layout", ["repa", "edm2"])
@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16"])
def test_moments_there_and_back(tmp_path: Path, layout: str, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout holds a float32 standard deviation: a stored half comes back to the bit, a float32 log-variance to
    the precision of that (its logarithm is off by two units of 2**-24, and rounded once more)."""
    monkeypatch.setattr(layouts, "_FOLDER", 1000)
    cache = cache_of(tmp_path / "cache", latents(11), codec=codec)
    back = there_and_back(cache, layout, tmp_path, codec)
    was, now = by_key(cache), by_key(back)
    assert was.keys() == now.keys() and labels_by_key(cache) == labels_by_key(back)
    for key, values in was.items():
        assert np.array_equal(now[key][:4], values[:4])
        if codec == "fp32":
            np.testing.assert_allclose(now[key][4:], values[4:], rtol=2.0**-23, atol=2.0**-23)
        else:
            assert np.array_equal(now[key], values)
    described, again = featcache.open(cache).manifest.dataset, featcache.open(back).manifest.dataset
    assert (described.vae, described.class_names, described.name) == (again.vae, again.class_names, again.name)


def test_the_files_are_those_that_repa_reads(tmp_path: Path) -> None:
    """By its own definitions: files by number, mean and standard deviation, labels in dataset.json; numbers follow the
    sorted keys, as those of the images that REPA's tool writes."""
    values = latents(11)
    cache = cache_of(tmp_path / "cache", values)
    said = Told()
    assert export(ExportRequest(cache=str(cache), out=tmp_path / "vae-sd", layout="repa"), said) == 11
    assert said.tasks[-1] == ("exporting", 11, 0, "samples") and said.counts[-1] == 11
    listed = json.loads((tmp_path / "vae-sd/dataset.json").read_text())["labels"]
    keys = featcache.open(cache).keys()
    order = sorted(range(11), key=lambda i: keys[i])
    assert [name for name, _ in listed] == [f"00000/img-mean-std-{row:08d}.npy" for row in range(11)]
    assert [label for _, label in listed] == [i % 3 for i in order]
    for (name, _), i in zip(listed, order):
        found = np.load(tmp_path / "vae-sd" / name, allow_pickle=False)
        assert found.dtype == np.float32 and np.array_equal(found[:4], values[i, 0, :4])
        np.testing.assert_allclose(found[4:], np.exp(0.5 * values[i, 0, 4:].astype(np.float64)), rtol=1e-7)


def test_more_samples_than_a_folder_holds(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "cache", latents(2_003)[:, :, :, :1, :1].repeat(4, 3).repeat(4, 4), shard_size=500)
    back = there_and_back(cache, "repa", tmp_path, "fp32")
    assert sorted(p.name for p in (tmp_path / "repa").iterdir() if p.is_dir()) == ["00000", "00001", "00002"]
    assert len(list((tmp_path / "repa/00001").iterdir())) == 1000
    assert labels_by_key(back) == labels_by_key(cache)


@pytest.mark.parametrize("views", [1, 2])
def test_lightningdit_holds_samples_of_the_posterior(
    tmp_path: Path, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "_SHARD", 16)
    values = latents(40, views)
    cache = cache_of(tmp_path / "cache", values)
    options: dict[str, Any] = {} if views == 2 else {"view": 0}
    export(ExportRequest(cache=str(cache), out=tmp_path / "a", layout="lightningdit", **options))
    assert sorted(p.name for p in (tmp_path / "a").glob("*.safetensors")) == [
        f"latents_rank00_shard{i:03d}.safetensors" for i in range(3)
    ]
    parts = [load_file(p) for p in sorted((tmp_path / "a").glob("*.safetensors"))]
    whole = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    keys = featcache.open(cache).keys()
    order = np.array(sorted(range(40), key=lambda i: keys[i]))
    assert whole["labels"].dtype == np.int64 and whole["labels"].tolist() == (order % 3).tolist()
    noise = []
    for view, name in enumerate(("latents", "latents_flip")):
        of_view = values[order, view if views == 2 else 0]
        std = np.exp(0.5 * of_view[:, 4:])
        noise.append((whole[name] - of_view[:, :4]) / std)
        assert whole[name].dtype == np.float32
        assert abs(noise[-1].mean()) < 4 / np.sqrt(noise[-1].size) and abs(noise[-1].std() - 1) < 0.05
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.1, "the two places have noise of their own"
    stats = torch.load(tmp_path / "a/latents_stats.pt", weights_only=True)
    assert stats["mean"].shape == stats["std"].shape == (1, 4, 1, 1)
    drawn = torch.from_numpy(whole["latents"]).double()
    torch.testing.assert_close(stats["mean"].flatten(), drawn.mean((0, 2, 3)).float())
    torch.testing.assert_close(stats["std"].flatten(), drawn.std((0, 2, 3)).float())
    export(ExportRequest(cache=str(cache), out=tmp_path / "b", layout="lightningdit", **options))
    assert tree(tmp_path / "a") == tree(tmp_path / "b"), "the same samples are drawn again"
    export(ExportRequest(cache=str(cache), out=tmp_path / "c", layout="lightningdit", seed=1, **options))
    other = load_file(tmp_path / "c/latents_rank00_shard000.safetensors")["latents"]
    assert not torch.equal(other, parts[0]["latents"])


def test_samples_come_back_to_the_bit(tmp_path: Path) -> None:
    """A cache of samples, as an import of LightningDiT's files is: no noise is added to them, and the statistics that
    came with them go with them."""
    values = latents(9, views=2)
    values[:, :, 4:] = -30
    cache = cache_of(tmp_path / "cache", values)
    back = there_and_back(cache, "lightningdit", tmp_path, "fp32")
    was, now = by_key(cache), by_key(back)
    assert was.keys() == now.keys() and all(np.array_equal(now[key], was[key]) for key in was)
    assert labels_by_key(back) == labels_by_key(cache)
    (tmp_path / "again").mkdir()
    again = there_and_back(back, "lightningdit", tmp_path / "again", "fp32")
    assert by_key(again).keys() == was.keys() and all(np.array_equal(by_key(again)[key], was[key]) for key in was)
    first, second = (torch.load(p / "lightningdit/latents_stats.pt") for p in (tmp_path, tmp_path / "again"))
    assert torch.equal(first["mean"], second["mean"]) and torch.equal(first["std"], second["std"])
    described = featcache.open(again).manifest.dataset.vae
    assert described is not None and described["channel_mean"] == first["mean"].flatten().tolist()
    assert {name: described[name] for name in VAE} == VAE


@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8"])
def test_parquet_holds_what_the_cache_decodes_to(tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_FILE_BYTES", 8 << 10)
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 3 << 10)
    path = cache_of(tmp_path / "cache", latents(23), codec=codec)
    export(ExportRequest(cache=str(path), out=tmp_path / "hf", layout="hf"))
    names = sorted(p.name for p in (tmp_path / "hf/data").iterdir())
    assert len(names) > 2 and names[0] == f"train-00000-of-{len(names):05d}.parquet"
    table = pq.read_table(tmp_path / "hf/data")
    cache = featcache.open(path)
    expected = cache.read(range(23))
    assert table["key"].to_pylist() == expected["key"].tolist()
    assert table["label"].to_numpy().tolist() == expected["label"].tolist()
    for name in ("vae/moments", "tiny@5", "tiny@5.cls"):
        found = np.array(table[name].to_pylist(), np.float32)
        assert np.array_equal(found, expected[name])
    half = codec == "fp16"
    assert str(table.schema.field("vae/moments").type).count("halffloat") == int(half)
    card = (tmp_path / "hf/README.md").read_text()
    assert "license: unknown" in card and "| `tiny@5` | 6x8 | float32 | int8 |" in card and '"fingerprint"' in card


def test_parquet_says_shapes_and_classes_as_datasets_reads_them(tmp_path: Path) -> None:
    """What `datasets` looks for in a file and in a card (checked against its version 5.2.0: a `load_dataset` of such
    files gives Array3D, Array2D, List and ClassLabel)."""
    import yaml

    path = cache_of(tmp_path / "cache", latents(5, views=2))
    request = ExportRequest(
        cache=str(path), out=tmp_path / "hf", layout="hf", features=("vae/moments", "label"), dtype="float16"
    )
    export(request)
    schema = pq.read_schema(tmp_path / "hf/data/train-00000-of-00001.parquet")
    described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert described == {
        "vae/moments": {"shape": [2, 8, 4, 4], "dtype": "float16", "_type": "Array4D"},
        "label": {"names": ["circle", "square", "star"], "_type": "ClassLabel"},
    }
    field = schema.field("vae/moments")
    assert field.metadata[b"ARROW:extension:name"] == b"datasets.features.features.Array4DExtensionType"
    assert json.loads(field.metadata[b"ARROW:extension:metadata"]) == [[2, 8, 4, 4], "float16"]
    front = yaml.safe_load((tmp_path / "hf/README.md").read_text().split("---")[1])
    assert front["dataset_info"]["features"][0] == {
        "name": "vae/moments",
        "dtype": {"array4_d": {"shape": [2, 8, 4, 4], "dtype": "float16"}},
    }
    assert front["dataset_info"]["features"][1]["dtype"]["class_label"]["names"] == {
        "0": "circle",
        "1": "square",
        "2": "star",
    }
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*"}]


def test_what_a_card_quotes_cannot_leave_its_block(tmp_path: Path) -> None:
    names = ("```\n# not a heading", "---\nlicense: mit", "two", "two")
    path = cache_of(tmp_path / "cache", latents(5), class_names=names)
    export(ExportRequest(cache=str(path), out=tmp_path / "hf", layout="hf"))
    card = (tmp_path / "hf/README.md").read_text()
    assert "\n# not a heading" not in card and "\nlicense: mit" not in card
    assert card.count("```") == 4
    described = json.loads(pq.read_schema(tmp_path / "hf/data/train-00000-of-00001.parquet").metadata[b"huggingface"])
    assert described["info"]["features"]["label"] == {"dtype": "int64", "_type": "Value"}, "names that are the same"


def test_float16_that_cannot_hold_a_value(tmp_path: Path) -> None:
    values = latents(5)
    values[3, 0, 0, 0, 0] = 1e5
    path = cache_of(tmp_path / "cache", values)
    with pytest.raises(UserError, match=r"beyond 65,504") as error:
        export(ExportRequest(cache=str(path), out=tmp_path / "hf", layout="hf", dtype="float16"))
    assert "--dtype float32" in str(error.value.remedy)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hostile_keys_stay_text(tmp_path: Path, layout: str) -> None:
    keys = [*HOSTILE, "plain.png"]
    work = tmp_path / "deep" / "work"
    work.mkdir(parents=True)
    path = cache_of(tmp_path / "cache", latents(len(keys), views=2), keys=keys)
    view = 0 if layout in ("repa", "edm2") else None
    export(ExportRequest(cache=str(path), out=work / "out", layout=layout, view=view))
    assert [p.name for p in work.iterdir()] == ["out"] and [p.name for p in work.parent.iterdir()] == ["work"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "deep"]
    names = [p.relative_to(work / "out").as_posix() for p in (work / "out").rglob("*")]
    assert all(name.isascii() and name.isprintable() and len(name) < 60 for name in names)
    if layout == "hf":
        return
    import_latents(ImportRequest(source=work / "out", out=tmp_path / "back", layout=layout))
    assert labels_by_key(tmp_path / "back") == labels_by_key(path)


def test_int4_and_bases_are_decoded(tmp_path: Path) -> None:
    path = build(tmp_path / "cache", [*base_features()[:3], tokens(codec="int4"), tokens("i@1", codec="int8")])
    export(ExportRequest(cache=str(path), out=tmp_path / "hf", layout="hf"))
    table, cache = pq.read_table(tmp_path / "hf/data"), featcache.open(path)
    for name in ("tiny@5", "i@1"):
        assert np.array_equal(np.array(table[name].to_pylist(), np.float32), cache.read(range(len(cache)))[name])


@pytest.mark.parametrize("form", ["zarr", "wds"])
def test_skipped_images_are_left_out(tmp_path: Path, form: str) -> None:
    path = build(tmp_path / "cache", skipped=[3, 40], format=form)
    export(ExportRequest(cache=str(path), out=tmp_path / "hf", layout="hf"))
    table, cache = pq.read_table(tmp_path / "hf/data"), featcache.open(path)
    assert len(table) == 48 and table["key"].to_pylist() == cache.keys()


# Refusals


def test_what_is_refused(tmp_path: Path) -> None:
    plain, mirrored = (cache_of(tmp_path / str(v), latents(5, views=v)) for v in (1, 2))
    bare = build(tmp_path / "bare")  # moments, but nothing is known of their VAE
    for cache, options, match, remedy in (
        (plain, {"layout": "npz"}, "no layout 'npz'", "--to"),
        (mirrored, {"layout": "repa"}, "holds each image mirrored too", "--view 0"),
        (plain, {"layout": "lightningdit"}, "no mirrored images", "--view 0"),
        (plain, {"layout": "edm2", "view": 1}, "no mirrored images", "--view 0"),
        (bare, {"layout": "repa"}, "holds no latents", "--to hf"),
        (plain, {"layout": "repa", "features": ("tiny@5",)}, "--features is for --to hf", "--to hf"),
        (plain, {"layout": "repa", "dtype": "float16"}, "--dtype is for --to hf", "--to hf"),
        (plain, {"layout": "hf", "dtype": "int8"}, "no dtype 'int8'", "float16"),
        (plain, {"layout": "hf", "features": ("dinov2-b@11",)}, "does not hold dinov2-b@11", "it holds"),
        (plain, {"layout": "hf", "view": 2}, "no view 2", "0 and 1"),
    ):
        with pytest.raises(UserError, match=match) as error:
            export(ExportRequest(cache=str(cache), out=tmp_path / "out", **options))
        assert remedy in str(error.value.remedy)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.unfinished").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def typed(line: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", line.split())
        status = run_app(app)
        return status, " ".join("".join(capsys.readouterr()).split())

    monkeypatch.chdir(tmp_path)
    cache_of(tmp_path / "cache", latents(5))
    status, said = typed("featcache export cache --to repa --out data/vae-sd")
    assert status == 0 and "data/vae-sd: 5 samples in the layout of repa" in said
    assert (tmp_path / "data/vae-sd/dataset.json").is_file()
    status, said = typed("featcache export cache --to lightningdit --out data/vae-sd --view 0")
    assert status == 2 and "rm -r" in said and "Traceback" not in said


def test_a_complete_export_is_left_alone(tmp_path: Path) -> None:
    path = cache_of(tmp_path / "cache", latents(5))
    request = ExportRequest(cache=str(path), out=tmp_path / "out", layout="repa")
    export(request)
    before, said = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}, Told()
    assert export(request, said) == 5
    assert "complete already" in said.notes[0] and not said.counts
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_notes_say_what_readers_take_for_granted(tmp_path: Path) -> None:
    def notes(cache: Path, layout: str, **options: Any) -> str:
        said = Told()
        export(ExportRequest(cache=str(cache), out=tmp_path / f"{cache.name}-{layout}", layout=layout, **options), said)
        return " ".join(said.notes)

    plain = cache_of(tmp_path / "plain", latents(5))
    part = cache_of(tmp_path / "part", latents(5), preprocessing={"resolution": 64, "available": 9})
    assert notes(plain, "repa") == ""
    assert "pixels in [-1, 1]; EDM2's encoder" in notes(plain, "edm2")
    assert "holds 5 of 9 images" in notes(part, "repa")
    assert "not mirrored" in notes(plain, "lightningdit", view=0)


# Whose folder it is, and what a kill leaves


def test_no_other_folder_is_touched(tmp_path: Path) -> None:
    path = cache_of(tmp_path / "cache", latents(5))

    def refused(match: str, out: str = "out") -> None:
        before = tree(tmp_path)
        with pytest.raises(UserError, match=match):
            export(ExportRequest(cache=str(path), out=tmp_path / out, layout="repa"))
        assert tree(tmp_path) == before

    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    refused("holds 'mine.txt' and is no export")
    (tmp_path / "file").write_text("a file")
    refused("is a file", "file")
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished/mine.txt").write_text("mine")
    refused("holds 'mine.txt' and is no unfinished export", "new")
    (tmp_path / "linked.unfinished").symlink_to(tmp_path / "out")
    refused("is in the way", "linked")
    export(ExportRequest(cache=str(path), out=tmp_path / "edm2", layout="edm2"))
    refused("is another export: it differs in layout", "edm2")
    other = cache_of(tmp_path / "other", latents(5, seed=1))
    export(ExportRequest(cache=str(other), out=tmp_path / "others", layout="repa"))
    refused("is another export: it differs in bytes", "others")
    (tmp_path / "edm2/featcache-export.json").write_text("{")
    refused("is damaged", "edm2")


def test_an_empty_folder_and_a_link_to_one_will_do(tmp_path: Path) -> None:
    path = cache_of(tmp_path / "cache", latents(5))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export(ExportRequest(cache=str(path), out=tmp_path / "link", layout="repa"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty/dataset.json").is_file()


def test_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache_of(tmp_path / "cache", latents(5))
    request = ExportRequest(cache=str(path), out=tmp_path / "out", layout="repa")
    inside, go = threading.Event(), threading.Event()
    write = layouts.NpyLayout.write

    def slow(self: layouts.NpyLayout, place: Path, piece: layouts.Piece) -> None:
        inside.set()
        assert go.wait(30)
        write(self, place, piece)

    monkeypatch.setattr(layouts.NpyLayout, "write", slow)
    first = threading.Thread(target=export, args=(request,))
    first.start()
    assert inside.wait(30)
    with pytest.raises(UserError, match="another process is exporting"):
        export(request)
    go.set()
    first.join()
    assert (tmp_path / "out/dataset.json").is_file() and not (tmp_path / "out/lock").exists()


def test_damage_is_not_exported(tmp_path: Path) -> None:
    path = cache_of(tmp_path / "cache", latents(9))
    (shard,) = path.glob("vae/moments/c.1.*")
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="is damaged: its bytes do not match"):
        export(ExportRequest(cache=str(path), out=tmp_path / "out", layout="repa"))
    assert not (tmp_path / "out").exists()
    export(ExportRequest(cache=str(path), out=tmp_path / "hf", layout="hf", features=("key", "label", "tiny@5")))


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    values = latents(5)
    values[2, 0, 1, 1, 1] = np.inf
    path = cache_of(tmp_path / "cache", values)
    with pytest.raises(CacheError, match="not finite"):
        export(ExportRequest(cache=str(path), out=tmp_path / "out", layout="repa"))


def test_a_full_disk_leaves_what_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache_of(tmp_path / "cache", latents(25))
    monkeypatch.setattr(layouts, "_FOLDER", 5)
    monkeypatch.setattr(layouts, "digits", lambda row: f"{row // 5:05d}{row % 5:03d}")
    request = ExportRequest(cache=str(path), out=tmp_path / "out", layout="repa")
    export(ExportRequest(cache=str(path), out=tmp_path / "whole", layout="repa"))
    real, calls = files._write, 0

    def full(fd: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls > 14:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(CacheError, match="disk is full"):
        export(request)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(files, "_write", real)
    said = Told()
    export(request, said)
    assert said.tasks[-1][2] == 10, "two folders were whole"
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_what_a_power_loss_leaves_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a folder that was there already, but not on the disk."""
    path = cache_of(tmp_path / "cache", latents(9))
    request = ExportRequest(cache=str(path), out=tmp_path / "out", layout="repa")
    export(request)
    whole = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.unfinished")
    (tmp_path / "out.unfinished/00000/img-mean-std-00000004.npy").write_bytes(b"")
    export(request)
    assert tree(tmp_path / "out") == whole


# Imports once, then forks a child for every line: arguments of `featcache`. Pieces are so small that there are twenty.
EXPORTER = """
import json, os, sys
import torch
from featcache.cli import app
from featcache.console import run_app
from featcache.share import exporters, layouts, parquet
from featcache.store import files
torch.set_num_threads(1)
layouts._FOLDER, layouts._SHARD, parquet._FILE_BYTES, parquet._GROUP_BYTES = 8, 8, 8 << 10, 4 << 10
layouts.digits = lambda row: f"{row // 8:05d}{row % 8:03d}"
files._fsync = lambda fd: None
files.sync_all = lambda: None  # no power is lost in this test
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        sys.argv = ["featcache", *json.loads(line)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(run_app(app))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def exporter() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", EXPORTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def run_export(exporter: subprocess.Popen[str], *words: object, kill_after_s: float | None = None) -> int:
    """A `featcache export`, killed after so long; its exit status."""
    assert exporter.stdin is not None and exporter.stdout is not None
    exporter.stdin.write(json.dumps(["export", *map(str, words)]) + "\n")
    exporter.stdin.flush()
    child = int(exporter.stdout.readline())
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with contextlib.suppress(ProcessLookupError):  # it was sooner
            os.kill(child, signal.SIGKILL)
    return int(exporter.stdout.readline())


@pytest.mark.parametrize("layout", ["repa", "lightningdit", "hf"])
def test_kills_at_random_moments(tmp_path: Path, layout: str, exporter: subprocess.Popen[str]) -> None:
    """Whenever it is killed: the export is not there, or whole; and what comes in the end is what comes without kills."""
    path = cache_of(tmp_path / "cache", latents(160), shard_size=40)
    command, out = [path, "--to", layout, "--view", 0, "--out"], tmp_path / "out"
    started = time.monotonic()
    assert run_export(exporter, *command, tmp_path / "whole") == 0
    takes_s = time.monotonic() - started
    whole = tree(tmp_path / "whole")
    rng, killed, interrupted = np.random.default_rng(3), 0, 0
    while killed < 12:
        status = run_export(exporter, *command, out, kill_after_s=takes_s * rng.random())
        killed += status == -signal.SIGKILL
        interrupted += (tmp_path / "out.unfinished").exists()
        if out.exists():
            found = tree(out)
            found.pop(exporters.LOCK, None)  # killed before its last deed
            assert found == whole
            shutil.rmtree(out)
    assert run_export(exporter, *command, out) == 0
    assert tree(out) == whole
    assert not (tmp_path / "out.unfinished").exists() and interrupted


# What comes back may have been changed by anybody


@pytest.mark.parametrize("layout", ["repa", "lightningdit"])
def test_a_marker_that_somebody_changed(tmp_path: Path, layout: str) -> None:
    path = cache_of(tmp_path / "cache", latents(5))
    out = tmp_path / "out"
    export(ExportRequest(cache=str(path), out=out, layout=layout, view=0))
    marker, keys = out / "featcache-export.json", out / "featcache-keys.json"
    said, listed = json.loads(marker.read_text()), json.loads(keys.read_text())

    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            import_latents(ImportRequest(source=out, out=tmp_path / "back", layout=layout))
        assert "remove" in str(error.value.remedy) and not (tmp_path / "back").exists()

    for change, match in (
        ({"layout": "hf"}, "is not of an export to"),
        ({"featcache_export": 99}, "is not of an export to"),
        ({"vae": {"name": "x"}}, r"dataset\.vae must be"),
        ({"vae": None}, "does not say what was exported"),
        ({"vae": {**VAE, "downsampling": 1 << 40}}, r"dataset\.vae\.downsampling must be"),
        ({"classes": [1]}, "a class name must be"),
        ({"cache": {"name": [], "fingerprint": "0" * 64}}, r"dataset\.name must be"),
    ):
        marker.write_text(json.dumps(said | change))
        refused(match)
    marker.write_text(json.dumps(said))
    for changed, match in (
        (listed[1:], "does not list the keys"),
        ([1, *listed[1:]], "does not list the keys"),
        (["a" * 5000, *listed[1:]], "a key that no file name is"),
        (["a\0b", *listed[1:]], "a key that no file name is"),
        (["", *listed[1:]], "a key that no file name is"),
        (["\ud83d", *listed[1:]], "not Unicode"),
    ):
        keys.write_text(json.dumps(changed))
        refused(match)
    keys.unlink()
    refused("cannot be read|no such")
    os.mkfifo(keys)
    refused("cannot be read")
    keys.unlink()
    marker.unlink()
    import_latents(ImportRequest(source=out, out=tmp_path / "back", layout=layout))
    assert all(key.startswith(("00000/img", "latents_rank00")) for key in labels_by_key(tmp_path / "back"))
