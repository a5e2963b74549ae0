"""Orders of reading: pure functions of (seed, epoch), in constant memory, the same for any world size.

A shuffled epoch is a permutation that can be evaluated at any position: a Feistel network over the next
power of two, applied again to results outside the range (cycle walking; Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). Nothing is stored, so resuming at any position costs nothing. The round
function is ours (a 64-bit finaliser with keys from SHA-256); it is for shuffling, not for secrecy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

_ROUNDS = 10
_BLOCK = 1 << 16


def _keys(*purpose: int | str) -> np.ndarray:
    """`_ROUNDS` keys (uint64) from a purpose, the same on every machine and numpy version."""
    text = "/".join(map(str, purpose)).encode()
    stream = b"".join(hashlib.sha256(text + bytes([i])).digest() for i in range(-(-_ROUNDS // 4)))
    return np.frombuffer(stream, "<u8")[:_ROUNDS].copy()


def _mix(x: np.ndarray) -> np.ndarray:
    """MurmurHash3's 64-bit finaliser: every input bit reaches every output bit."""
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xFF51AFD7ED558CCD)
    x ^= x >> np.uint64(33)
    x *= np.uint64(0xC4CEB9FE1A85EC53)
    x ^= x >> np.uint64(33)
    return x


def permute(positions: np.ndarray, count: int, keys: np.ndarray) -> np.ndarray:
    """Images (int64) of `positions` (each in [0, count)) under the permutation of [0, count) that `keys` select."""
    bits = max(2, (count - 1).bit_length())
    right_bits = bits // 2
    left_bits = bits - right_bits
    result = np.array(positions, np.uint64).reshape(-1)
    todo = np.arange(len(result))
    values = result
    while len(todo):
        widths = (left_bits, right_bits)
        left = values >> np.uint64(right_bits)
        right = values & np.uint64((1 << right_bits) - 1)
        for key in keys:
            # (L, R) -> (R, L ^ f(R)): the halves change places, and so do their widths where they are unequal.
            mask = np.uint64((1 << widths[0]) - 1)
            left, right = right, left ^ (_mix(right + key) & mask)
            widths = (widths[1], widths[0])
        values = (left << np.uint64(widths[1])) | right
        outside = values >= count
        result[todo[~outside]] = values[~outside]
        todo, values = todo[outside], values[outside]
    return result.astype(np.int64).reshape(np.shape(positions))


@dataclass(frozen=True)
class Order:
    """An order of `count` samples: `order[i]`, `order[a:b]`, `order[array]` are sample indices (int64)."""

    count: int

    def __len__(self) -> int:
        return self.count

    def _at(self, positions: np.ndarray) -> np.ndarray:
        return positions

    @overload
    def __getitem__(self, key: int) -> int: ...

    @overload
    def __getitem__(self, key: slice | np.ndarray | Sequence[int]) -> np.ndarray: ...

    def __getitem__(self, key: int | slice | np.ndarray | Sequence[int]) -> int | np.ndarray:
        if isinstance(key, slice):
            return self._at(np.arange(*key.indices(self.count), dtype=np.int64))
        positions = np.asarray(key, np.int64)
        if positions.size and (positions.min() < -self.count or positions.max() >= self.count):
            raise IndexError(f"position {key} is outside an order of {self.count} samples")
        found = self._at(np.where(positions < 0, positions + self.count, positions))
        return int(found) if found.ndim == 0 else found

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.count, _BLOCK):
            yield from self[start : start + _BLOCK].tolist()


@dataclass(frozen=True)
class ShuffledOrder(Order):
    """All samples once, globally shuffled."""

    keys: np.ndarray

    def _at(self, positions: np.ndarray) -> np.ndarray:
        return permute(positions, self.count, self.keys)


