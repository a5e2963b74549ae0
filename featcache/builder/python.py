"""`featcache.build`: what the command does, for programs and notebooks."""

from __future__ import annotations

from typing import Any

import featcache
from featcache.builder.asked import refuse_other_layout, request_of
from featcache.builder.request import BuildRequest
from featcache.builder.run import build as run
from featcache.progress import QUIET, Progress
from featcache.read.reader import Cache
from featcache.settings import given_of
from featcache.sources import remembered


def build(*, progress: Progress = QUIET, remember: bool = True, **settings: Any) -> Cache:
    """Encode images into a cache, continue a build, or add features to one (`into`); returns the open cache.

        featcache.build(data="photographs", encoder="dinov2-b@11", vae_levels=["G3", "G4"], out="caches/photographs")

    Args:
        progress: who is told how far it is, e.g. `featcache.console_progress.RichProgress()`, as a context manager.
        remember: note in `~/.cache/featcache`, for inspect, eval and analyze, where the images lie.
        settings: the options of `featcache build`, by their names with `_` for `-`, valued as they are typed; lists will
            do where several are typed.

    Raises:
        UserError: bad input of any kind; whatever shards were written stay, and the same call continues.
    """
    given = given_of(BuildRequest, settings)
    request = request_of(given)
    refuse_other_layout(given)
    cache = featcache.open(run(request, progress).path)
    if remember:
        remembered.remember(cache.manifest.dataset.fingerprint, request.data)
    return cache
