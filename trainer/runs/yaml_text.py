"""YAML from outside, read in one place: plain values only, bounded in size, depth and number.

The text is first walked event by event, without building anything and without recursion: libyaml's own loader overflows
the stack of the process on deep nesting, and a few lines of aliases stand for billions of values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from featcache.errors import UserError
from featcache.store import files

MAX_BYTES = 1 << 20
MAX_NODES = 10_000  # an alias counts as often as its content would
MAX_DEPTH = 32
MAX_BITS = 1024  # of a whole number, as many as a float's range

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


class _GivenTwice(Exception):
    """A key, its argument, stands twice in one mapping."""


class _Loader(_PARSER):  # type: ignore[misc]
    """Safe, and strict about keys: YAML itself lets the last of two win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            try:
                if key in seen:
                    raise _GivenTwice(key)
                seen.add(key)
            except TypeError:
                break  # a key that is a list or a mapping: the base class has the message
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuses numbers that no setting takes: a hexadecimal one may have so many digits that it cannot be printed."""
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > MAX_BITS:
            raise ValueError(f"a number of {value.bit_length()} bits")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(path: Path) -> Any:
    """The plain values in a file.

    Raises:
        UserError: it cannot be read, or as `parse_yaml`.
    """
    try:
        data = files.read_bounded(path, MAX_BYTES)
    except UserError as error:
        raise UserError(error.what, remedy=error.remedy) from error
    return parse_yaml(data, str(path))


def parse_yaml(data: bytes | str, where: str) -> Any:
    """The plain values in one YAML document; `where` opens the error's sentence.

    Raises:
        UserError: no valid YAML, too large, too deep, a key given twice, or a tag (`!!python/...`).
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        _check_size(text, where)
        return yaml.load(text, _Loader)
    except _GivenTwice as error:
        raise UserError(f"{where}: key {_short(error.args[0])} is given twice", remedy="Keep one of them.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates such as 2001-99-99, numbers of 5,000 digits
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split()):.300}") from error


def _check_size(text: str, where: str) -> None:
    """Refuses what would be too much once it is built, and tags. Aliases count with all that they stand for."""
    total = 0
    sizes: dict[str, int] = {}  # of finished anchors
    opened: list[tuple[str | None, int]] = []  # anchor of each open collection, and the total before it
    for event in yaml.parse(text, Loader=_PARSER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise UserError(f"{where}: *{_short(event.anchor)} stands for nothing, or for a part of itself")
            total += sizes[event.anchor]
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            if anchor is not None:
                sizes[anchor] = total - before
        elif isinstance(event, yaml.NodeEvent):
            tag = getattr(event, "tag", None)
            if tag not in (None, "!"):
                raise UserError(f"{where}: the tag {_short(tag)} is not read", remedy="Leave tags out.")
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, total - 1))
            elif event.anchor is not None:
                sizes[event.anchor] = 1
        if total > MAX_NODES or len(opened) > MAX_DEPTH:
            raise UserError(
                f"{where} holds more than {MAX_NODES:,} values, or is nested more than {MAX_DEPTH} levels deep: "
                "no settings do"
            )


def _short(value: object) -> str:
    return repr(value)[:80]
