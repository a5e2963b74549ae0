"""Writing a webdataset cache: the same life as a zarr cache, but a shard is one tar with all features in it."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np

from featcache.errors import CacheError
from featcache.store.layout import shard_samples
from featcache.store.manifest import FeatureSpec, Skipped
from featcache.store.wds import TarLayout, encode_tar, tar_layout, tar_name
from featcache.store.writer import CacheWriter, Sums, has_bytes, remove_others

_TAR = re.compile(r"\d{8,}\.tar\Z")


class WdsWriter(CacheWriter):
    """Collects a shard's features in memory and writes its tar when the last one arrives."""

    def begin(self, specs: Sequence[FeatureSpec], *, without_blocks: Collection[str] = ()) -> None:
        """As `CacheWriter.begin`; all features of the cache must be declared at once.

        Raises `CacheError` if the cache is complete with other features.
        """
        new = [spec.name for spec in specs if spec.name not in self._base.features]
        if self._base.features and new:
            raise CacheError(
                f"{self.path} is a webdataset cache: its tars are complete and cannot take {', '.join(new)}",
                remedy="convert it (featcache convert A B --to zarr) and add the features to the result",
            )
        self._specs = {spec.name: spec for spec in specs}
        super().begin(specs, without_blocks=without_blocks)

    @functools.cached_property
    def _layout(self) -> TarLayout:
        return tar_layout(replace(self._base, features=self._specs))

    @functools.cached_property
    def _collected(self) -> dict[int, dict[str, np.ndarray]]:
        return {}

    def _make_directories(self, feature: str) -> None:
        """Tars lie beside the root document."""

    def _clear_unjournaled(self) -> None:
        # A tar is written whole: a shard that only some features have journaled is not done for any.
        common = set.intersection(*self._done.values())
        self._done = {name: set(common) for name in self._done}
        if self._locks:
            remove_others(self.path, {tar_name(shard) for shard in common}, _TAR)

    def _shard_is_whole(self, spec: FeatureSpec, shard: int) -> bool:
        if shard >= self.n_shards:
            return False
        n = shard_samples(self.dataset.count, self.shard_size, shard)
        return has_bytes(self.path / tar_name(shard), self._layout.tar_bytes(n))

    def _store(self, feature: str, shard: int, arrays: dict[str, np.ndarray]) -> None:
        # Copied: the caller may reuse its buffers before the other features arrive.
        collected = self._collected.setdefault(shard, {})
        collected |= {name: values.copy() for name, values in arrays.items()}
        if set(collected) != set(self._layout.members):
            return
        del self._collected[shard]
        buffers = encode_tar(self._layout, shard * self.shard_size, collected)
        hashes = self._write_file(self._sealing, self.path / tar_name(shard), buffers)
        specs = self._specs.items()
        self._written_to_group([(name, shard, dict.fromkeys(spec.arrays, hashes)) for name, spec in specs])

    @property
    def _sealing(self) -> str:
        """The feature that writes the checksum files, which all share."""
        return max(self._specs)

    def _shard_file(self, array: str, shard: int) -> str:
        return tar_name(shard)

    def _arrays_with_blocks(self, feature: str) -> Iterable[str]:
        return [min(self._specs[feature].arrays)] if feature == self._sealing else ()

    def _seal(self, name: str, sums: Sums) -> list[Skipped]:
        entries = self._journal_of(self._specs[name])
        if name == self._sealing:
            array = min(self._specs[name].arrays)
            hashes = {shard: self._hashes(entry, array, shard) for shard, entry in entries.items()}
            self._seal_array(array, hashes, sums)
            for digests in (sums.checksums, sums.blocks):
                if array in digests:
                    digests |= dict.fromkeys((a for spec in self._specs.values() for a in spec.arrays), digests[array])
        return [skipped for entry in entries.values() for skipped in entry.skipped]
