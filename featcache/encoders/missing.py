"""All the weights that a command lacks, in one error, before any of them is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from featcache.encoders import text, vae, vision
from featcache.encoders.base import WeightsSource
from featcache.encoders.table import ENCODERS, TEXTS, VAES
from featcache.errors import WeightsUnavailable


def require_weights(
    weights: WeightsSource, *, vae_name: str | None, encoders: Iterable[str] = (), texts: Iterable[str] = ()
) -> None:
    """Find, or download, the pretrained files of all these; names that have none (embedded, a user's) are passed over.

    Raises `WeightsUnavailable` that names every file that is neither here nor to be had.
    """
    errors: list[WeightsUnavailable] = []
    if weights.random_seed is None:
        for find in _finders(weights, vae_name, encoders, texts):
            try:
                find()
            except WeightsUnavailable as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        lines = "".join(f"\n  {error.what}" for error in errors)
        raise WeightsUnavailable(
            f"{len(errors)} files of pretrained weights are missing:{lines}",
            remedy="Bring them all and pass --weights-dir DIR (see docs/encoders.md).",
        )


def _finders(
    weights: WeightsSource, vae_name: str | None, encoders: Iterable[str], texts: Iterable[str]
) -> Iterator[Callable[[], Path]]:
    """One function for each file, which finds it or raises `WeightsUnavailable`."""
    entry = VAES.get(vae_name or "")
    if entry is not None and entry.hub_id is not None:
        yield partial(vae.find_file, vae_name or "", weights)
    for name in encoders:
        if name in ENCODERS:
            yield partial(vision.find_file, name, ENCODERS[name], weights)
    for name in texts:
        hub_id = TEXTS[name].hub_id if name in TEXTS else None
        if hub_id is not None:
            for what, files in text.needed_files(TEXTS[name]):
                yield partial(text.find_file, name, hub_id, weights, files, what)
