"""Command lines of README and docs: each is one that the programs take, and a page that tells a whole way is walked."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import typer

from featcache.cli import app as featcache_app
from featcache.settings import from_mapping
from trainer.cli import app as trainer_app
from trainer.runs.config import RunConfig, apply_overrides
from trainer.runs.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pipelines/*.md")])
APPS = {"featcache": featcache_app, "trainer": trainer_app}
# Methods that a page makes up.
INVENTED = ("pooled", "mean_distance")
_LINE = re.compile(
    r"^(?:    |\$ )?(?:[A-Z_]+=\S+ )*(?:torchrun .*? -m (?=(?:featcache|trainer)))?((?:featcache|trainer)(?:\.cli --)? .*)$"
)


def command_lines(page: Path) -> list[list[str]]:
    """Words of each command in the page's blocks of code; comments, `...` and what is piped on are left out."""
    text, found, fenced = page.read_text("utf-8").replace("\\\n", " "), [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif (fenced or line.startswith("    ")) and (match := _LINE.match(line)):
            words = shlex.split(match[1].replace(".cli --", ""), comments=True)
            command = itertools.takewhile(lambda word: word not in ("|", ">", "&", "&&"), words)
            found.append([word for word in command if word != "..."])
    return found


LINES = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}") for page in PAGES for words in command_lines(page)
]


def test_commands_are_found() -> None:
    assert len(LINES) > 70
    typed = [words for page in ("README.md", "docs/evaluation.md") for words in command_lines(ROOT / page)]
    assert ["featcache", "build", "--encoder", "dinov2-b", "--vae-levels", "G3,G4"] in typed
    assert ["trainer", "sample", "runs/ahpa", "--num", "50000"] in typed, "of torchrun, too"


@pytest.mark.parametrize("words", LINES)
def test_a_command_is_one_that_the_program_takes(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its options are there and take such values, methods and recipes are known, and so are the keys of --set."""
    monkeypatch.chdir(tmp_path)
    program: Any = typer.main.get_command(APPS[words[0]])
    parent = program.make_context(words[0], words[1:])
    name, command, rest = program.resolve_command(parent, words[1:])
    context = command.make_context(name, rest, parent=parent)
    if words[:2] != ["trainer", "run"] or any(name in words for name in INVENTED):
        return
    given = {key: value for key, value in context.params.items() if key in ("model", "method") and value is not None}
    recipe = context.params.get("recipe")
    values = load_recipe(recipe) if recipe else {}
    from_mapping(RunConfig, apply_overrides({**values, **given}, context.params.get("set_") or []))


@pytest.mark.slow
def test_the_way_through_the_page_on_roles(cli: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    """Every command of it, one after the other, in few steps."""
    small = {"--steps": "2", "--limit": "24", "--num": "4", "--batch-size": "8"}
    for words in command_lines(ROOT / "docs" / "roles.md"):
        short = [small.get(before, word) for before, word in zip(["", *words], words)]
        done = cli(*short, timeout=600)
        assert done.returncode == 0, (short, done.stdout[-2000:], done.stderr[-2000:])
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"reg", "reg-ahpa", "redi-repa", "own"}
