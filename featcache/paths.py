"""Paths as a user types them: of files to write, and of folders that must be on this machine."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from featcache.errors import UserError, os_error

PAGES = (".html", ".htm")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin")


def last_name(cache: str) -> str:
    """What a file made from a cache is called after: the last part of its URL, or of its path wherever that leads."""
    if "://" in cache:
        return cache.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]
    return Path(cache).resolve().name


def typed(path: Path | str) -> str:
    """How a path is typed in a shell, also one with spaces or one that would be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def home() -> Path | None:
    """The user's home, None where nobody knows it: no `HOME`, and an id without a name, as in many containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def user_cache(variable: str) -> Path:
    """Where files go that can be had again: `$XDG_CACHE_HOME/featcache`, else `~/.cache/featcache`.

    variable: one that names another place, for the remedy.

    Raises `UserError` if nobody knows the user's home.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "featcache"
    found = home()
    if found is None:
        raise UserError(
            "no home folder is known for this user, so there is no place to keep files",
            remedy=f"Name one: export {variable}=FOLDER, or export HOME=FOLDER",
        )
    return found / ".cache" / "featcache"


_SCHEME = re.compile(r"(s3|gs|hf|https?|file|ftp):/")


def on_this_machine(path: Path) -> Path:
    """`path` as it is. Raises `UserError` for a URL, of which a `Path` would make a folder named `s3:`."""
    if _SCHEME.match(str(path)):
        url = str(path).replace(":/", "://", 1)
        raise UserError(
            f"{url} is a URL, and only a path on this machine will do here",
            remedy="Name a path. featcache push CACHE URL and featcache pull URL FOLDER copy caches from and to this machine.",
        )
    return path


def check_output(path: Path, endings: Sequence[str], *, example: str) -> Path:
    """`path` as it is. To be asked before any work, for a file that is going to be replaced whole.

    The ending keeps a mistyped name from replacing what cannot be had again, such as a cache's root document.

    Args:
        endings: of which the name must have one, such as `.html`.
        example: a file name for the remedy.

    Raises `UserError` for a folder, a device, a pipe, or a name with another ending.
    """
    try:
        found = path.stat().st_mode if path.exists() else None
    except OSError as error:
        raise os_error(error) from error
    if found is not None and stat.S_ISDIR(found):
        raise UserError(
            f"{path} is a folder, and a file is to be written",
            remedy=f"Name a file in it, such as {typed(path / example)}",
        )
    if found is not None and not stat.S_ISREG(found):
        raise UserError(f"{path} is a device or a pipe, which nothing can replace", remedy=f"Name a file: {example}")
    if path.suffix.lower() not in endings:
        raise UserError(
            f"{path} does not end in {' or '.join(endings)}",
            remedy=f"Name a file that does, such as {typed(path.with_name(example))}",
        )
    return path
