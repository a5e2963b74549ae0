"""The pages of settings: every setting of runs, methods, streams and builds is on them, with a meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from subprocess import CompletedProcess
from typing import Annotated, Literal

import pytest

from featcache.build.request import BuildRequest
from featcache.describe import Setting, described
from featcache.errors import UserError
from featcache.settings import Count, Names, Option, settings
from trainer.align import config_class, method_names
from trainer.runs.config import RunConfig
from trainer.runs.setting_pages import groups, markdown, page
from trainer.runs.streams import StreamConfig

CLASSES = [RunConfig, StreamConfig, BuildRequest, *(config_class(name) for name in method_names())]


@settings
class Sample:
    """What it is for: nothing.

    count: how many
        there are; `a: b` is no field. kind, names: two at once.

    This: belongs to nothing.
    """

    count: Count = 3
    kind: Literal["a", "b"] | None = None
    names: Names = ("x", "y")
    other: Annotated[bool, Option("From its option.")] = False
    bare: float = 1e-4


def test_meanings_are_the_docstring_s() -> None:
    assert described(Sample) == [
        Setting("count", "whole number", "3", "How many there are; `a: b` is no field."),
        Setting("kind", "a, b or null", "null", "Two at once."),
        Setting("names", "list (text)", "[x, y]", "Two at once."),
        Setting("other", "true or false", "false", "From its option."),
        Setting("bare", "number", "0.0001", ""),
    ]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_meaning(cls: type) -> None:
    found = described(cls)
    assert [entry.name for entry in found] == [field.name for field in dataclasses.fields(cls)]
    assert not [entry.name for entry in found if len(entry.meaning) < 5 or entry.meaning.endswith((",.", ":."))]


def test_the_page_has_them_all() -> None:
    text = markdown()
    lines = list(page(width=100))
    for prefix, entries in groups().values():
        for entry in entries:
            assert f"| `{prefix}{entry.name}` |" in text
            assert any(line.startswith(f"  {prefix}{entry.name} = ") for line in lines)
    assert "--method redi" in groups() and "--method none" not in groups()


def test_a_word_finds_settings(cli: Callable[..., CompletedProcess[str]]) -> None:
    assert [line for line in page("repa", width=100) if not line.startswith(" ")] == ["--method repa"]
    found = cli("trainer", "settings", "router_lr")
    assert found.returncode == 0 and found.stdout.splitlines()[:2] == [
        "--method ahpa",
        "  ahpa.router_lr = 1.0   (number)",
    ]
    wrong = cli("trainer", "settings", "ahpa.roter")
    assert wrong.returncode == 2 and "Did you mean 'ahpa.router'" in wrong.stderr
    with pytest.raises(UserError, match="no setting"):
        list(page("no such thing", width=80))
