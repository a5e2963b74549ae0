"""One server of processes and one set of workspaces for all tests of the attacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.lab import Lab
from tests.attacks.processes import NoCompiler, Processes, processes


def _served(*, trainer: bool) -> Iterator[Processes]:
    try:
        with processes(trainer=trainer) as found:
            yield found
    except NoCompiler as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server() -> Iterator[Processes]:
    """For featcache's commands."""
    yield from _served(trainer=False)


@pytest.fixture(scope="session")
def whole_server() -> Iterator[Processes]:
    """For all commands."""
    yield from _served(trainer=True)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab") / "lab")


@pytest.fixture(scope="session")
def whole_lab(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Lab:
    """With a bucket."""
    return Lab(tmp_path_factory.mktemp("lab") / "lab", s3=s3_server)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder
