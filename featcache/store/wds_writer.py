"""Writing a webdataset cache: the same life as a zarr cache, but a shard is one tar with all features in
it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from featcache.errors import CacheError
from featcache.store import files
from featcache.store.layout import CHECKSUMS, shard_samples
from featcache.store.manifest import FeatureSpec, Skipped
from featcache.store.wds import TarLayout, encode_tar, tar_layout, tar_name
from featcache.store.writer import CacheWriter, checksums_text, recorded_checksums, shard_names


class WdsWriter(CacheWriter):
    """Collects a shard's features in memory and writes its tar when the last one arrives."""

    def begin(self, specs: Sequence[FeatureSpec]) -> None:
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
        super().begin(specs)
        # A tar is written whole: a shard that only some features have journaled is not done for any.
        common = set.intersection(*self._done.values())
        self._done = {name: set(common) for name in self._done}

    @functools.cached_property
    def _layout(self) -> TarLayout:
        return tar_layout(replace(self._base, features=self._specs))

    @functools.cached_property
    def _collected(self) -> dict[int, dict[str, np.ndarray]]:
        return {}

    def _prepare(self, spec: FeatureSpec) -> None:
        for leftover in self.path.glob("*.tar" + files.PART_SUFFIX):
            files.remove_file(leftover)

    def _shard_is_whole(self, spec: FeatureSpec, shard: int) -> bool:
        if shard >= self.n_shards:
            return False
        n = shard_samples(self.dataset.count, self.shard_size, shard)
        try:
            return (self.path / tar_name(shard)).stat().st_size == self._layout.tar_bytes(n)
        except OSError:
            return False

    def _store(self, feature: str, shard: int, arrays: dict[str, np.ndarray]) -> None:
        # Copied: the caller may reuse its buffers before the other features arrive.
        collected = self._collected.setdefault(shard, {})
        collected |= {name: values.copy() for name, values in arrays.items()}
        if set(collected) != set(self._layout.members):
            return
        del self._collected[shard]
        buffers = encode_tar(self._layout, shard * self.shard_size, collected)
        digest = self._group.write(self.path / tar_name(shard), buffers)
        specs = self._specs.items()
        self._written_to_group([(name, shard, dict.fromkeys(spec.arrays, digest)) for name, spec in specs])

    def _seal(self, name: str, checksums: dict[str, str]) -> list[Skipped]:
        spec = self._specs[name]
        array = next(iter(spec.arrays))
        shards = sorted(set(range(self.n_shards)) if self._repairs is None else self._repairs[name])
        lines = [""] * self.n_shards if self._repairs is None else recorded_checksums(self.path, self._base, array)
        skipped: list[Skipped] = []
        for shard in shards:
            digests, entries = self._journaled(spec, shard)
            lines[shard] = digests[array]
            skipped += entries
        names = shard_names(self._base, array)
        if name != max(self._specs):
            return skipped
        # All features share the tars; the last one writes their checksums.
        digest = self._group.write(self.path / CHECKSUMS, [checksums_text(lines, names)])
        checksums |= {array: digest for spec in self._specs.values() for array in spec.arrays}
        return skipped
