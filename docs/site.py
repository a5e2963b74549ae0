"""What the site has beside the pages of docs/ (a hook of MkDocs): README, recipes, settings; and links that lead there.

Run by `make docs`, with the repository's root as the working folder.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository that lie outside docs/ -> their place in the site.
ELSEWHERE = {
    "README.md": "index.md",
    "pipelines/README.md": "recipes.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
SETTINGS = "settings.md"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\((?!https?://|mailto:|#)([^)#\s]*)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```\w+)[ \t]+\w.*$", re.MULTILINE)  # words that tests read, after the language
_DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def on_pre_build(config: MkDocsConfig) -> None:
    """Public things without a docstring end the build: the reference would show a bare name."""
    if bare := sorted(undocumented()):
        raise PluginError(f"no docstring: {', '.join(bare)}")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    from trainer.runs.setting_pages import markdown

    for source, place in ELSEWHERE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text("utf-8")))
    files.append(File.generated(config, SETTINGS, content=markdown()))
    for picture in sorted(_pictures()):
        files.append(File.generated(config, picture, abs_src_path=str(ROOT / picture)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    own = page.file.src_uri
    source = next((name for name, place in ELSEWHERE.items() if place == own), f"docs/{own}")
    markdown = _FENCE.sub(r"\1", markdown)
    return _LINK.sub(lambda link: _relinked(link, source, own, files), markdown)


def _relinked(link: re.Match[str], source: str, own: str, files: Files) -> str:
    """A link of a page of the repository, as the site's: to a file that the site does not have it is its text alone."""
    mark, text, target, anchor = link[1], link[2], link[3], link[4] or ""
    there = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    inside = ELSEWHERE.get(there, there.removeprefix("docs/"))
    if files.get_file_from_path(inside) is None:
        if there.startswith("docs/") or not (ROOT / there).exists():
            return link[0]  # broken: MkDocs says so
        return text
    return f"{mark}[{text}]({posixpath.relpath(inside, posixpath.dirname(own) or '.')}{anchor})"


def _pictures() -> Iterator[str]:
    """Pictures outside docs/ that a page shows."""
    found = set()
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ELSEWHERE)]:
        for link in _LINK.finditer(page.read_text("utf-8")):
            there = (page.parent / link[3]).resolve()
            if link[1] and not there.is_relative_to(ROOT / "docs") and there.is_file():
                found.add(there.relative_to(ROOT).as_posix())
    yield from found


def undocumented() -> Iterator[str]:
    """Names that the pages of the reference show and that say nothing of themselves."""
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in _DIRECTIVE.findall(page.read_text("utf-8")):
            yield from _bare(name)


def _bare(name: str) -> Iterator[str]:
    from pydoc import locate

    found = locate(name)
    if found is None:
        raise PluginError(f"the reference names {name}, which there is not")
    if not (getattr(found, "__doc__", None) or "").strip():
        yield name
    for member, value in vars(found).items() if isinstance(found, type) or hasattr(found, "__file__") else ():
        if not member.startswith("_") and _is_own(value, found):
            if not (getattr(value, "__doc__", None) or "").strip():
                yield f"{name}.{member}"
            if isinstance(value, type):
                yield from _bare(f"{name}.{member}")


def _is_own(value: Any, owner: Any) -> bool:
    """Whether it is a function, a property or a class that the class or module defines itself."""
    if isinstance(owner, type):
        return isinstance(value, (property, classmethod, staticmethod)) or callable(value) or hasattr(value, "func")
    return callable(value) and getattr(value, "__module__", None) == owner.__name__
