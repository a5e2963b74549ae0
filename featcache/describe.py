"""What classes of settings say of themselves: types, defaults and meanings, for tables of settings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from featcache.settings import options_of

_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}


@dataclass(frozen=True)
class Setting:
    """One setting, for people: its name, what it takes, its default as YAML would have it, and what it means."""

    name: str
    type: str
    default: str
    meaning: str


def described(cls: type) -> list[Setting]:
    """The settings of a class made by `featcache.settings.settings`, in the order of its fields.

    A meaning is what the class's docstring says after `name: ` (or `name, other: `), else the help of its option.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    meanings = _meanings(inspect.getdoc(cls) or "", [field.name for field in fields])
    options = options_of(cls)
    return [
        Setting(
            name=field.name,
            type=_kind(hints[field.name]),
            default=_default(field),
            meaning=meanings.get(field.name) or (options[field.name].help if field.name in options else ""),
        )
        for field in fields
    ]


def _meanings(text: str, names: list[str]) -> dict[str, str]:
    """Field -> what the docstring says of it: up to the next field that it speaks of, or the end of the paragraph."""
    name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    if not names:
        return {}
    # A field is spoken of at the beginning of a line or sentence, so `align: {ahpa: ...}` inside a text is none.
    start = re.compile(rf"(?:^|(?<=[.;:)]))\s*((?:{name})(?:,\s+(?:{name}))*):\s", re.MULTILINE)
    ends = re.compile(r"\n\s*\n|^[ \t]*[A-Z][\w ()]*:$", re.MULTILINE)
    found = {}
    matches = list(start.finditer(text))
    for match, following in zip(matches, [*matches[1:], None]):
        said = text[match.end() : following.start() if following else len(text)]
        said = " ".join(ends.split(said)[0].split()).rstrip(".;")
        for field in re.split(r",\s+", match[1]):
            found[field] = said[:1].upper() + said[1:] + "."
    return found


def _kind(hint: Any) -> str:
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is types.NoneType else _kind(part) for part in parts)
    if origin is Literal:
        return ", ".join(map(str, parts))
    if origin is tuple:
        return f"list ({_kind(parts[0])})"
    if origin is not None and issubclass(origin, Mapping):
        return "group of keys"
    return _KINDS.get(hint, getattr(hint, "__name__", str(hint)))


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if str(value) else '""'
