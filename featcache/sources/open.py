"""What `--data` names: an embedded set, a folder, archives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import featcache
from featcache.errors import UserError
from featcache.sources.archives import open_archives
from featcache.sources.base import Source
from featcache.sources.embedded import is_embedded, open_embedded, recorded_embedded
from featcache.sources.folder import open_folder
from featcache.sources.opening import raise_unreadable
from featcache.sources.parquet import open_parquet
from featcache.store.remote import is_remote


class Opener(Protocol):
    """Opens the files that a path, a URL or a pattern of them names; folder: they are all of a kind in a local folder."""

    def __call__(self, pattern: str, *, name: str, folder: bool) -> Source: ...


# Of a folder that holds several kinds, the first here is taken. A new kind of file is a module and a line.
FILES: Mapping[str, Opener] = {
    ".parquet": open_parquet,
    ".tar": open_archives,
    ".zip": open_archives,
}


def open_source(data: str, *, resolution: int, limit: int | None = None) -> Source:
    """The source that `--data` names: an embedded set (`open_embedded`), a folder with one folder per class, or archives.

    Archives are `.tar`, `.zip` and `.parquet` files, folders of them, and patterns of webdataset shards
    (`data/train-{0000..0146}.tar`, also behind `s3://` and `hf://`): see docs/sources.md.

    Args:
        data: what the user typed.
        resolution: side in pixels after the crop.
        limit: of an embedded set, how many images exist (default 2,000).

    Raises `UserError` for an embedded set that there is not; if the folder is missing, is not a folder, or holds no images.
    """
    if is_embedded(data):
        return open_embedded(data, resolution=resolution, limit=limit)
    try:
        return _open_files(data)
    except OSError as error:
        raise_unreadable(f"--data {data}", error)


def _open_files(data: str) -> Source:
    remote, path = is_remote(data), Path(data)
    if remote or "{" in data or "*" in data or (path.is_file() and path.suffix.lower() in FILES):
        named = data.partition("?")[0] if remote else data  # without the secrets of a signed URL
        stem, dot, suffix = named.rstrip("/").rpartition("/")[2].rpartition(".")
        name = stem if dot + suffix in FILES else stem + dot + suffix
        opener = FILES.get("." + named.lower().rpartition(".")[2], open_archives)
        return opener(data, name=name, folder=False)
    if path.is_dir():
        held = {file.suffix.lower() for file in path.iterdir() if file.is_file()}
        kind = next((suffix for suffix in FILES if suffix in held), None)
        if kind is not None and not any(child.is_dir() for child in path.iterdir()):
            return FILES[kind](str(path / f"*{kind}"), name=path.resolve().name, folder=True)
    return open_folder(path)


_NO_IMAGES_REMEDY = "Type: featcache build --data /path/to/images ...   (one folder per class), or --data shapes"


def find_data(data: str | None, *, into: Path | None = None, remedy: str = _NO_IMAGES_REMEDY) -> str:
    """`--data`, else `$FEATCACHE_DATA`, else `./data/imagenet`.

    into: cache to add to; one of the embedded set says itself which images it holds.
    remedy: what the error says to type.

    Raises `UserError` if none of the three exists.
    """
    if data is None and into is not None:
        shapes = recorded_embedded(featcache.open(into).manifest.dataset.source)
        if shapes is not None:
            return shapes[0]
    chosen = data or os.environ.get("FEATCACHE_DATA")
    if chosen:
        return chosen
    default = Path("data/imagenet")
    if default.exists():
        return str(default)
    raise UserError(
        "no images to encode: --data was not given, $FEATCACHE_DATA is not set and ./data/imagenet does not exist",
        remedy=remedy,
    )
