"""How both command lines talk: one console, one way to print an error, one way to leave."""

from __future__ import annotations

import contextlib
import io
import os
import re
import select
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich import console as rich_console
from rich.markup import escape
from rich.measure import Measurement

from featcache.errors import UserError, first_line, os_error
from featcache.redact import redact

if TYPE_CHECKING:
    from rich.table import Table


class Console(rich_console.Console):
    """Rich's, which shows what it is given: `:x:` in a file's name is no emoji. A pipe without a reader is an error
    for `run_app` to answer, not a quiet exit code 1.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, soft_wrap=True, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def print_table(self, table: Table) -> None:
        """A table as wide as what is in it: a narrow terminal wraps its lines, a file has them whole. Columns that are
        made to fit would lose the ends of paths and of numbers.
        """
        own = self._width
        try:
            self.width = 1 << 16
            self.width = max(1, Measurement.get(self, self.options, table).maximum)
            self.print(table, crop=False)
        finally:
            self._width = own


console = Console()
errors = Console(stderr=True)

EXIT_USER_ERROR = 2
EXIT_FAULT = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # 128 + SIGPIPE


def print_error(error: UserError) -> None:
    """One short paragraph: what is wrong and why, then what to type. Nothing where standard error takes no more."""
    with contextlib.suppress(OSError):
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

    0: done. 1: done, and the answer is no (a damaged cache). 2: something the user can put right, a disk that refuses and
    a lack of memory included. 70: a fault of the program. 128 + n: stopped by signal n (130: Ctrl-C), or as if (141: the
    reader of a pipe has left, so that what was to be said or done may not have been).

    With `FEATCACHE_DEBUG=1` in the environment, errors are raised as they are (for developers).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Of a name that the terminal's encoding lacks the rest is still shown, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    if debugging():
        return int(app(standalone_mode=False) or 0)
    former = threading.excepthook, warnings.showwarning
    threading.excepthook, warnings.showwarning = _thread_ended, _warned
    try:
        with _outputs() as outputs:
            return _flushed(_run(app, outputs))
    finally:
        threading.excepthook, warnings.showwarning = former


@contextlib.contextmanager
def _outputs() -> Iterator[list[int]]:
    """Descriptors of where standard output and error lead now: rich turns the former to /dev/null when it breaks."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(os.dup(stream.fileno()))
    try:
        yield found
    finally:
        for descriptor in found:
            os.close(descriptor)


def _flushed(code: int) -> int:
    """The exit code once all that was printed has arrived; of success another one where it cannot."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            code = code or EXIT_NO_READER
            _discard(stream)
        except OSError as error:
            if not code:
                print_error(os_error(error))
            code = code or EXIT_USER_ERROR
            _discard(stream)
    return code


def _discard(stream: TextIO) -> None:
    """What is left to be written to a stream goes nowhere, so that the interpreter does not fail over it at its end."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(app: Callable[..., int | None], outputs: Sequence[int]) -> int:
    try:
        refuse_empty(sys.argv[1:])
        _require_folder()
        code = int(app(standalone_mode=False) or 0)
        # The parser turns Ctrl-C into this code without a word.
        return _interrupted() if code == EXIT_INTERRUPTED else code
    except UserError as error:
        print_error(error)
        return EXIT_USER_ERROR
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except SystemExit as leaving:
        # Typer leaves so, without a word, whatever pipe it was that broke.
        if isinstance(leaving.__context__, BrokenPipeError):
            return _refused(leaving.__context__, outputs)
        raise
    except OSError as error:
        return _refused(error, outputs)
    except Exception as error:
        # Usage errors (unknown options, missing arguments) of typer's parser, whose classes typer does not export.
        show = getattr(error, "show", None)
        if show is not None:
            with contextlib.suppress(OSError):
                show()
            return int(getattr(error, "exit_code", EXIT_USER_ERROR))
        known = _known(error)
        if known is not None:
            print_error(known)
            return EXIT_USER_ERROR
        print_error(_fault(error))
        return EXIT_FAULT
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries written in Rust, and no Exception
            raise
        print_error(_fault(error))
        return EXIT_FAULT


def _refused(error: OSError, outputs: Sequence[int]) -> int:
    """The exit code for what the system refused, which is said where somebody listens."""
    if isinstance(error, BrokenPipeError) and _reader_left(outputs):
        return EXIT_NO_READER
    print_error(os_error(error))
    return EXIT_USER_ERROR


def _reader_left(outputs: Sequence[int]) -> bool:
    """Whether whoever read what is printed has left (`featcache info | head`): nobody is there to report to."""
    poll = select.poll()
    for descriptor in outputs:
        poll.register(descriptor, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def refuse_empty(words: Sequence[str]) -> None:
    """Raises `UserError` for an empty word on a command line: nearly always a shell variable that is not set.

    `featcache rm "$CACHE" --features "$LAYERS"` must not mean the whole of the working folder.
    """
    for i, word in enumerate(words):
        name = word.removesuffix("=") if re.fullmatch(r"--[a-z-]+=", word) else None
        if word == "":
            name = words[i - 1] if i and words[i - 1].startswith("--") else "an argument"
        if name is not None:
            raise UserError(
                f"{name} is empty",
                remedy="Give it a value or leave it out. (A shell variable that is not set is empty: echo it.)",
            )


def _require_folder() -> None:
    """Raises `UserError` where the working folder was removed: libraries end the process there, each in its own way."""
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UserError("the folder you are in was removed", remedy="Go to one that exists: cd") from error


def _warned(message: Warning | str, *_: object, **__: object) -> None:
    """A library's warning as one line; its text may quote names."""
    with contextlib.suppress(OSError):
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
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return UserError(
            "the machine starts no more threads for this user",
            remedy="Have the limit on processes raised (ulimit -u), or take fewer --workers or --threads; finished work is kept.",
        )
    if isinstance(error, RecursionError):
        return UserError(
            "a file or setting is nested too deeply to be read", remedy="Look at what was passed to the command."
        )
    return None


def _fault(error: BaseException) -> UserError:
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
    with contextlib.suppress(OSError):
        errors.print("[yellow]interrupted[/yellow]: finished work is kept; the same command continues it.")
    return EXIT_INTERRUPTED


def amount_text(count: float) -> str:
    """A count or a rate: `1,200`, `12.3`."""
    return f"{count:,.0f}" if count >= 100 else f"{count:.3g}"


def time_text(seconds: float) -> str:
    """How long something takes, in the two largest units that matter: `45 s`, `1 min`, `2 h 5 min`, `3 d 4 h`."""
    left = max(0, round(seconds))
    if left >= 3600:
        left = 60 * round(left / 60)
    if left >= 86400:
        left = 3600 * round(left / 3600)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count:,} {unit}")
    return " ".join(parts) or "0 s"


def size_text(count_bytes: float) -> str:
    """`8 B`, `1.5 MB`; with `/s` behind it a rate."""
    for unit in ("B", "KB", "MB", "GB"):
        if count_bytes < 999.5:  # 999.7 would be shown as 1e+03
            return f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.3g} TB"
