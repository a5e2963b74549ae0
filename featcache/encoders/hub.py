"""Files from the model hub: the local cache first, the network only when it answers, and never a long silence."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from featcache.errors import first_line

PROBE_TIMEOUT_S = 5.0


class HubUnreachable(Exception):
    """The file is not in the local hub cache and the hub does not answer (or does not have it)."""


@cache
def _hub_problem() -> str | None:
    """Why the hub cannot be used, or None. Probed once: the hub client itself retries for half a minute per file."""
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return "offline mode is set in the environment"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except OSError as error:
        reason = getattr(error, "reason", error)
        return f"the model hub does not answer: {reason}"
    return None


def hub_file(repo: str, names: tuple[str, ...]) -> Path:
    """Local path of the first of `names` that the hub repository `repo` holds.

    Raises `HubUnreachable` if none is cached and the hub does not answer, refuses access, or has none of them.
    """
    for name in names:
        cached = try_to_load_from_cache(repo, name)
        if isinstance(cached, str):
            return Path(cached)
    if (problem := _hub_problem()) is not None:
        raise HubUnreachable(problem)
    problem = "no such file"
    for name in names:
        try:
            return Path(hf_hub_download(repo, name))
        except Exception as error:  # the client raises a dozen unrelated classes; all mean "not to be had"
            problem = f"{type(error).__name__}: {first_line(error)}"
    raise HubUnreachable(problem)
