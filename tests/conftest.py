"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.progress import Quiet

# How long an example takes depends on what else the machine does: it is no property of the code.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(scope="session", autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What builds note of where images lie, and statistics of references, go nowhere near the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATCACHE_REFERENCES", str(tmp_path_factory.mktemp("references")))
        patch.setenv("FEATCACHE_PLACES", str(tmp_path_factory.mktemp("places")))
        yield


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """A folder of real ImageNet JPEGs beside the checkout; tests that need it skip where it is absent."""
    folder = SHARED / "data" / "imagenet-sample"
    if not folder.is_dir():
        pytest.skip(f"real images are not here ({folder})")
    return folder


@pytest.fixture(scope="session")
def papers() -> Path:
    """A folder with the papers' text (``ahpa.txt`` and so on) beside the checkout; skips where it is absent."""
    folder = SHARED / "papers"
    if not folder.is_dir():
        pytest.skip(f"the papers' text is not here ({folder})")
    return folder


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """Vectors that the public REPA and DiT code computed: in $FEATCACHE_GOLDEN, else beside the checkout; skips if absent."""
    folder = Path(os.environ.get("FEATCACHE_GOLDEN", SHARED / "golden"))
    files = [f"{name}.{kind}" for name in ("sit_repa", "dit_official") for kind in ("json", "npz")]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        pytest.skip(f"{folder} lacks {', '.join(missing)}; FEATCACHE_GOLDEN can name a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of a server that speaks S3 on the loopback."""
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1).read()
            break
        except OSError:
            time.sleep(0.1)
    yield url
    process.terminate()
    process.wait()


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of an empty bucket there; the environment points every client to it."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{time.monotonic_ns()}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return name


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``featcache`` or ``trainer`` as a user types it, in an empty working folder."""

    def call(*words: str, cwd: Path = tmp_path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        program, *rest = words
        command = [str(Path(sys.executable).with_name(program)), *rest]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    return call


@pytest.fixture(scope="session")
def shapes_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dozen embedded images with moments, all VAE groups and three layers of the tiny encoder."""
    path = tmp_path_factory.mktemp("caches") / "shapes"
    build(
        BuildRequest(
            data="shapes", encoders=(EncoderChoice(name="tiny"),), limit=24, batch_size=8, shard_size=8, out=path
        ),
        Quiet(),
    )
    return path
