"""What the pages and the code's own texts name is there: files, modules, functions."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("pipelines/*.md")])
ROOMS = "featcache|trainer|pipelines|tests|benchmarks|docs"
# What a command writes (--out) need not be there.
FILES = re.compile(rf"(?<![\w/.~-])(?<!--out )((?:{ROOMS})/[\w./-]*[\w/])")
NAMES = re.compile(r"(?<![\w/.-])((?:featcache|trainer|pipelines|tests|benchmarks)(?:\.[A-Za-z_]\w*)+)")
FILE_NAMES = ("json", "sig", "sbatch")  # featcache.json is a file in a cache


def prose(page: Path) -> str:
    """The page without examples of files to be added."""
    return re.sub(r"^```(python|diff)\b.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


@cache
def names_in(file: Path) -> frozenset[str]:
    """What a module defines or imports at its top, whatever the condition."""
    return frozenset(_bound(ast.parse(file.read_text("utf-8")).body))


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name for alias in node.names)
            case ast.Assign():
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If():
                yield from _bound([*node.body, *node.orelse])


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something that a module binds."""
    place = ROOT
    for part in name.split("."):
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").is_file():
            place = place / f"{part}.py"
        else:
            module = place / "__init__.py" if place.is_dir() else place
            return module.is_file() and part in names_in(module)
    return True


def missing_names(text: str) -> list[str]:
    return [name for name in NAMES.findall(text) if name.split(".")[1] not in FILE_NAMES and not exists(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(page: Path) -> None:
    text = prose(page)
    missing = [name for name in FILES.findall(text) if not (ROOT / name).exists()]
    missing += missing_names(text)
    assert not missing, f"{page.name} names what is not there: {', '.join(missing)}"


@pytest.mark.parametrize("package", ["featcache", "trainer", "pipelines", "benchmarks"])
def test_what_messages_and_docstrings_name_is_there(package: str) -> None:
    missing = []
    for file in sorted((ROOT / package).rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text("utf-8")))
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        missing += [f"{file.relative_to(ROOT)}: {name}" for text in texts for name in missing_names(text)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", prose(page))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_what_is_not_there_is_found() -> None:
    assert exists("featcache.open") and exists("featcache.errors.UserError") and exists("trainer.training.loop")
    assert not exists("trainer.loop") and not exists("featcache.errors.UsrError") and not exists("featcache.markdown")
    assert FILES.findall("see `trainer/loop.py`, and --out tests/x.json") == ["trainer/loop.py"]
