"""What `featcache stats` does."""

from __future__ import annotations

from pathlib import Path

import featcache
from featcache.console import console, safe
from featcache.console_progress import RichProgress
from featcache.errors import UserError
from featcache.paths import check_output, last_name
from featcache.read.normalization import OVER, Over, compute, load, save
from featcache.settings import suggest


def write_statistics(cache: str, feature: str, over: str, out: Path | None) -> None:
    """Computes, writes, and prints by channel where there are few."""
    chosen: Over | None = next((kind for kind in OVER if kind == over), None)
    if chosen is None:
        raise UserError(f"--over {over!r} is not known", remedy=f"{suggest(over, OVER)}Type channel or position.")
    opened = featcache.open(cache)
    target = out or Path(f"{last_name(cache)}-{over}.safetensors")
    check_output(target, (".safetensors",), example="stats.safetensors")
    if target.exists() and not _is_ours(target):
        raise UserError(f"{target} is there and holds no statistics of a cache", remedy="Type another name with --out.")
    with RichProgress() as progress:
        found = compute(opened, feature, chosen, progress=progress)
    save(found, target)
    if found.over == "channel" and found.mean.numel() <= 64:
        for i, (mean, std) in enumerate(zip(found.mean.flatten().tolist(), found.std.flatten().tolist())):
            console.print(f"channel {i:3}   mean {mean:9.4f}   std {std:9.4f}")
    console.print(f"statistics of {safe(feature)} over {found.count} images: [bold]{safe(target)}[/bold]")


def _is_ours(path: Path) -> bool:
    try:
        return load(path).fingerprint is not None
    except UserError:
        return False
