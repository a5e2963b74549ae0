"""Batches of a cache, endlessly, in a global shuffle that can be resumed anywhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from featcache.codecs import FeatureCodec
from featcache.errors import CacheError, UserError
from featcache.read.captions import COUNT
from featcache.read.captions import one_caption as row_of_one_caption
from featcache.read.decoded import decode_in_pieces
from featcache.read.open import open_cache
from featcache.read.order import Order, epoch_order, sequential_order, stream_indices
from featcache.read.reader import Cache
from featcache.torch.feed import Feed, Share

Shuffle = Literal["global", "windows", "none"]


class Loader:
    """Iterates over batches, `{feature: [rows, *shape]}` on the device, without an end unless `stop` is given.

    The order of samples is one infinite stream, the epochs' permutations one after another; batch `k` is positions
    `k * batch_size .. (k + 1) * batch_size` of it. So the position is a function of the step alone: nothing but the step
    has to be saved, any number of ranks reads the same global batches, and no sample is dropped at the end of an epoch.

    A thread reads ahead. On a GPU it reads into pinned memory and copies stored bytes on a stream of its own, while the
    step runs; features are decoded on the device.

        loader = Loader("caches/imagenet", ["vae/moments", "dinov2-b@11", "label"], batch_size=256, device="cuda")
        for batch in loader:
            ...
            if loader.step % 10_000 == 0:
                torch.save({"loader": loader.state_dict(), ...}, path)

    A new iteration goes on where the last one stopped. Breaking out of it, or `close`, ends the thread.

    Args:
        cache: an open one, or its folder or URL.
        features: names; integers (`label`) stay what they are.
        batch_size: global, over all ranks and micro-batches.
        dtype: of decoded features. None: stored arrays by their names, in buffers that are valid until the next batch
            is asked for; for decoding inside a compiled step by `featcache.codecs.FeatureCodec`.
        seed: of the order, and of the views of mirrored images (a fair coin for each position) and of captions.
        shuffle: `global`; `windows`: shards in random order, shuffled in windows of eight (for remote caches larger than
            the local store, and for disks that must seek); `none`: as stored.
        rank: this process's, of `world_size`, among which every batch is shared out; default `torch.distributed`'s.
        world_size: how many processes; default `torch.distributed`'s if it is initialised, else 1.
        micro_batches: deliver a step's rows in so many batches, one after another, for accumulating gradients.
        start: first step.
        stop: the step to stop before.
        device: where batches go.
        extra: names to read only at the steps for which `wanted` says so.
        wanted: whether to read them, by the step.
        one_caption: of text features `[C, ...]` only one caption's row, `[...]`, drawn uniformly for each position among
            those that the image has; only its bytes are read. Zeros where there is none: read `text/count` beside it.

    Raises:
        CacheError: no cache, an empty one, a feature that it lacks. UserError: a batch that cannot be shared out.
    """

    def __init__(
        self,
        cache: Cache | str | os.PathLike[str],
        features: Sequence[str],
        *,
        batch_size: int,
        dtype: torch.dtype | None = torch.float32,
        seed: int = 0,
        shuffle: Shuffle = "global",
        rank: int | None = None,
        world_size: int | None = None,
        micro_batches: int = 1,
        start: int = 0,
        stop: int | None = None,
        device: str | torch.device = "cpu",
        extra: Sequence[str] = (),
        wanted: Callable[[int], bool] = lambda step: True,
        one_caption: bool = False,
    ) -> None:
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        self.features, self.extra = tuple(dict.fromkeys(features)), tuple(dict.fromkeys(extra))
        self.cache.require([*self.features, *self.extra, *([COUNT] if one_caption else ())])
        if not len(self.cache):
            raise CacheError(f"{self.cache.path} holds no samples")
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"features cannot be decoded to {dtype}", remedy="Type for example dtype=torch.bfloat16.")
        self.share = _share(batch_size, rank, world_size, micro_batches)
        self.step, self.stop, self.seed, self.dtype = start, stop, seed, dtype
        self._order, self._shuffle = _order(shuffle, self.cache), shuffle
        self._device, self._wanted = torch.device(device), wanted
        self._feed: Feed | None = None
        names = () if dtype is None else dict.fromkeys((*self.features, *self.extra))
        self._one_caption = one_caption
        specs = {name: self.cache.features[name] for name in names}
        self._codecs = {
            name: FeatureCodec(row_of_one_caption(spec) if one_caption else spec).to(self._device)
            for name, spec in specs.items()
        }

    def indices(self, start: int, stop: int) -> Any:
        """Sample indices of the global batches of steps `start..stop`, int64 `[(stop - start) * batch_size]`."""
        size = self.share.global_batch
        return self._at(start * size, stop * size)

    def _at(self, start: int, stop: int) -> Any:
        return stream_indices(start, stop, count=len(self.cache), seed=self.seed, order=self._order)

    @property
    def epoch(self) -> float:
        """How often the samples have been seen before `step`."""
        return self.step * self.share.global_batch / len(self.cache)

    @property
    def waited_s(self) -> float:
        """Seconds that the latest iteration's consumer has waited for data: the host's; on a GPU, only while the device
        had nothing left to do when the data came, so that reading hidden behind computation counts as none."""
        return self._feed.waited_s if self._feed is not None else 0.0

    def __len__(self) -> int:
        """Batches left on this rank, if there is an end."""
        if self.stop is None:
            raise TypeError("a Loader without stop= has no length")
        return max(0, self.stop - self.step) * self.share.micro_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.close()
        self._feed = feed = Feed(
            self.cache,
            self.features,
            extra=[name for name in self.extra if name not in self.features],
            wanted=self._wanted,
            share=self.share,
            indices=self._at,
            seed=self.seed,
            device=self._device,
            steps=range(self.step, 2**63 - 1 if self.stop is None else self.stop),
            one_caption=self._one_caption,
        )
        try:
            for number, stored in enumerate(feed, 1):
                if number % self.share.micro_batches == 0:  # so that a state saved in the loop's body goes on after it
                    self.step += 1
                yield stored if self.dtype is None else self._decoded(stored, self.dtype)
        finally:
            feed.close()

    def _decoded(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        codecs = {name: codec for name, codec in self._codecs.items() if codec.arrays[0] in stored}
        if self._device.type == "cpu":
            return {name: decode_in_pieces(codec, stored, dtype) for name, codec in codecs.items()}
        decoded = {name: codec.decode(stored, dtype) for name, codec in codecs.items()}
        # What is stored as it is asked for would be the buffer, which later batches overwrite.
        held = {values.data_ptr() for values in stored.values()}
        return {name: x.clone() if x.data_ptr() in held else x for name, x in decoded.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and what must stay the same for going on there."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was saved, on any number of ranks; for iterations begun from now on.

        Raises:
            UserError: it was saved with other samples, seed, batch size or order.
        """
        saved = {"one_caption": False, **state}  # states of before do not name it
        for name, value in self._identity().items():
            if saved.get(name) != value:
                raise UserError(
                    f"the loader's state was saved with {name} {saved.get(name)!r}, and this one has {value!r}",
                    remedy="Batches would be others than those that were left; make the loader as it was.",
                )
        self.step = int(state["step"])

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.cache.fingerprint,
            "seed": self.seed,
            "batch_size": self.share.global_batch,
            "shuffle": self._shuffle,
            "one_caption": self._one_caption,
        }

    def close(self) -> None:
        """Ends the reading thread."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None


def _share(batch_size: int, rank: int | None, world_size: int | None, micro_batches: int) -> Share:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Share(
        global_batch=batch_size,
        rank=rank if rank is not None else torch.distributed.get_rank() if distributed else 0,
        world_size=world_size if world_size is not None else torch.distributed.get_world_size() if distributed else 1,
        micro_batches=micro_batches,
    )


def _order(shuffle: str, cache: Cache) -> Callable[[int, int, int], Order]:
    if shuffle == "global":
        return epoch_order
    if shuffle == "windows":
        return functools.partial(sequential_order, shard_size=cache.manifest.shard_size)
    if shuffle == "none":
        return lambda seed, epoch, count: Order(count)
    raise UserError(f"there is no shuffle {shuffle!r}", remedy="Take 'global', 'windows' or 'none'.")
