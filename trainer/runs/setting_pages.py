"""All settings of runs, as `trainer settings` and the documentation show them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from featcache.describe import Setting, described
from featcache.errors import UserError
from featcache.settings import suggest
from trainer.align import config_class, method_names
from trainer.runs.config import RunConfig
from trainer.runs.streams import StreamConfig


def groups() -> dict[str, tuple[str, list[Setting]]]:
    """Title -> what goes before the names when they are typed, and the settings."""
    methods = {f"--method {name}": (f"{name}.", described(config_class(name))) for name in method_names()}
    every = {"A run": ("", described(RunConfig)), **methods, "A stream": ("streams.FEATURE.", described(StreamConfig))}
    return {title: group for title, group in every.items() if group[1]}


def page(text: str = "", *, width: int) -> Iterator[str]:
    """Lines for a terminal: all settings, those of a method (`ahpa`), or those whose name holds `text`.

    Raises:
        UserError: there is none.
    """
    names = set()
    found = False
    for title, (prefix, settings) in groups().items():
        whole = not text or text == prefix.partition(".")[0]
        chosen = [entry for entry in settings if whole or text in prefix + entry.name]
        names |= {prefix + entry.name for entry in settings}
        if not chosen:
            continue
        found = True
        yield title
        for entry in chosen:
            yield f"  {prefix}{entry.name} = {entry.default}   ({entry.type})"
            yield from textwrap.wrap(entry.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if not found:
        raise UserError(
            f"no setting is named {text!r:.80}", remedy=f"{suggest(text, names)}trainer settings lists them all."
        )


def markdown() -> str:
    """The same as tables."""
    parts = [
        "# Settings",
        "What a recipe holds and `--set KEY=VALUE` takes; `trainer settings` prints the same. Made from the code.",
    ]
    for title, (prefix, settings) in groups().items():
        rows = ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for entry in settings:
            cells = (f"`{prefix}{entry.name}`", entry.type, f"`{entry.default}`", entry.meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"
