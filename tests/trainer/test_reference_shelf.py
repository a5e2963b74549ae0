"""Statistics of a cache's images are computed once, kept, checked when they are taken, and shared."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import featcache
from featcache.errors import UserError
from tests.told import Told
from trainer.evaluate import references
from trainer.evaluate.extractors import build_extractor
from trainer.evaluate.images import CacheImages
from trainer.evaluate.judge import evaluate
from trainer.evaluate.references import Statistics, images_key, reference_statistics
from trainer.evaluate.shelf import Shelf


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(folder=tmp_path / "references")


def taken(cache: Path, shelf: Shelf | None, told: Told, **kw: int) -> Statistics:
    return reference_statistics(
        cache,
        build_extractor("embedded", random_weights=kw.get("weights")),
        resolution=64,
        need_features=True,
        batch_size=kw.get("batch_size", 8),
        shelf=shelf,
        progress=told,
    )


def passes(told: Told) -> int:
    return sum(name == "features of the reference" for name, *_ in told.tasks)


def assert_same(a: Statistics, b: Statistics) -> None:
    assert np.array_equal(a.mean, b.mean) and np.array_equal(a.covariance, b.covariance)
    assert a.features is not None and b.features is not None and torch.equal(a.features, b.features)
    assert (a.count, a.resolution, dict(a.provenance)) == (b.count, b.resolution, dict(b.provenance))


def test_the_second_time_they_are_read_and_equal_to_the_bit(shapes_cache: Path, shelf: Shelf) -> None:
    told = Told()
    anew = taken(shapes_cache, None, told)
    first, second = taken(shapes_cache, shelf, told), taken(shapes_cache, shelf, told)
    assert passes(told) == 2, "anew, and for the shelf"
    assert_same(anew, first)
    assert_same(anew, second)
    (file,) = shelf.folder.glob("*.npz")
    assert told.notes == [
        f"reference statistics kept in {file}",
        f"reference statistics from {file} (computed on {told.notes[1].split()[-1]}",
    ]
    assert list(shelf.folder.iterdir()) == [file], "no lock and no part stays"


def test_what_changes_the_numbers_has_statistics_of_its_own(shapes_cache: Path, shelf: Shelf) -> None:
    told = Told()
    for other in ({}, {"batch_size": 5}, {"weights": 3}):
        taken(shapes_cache, shelf, told, **other)
    assert passes(told) == len(list(shelf.folder.glob("*.npz"))) == 3
    images = CacheImages(cache=featcache.open(shapes_cache))
    extractor = build_extractor("embedded")
    key = images_key(images, extractor, 8)
    assert json.loads(json.dumps(key)) == key
    assert images_key(replace(images, limit=20), extractor, 8)["slots"] != key["slots"]


def flipped(data: bytes) -> bytes:
    at = data.index(b"mu.npy") + 200
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[: len(data) // 2], lambda data: b"no npz"])
def test_damaged_statistics_are_computed_again(
    shapes_cache: Path, shelf: Shelf, damage: Callable[[bytes], bytes]
) -> None:
    told = Told()
    first = taken(shapes_cache, shelf, told)
    (file,) = shelf.folder.glob("*.npz")
    file.write_bytes(damage(file.read_bytes()))
    assert_same(first, taken(shapes_cache, shelf, told))
    assert passes(told) == 2 and any("computing it again" in note for note in told.notes)
    assert_same(first, taken(shapes_cache, shelf, told))
    assert passes(told) == 2, "and kept again"


def test_a_pipe_in_place_of_a_file_holds_nobody_up(shelf: Shelf) -> None:
    statistics = Statistics(mean=np.arange(3.0), covariance=np.eye(3), count=5, resolution=8, provenance={})
    path = shelf.path({"of": "x"})
    path.parent.mkdir()
    os.mkfifo(path)
    threading.Thread(target=_write_to_whoever_waits, args=[path], daemon=True).start()
    assert shelf.get({"of": "x"}, lambda: statistics, told := Told()) is statistics
    assert path.is_file() and not any("computing it again" in note for note in told.notes), told.notes


def _write_to_whoever_waits(pipe: Path) -> None:
    """So that a reader does not wait for ever; until there is one, opening fails."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        time.sleep(0.1)


