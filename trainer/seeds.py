"""One seed of a run, many independent streams."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, purpose: str, *indices: int) -> int:
    """A seed in [0, 2^63) that is a function of (seed, purpose, indices) alone, so no random state needs saving."""
    text = "/".join(map(str, (purpose, seed, *indices)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
