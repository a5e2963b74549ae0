"""How both command lines talk: one console, one way to print an error, one way to leave."""

from __future__ import annotations

import os
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from featcache.errors import UserError, first_line, os_error
from featcache.redact import redact

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

EXIT_USER_ERROR = 2
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130


class ByteBar:
    """A spinner with what has been done so far and its rate (for work whose total is not known beforehand)."""

    def __init__(self, name: str) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn(safe(name)),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
        )
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

    Secrets in URLs are hidden (`featcache.redact`). Rich's markup is escaped; control characters other than newline and
    tab (so terminal escapes too), and the marks that reorder text, become a visible `\\xNN`, lone surrogates (bytes of
    file names that are not UTF-8) likewise.
    """
    return escape(plain(value))


def plain(value: object) -> str:
    """As `safe`, for places that know no markup, such as questions."""
    return "".join(_visible(character) for character in redact(str(value)))


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def run_app(app: Callable[..., int | None]) -> int:
    """Runs a typer application and gives the exit code: whatever goes wrong becomes one paragraph.

    0: done. 1: done, and the answer is no (a damaged cache). 2: something the user can put right, a disk that refuses
    and a lack of memory included. 70: a fault of the program. 128 + n: stopped by signal n (130: Ctrl-C).

    With `FEATCACHE_DEBUG=1` in the environment, errors are raised as they are (for developers).
    """
    if debugging():
        return int(app(standalone_mode=False) or 0)
    former = threading.excepthook, warnings.showwarning
    threading.excepthook, warnings.showwarning = _thread_ended, _warned
    try:
        return _run(app)
    finally:
        threading.excepthook, warnings.showwarning = former


def _run(app: Callable[..., int | None]) -> int:
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
        print_error(os_error(error))
        return EXIT_USER_ERROR
    except Exception as error:
        # Usage errors (unknown options, missing arguments) of typer's parser, whose classes typer does not export.
        show = getattr(error, "show", None)
        if show is not None:
            show()
            return int(getattr(error, "exit_code", EXIT_USER_ERROR))
        known = _known(error)
        if known is not None:
            print_error(known)
            return EXIT_USER_ERROR
        print_error(_fault(error))
        return EXIT_FAULT


def _warned(message: Warning | str, *_: object, **__: object) -> None:
    """A library's warning as one line; its text may quote names."""
    errors.print(f"[yellow]note:[/yellow] {safe(' '.join(str(message).split()))}")


def _thread_ended(ended: threading.ExceptHookArgs) -> None:
    """One line for what ends a thread; whoever waits for its work raises an error of its own."""
    if ended.exc_value is not None and not isinstance(ended.exc_value, SystemExit):
        what = os_error(ended.exc_value).what if isinstance(ended.exc_value, OSError) else first_line(ended.exc_value)
        errors.print(f"[yellow]note:[/yellow] work in the background ended: {safe(what)}")


def debugging() -> bool:
    """Whether errors are to be raised as they are: `FEATCACHE_DEBUG`, or its former name `FEATCACHE_TRACEBACK`."""
    return any(os.environ.get(name, "") not in ("", "0") for name in ("FEATCACHE_DEBUG", "FEATCACHE_TRACEBACK"))


def _known(error: Exception) -> UserError | None:
    """What exceptions of the interpreter and of torch mean, where that is always the same."""
    text = _text(error)
    if type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and "out of memory" in text.lower() and not isinstance(error, RecursionError)
    ):
        return UserError(
            f"the GPU's memory is not enough: {text}",
            remedy="Take a smaller --batch-size (for trainer run also --set accumulate=2 or more), or end other "
            "programs on that GPU; finished work is kept.",
        )
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in text):
        return UserError(
            f"the memory of this machine is not enough{f': {text}' if text else ''}",
            remedy="Take a smaller --batch-size or fewer samples, or end other programs; finished work is kept.",
        )
    if isinstance(error, RecursionError):
        return UserError(
            "a file or setting is nested too deeply to be read", remedy="Look at what was passed to the command."
        )
    return None


def _fault(error: Exception) -> UserError:
    line = _text(error)
    rank = os.environ.get("RANK", "0")
    return UserError(
        f"{'' if rank == '0' else f'rank {rank}: '}an unforeseen fault ended the command: {type(error).__name__}{f': {line}' if line else ''}",
        remedy="Work that was finished before is kept, and the same command continues it. This is a fault of the program: "
        "please report it where you got the program from, with the command, this message and what "
        "FEATCACHE_DEBUG=1 set before the same command prints.",
    )


def _text(error: BaseException) -> str:
    """What an error says; nothing where it says nothing."""
    line = first_line(error)
    return "" if line == type(error).__name__ else line


def _interrupted() -> int:
    errors.print("[yellow]interrupted[/yellow]: finished work is kept; the same command continues it.")
    return EXIT_INTERRUPTED


def size_text(count_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count_bytes < 1000:
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"
