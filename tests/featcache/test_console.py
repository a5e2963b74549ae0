"""How the command lines end: interrupted, refused, unanswered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from store_helpers import build

from featcache.console import run_app


def test_an_interrupted_command_says_that_it_can_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["work"])
    assert run_app(app) == 130
    assert "the same command continues it" in capsys.readouterr().err


def test_rm_with_nobody_to_ask_removes_nothing(tmp_path: Path) -> None:
    path = build(tmp_path / "cache")
    command = [str(Path(sys.executable).with_name("featcache")), "rm", str(path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--yes" in done.stderr
    assert (path / "zarr.json").is_file()
    done = subprocess.run([*command, "--features", "absent@1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "does not hold absent@1" in done.stderr
