"""Progress on a terminal, and where there is none."""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from featcache import console_progress
from featcache.console import size_text
from featcache.console_progress import RichProgress
from featcache.progress import Progress, Quiet, RecordingProgress


class Clock:
    now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_progress, "time", clock)
    return clock


def screen(
    monkeypatch: pytest.MonkeyPatch, *, terminal: bool, width: int = 200, height: int = 25, **options: Any
) -> io.StringIO:
    """What progress writes, to a terminal of so many columns or elsewhere."""
    text = io.StringIO()
    shown = Console(
        file=text, force_terminal=terminal, width=width, height=height, highlight=False, soft_wrap=True, **options
    )
    monkeypatch.setattr(console_progress, "console", shown)
    return text


def wait_for(text: io.StringIO, what: str) -> None:
    until = time.monotonic() + 20
    while what not in text.getvalue():
        assert time.monotonic() < until, f"{what!r} not in {text.getvalue()!r}"
        time.sleep(0.01)


def test_a_bar_with_rate_time_left_and_the_latest_numbers(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen(monkeypatch, terminal=True)
    with RichProgress() as progress:
        progress.begin("encoding", 100, done=20)
        wait_for(text, "20/100 images, 0 s")
        clock.now_s += 10
        progress.update(40, "bottleneck: x\nimages/s of each stage: x 25")
        wait_for(text, "60/100 images, 4 images/s, 10 s left, bottleneck: x")
        assert "━" in text.getvalue() and "\x1b[2mimages/s of each stage: x 25\x1b[0m" in text.getvalue()
        clock.now_s += 3  # time left runs down between two updates
        wait_for(text, "60/100 images, 4 images/s, 7 s left")
        clock.now_s += 7
        progress.update(40)
        wait_for(text, "100/100 images, 4 images/s, 20 s, bottleneck: x")
    assert text.getvalue().count("encoding: 100/100 images, 4 images/s, 20 s, bottleneck: x") == 1, "it stays"


def test_bytes_are_sizes_and_an_unknown_total_is_a_spinner(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen(monkeypatch, terminal=True)
    with RichProgress() as progress:
        progress.begin("copying", None, unit="bytes")
        clock.now_s += 10
        progress.update(1_500_000_000)
        wait_for(text, "1.5 GB, 150 MB/s, 10 s")
        assert "━" not in text.getvalue() and set(text.getvalue()) & set("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")
        progress.begin("checking", 2_000_000, unit="bytes")
        progress.update(500_000)
        wait_for(text, "500 KB/2 MB")
    assert size_text(999.7) == "1 KB" and size_text(999.4) == "999 B"


@pytest.mark.parametrize("dumb", [False, True])
def test_lines_where_there_is_no_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch, dumb: bool) -> None:
    """A dumb terminal cannot redraw, so it counts as none. A line comes whether or not anything has moved."""
    text = screen(monkeypatch, terminal=dumb, _environ={"TERM": "dumb" if dumb else "xterm"}, no_color=True)
    monkeypatch.setattr(console_progress, "PLAIN_EVERY_S", 0.02)
    with RichProgress() as progress:
        progress.begin("training repa", 1000, done=500, unit="steps")
        wait_for(text, "training repa: 500/1,000 steps, 0 s so far\n")
        clock.now_s += 100
        progress.update(250, "loss 0.5\nmore")
        wait_for(text, "training repa: 750/1,000 steps, 2.5 steps/s, 1 min 40 s left, loss 0.5, more\n")
        clock.now_s += 10
        wait_for(text, "training repa: 750/1,000 steps, 2.5 steps/s, 1 min 30 s left, loss 0.5, more\n")
        progress.begin("copying", None, unit="bytes")
        clock.now_s += 2
        progress.update(3000)
        wait_for(text, "copying: 3 KB, 1.5 KB/s, 2 s\n")
    assert "\x1b" not in text.getvalue()


def test_what_is_over_soon_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen(monkeypatch, terminal=False)
    with RichProgress() as progress:
        progress.begin("checking", None, unit="bytes")
        progress.begin("sampling", 8, done=8)
        progress.begin("sampling", 8)
        progress.update(5)
        progress.update(3)
        progress.begin("nothing", 0)
    (line,) = text.getvalue().splitlines()
    assert line.startswith("sampling: 8/8 images, ")


def test_how_far_it_came_is_said_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen(monkeypatch, terminal=False)
    with pytest.raises(OSError), RichProgress() as progress:
        progress.begin("sampling", 8)
        progress.update(5)
        raise OSError
    assert text.getvalue().startswith("sampling: 5/8 images, ")
    assert not any(thread.name == "progress" for thread in threading.enumerate())


@pytest.mark.parametrize("terminal", [True, False])
def test_names_texts_and_notes_are_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    text = screen(monkeypatch, terminal=terminal)
    hostile = "\x1b]0;owned\x07[red]http://me:hunter2@host/\u202e"
    visible = r"\x1b]0;owned\x07[red]http://***@host/\u202e"
    with RichProgress() as progress:
        progress.begin(f"name {hostile}\nsecond line", 2)
        progress.update(1, f"text {hostile}\nbelow {hostile}")
        progress.note(f"note {hostile}")
    for what in ("name", "text", "below", "note"):
        assert f"{what} {visible}" in text.getvalue()
    assert f"name {visible} second line" in text.getvalue()
    assert not any(bad in text.getvalue() for bad in ("\x1b]", "\x07", "\u202e", "hunter2"))


@pytest.mark.parametrize("terminal", [True, False])
def test_many_threads_lose_no_count(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    text = screen(monkeypatch, terminal=terminal)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with RichProgress() as progress:
            progress.begin("copying", None, unit="files")

            def count() -> None:
                for _ in range(2000):
                    progress.update(1)

            threads = [threading.Thread(target=count) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert "copying: 16,000 files" in text.getvalue()


NUMBERS = ("1,234 images/s", "12 % waiting for data", "loss 0.8312")
MORE = tuple(f"metric/similarity/of a rather long name {i} 0.1234" for i in range(6))


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_recorded_work_is_two_lines_that_fit(clock: Clock, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """The time left and the three numbers are there at any width; the bar, the share and further numbers where they fit."""
    screen(monkeypatch, terminal=True, width=width)
    with RichProgress() as progress:
        progress.begin("training ahpa+sara+sra2 on LightningDiT-XL/1", 400_000, done=1000, unit="steps")
        clock.now_s += 300  # of which the first step compiles
        progress.record(1, NUMBERS, MORE)
        clock.now_s += 100
        progress.update(99)
        progress.record(100, NUMBERS, MORE)
        shown = io.StringIO()
        Console(file=shown, force_terminal=True, width=width, color_system="standard").print(progress._picture())
    first, second = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue()).splitlines()
    assert max(len(first), len(second)) <= width
    assert "1,200/400,000 steps" in first and "2 d 8 h left" in first
    assert second.startswith(", ".join(NUMBERS))
    assert ("━" in first) == (width > 100) and ("0.3 %" in first) == (width >= 120)
    assert ("training" in first) == (width >= 80)
    fitting = [n for n in range(len(MORE) + 1) if len(", ".join([*NUMBERS, *MORE[:n]])) < width]
    assert second == ", ".join([*NUMBERS, *MORE[: fitting[-1]]])


def test_a_record_is_a_line_where_there_is_no_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen(monkeypatch, terminal=False)
    monkeypatch.setattr(console_progress, "PLAIN_EVERY_S", 0.01)
    with RichProgress() as progress:
        progress.begin("training", 400, unit="steps")
        wait_for(text, "training: 0/400 steps, 0 s so far\n")
        clock.now_s += 60
        progress.record(1, ("loss 1",), MORE)
        for _ in range(3):
            clock.now_s += 50
            progress.update(49)
            progress.record(50, (*NUMBERS[:2], "loss\r0.5"), MORE)
        time.sleep(0.1)  # no line between records
        clock.now_s += console_progress.SILENT_S
        wait_for(text, "training: 298/400 steps, 74.5 %, 0 s left, ")
    lines = [line for line in text.getvalue().splitlines() if not line.startswith("training: 0/400")]
    said = r"1,234 images/s, 12 % waiting for data, loss\r0.5"
    assert lines[:4] == [
        "training: 1/400 steps, 0.2 %, loss 1",
        f"training: 100/400 steps, 25.0 %, 2 min 32 s left, {said}",
        f"training: 199/400 steps, 49.7 %, 1 min 42 s left, {said}",
        f"training: 298/400 steps, 74.5 %, 52 s left, {said}",
    ]
    assert all(line == f"training: 298/400 steps, 74.5 %, 0 s left, {said}" for line in lines[4:]) and len(lines) > 4
    assert not set("\r\x1b━") & set(text.getvalue())


def test_the_time_left_follows_the_latest_records(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen(monkeypatch, terminal=False)
    with RichProgress() as progress:
        progress.begin("training", 10_000, unit="steps")
        for second in [*[10] * 5, *[1] * 250]:  # the machine was busy at first
            clock.now_s += second
            progress.record(1, ())
    assert text.getvalue().splitlines()[-1] == "training: 255/10,000 steps, 2.5 %, 2 h 42 min left"


def test_the_time_left_spreads_what_comes_every_hundred_records(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause as long as the steps between two of them, which is over, is still to come again and again."""
    text = screen(monkeypatch, terminal=False)
    with RichProgress() as progress:
        progress.begin("training", 2000, unit="steps")
        for record in range(1000):
            clock.now_s += 101 if record % 100 == 50 else 1
            progress.record(1, ())
    left = [line.rpartition(", ")[2] for line in text.getvalue().splitlines()[-95::30]]
    assert left == ["36 min 33 s left", "35 min 33 s left", "34 min 33 s left", "33 min 33 s left"], left


def test_unused_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = screen(monkeypatch, terminal=True)
    with RichProgress():
        pass
    assert text.getvalue() == ""


@pytest.mark.parametrize("kind", [Quiet, RichProgress])
def test_every_progress_is_called_alike(kind: type) -> None:
    for name in ("begin", "update", "note"):
        assert inspect.signature(getattr(kind, name)) == inspect.signature(getattr(Progress, name))


@pytest.mark.parametrize("kind", [Quiet, RichProgress])
def test_records_are_called_alike(kind: type[RecordingProgress]) -> None:
    assert inspect.signature(kind.record) == inspect.signature(RecordingProgress.record)


def test_the_protocol_costs_no_start_up_time() -> None:
    code = "import sys, featcache.progress; print(*{'rich', 'numpy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
