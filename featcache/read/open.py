"""Opening a cache wherever it lies."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from featcache.read.reader import Cache
from featcache.read.stream import DEFAULT_CACHE_BYTES, open_remote
from featcache.store.backends import open_backend
from featcache.store.remote import is_remote, local_path
from featcache.store.root import read_root
from featcache.store.signing import require_digest


def open_cache(
    path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
    expect: str | None = None,
) -> Cache:
    """Open the cache at `path` for reading: a directory, or a URL (s3://, gs://, hf://, http(s)://).

    A remote cache is read through blocks kept in `cache_dir` (default under the user's cache directory), at
    most `cache_bytes` of them (default 10 GiB). `expect` is the digest that the cache must have.

    Raises `CacheError` if there is none, it is another one, unfinished, damaged or of another format version.
    """
    if "://" in os.fspath(path):
        if is_remote(path):
            limit = DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes
            directory = None if cache_dir is None else Path(cache_dir)
            return open_remote(os.fspath(path), cache_dir=directory, cache_bytes=limit, expect=expect)
        path = local_path(path)
    directory = Path(path)
    manifest = read_root(directory)
    if expect is not None:
        require_digest(manifest, expect, str(directory))
    reopen = functools.partial(open_cache, str(directory.absolute()), expect=expect)
    return Cache(str(directory), manifest, open_backend(directory, manifest), reopen=reopen)
