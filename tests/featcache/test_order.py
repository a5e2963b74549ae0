"""Orders are permutations, functions of (seed, epoch) alone, and well mixed."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.read.order import epoch_order, sequential_order


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), count=st.integers(1, 3000))
def test_epoch_order_is_a_permutation(seed: int, epoch: int, count: int) -> None:
    order = epoch_order(seed, epoch, count)
    assert np.array_equal(np.sort(order[:]), np.arange(count))
    assert len(order) == count


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(1, 300),
    shard_size=st.integers(1, 100),
    window=st.integers(1, 9),
    epoch=st.integers(0, 99),
)
def test_sequential_order_is_a_permutation(count: int, shard_size: int, window: int, epoch: int) -> None:
    order = sequential_order(3, epoch, count, shard_size, window=window)
    assert np.array_equal(np.sort(order[:]), np.arange(count))


def test_known_values_never_change() -> None:
    # A changed order would silently change every resumed run: these values pin it.
    assert epoch_order(0, 0, 10)[:].tolist() == [1, 4, 7, 8, 0, 2, 3, 5, 9, 6]
    assert epoch_order(7, 3, 1_281_167)[[0, 1, 640_000, 1_281_166]].tolist() == [
        458942,
        688296,
        229728,
        851411,
    ]


@pytest.mark.parametrize("order", [epoch_order(5, 1, 1000), sequential_order(5, 1, 1000, 64, window=3)])
def test_indexing_agrees(order) -> None:
    whole = order[:]
    assert whole.dtype == np.int64
    assert list(order) == whole.tolist()
    assert [order[i] for i in (0, 17, 999, -1)] == [whole[0], whole[17], whole[999], whole[999]]
    assert np.array_equal(order[100:300:7], whole[100:300:7])
    # Any world size: each rank's share of a global batch, put together, is the global batch.
    for world in (1, 2, 8):
        shares = [order[np.arange(64) * 1 + 128][rank::world] for rank in range(world)]
        assert np.array_equal(np.sort(np.concatenate(shares)), np.sort(whole[128:192]))
    with pytest.raises(IndexError):
        order[1000]


def test_uniform_over_permutations() -> None:
    # Chi-square over where sample 0 lands, and over all 24 permutations of 4 samples.
    n, trials = 50, 4000
    landed = np.array([int(np.flatnonzero(epoch_order(1, e, n)[:] == 0)[0]) for e in range(trials)])
    counts = np.bincount(landed, minlength=n)
    chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum()
    assert chi2 < 49 + 5 * np.sqrt(2 * 49)
    seen: dict[tuple[int, ...], int] = {}
    for e in range(trials):
        key = tuple(epoch_order(2, e, 4)[:].tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 24
    chi2 = sum((c - trials / 24) ** 2 / (trials / 24) for c in seen.values())
    assert chi2 < 23 + 5 * np.sqrt(2 * 23)


def test_neighbours_are_uncorrelated() -> None:
    for count in (1000, 100_000):
        order = epoch_order(11, 0, count)[:].astype(np.float64)
        correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(count)
        other = epoch_order(11, 1, count)[:].astype(np.float64)
        assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(count)


def test_sequential_order_touches_few_shards_at_a_time() -> None:
    count, shard_size, window = 10_000, 100, 4
    order = sequential_order(0, 0, count, shard_size, window=window)[:]
    for start in range(0, count, window * shard_size):
        shards = np.unique(order[start : start + window * shard_size] // shard_size)
        assert len(shards) <= window
    assert not np.array_equal(order, sequential_order(0, 1, count, shard_size, window=window)[:])


def test_constant_memory_at_any_size() -> None:
    order = epoch_order(0, 0, 10**12)
    start = time.perf_counter()
    found = order[10**11 : 10**11 + 256]
    assert time.perf_counter() - start < 1
    assert len(np.unique(found)) == 256
    assert found.max() < 10**12
