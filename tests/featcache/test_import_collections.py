"""Latents of REPA-E and iREPA, written as their code (and `datasets`) writes them; and what others could make of such files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
import torch

import featcache
from featcache.errors import UserError
from featcache.share.importers import ImportRequest, import_latents, open_latents
from featcache.share.verify import verify
from featcache.store import files

NAME = "imagenet-latents-sdvae-ft-mse-f8d4"


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)


def latents(n: int = 25, channels: int = 4, side: int = 4) -> np.ndarray:
    """Mean and standard deviation, float32 `[n, 2C, h, w]`."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, 2 * channels, side, side)).astype(np.float32)
    values[:, channels:] = np.exp(values[:, channels:] - 3)
    return values


def nested(values: np.ndarray) -> pa.Array:
    """`[n, ...]` as nested lists, as the storage of `datasets`' arrays is."""
    array = pa.array(values.reshape(-1))
    for size in values.shape[:0:-1]:
        array = pa.ListArray.from_arrays(np.arange(0, len(array) + 1, size, dtype=np.int32), array)
    return array


def save_arrow(folder: Path, columns: dict[str, pa.Array], shards: int = 2, options: Any = None) -> None:
    """What `datasets.Dataset.save_to_disk` writes (compared with its version 5.2.0)."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    size = -(-len(table) // shards)
    for i, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as out:
            out.write_table(table.slice(i * size, size), max_chunksize=6)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def irepa(tmp_path: Path, values: np.ndarray, labels: list[int], *, how: str = "txt") -> Path:
    data = tmp_path / "data"
    save_arrow(data / NAME, {"data": nested(values)})
    if how == "txt":
        (data / "imagenet_train_labels.txt").write_text("".join(f"{label}\n" for label in labels))
    else:
        save_arrow(data / "imagenet-latents-images", {"label": pa.array(labels)}, shards=1)
    return data / NAME


def repae(path: Path, values: np.ndarray, labels: list[int]) -> list[str]:
    """As cache_latents.py writes it: a dataset a file, in groups, and dataset.json as bytes."""
    names = [f"{i // 10:05d}/img-mean-std-{i:08d}.npy" for i in range(len(values))]
    with h5py.File(path, "w") as file:
        for name, value in zip(names, values):
            file.require_group(name.split("/")[0]).create_dataset(name.split("/")[1], data=value)
        listed = json.dumps({"labels": list(zip(names, labels))})
        file.create_dataset("dataset.json", data=np.array(listed.encode("utf-8"), dtype="S"))
    return names


def save_statistics(path: Path, channels: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = torch.arange(1, channels + 1).view(1, channels, 1, 1) / 2
    torch.save({"latents_scale": scale, "latents_bias": torch.full((1, channels, 1, 1), 0.25)}, path)


def check(cache_path: Path, values: np.ndarray, labels: list[int], number: Callable[[str], int]) -> None:
    assert verify(cache_path).ok
    cache = featcache.open(cache_path)
    found = cache.read(range(len(cache)))
    which = [number(key) for key in found["key"]]
    assert sorted(which) == list(range(len(values)))
    C = values.shape[1] // 2
    assert np.array_equal(found["vae/moments"][:, :C], values[which, :C])
    np.testing.assert_allclose(np.exp(0.5 * found["vae/moments"][:, C:]), values[which, C:], rtol=2e-6)
    assert found["label"].tolist() == [labels[i] for i in which]


@pytest.mark.parametrize("how", ["txt", "images"])
def test_irepa(tmp_path: Path, how: str) -> None:
    values, labels = latents(), [i % 7 for i in range(25)]
    folder = irepa(tmp_path, values, labels, how=how)
    save_statistics(tmp_path / "pretrained_models/sdvae-ft-mse-f8d4-latents-stats.pt")
    manifest = import_latents(ImportRequest(source=folder, out=tmp_path / "cache", layout="irepa", codec="fp32"))
    check(tmp_path / "cache", values, labels, int)
    vae = manifest.dataset.vae
    assert vae is not None and vae["name"] == "sd-ft-mse" and vae["downsampling"] == 8
    assert vae["channel_mean"] == [0.25] * 4 and vae["channel_std"] == [2.0, 1.0, 2 / 3, 0.5]
    assert manifest.dataset.preprocessing["resolution"] == 32
    assert manifest.features["vae/moments"].provenance["imported_from"] == "irepa"


def test_irepas_validation_split_and_an_axis_of_one(tmp_path: Path) -> None:
    irepa(tmp_path, latents(), [0] * 25)
    values, labels = latents(12), [i % 5 for i in range(12)]
    save_arrow(tmp_path / "data" / NAME / "val", {"data": nested(values[:, None])}, shards=1)
    (tmp_path / "data/imagenet_val_labels.txt").write_text("\n".join(map(str, labels)))
    source = tmp_path / "data" / NAME / "val"
    import_latents(ImportRequest(source=source, out=tmp_path / "cache", layout="irepa", codec="fp32"))
    check(tmp_path / "cache", values, labels, int)


@pytest.mark.parametrize(("stem", "channels", "known"), [("e2e-vavae", 32, "e2e-va-vae"), ("mine", 4, "unknown")])
def test_repae(tmp_path: Path, stem: str, channels: int, known: str) -> None:
    values, labels = latents(channels=channels), [i % 7 for i in range(25)]
    names = repae(tmp_path / f"{stem}.h5", values, labels)
    (tmp_path / "images.h5").write_bytes(b"not looked at")
    save_statistics(tmp_path / "elsewhere.pt", channels)
    request = ImportRequest(
        source=tmp_path, out=tmp_path / "cache", layout="repae", codec="fp32", statistics=tmp_path / "elsewhere.pt"
    )
    manifest = import_latents(request)
    check(tmp_path / "cache", values, labels, names.index)
    vae = manifest.dataset.vae
    assert vae is not None and vae["name"] == known and vae["downsampling"] == (8 if channels == 4 else 16)
    assert vae["channel_mean"] == [0.25] * channels and vae["channel_std"][1] == 1.0


def test_statistics_that_are_not_there_are_computed_of_samples_of_the_posterior(tmp_path: Path) -> None:
    values = latents(200)
    values[:, 4:] *= 20
    repae(tmp_path / "mine.h5", values, [0] * 200)
    vae = open_latents(tmp_path / "mine.h5", "repae").vae
    noise = np.random.default_rng(1).normal(size=(300, 200, 4, 4, 4))
    samples = values[:, :4] + values[:, 4:] * noise
    np.testing.assert_allclose(vae["channel_std"], samples.std((0, 1, 3, 4)), rtol=0.02)
    np.testing.assert_allclose(vae["channel_mean"], values[:, :4].astype(np.float64).mean((0, 2, 3)), rtol=1e-5)
    save_statistics(tmp_path / "mine-latents-stats.pt")
    assert open_latents(tmp_path / "mine.h5", "repae").vae["channel_mean"] == [0.25] * 4, "found beside"


def refused(source: Path, layout: str, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as error:
        found = open_latents(source, layout, **options)
        for i in range(len(found)):
            found.read(i)
    assert error.value.remedy


def test_irepa_refusals(tmp_path: Path) -> None:
    values, labels = latents(), [0] * 25
    folder = irepa(tmp_path, values, labels)
    state = folder / "state.json"
    good = state.read_text()
    for said, match in (
        ("{", "does not list the files"),
        ('{"_data_files": [{"filename": "../../etc/passwd"}]}', "is no file in this folder"),
        ('{"_data_files": [{"filename": 5}]}', "is no file in this folder"),
        ('{"_data_files": [], "_indices_files": [{"filename": "x"}]}', "it is a selection"),
        ('{"_data_files": []}', "holds no .arrow files"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow cannot be read"),
    ):
        state.write_text(said)
        refused(folder, "irepa", match)
    state.write_text(good)
    text = tmp_path / "data/imagenet_train_labels.txt"
    text.write_text("0\n" * 24)
    refused(folder, "irepa", "24 labels for 25 latents")
    text.write_text("zero\n" * 25)
    refused(folder, "irepa", "a number a line")
    text.write_text("-1\n" * 25)
    refused(folder, "irepa", "a label is -1")
    text.unlink()
    refused(folder, "irepa", "has no labels")
    text.write_text("0\n" * 25)
    (tmp_path / "stats.pt").write_bytes(b"no pickle")
    refused(folder, "irepa", "stats.pt cannot be read", statistics=tmp_path / "stats.pt")
    save_statistics(tmp_path / "stats.pt", 32)
    refused(folder, "irepa", "is for 32 channels", statistics=tmp_path / "stats.pt")
    refused(folder, "repa", "--statistics is for", statistics=tmp_path / "stats.pt")
    ragged = [value.tolist() for value in values]
    ragged[20][3][2].pop()
    for column, match in (
        (pa.array(ragged), "its lists have the lengths"),
        (nested(values[:, 0].astype(np.int32)), "it holds int32"),
        (nested(values[:, :7]), r"not \[2C, h, w\]"),
        (pa.array([None, *values[1:].tolist()]), "no array of numbers"),
    ):
        save_arrow(folder, {"data": column})
        refused(folder, "irepa", match)
    save_arrow(folder, {"image": nested(values)})
    refused(folder, "irepa", "none is called data")
    save_arrow(folder, {"data": nested(np.zeros_like(values))}, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    refused(folder, "irepa", "it is compressed")
    outside = tmp_path / "outside.arrow"
    outside.write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    (folder / "data-00000-of-00002.arrow").unlink()
    (folder / "data-00000-of-00002.arrow").symlink_to(outside)
    refused(folder, "irepa", "a link that leads out")


def test_damaged_arrow_files_are_errors(tmp_path: Path) -> None:
    """Flipped bytes and cut ends: right numbers or a `UserError`, never more."""
    folder = irepa(tmp_path, latents(), [0] * 25)
    file = folder / "data-00000-of-00002.arrow"
    good, rng, errors = file.read_bytes(), np.random.default_rng(2), 0
    for _ in range(150):
        data = bytearray(good)
        for place in rng.integers(0, len(data) if rng.random() < 0.5 else 1500, 3):
            data[place] = rng.integers(256)
        file.write_bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)
        try:
            found = open_latents(folder, "irepa")
            shapes = {found.read(i).shape for i in range(len(found))}
            assert shapes == {(1, 8, 4, 4)}
        except UserError:
            errors += 1
    assert errors > 20


def test_repae_refusals(tmp_path: Path) -> None:
    values = latents()
    path = tmp_path / "x.h5"
    names = repae(path, values, [0] * 25)
    good, numbers = path.read_bytes(), itertools.count()

    def changed(change: Callable[[h5py.File], None], match: str) -> None:
        place = tmp_path / f"{next(numbers)}.h5"  # the library knows which files it has open
        place.write_bytes(good)
        with h5py.File(place, "a") as file:
            change(file)
        refused(place, "repae", match)
        place.unlink()

    def replaced(make: Callable[[h5py.File], Any], match: str, name: str = names[7]) -> None:
        def change(file: h5py.File) -> None:
            del file[name]
            make(file)

        changed(change, match)

    repae(tmp_path / "other.h5", values, [0] * 25)
    layout = h5py.VirtualLayout(shape=(8, 4, 4), dtype="f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), names[7], shape=(8, 4, 4))
    (tmp_path / "raw").write_bytes(bytes(512))
    external = h5py.ExternalLink(str(tmp_path / "other.h5"), names[7])
    replaced(lambda f: f.__setitem__(names[7], external), "is a link")
    replaced(lambda f: f.__setitem__(names[7], h5py.SoftLink(f"/{names[8]}")), "is a link")
    replaced(lambda f: f.create_virtual_dataset(names[7], layout), "not in this file")
    replaced(
        lambda f: f.create_dataset(names[7], (8, 4, 4), "f4", external=[(str(tmp_path / "raw"), 0, 512)]),
        "not in this file",
    )
    replaced(
        lambda f: f.__setitem__("00001", h5py.ExternalLink(str(tmp_path / "other.h5"), "/00001")), "is a link", "00001"
    )
    replaced(lambda f: f.create_dataset(names[7], (1 << 20, 1 << 10), "f4", chunks=True), "cannot be read")
    replaced(lambda f: f.create_dataset(names[7], data=values[7].astype(int)), "cannot be read")
    replaced(lambda f: f.create_dataset(names[7], data=values[7, :6]), "the first one")
    replaced(lambda f: f.create_group(names[7]), "cannot be read")
    replaced(lambda f: None, "files that are not there")
    replaced(lambda f: None, "dataset.json", "dataset.json")
    for data in (b"", b"not hdf5", good[:1000]):
        (tmp_path / "bad.hdf5").write_bytes(data)
        refused(tmp_path / "bad.hdf5", "repae", "is no HDF5 file")
    refused(tmp_path / "gone.h5", "repae", "cannot be read")
    refused(tmp_path, "repae", "holds 2 .h5 files")


def test_h5py_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repae(tmp_path / "x.h5", latents(), [0] * 25)
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match="h5py, which is not installed") as error:
        open_latents(tmp_path / "x.h5", "repae")
    assert error.value.remedy == "pip install h5py"
