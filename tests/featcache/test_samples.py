"""A cache as a sequence of samples, and as a dataset of PyTorch: what is asked for is what was stored, in every process."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import featcache
from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.codecs import decode
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from featcache.torch import Dataset


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "mirrored"
    encoders = (EncoderChoice(name="tiny"),)
    build(BuildRequest(data="shapes", encoders=encoders, limit=6, flip=True, shard_size=4, out=path), Quiet())
    return path


def independent(cache: featcache.Cache, name: str, index: int, view: int = 0) -> np.ndarray:
    """A sample's feature in float32, by zarr alone and the codec's function."""
    import zarr

    group, spec = zarr.open_group(cache.path, mode="r"), cache.features[name]
    stored = {}
    for suffix in spec.stored:
        row = np.asarray(group[name + suffix][cache.slots([index])[0]])
        stored[suffix] = torch.from_numpy(np.ascontiguousarray(row[view] if spec.views > 1 else row))[None]
    return decode(spec.codec, stored, spec.shape)[0].numpy()


@given(index=st.integers(-24, 23))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sample_is_what_zarr_holds(shapes_cache: Path, index: int) -> None:
    cache = featcache.open(shapes_cache)
    sample = cache[index]
    assert set(sample) == set(cache.features) - {"content"}
    for name in ("vae/moments", "vae/G4", "tiny@5"):
        assert sample[name].dtype == np.float32
        assert np.array_equal(sample[name], independent(cache, name, index % 24))
    assert sample["label"] == cache.labels()[index] and sample["key"] == cache.keys()[index]


def test_a_cache_is_a_sequence(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    keys = cache.keys()
    assert [sample["key"] for sample in cache] == keys, "iteration ends"
    assert cache[3:9:2]["key"].tolist() == keys[3:9:2] and cache[-2:]["key"].tolist() == keys[-2:]
    assert cache[[5, 2, 5]]["key"].tolist() == [keys[5], keys[2], keys[5]]
    mask = cache.labels() == 3
    assert cache.read(mask, ["label"])["label"].tolist() == [3] * int(mask.sum())
    assert cache[7:7]["tiny@5"].shape == (0, 16, 128)
    assert cache.classes[:3] == ("circle", "square", "triangle")
    for outside in (24, -25):
        with pytest.raises(IndexError, match=f"sample {outside} is outside the cache's 24"):
            cache[outside]


def test_what_dtypes_give(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    names = ["tiny@5", "label", "key"]
    half = cache.read([1, 2], names, dtype=np.float16)
    assert half["tiny@5"].dtype == np.float16 and half["label"].dtype == np.int64
    tensors = cache.read([1, 2], names, dtype=torch.bfloat16)
    assert tensors["tiny@5"].dtype == torch.bfloat16 and tensors["label"].dtype == torch.int64
    assert tensors["key"] == cache.keys()[1:3]
    exact = cache.read([1, 2], names)["tiny@5"]
    assert torch.equal(tensors["tiny@5"], torch.from_numpy(exact).bfloat16())
    stored = cache.read([1, 2], names, dtype=None)
    assert stored["tiny@5"].dtype == np.int8 and stored["tiny@5.scale"].dtype == np.float32
    assert np.array_equal(stored["tiny@5"] * stored["tiny@5.scale"][..., None], exact)
    for wrong in (np.int8, torch.int64, "float", object(), "nonsense"):
        if wrong == "float":  # numpy's name of float64
            assert cache.read([0], ["tiny@5"], dtype=wrong)["tiny@5"].dtype == np.float64
            continue
        with pytest.raises(UserError, match="cannot be decoded to"):
            cache.read([0], dtype=wrong)


@pytest.mark.parametrize(
    ("indices", "said"),
    [
        ([24], "outside the cache's 24 samples"),
        ([-1], "outside the cache's 24 samples"),
        ([0.5], "whole numbers"),
        ([[1, 2]], "whole numbers"),
        (["a"], "whole numbers"),
        ([True, False], "the mask is"),
    ],
)
def test_indices_that_are_none(shapes_cache: Path, indices: list[Any], said: str) -> None:
    with pytest.raises(CacheError, match=said):
        featcache.open(shapes_cache).read(indices)


def test_a_feature_that_is_not_there_is_named(shapes_cache: Path) -> None:
    with pytest.raises(CacheError, match="does not hold dinov2-b@11"):
        featcache.open(shapes_cache).read([0], ["dinov2-b@11"])


def test_both_views(mirrored: Path) -> None:
    cache = featcache.open(mirrored)
    for view in (0, 1):
        got = cache.read([4, 1], ["vae/moments"], view=view)["vae/moments"]
        assert np.array_equal(got, [independent(cache, "vae/moments", index, view) for index in (4, 1)])
    assert not np.array_equal(cache.read([4])["vae/moments"], cache.read([4], view=1)["vae/moments"])


def test_a_notebook_shows_a_table(shapes_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = featcache.open(shapes_cache)
    monkeypatch.setattr(cache, "path", "<script>alert(1)</script>")
    shown = cache._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown
    assert "<td>vae/G4</td><td>4x16x88</td><td>int8</td>" in shown and "24 images of 10 classes" in shown
    assert "24 samples" in repr(cache)


def test_a_pickled_cache_is_opened_anew(shapes_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shapes_cache.parent)
    cache = featcache.open(shapes_cache.name)
    stored, expected = pickle.dumps(cache), cache[3]["tiny@5"]
    monkeypatch.chdir("/")
    assert np.array_equal(pickle.loads(stored)[3]["tiny@5"], expected)


@pytest.mark.parametrize("start", ["none", "fork", "spawn", "forkserver"])
def test_workers_deliver_what_is_stored(shapes_cache: Path, start: str) -> None:
    """However they come to be; also after the parent has read, whose threads a forked child does not have."""
    cache = featcache.open(shapes_cache)
    dataset = Dataset(cache, ["vae/moments", "tiny@5", "label", "key"], dtype=torch.float16)
    expected = cache.read(range(24), dataset.features, dtype=torch.float16)
    assert torch.equal(dataset[5]["tiny@5"], expected["tiny@5"][5])
    options: dict[str, Any] = {} if start == "none" else {"num_workers": 2, "multiprocessing_context": start}
    batches = list(DataLoader(dataset, batch_size=5, **options))
    assert [key for batch in batches for key in batch["key"]] == expected["key"]
    for name in ("vae/moments", "tiny@5", "label"):
        assert torch.equal(torch.cat([batch[name] for batch in batches]), expected[name])


def test_views_of_a_dataset(mirrored: Path) -> None:
    cache = featcache.open(mirrored)
    both = torch.stack(
        [cache.read(range(6), ["vae/moments"], dtype=torch.float32, view=v)["vae/moments"] for v in (0, 1)]
    )
    for view in (0, 1):
        fixed = Dataset(mirrored, ["vae/moments"], view=view)
        assert all(torch.equal(fixed[i]["vae/moments"], both[view, i]) for i in range(6))
    coins = Dataset(mirrored, ["vae/moments"], view="random")
    torch.manual_seed(0)
    taken = [[torch.equal(coins[i]["vae/moments"], both[1, i]) for i in range(6)] for _ in range(30)]
    torch.manual_seed(0)
    assert taken == [[torch.equal(coins[i]["vae/moments"], both[1, i]) for i in range(6)] for _ in range(30)]
    assert 0.3 < np.mean(taken) < 0.7


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: Dataset(path, ["nothing"]), "does not hold nothing"),
        (lambda path: Dataset(path, dtype=torch.int8), "cannot be decoded"),
        (lambda path: Dataset(path, view=2), "no view 2"),  # type: ignore[arg-type]
        (lambda path: Dataset(path / "elsewhere"), "elsewhere"),
    ],
)
def test_datasets_that_cannot_be(shapes_cache: Path, make: Callable[[Path], Dataset], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(shapes_cache)


def test_a_dataset_ends(shapes_cache: Path) -> None:
    dataset = Dataset(shapes_cache, ["label"])
    assert len(dataset) == 24 == len([*dataset]) and dataset[-1]["label"] == dataset[23]["label"]
    with pytest.raises(IndexError):
        dataset[24]
