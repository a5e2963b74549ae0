"""Image sources: where pixels come from before any encoder sees them.

A source is a finite, ordered set of samples; sample `i` has a key (unique, stable text), a label (class index) and
pixels. Everything downstream joins by key, never by position in a directory listing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from featcache.keys import key_bytes
from featcache.sources.decoders import LOADERS
from featcache.sources.pixels import FILES_IN_FLIGHT, MAX_FILE_BYTES, BadImage, content_hash

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")


class Source(Protocol):
    """A labelled image set. `description` regenerates or names the source in a manifest (no absolute paths)."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def label(self, index: int) -> int: ...

    def signature(self, index: int) -> str:
        """Cheap identity of the sample's bytes (file size, or generator parameters) that enters the fingerprint."""
        ...

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        """Pixels after the crop, uint8 [R, R, 3], and the first 8 bytes of the SHA-256 of the sample as stored.

        Args:
            decoder: a key of `featcache.sources.decoders.LOADERS`, which also says by which crop.

        Raises `BadImage` if the file cannot be decoded.
        """
        ...


class EncodedSource:
    """What sources of encoded files share: reading gives bytes, loading decodes and crops them."""

    def key(self, index: int) -> str:
        raise AssertionError("a source defines its keys")

    def size_bytes(self, index: int) -> int:
        """Memory that `read` takes. Raises as it does."""
        raise AssertionError("a source knows its files' sizes")

    def read(self, index: int) -> bytes:
        """The sample's file as stored.

        Raises `BadImage` if it cannot be read for a reason that lies in the file; `UserError` if others cannot either:
        the archive, the disk or the network fails.
        """
        raise AssertionError("a source defines its reading")

    def load(self, index: int, resolution: int, decoder: str = "pil") -> tuple[np.ndarray, int]:
        """As `Source.load`."""
        size = self.size_bytes(index)
        if size > MAX_FILE_BYTES:
            raise BadImage(
                self.key(index), f"the file has {size} bytes, more than the {MAX_FILE_BYTES:,} that are read"
            )
        with FILES_IN_FLIGHT.claim(size):
            data = self.read(index)
            return LOADERS[decoder](data, self.key(index), resolution), content_hash(data)


def fingerprint(source: Source, indices: Sequence[int] | np.ndarray) -> str:
    """SHA-256 (hex) over class names and (key, label, signature) of the chosen samples, in key order.

    Equal for the same images wherever they lie; does not depend on the order in which they are cached.
    """
    digest = hashlib.sha256()
    digest.update(key_bytes("\n".join(source.class_names)))
    lines = sorted(f"{source.key(int(i))}\t{source.label(int(i))}\t{source.signature(int(i))}" for i in indices)
    for line in lines:
        digest.update(b"\n" + key_bytes(line))
    return digest.hexdigest()


def sample_order(count: int, *, seed: int) -> np.ndarray:
    """Slot -> source index, int64 [count]: a seeded permutation, so that shards read in sequence mix classes."""
    return np.random.Generator(np.random.Philox(key=[seed, 0x0FDE5])).permutation(count)
