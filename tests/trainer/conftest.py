"""A tiny cache, built once, and a model size to train on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import add_nano

import featcache
from featcache.builder.derive import DeriveRequest, derive
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import parse_encoders
from featcache.progress import Quiet
from featcache.read.normalization import OVER, compute, save
from trainer.models.config import SIZES, TEXT_SIZES


@pytest.fixture(scope="session")
def streams_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `shapes_cache`, with what is diffused beside latents: a class token (`tiny@5.cls`) and components of its tokens
    (`tiny@5.pca4`)."""
    path = tmp_path_factory.mktemp("caches") / "streams"
    encoders = parse_encoders(["tiny@2,5,5.cls"])
    build(BuildRequest(data="shapes", encoders=encoders, limit=24, batch_size=8, shard_size=8, out=path), Quiet())
    derive(DeriveRequest(cache=path, feature="tiny@5", components=4))
    return path


@pytest.fixture(scope="session")
def text_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `shapes_cache`, with the embedded set's two captions of each image by the tiny text encoder."""
    path = tmp_path_factory.mktemp("caches") / "text"
    encoders = parse_encoders(["tiny@2,5"])
    request = BuildRequest(
        data="shapes", encoders=encoders, texts=("tiny",), limit=24, batch_size=8, shard_size=8, out=path
    )
    build(request, Quiet())
    return path


@pytest.fixture(scope="session")
def statistics(shapes_cache: Path) -> dict[str, Path]:
    """Files with the statistics of that cache's moments, by what they are taken over; they lie beside the cache."""
    files: dict[str, Path] = {over: shapes_cache.with_name(f"{over}.safetensors") for over in OVER}
    for over in OVER:
        save(compute(featcache.open(shapes_cache), "vae/moments", over), files[over])
    return files


@pytest.fixture
def nano() -> Iterator[None]:
    """The model size ``Nano`` and one thread, for the length of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    add_nano()
    yield
    SIZES.pop("Nano", None)
    TEXT_SIZES.pop("Nano", None)
    torch.set_num_threads(threads)
