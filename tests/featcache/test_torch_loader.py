"""The loader: which samples in which order, whoever reads them, and that nothing is overwritten while in use."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import featcache
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from featcache.read.decoded import read_decoded
from featcache.read.order import Order, stream_indices, stream_views
from featcache.torch import Loader
from featcache.torch.feed import RING, Share


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


def read(cache: featcache.Cache, share: Share, steps: range, **kw: Any) -> list[dict[str, torch.Tensor]]:
    """What a loader of stored arrays delivers to one rank."""
    loader = Loader(
        cache,
        ["vae/moments", "label"],
        batch_size=share.global_batch,
        rank=share.rank,
        world_size=share.world_size,
        micro_batches=share.micro_batches,
        seed=5,
        start=steps.start,
        stop=steps.stop,
        **{"dtype": None, **kw},
    )
    return [{name: value.clone() for name, value in batch.items()} for batch in loader]


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
    for batch in Loader(cache, ["vae/moments"], batch_size=4, dtype=None, stop=2 * RING):
        before = batch["vae/moments"].clone()
        time.sleep(0.02)  # long enough for the thread to fill all other buffers
        assert torch.equal(batch["vae/moments"], before)


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


def test_leaving_the_loop_ends_the_thread(shapes_cache: Path) -> None:
    before = threading.active_count()
    loader = Loader(shapes_cache, ["label"], batch_size=2)
    for _ in loader:
        assert threading.active_count() > before
        break
    loader.close()
    assert threading.active_count() == before


def test_a_new_iteration_ends_the_former_one(shapes_cache: Path) -> None:
    loader = Loader(shapes_cache, ["label"], batch_size=2)
    first, second = iter(loader), iter(loader)
    next(first)
    next(second)
    assert next(first, None) is None
    second.close()  # type: ignore[attr-defined]


def test_features_arrive_decoded_and_stay(shapes_cache: Path) -> None:
    """Also what is stored just as it is asked for: batches are nobody's buffers."""
    cache = featcache.open(shapes_cache)
    names = ["vae/moments", "tiny@5", "vae/G4", "label", "key"]
    for dtype in (torch.float32, torch.float16):
        got = list(Loader(cache, names, batch_size=4, dtype=dtype, stop=2 * RING))
        indices = stream_indices(0, 8 * RING, count=len(cache), seed=0)
        expected = list(read_decoded(cache, names[:-1], indices))
        for name in names[:-1]:
            whole = torch.cat([batch[name] for batch in expected])
            assert torch.equal(torch.cat([batch[name] for batch in got]), whole if name == "label" else whole.to(dtype))
        keys = [bytes(row).rstrip(b"\0").decode() for batch in got for row in batch["key"].numpy()]
        assert keys == [cache.keys()[i] for i in indices]


@given(
    stops=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    micro=st.sampled_from([1, 2]),
    ranks=st.sampled_from([1, 2]),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_loader_goes_on_where_its_state_was_saved(
    shapes_cache: Path, stops: list[int], micro: int, ranks: int
) -> None:
    """Wherever it stopped, and on another number of ranks."""
    cache, seen = featcache.open(shapes_cache), []
    state = Loader(cache, ["key"], batch_size=4, seed=9).state_dict()
    for n in stops:
        loader = Loader(cache, ["key"], batch_size=4, seed=9, micro_batches=micro, world_size=ranks, rank=ranks - 1)
        loader.load_state_dict(state)
        for number, batch in enumerate(loader, 1):
            seen.append((loader.step - 1, (number - 1) % micro, batch["key"].numpy()))
            if number == n * micro:
                break
        state = loader.state_dict()
    assert state["step"] == sum(stops)
    keys = np.array(cache.keys())
    order = stream_indices(0, 4 * sum(stops), count=len(cache), seed=9).reshape(-1, 4)
    share = Share(global_batch=4, rank=ranks - 1, world_size=ranks, micro_batches=micro)
    for step, part, rows in seen:
        # The step counts a batch as seen once its last micro-batch is out.
        of_step = step if part == micro - 1 else step + 1
        expected = keys[order[of_step]][share.slice(part)]
        assert [bytes(row).rstrip(b"\0").decode() for row in rows] == expected.tolist()


@pytest.mark.parametrize(
    ("changes", "said"), [({"seed": 1}, "seed"), ({"batch_size": 8}, "batch_size"), ({"shuffle": "none"}, "shuffle")]
)
def test_a_state_of_other_batches_is_refused(shapes_cache: Path, changes: dict[str, Any], said: str) -> None:
    state = Loader(shapes_cache, ["label"], batch_size=4).state_dict()
    other = Loader(shapes_cache, ["label"], **{"batch_size": 4, **changes})
    with pytest.raises(UserError, match=f"saved with {said}"):
        other.load_state_dict(state)
    with pytest.raises(UserError, match="saved with fingerprint None"):
        other.load_state_dict({"step": 3})


def test_shuffles_hold_every_sample_once(shapes_cache: Path) -> None:
    cache = featcache.open(shapes_cache)
    orders = {}
    for shuffle in ("global", "windows", "none"):
        loader = Loader(cache, ["label"], batch_size=6, shuffle=shuffle)
        orders[shuffle] = loader.indices(0, 4).tolist()
        assert sorted(orders[shuffle]) == list(range(24))
        got = torch.cat([batch["label"] for batch in itertools.islice(loader, 4)])
        assert got.tolist() == cache.labels()[orders[shuffle]].tolist()
        assert loader.epoch == 1.0
    assert orders["none"] == list(range(24)) == Order(24)[:].tolist()
    assert orders["global"] != orders["none"]


def test_a_loader_with_an_end_has_a_length(shapes_cache: Path) -> None:
    loader = Loader(shapes_cache, ["label"], batch_size=4, micro_batches=2, stop=3)
    assert len(loader) == len(list(loader)) == 6
    assert len(loader) == 0 and list(loader) == []
    with pytest.raises(TypeError):
        len(Loader(shapes_cache, ["label"], batch_size=4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 6, "world_size": 4, "rank": 0}, "cannot be shared by 4 ranks"),
        ({"batch_size": 0}, "no share"),
        ({"rank": 2, "world_size": 2}, "no share"),
        ({"dtype": torch.int8}, "cannot be decoded"),
        ({"shuffle": "local"}, "no shuffle 'local'"),
        ({"features": ["dinov2-b@11"]}, "does not hold dinov2-b@11"),
        ({"extra": ["vae/G9"]}, "does not hold vae/G9"),
    ],
)
def test_what_cannot_be_loaded_is_refused(shapes_cache: Path, changes: dict[str, Any], said: str) -> None:
    options = {"features": ["label"], "batch_size": 4, **changes}
    with pytest.raises(UserError, match=said):
        Loader(shapes_cache, options.pop("features"), **options)
