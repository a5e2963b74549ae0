"""How the command lines end: interrupted, refused, unanswered."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import typer
from rich.console import Console
from store_helpers import build

from featcache.console import print_error, run_app, safe
from featcache.errors import UserError


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


def ends_with(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Exit code and what is said when a command raises ``error``."""
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["work"])
    code = run_app(app)
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return code, said.err


@pytest.mark.parametrize("code", sorted(errno.errorcode))
def test_every_refusal_of_the_system_is_one_line_with_the_file(
    code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, said = ends_with(OSError(code, os.strerror(code), "/data/x [red]\x1b[31m"), monkeypatch, capsys)
    first, *rest = said.splitlines()
    assert ended == 2 and first == f"error: {os.strerror(code)}: /data/x [red]\\x1b[31m" and len(rest) == 1


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def unprintable() -> Exception:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    return Unprintable()


@pytest.mark.parametrize(
    ("error", "code", "what"),
    [
        (MemoryError(), 2, "memory of this machine is not enough"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 2, "memory of this machine"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), 2, "GPU's memory is not enough"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deeply"),
        (ConnectionResetError(104, "Connection reset by peer"), 2, "Connection reset by peer"),
        (OSError("no number and no file"), 2, "no number and no file"),
        (KeyError("vae [/] \x1b]0;pwn\x07"), 70, "KeyError: 'vae [/] \\x1b]0;pwn\\x07'"),
        (
            ValueError("https://someone:hunter2@host/x?token=abc failed\nmore"),
            70,
            "https://***@host/x?token=*** failed",
        ),
        (AssertionError(), 70, "AssertionError\n"),
        (unprintable(), 70, "Unprintable\n"),
        (ZeroDivisionError("x" * 10_000), 70, "xxx"),
    ],
)
def test_whatever_is_raised_becomes_a_paragraph(
    error: Exception, code: int, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, said = ends_with(error, monkeypatch, capsys)
    assert ended == code and what in said and len(said) < 1000
    assert "\x1b" not in said and "hunter2" not in said and "abc" not in said
    if code == 70:
        assert "FEATCACHE_DEBUG=1" in said and "is kept" in said and "report it" in said


@pytest.mark.parametrize("name", ["FEATCACHE_DEBUG", "FEATCACHE_TRACEBACK"])
def test_developers_get_the_exception(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        raise KeyError("x")

    monkeypatch.setattr(sys, "argv", ["work"])
    monkeypatch.setenv(name, "1")
    with pytest.raises(KeyError):
        run_app(app)


def test_a_warning_is_one_line_that_is_obeyed_in_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        warnings.warn("no glyph\n for [red]\x1b", stacklevel=1)

    monkeypatch.setattr(sys, "argv", ["work"])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run_app(app) == 0
    assert capsys.readouterr().err == "note: no glyph for [red]\\x1b\n"


def test_a_thread_that_dies_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = typer.Typer()

    @app.command()
    def work() -> None:
        def fail() -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/[x]")

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()

    monkeypatch.setattr(sys, "argv", ["work"])
    assert run_app(app) == 0
    assert capsys.readouterr().err == "note: work in the background ended: No space left on device: /data/[x]\n"


HOSTILE = [
    "[red]x[/red]",
    "[/]",
    "\x1b]0;pwn\x07",
    "\x1b[2J",
    "\u202ecod.exe",
    "a\rb",
    "\x9b31m",
    "\udc80",
    "x\\",
    "\\[x",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_outside_is_shown_as_it_is_and_obeyed_in_nothing(text: str) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, highlight=False, soft_wrap=True, color_system="truecolor").print(
        f"[bold]{safe(text)}[/bold]|"
    )
    shown = out.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "")
    assert not any((ord(c) < 32 and c != "\n") or 127 <= ord(c) < 160 or c == "\u202e" for c in shown)
    assert shown.endswith("|\n") and (text not in ("[red]x[/red]", "[/]") or text in shown)


@pytest.mark.parametrize("name", ["runs/a:x:b", ":smile:", "s3://team/x:b:y"])
def test_names_do_not_become_pictures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_error(UserError(name, remedy=f"[bold] {name}"))
    shown = capsys.readouterr().err
    assert shown == f"error: {name}\n[bold] {name}\n"


class PanicException(BaseException):
    """As Rust libraries raise it."""


def test_a_panic_of_a_library_becomes_a_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, said = ends_with(PanicException("request valid: InvalidUri"), monkeypatch, capsys)
    assert ended == 70 and "PanicException: request valid" in said and "report it" in said


def test_a_pipe_that_is_not_the_terminal_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where nobody reads what is printed there is nobody to tell."""
    ended, said = ends_with(BrokenPipeError(errno.EPIPE, "Broken pipe"), monkeypatch, capsys)
    assert ended == 2 and "Broken pipe" in said


@pytest.mark.parametrize("work", ["print('x' * 1000000, flush=True)", "console.print('x' * 1000000)"])
def test_a_reader_that_leaves_is_neither_success_nor_damage(work: str) -> None:
    code = f"""
import sys, typer
from featcache.console import console, run_app
app = typer.Typer()
@app.command()
def work():
    {work}
sys.argv = ["work"]
sys.exit(run_app(app))
"""
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | true', sys.executable, code], capture_output=True, text=True
    )
    assert done.returncode == 141 and done.stderr == ""


def test_letters_that_the_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "featcache.cli", "info", str(tmp_path / "sch\u00f6n")]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "sch\\xf6n" in done.stderr and "Unicode" not in done.stderr


@pytest.mark.parametrize(
    "words", [["repair"], ["gc"], ["rm", "--yes", "--features", "x"], ["push", "s3://bucket/x"], ["sign", "--key", "k"]]
)
def test_a_url_where_a_folder_is_needed(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from featcache.cli import app

    monkeypatch.chdir(tmp_path)
    command, *rest = words
    monkeypatch.setattr(sys, "argv", ["featcache", command, "https://me:hidden@host/x", *rest])
    assert run_app(app) == 2
    said = capsys.readouterr()
    assert "is a URL" in said.err and "featcache pull URL FOLDER" in said.err and "hidden" not in said.out + said.err


def test_secrets_are_shown_nowhere() -> None:
    assert safe("read https://u:hunter2@h/x?sig=s") == "read https://***@h/x?sig=***"


@pytest.mark.parametrize("module", ["featcache.cli", "trainer.cli"])
def test_modules_end_like_the_commands(module: str, tmp_path: Path) -> None:
    words = {"featcache.cli": ["info", "a\x1b[31m" * 60], "trainer.cli": ["report", "a\x1b[31m" * 60]}[module]
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr + done.stdout
