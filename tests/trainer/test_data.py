"""Batches: which samples in which order, whoever reads them, and that nothing is overwritten while in use."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import featcache
from featcache.errors import CacheError
from featcache.progress import Quiet
from trainer.training.data import RING, Batches, Share, stream_indices, stream_views

CPU = torch.device("cpu")


@given(
    count=st.integers(1, 40), seed=st.integers(0, 1 << 40), cuts=st.lists(st.integers(0, 200), min_size=2, max_size=6)
)
def test_the_stream_is_the_same_however_it_is_cut(count: int, seed: int, cuts: list[int]) -> None:
    cuts = sorted(cuts)
    whole = stream_indices(cuts[0], cuts[-1], count=count, seed=seed)
    pieces = [stream_indices(a, b, count=count, seed=seed) for a, b in itertools.pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(pieces))


@given(count=st.integers(1, 50), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
def test_each_epoch_holds_every_sample_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(stream_indices(epoch * count, (epoch + 1) * count, count=count, seed=seed)) == list(range(count))


def test_views_are_fair_coins_that_depend_on_the_position_alone() -> None:
    views = stream_views(0, 20_000, seed=3)
    assert set(views) == {0, 1}
    assert abs(views.mean() - 0.5) < 4 * 0.5 / np.sqrt(20_000)
    assert np.array_equal(stream_views(4_000, 9_000, seed=3), views[4_000:9_000])
    assert not np.array_equal(stream_views(0, 20_000, seed=4), views)


def read(cache: featcache.Cache, share: Share, steps: range, **kw: object) -> list[dict[str, torch.Tensor]]:
    batches = Batches(
        cache,
        ["vae/moments", "label"],
        share=share,
        seed=5,
        device=CPU,
        steps=steps,
        **kw,  # type: ignore[arg-type]
    )
    try:
        return [{name: value.clone() for name, value in batch.items()} for batch in batches]
    finally:
        batches.close()


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_ranks_and_micro_batches_share_out_the_same_global_batches(
    shapes_cache: Path, world_size: int, micro_batches: int
) -> None:
    cache, steps = featcache.open(shapes_cache), range(4, 9)  # across the end of an epoch of 24 samples
    expected = stream_indices(4 * 8, 9 * 8, count=24, seed=5).reshape(5, 8)
    labels = cache.labels()
    got = np.full((5, 8), -1)
    for rank in range(world_size):
        share = Share(global_batch=8, rank=rank, world_size=world_size, micro_batches=micro_batches)
        for k, batch in enumerate(read(cache, share, steps)):
            step, micro = divmod(k, micro_batches)
            got[step, share.slice(micro)] = batch["label"].numpy()
    assert np.array_equal(got, labels[expected])


def test_micro_batches_are_the_same_for_any_number_of_ranks() -> None:
    for micro in range(3):
        alone = Share(global_batch=12, micro_batches=3)
        parts = [Share(global_batch=12, rank=r, world_size=2, micro_batches=3) for r in range(2)]
        rows = [row for part in parts for row in range(12)[part.slice(micro)]]
        assert rows == list(range(12)[alone.slice(micro)])


def test_stored_bytes_arrive_unchanged(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    share = Share(global_batch=6)
    batches = read(cache, share, range(0, 2), extra=["tiny@5"])
    indices = stream_indices(0, 12, count=24, seed=5)
    with cache.reader(["vae/moments", "tiny@5", "label"]) as reader:
        out = reader.allocate(12)
        reader.read(indices, out)
    assert set(batches[0]) == set(out) >= {"tiny@5", "tiny@5.scale"}
    for name, values in out.items():
        assert np.array_equal(torch.cat([batch[name] for batch in batches]).numpy(), values)


def test_targets_are_read_only_where_they_are_wanted(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    batches = read(cache, Share(global_batch=4), range(6), extra=["vae/G4"], wanted=lambda step: step % 2 == 0)
    assert ["vae/G4" in batch for batch in batches] == [True, False] * 3
    plain = read(cache, Share(global_batch=4), range(6))
    assert all(torch.equal(a["vae/moments"], b["vae/moments"]) for a, b in zip(batches, plain))


def test_a_batch_is_not_overwritten_while_it_is_in_use(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    batches = Batches(cache, ["vae/moments"], share=Share(global_batch=4), seed=0, device=CPU, steps=range(2 * RING))
    try:
        for batch in batches:
            before = batch["vae/moments"].clone()
            time.sleep(0.02)  # long enough for the thread to fill all other buffers
            assert torch.equal(batch["vae/moments"], before)
    finally:
        batches.close()


def test_mirrored_views_follow_the_coins(tmp_path: Path) -> None:
    from featcache.build.request import BuildRequest
    from featcache.build.run import build
    from featcache.encoders import EncoderChoice

    request = BuildRequest(
        data="shapes", encoders=(EncoderChoice(name="tiny"),), limit=4, flip=True, shard_size=4, out=tmp_path / "c"
    )
    build(request, Quiet())
    cache = featcache.open(tmp_path / "c")
    got = torch.cat([b["vae/moments"] for b in read(cache, Share(global_batch=4), range(4))]).numpy()
    with cache.reader(["vae/moments"]) as reader:  # [n, 2, 2C, h, w]
        out = reader.allocate(16)
        reader.read(stream_indices(0, 16, count=4, seed=5), out)
    views = stream_views(0, 16, seed=5)
    assert np.array_equal(got, out["vae/moments"][np.arange(16), views])
    assert not np.array_equal(got, out["vae/moments"][:, 0])


def test_an_error_of_the_reading_thread_reaches_the_consumer(shapes_cache: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shapes_cache, tmp_path / "damaged")
    for file in (tmp_path / "damaged" / "vae" / "moments").rglob("*"):
        if file.is_file() and file.name not in ("zarr.json", "SHA256SUMS"):
            file.unlink()
    with pytest.raises(CacheError):
        read(featcache.open(tmp_path / "damaged"), Share(global_batch=4), range(3))


def test_closing_early_ends_the_thread(shapes_cache: Path) -> None:
    batches = Batches(
        featcache.open(shapes_cache), ["label"], share=Share(global_batch=2), seed=0, device=CPU, steps=range(10**6)
    )
    next(iter(batches))
    batches.close()
    assert not batches._thread.is_alive()
