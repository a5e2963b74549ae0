"""What an installation prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", ["build_wheel", "build_editable"])
def test_installing_warns_of_nothing(tmp_path: Path, kind: str) -> None:
    """setuptools prints its warnings as a box; here they are errors."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for package in ("featcache", "trainer", "pipelines", "pipelines/embedded"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "pipelines" / "none.yaml").touch()
    program = f"import setuptools.build_meta as backend; backend.{kind}('made')"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "****" not in done.stderr and len(list((tmp_path / "made").glob("*.whl"))) == 1
