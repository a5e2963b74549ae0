"""What CONTRIBUTING.md says works: its examples are applied to a copy of the project and its commands typed there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
HOW_TOS = ("method", "recipe", "encoder", "source", "metric")
WHAT_IS_SEEN = {
    "method": "run: runs/pooled",
    "recipe": "SiT-S/2 + SRA 2",
    "encoder": "deit-t@11",
    "source": "cache: caches/drawn",
    "metric": "embedded-MeanDistance",
}


def blocks(how_to: str) -> Iterator[tuple[str, str]]:
    """Language and text of a how-to's blocks, in order."""
    for language, of, text in re.findall(
        r"^```(\w+) (\w+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    ):
        if of == how_to:
            yield language, text


def insert(project: Path, diff: str) -> None:
    """Adds the lines marked `+` beside those that are there already; these stand in the file once, as they are here."""
    for name, lines in re.findall(r"^--- (.*)\n((?:[ +].*\n|\+\n)+)", diff, re.MULTILINE):
        file = project / name
        text, parts = file.read_text("utf-8"), lines.splitlines()
        assert all(line[:1] in (" ", "+") for line in parts)
        there = "".join(f"{line[1:]}\n" for line in parts if line[0] == " ")
        assert text.count(f"\n{there}") == 1, f"{name}: {there!r} is there {text.count(there)} times"
        file.write_text(text.replace(f"\n{there}", "\n" + "".join(f"{line[1:]}\n" for line in parts)), "utf-8")


def follow(project: Path, how_to: str) -> list[str]:
    """Makes a how-to's changes in a copy of the project; its commands."""
    commands = []
    for language, text in blocks(how_to):
        if language == "python":
            name = text.splitlines()[0].removeprefix("# ")
            ast.parse(text)
            assert not (project / name).exists()
            (project / name).write_text(text, "utf-8")
        elif language == "diff":
            insert(project, text)
        else:
            commands.append(text)
    return commands


def type_there(project: Path, commands: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": str(project),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is in the project's folders."""
    copy = tmp_path_factory.mktemp("contributing")
    for name in ("featcache", "trainer", "pipelines", "docs", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.tar.xz"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def test_the_examples_fit_and_are_found_in_the_tables(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project, copy)
    for how_to in HOW_TOS:
        assert follow(copy, how_to), how_to
    code = (
        "from importlib import import_module as i\n"
        "assert 'pooled' in i('trainer.align').METHODS and i('trainer.align').config_class('pooled')().weight == 0.5\n"
        "assert i('trainer.evaluate.table').METRICS['mean_distance'].label == 'MeanDistance'\n"
        "assert i('featcache.encoders.table').ENCODERS['deit-t'].width == 192\n"
        "assert i('featcache.sources.open').FILES['.npz'].__name__ == 'open_arrays'\n"
        "assert i('trainer.runs.recipes').load_recipe_file('sra2/s2').model == 'SiT-S/2'\n"
    )
    type_there(copy, f'{sys.executable} -c "{code}"')
    for tool in ("ruff check", "ruff format --check", "lint-imports --no-logo --no-cache"):
        type_there(copy, tool)


@pytest.fixture(scope="module")
def with_cache(project: Path) -> Path:
    ((_, command),) = blocks("try")
    type_there(project, command)
    return project


@pytest.mark.slow
@pytest.mark.parametrize("how_to", HOW_TOS)
def test_following_a_how_to(with_cache: Path, how_to: str) -> None:
    seen = "".join(type_there(with_cache, command) for command in follow(with_cache, how_to))
    assert WHAT_IS_SEEN[how_to] in seen
    if how_to == "recipe":
        assert "| SiT-S/2 + SRA 2 | `sra2/s2` |" in (with_cache / "pipelines/README.md").read_text("utf-8")


def test_all_how_tos_are_followed() -> None:
    found = dict.fromkeys(re.findall(r"^```\w+ (\w+)$", PAGE.read_text("utf-8"), re.MULTILINE))
    assert tuple(found) == ("try", *HOW_TOS)