def test_other_numbers_under_the_same_name_are_not_taken(shapes_cache: Path, shelf: Shelf) -> None:
    """Whole files: the statistics of another key, numbers that were changed, and objects, which are never unpickled."""
    told = Told()
    taken(shapes_cache, shelf, told)
    (file,) = shelf.folder.glob("*.npz")
    good = file.read_bytes()
    taken(shapes_cache, shelf, told, batch_size=5)
    (other,) = set(shelf.folder.glob("*.npz")) - {file}
    with np.load(file) as stored:
        arrays = dict(stored)
    changed = {**arrays, "mu": arrays["mu"] + 1e-9}
    for write in (
        lambda: file.write_bytes(other.read_bytes()),
        lambda: np.savez(file, **changed),
        lambda: np.savez(file, mu=np.array([{}], dtype=object), sigma=arrays["sigma"]),
    ):
        write()
        before = passes(told)
        taken(shapes_cache, shelf, told)
        assert passes(told) == before + 1
        with np.load(file) as stored:
            assert np.array_equal(stored["mu"], arrays["mu"])
    assert len(good) == file.stat().st_size


def test_of_several_at_once_one_computes_and_the_others_wait(shelf: Shelf) -> None:
    computed, found, begun = [], [], threading.Barrier(4)
    statistics = Statistics(
        mean=np.arange(3.0), covariance=np.eye(3), count=5, resolution=8, provenance={"source": "x"}
    )

    def compute() -> Statistics:
        computed.append(threading.get_ident())
        threading.Event().wait(0.3)
        return statistics

    def ask() -> None:
        begun.wait()
        found.append(shelf.get({"of": "x"}, compute, Told()))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(computed) == 1 and len(found) == 4
    assert all(np.array_equal(f.mean, statistics.mean) and f.provenance == statistics.provenance for f in found)


def test_where_nothing_can_be_kept_it_is_computed_and_said(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    told = Told()
    assert taken(shapes_cache, Shelf(folder=tmp_path / "file/below"), told).count == 24
    assert any("are not kept" in note for note in told.notes)
    for name in ("FEATCACHE_REFERENCES", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("featcache.paths.home", lambda: None)
    assert Shelf.of_user(told) is None and "FEATCACHE_REFERENCES" not in told.notes[-1]
    monkeypatch.setenv("FEATCACHE_REFERENCES", str(tmp_path / "mine"))
    assert Shelf.of_user(told) == Shelf(folder=tmp_path / "mine")


def test_an_error_of_the_images_is_no_error_of_the_shelf(shelf: Shelf) -> None:
    def fails() -> Statistics:
        raise UserError("an image is damaged")

    for _ in range(2):
        with pytest.raises(UserError, match="an image is damaged"):
            shelf.get({"of": "x"}, fails, Told())
    assert list(shelf.folder.iterdir()) == []


def test_metrics_are_those_without_a_shelf(shapes_cache: Path, shelf: Shelf) -> None:
    """Also of metrics that need no activations, after ones that do, and the other way around."""
    extractor = build_extractor("embedded")
    samples = CacheImages(cache=featcache.open(shapes_cache), limit=12)

    def judged(metrics: list[str], shelf: Shelf | None) -> dict[str, object]:
        result = evaluate(samples, shapes_cache, extractor, metrics=metrics, shelf=shelf)
        return {key: result[key] for key in ("metrics", "details", "settings", "warnings")}

    for metrics in (["fid"], ["fid", "precision", "recall", "kid"], ["fid"]):
        assert judged(metrics, shelf) == judged(metrics, None)
    assert len(list(shelf.folder.glob("*.npz"))) == 1
    assert references.DEFAULT_KEPT_FEATURES == 10_000
