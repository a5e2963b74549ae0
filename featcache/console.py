"""How both command lines talk: one console, one way to print an error, one way to leave."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

from rich.console import Console

from featcache.errors import UserError

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class ByteBar:
    """A spinner with what has been done so far and its rate (for work whose total is not known beforehand)."""

    def __init__(self, name: str) -> None:
        from rich.progress import (
            DownloadColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        columns = (SpinnerColumn(), TextColumn(name), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=None)

    def __enter__(self) -> ByteBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, amount: int) -> None:
        self._bar.update(self._task, advance=amount)


def print_error(error: UserError) -> None:
    """One short paragraph: what is wrong and why, then what to type."""
    errors.print(f"[bold red]error:[/bold red] {safe(error.what)}")
    if error.remedy:
        errors.print(safe(error.remedy))


def safe(value: object) -> str:
    """`value` as text that a terminal shows and does not obey: for whatever a file, a manifest or a server says.

    Rich's markup is escaped; control characters other than newline and tab (so terminal escapes too), and the marks
    that reorder text, become a visible `\\xNN`, lone surrogates (bytes of file names that are not UTF-8) likewise.
    """
    from rich.markup import escape

    return escape("".join(_visible(character) for character in str(value)))


def _visible(character: str) -> str:
    import unicodedata

    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def run_app(app: Any) -> int:
    """Runs a typer application; user errors become a paragraph and exit code 2, Ctrl-C exit code 130.

    With ``FEATCACHE_TRACEBACK=1`` in the environment, errors are raised as they are (for developers).
    """
    import typer

    if os.environ.get("FEATCACHE_TRACEBACK"):
        return int(app(standalone_mode=False) or 0)
    try:
        code = int(app(standalone_mode=False) or 0)
        # The parser turns Ctrl-C into this code without a word.
        return _interrupted() if code == EXIT_INTERRUPTED else code
    except UserError as error:
        print_error(error)
        return EXIT_USER_ERROR
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except BrokenPipeError:
        # The reader of a pipe has left (`featcache info | head`): nothing to report, and nothing more to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        print_error(
            UserError(
                f"{error.strerror}: {error.filename or 'while writing'}",
                remedy="Free space or choose another place, then run the same command again: finished work is kept.",
            )
        )
        return EXIT_USER_ERROR
    except Exception as error:
        # Usage errors (unknown options, missing arguments) of typer's parser, whose classes typer does not export.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return int(getattr(error, "exit_code", EXIT_USER_ERROR))


def _interrupted() -> int:
    errors.print("[yellow]interrupted[/yellow]: finished work is kept; the same command continues it.")
    return EXIT_INTERRUPTED
