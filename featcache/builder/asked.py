"""What is asked of a build, in a shell or in Python: conventions and checks that both share."""

from __future__ import annotations

import featcache
from featcache.builder.request import BuildRequest
from featcache.errors import UserError
from featcache.paths import on_this_machine
from featcache.settings import Given, flag_of, from_typed


def refuse_other_layout(given: Given) -> None:
    """Raises `UserError` for an option that says how the cache is laid out which `into` names, and differs from it."""
    if "into" not in given:
        return
    manifest = featcache.open(given["into"]).manifest
    has = {
        "seed": manifest.dataset.order_seed,
        "flip": manifest.dataset.flip,
        "shard_size": manifest.shard_size,
        "format": manifest.format,
        "compressor": manifest.compressor,
    }
    for name, value in has.items():
        if name in given and given[name] != value:
            flag = flag_of(BuildRequest, name)
            raise UserError(
                f"{flag} cannot be chosen when features are added: {given['into']} has {value}, not {given[name]}",
                remedy=f"Leave {flag} out, or make a new cache with --out.",
            )


def request_of(given: Given) -> BuildRequest:
    """What was typed, with the images found by convention where none are named."""
    from featcache.sources.open import find_data

    data, into = given.get("data"), given.get("into")
    if into is not None:
        on_this_machine(into)
    return from_typed(BuildRequest, {**given, "data": find_data(data, into=into)})