@dataclass(frozen=True)
class WindowedOrder(Order):
    """All samples once, shards in random order, shuffled within windows of `window` shards."""

    shard_size: int
    window: int
    seed: int
    epoch: int

    @functools.cached_property
    def _layout(self) -> tuple[np.ndarray, np.ndarray]:
        """Shards in reading order, and where each begins in the stream (the short last shard shifts the rest)."""
        n_full, rest = divmod(self.count, self.shard_size)
        n_shards = n_full + (rest > 0)
        shards = permute(np.arange(n_shards), n_shards, _keys("shards", self.seed, self.epoch))
        sizes = np.where(shards == n_full, rest, self.shard_size)
        return shards, np.concatenate([[0], np.cumsum(sizes)])

    def _at(self, positions: np.ndarray) -> np.ndarray:
        shards, starts = self._layout
        flat = positions.reshape(-1)
        window_starts = starts[:: self.window]
        if window_starts[-1] != self.count:
            window_starts = np.append(window_starts, self.count)
        windows = np.searchsorted(window_starts, flat, side="right") - 1
        streamed = np.empty_like(flat)
        for window in np.unique(windows):
            inside = windows == window
            low, high = int(window_starts[window]), int(window_starts[window + 1])
            keys = _keys("window", self.seed, self.epoch, int(window))
            streamed[inside] = low + permute(flat[inside] - low, high - low, keys)
        place = np.searchsorted(starts, streamed, side="right") - 1
        found: np.ndarray = shards[place] * self.shard_size + streamed - starts[place]
        return found.reshape(positions.shape)


def epoch_order(seed: int, epoch: int, count: int) -> Order:
    """A global shuffle without replacement of `count` samples, a function of (seed, epoch) alone.

    Rank r of w takes any fixed share of each slice (`order[start:stop][r::w]`, say): the global order does
    not know of ranks. Constant memory; about 1 us per sample.
    """
    return ShuffledOrder(count, _keys("epoch", seed, epoch))


def sequential_order(seed: int, epoch: int, count: int, shard_size: int, *, window: int = 8) -> Order:
    """The order for spinning disks and remote storage: whole shards, one window after another.

    Shards come in random order; `window` of them at a time are shuffled together. Reading it touches each
    shard once per epoch. Memory: 16 bytes per shard.
    """
    return WindowedOrder(count, shard_size, window, seed, epoch)


def stream_indices(
    start: int, stop: int, *, count: int, seed: int, order: Callable[[int, int, int], Order] = epoch_order
) -> np.ndarray:
    """Sample indices at positions `start..stop` of the infinite stream over `count` samples, int64: the epochs' orders
    one after another.

    order: (seed, epoch, count) -> the order of an epoch.
    """
    pieces = []
    while start < stop:
        epoch, offset = divmod(start, count)
        end = min(count, offset + stop - start)
        pieces.append(order(seed, epoch, count)[offset:end])
        start += end - offset
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def stream_views(start: int, stop: int, *, seed: int) -> np.ndarray:
    """Which of two cached views (0 as is, 1 mirrored) each position of the stream takes: a fair coin, int64."""
    block, views = 4096, []
    for number in range(start // block, -(-stop // block)):
        coins = np.random.Generator(np.random.Philox(key=[seed, 0xF11B], counter=[0, 0, 0, number])).integers(
            0, 2, block
        )
        views.append(coins[max(0, start - number * block) : stop - number * block])
    return np.concatenate(views) if views else np.empty(0, np.int64)


def stream_captions(start: int, stop: int, *, counts: Sequence[int] | np.ndarray, seed: int) -> np.ndarray:
    """Which of its sample's captions each position `start..stop` of the stream takes: int64, uniform (to 2^-32), a function
    of (seed, position) and of the count alone.

    counts: int [stop - start], captions of the sample at each position; where it has none, 0 is taken.
    """
    block, drawn = 4096, [np.empty(0, np.uint64)]
    for number in range(start // block, -(-stop // block)):
        raw = np.random.Philox(key=[seed, 0xCA97], counter=[0, 0, 0, number]).random_raw(block)
        drawn.append(raw[max(0, start - number * block) : stop - number * block])
    # The upper 32 bits u, uniform in [0, 2^32), become floor(u * count / 2^32).
    upper = np.concatenate(drawn) >> np.uint64(32)
    chosen: np.ndarray = (upper * np.maximum(counts, 0).astype(np.uint64) >> np.uint64(32)).astype(np.int64)
    return chosen
