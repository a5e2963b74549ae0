"""Signals that end a command, answered at once.

Python runs its handlers between two of its instructions, so one that arrives while the main thread is in a long call, such
as a backward pass on a CPU, waits until that is over. The operating system's handler only writes the signal's number to a
pipe, and a thread that waits at its end answers while the call goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 130
APART_S = 1.0  # signals that follow faster are copies: schedulers, terminals and launchers send several
GRACE_S = 1.5  # for the main thread to end by itself
_END = 255  # no signal's number


@contextmanager
def _watching(react: Callable[[int], None]) -> Iterator[None]:
    """Calls `react` with the number of each signal that Python handles, on a thread of its own. Main thread only."""
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    former = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    owner = os.getpid()

    def watch() -> None:
        while (got := os.read(receiver, 1)) and got[0] != _END:
            react(got[0])

    thread = threading.Thread(target=watch, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        if os.getpid() == owner:  # a forked child has neither the thread nor the pipe to itself
            os.write(sender, bytes([_END]))
            thread.join()
        os.close(sender)
        os.close(receiver)


def leave_now(text: str, code: int = EXIT_INTERRUPTED) -> None:
    """Ends the process as it is, from any thread, as a kill would: what is on the disk is complete or absent. Without the
    console, whose lock another thread may hold."""
    terminal = sys.stdout.isatty() or sys.stderr.isatty()
    show_cursor = "\x1b[?25h" if terminal else ""
    with contextlib.suppress(OSError, ValueError):
        os.write(2, f"{show_cursor}\n{text}\n".encode("utf-8", "backslashreplace") if text else show_cursor.encode())
    os._exit(code)


@contextmanager
def prompt(text: str = "interrupted") -> Iterator[None]:
    """Ctrl-C in the block ends it with `KeyboardInterrupt`, as ever; where the main thread does not get round to it soon,
    the process ends with exit code 130 all the same. Further ones, which would interrupt the ending itself, do nothing from
    then on, also after the block. Nothing in any other thread than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    over = threading.Event()

    def react(number: int) -> None:
        if number == signal.SIGINT and not over.wait(GRACE_S):
            leave_now(text)

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, _nothing)
        signal.default_int_handler(number, frame)

    def unraisable(hook_args: sys.UnraisableHookArgs) -> None:
        # Raised where Python drops it, in a finaliser: nothing to be shown, since `react` ends the process.
        if hook_args.exc_type is not KeyboardInterrupt:
            former(hook_args)

    former, sys.unraisablehook = sys.unraisablehook, unraisable
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with _watching(react):
        if usual:
            signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            over.set()
            sys.unraisablehook = former
            if signal.getsignal(signal.SIGINT) is interrupt:
                signal.signal(signal.SIGINT, signal.default_int_handler)


class Stop:
    """What a loop is told by signals. `number`: the first one's, 0 before."""

    def __init__(self) -> None:
        self.number = 0
        self._first_s = 0.0

    def take(self, number: int) -> bool:
        """Takes note of one; whether it asks to end at once: a Ctrl-C that a person typed after another signal. torchrun
        passes a first Ctrl-C on as it is, and a second one as SIGTERM."""
        now = time.monotonic()
        if not self.number:
            self.number, self._first_s = number, now
            return False
        passed_on = number == signal.SIGTERM and self.number == signal.SIGINT and "TORCHELASTIC_RUN_ID" in os.environ
        return (number == signal.SIGINT or passed_on) and now - self._first_s > APART_S


@contextmanager
def collected(say: Callable[[], None], farewell: Callable[[], str]) -> Iterator[Stop]:
    """Collects SIGTERM, SIGINT and SIGHUP (the terminal is gone) instead of dying, so that the loop can save and leave.
    What is ignored already (`nohup`) stays so. Nothing is collected in any other thread than the main one.

    The first signal has `say` called at once, on a thread of its own. A second Ctrl-C, a second or more later, prints
    `farewell` and ends the process.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def react(number: int) -> None:
        first = not stop.number
        if stop.take(number):
            leave_now(farewell())
        if first:
            with contextlib.suppress(Exception):  # a terminal that is gone keeps nothing from being saved
                say()

    wanted = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    with _watching(react):
        former = {number: signal.signal(number, _nothing) for number in wanted}
        try:
            yield stop
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def _nothing(*_: object) -> None:
    """The thread has seen it."""
