"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``featcache`` or ``trainer`` as a user types it, in an empty working folder."""

    def call(*words: str, cwd: Path = tmp_path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        program, *rest = words
        command = [str(Path(sys.executable).with_name(program)), *rest]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    return call
