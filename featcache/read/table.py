"""A cache as a notebook shows it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from featcache.console import size_text

if TYPE_CHECKING:
    from featcache.read.reader import Cache

_TITLES = ("feature", "shape", "codec", "per image", "total")


def as_html(cache: Cache) -> str:
    """What the cache holds, as HTML; all text of the cache is escaped."""
    dataset, rows = cache.manifest.dataset, []
    for name, spec in cache.features.items():
        size = spec.bytes_per_sample
        rows.append((name, spec.shape_text, spec.stored_as, size_text(size), size_text(size * dataset.count)))
    resolution = dataset.preprocessing.get("resolution", "?")
    of_classes = f" of {len(cache.classes):,} classes" if cache.classes else ""
    caption = f"{cache.path}: {len(cache):,} images{of_classes} from {dataset.source}, {resolution} px"
    head = "".join(f"<th>{title}</th>" for title in _TITLES)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<table><caption>{html.escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
