"""Changes to bytes and to JSON values, by chance."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

LEAVES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf")),
    *("", "..", "../../etc/passwd", "/etc/passwd", "label", "a/../../b", "raw", "object", "|O", "\ud800", "\x1b[2J"),
    *("zarr.json", "c.0.0", "x" * 5000, "0" * 64, "\x00", "tiny@5.scale", "vae", "a.part", "\u202e", "[red]"),
    *([], {}, [[]], {"": {}}, [None], {"a": 1}, [[[[[[[[]]]]]]]]),
)
_WORDS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b"\0",
    b"\n",
    b",",
    b":",
    b"NaN",
    b"1e999",
    b"-",
    b"\xff",
    b"null",
    b"../",
    b"9" * 400,
)


def change_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to four changes: flips, cuts, insertions, copies, words, extreme numbers."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        n = len(changed)
        at = chance.randrange(n + 1)
        length = min(n - at, chance.choice((1, 2, 4, 8, 64, 512)))
        action = chance.randrange(8)
        if action == 0 and n:
            changed[at % n] ^= 1 << chance.randrange(8)
        elif action == 1:
            del changed[at:]
        elif action == 2:
            del changed[at : at + length]
        elif action == 3:
            changed[at:at] = chance.randbytes(chance.choice((1, 3, 16, 600)))
        elif action == 4:
            changed[at : at + length] = chance.randbytes(length)
        elif action == 5:
            changed[at:at] = changed[at : at + length] * chance.choice((1, 2, 50))
        elif action == 6:
            word = chance.choice(_WORDS)
            changed[at : at + chance.choice((0, len(word)))] = word
        else:
            width = chance.choice((1, 2, 4, 8))
            number = chance.choice((0, 1, 2 ** (8 * width) - 1, 2 ** (8 * width - 1), 2 ** (8 * width - 1) - 1))
            changed[at : at + width] = number.to_bytes(width, "little")
    return bytes(changed)


def places(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all nodes of a JSON value."""
    found = [prefix]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found += places(child, (*prefix, key))
    return found


def change_value(value: Any, chance: random.Random) -> Any:
    """A copy with one to three nodes replaced, removed, renamed, doubled, nudged or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2, 3))):
        nodes = places(value)[1:]
        if not nodes:
            return chance.choice(LEAVES)
        *parents, last = chance.choice(nodes)
        node = value
        for key in parents:
            node = node[key]
        action = chance.randrange(6)
        if action == 0:
            del node[last]
        elif action == 1 and isinstance(node, dict):
            node[str(chance.choice(LEAVES))] = node.pop(last)
        elif action == 2 and type(node[last]) is int:
            node[last] += chance.choice((-1, 1, 2**32, -(2**63)))
        elif action == 3:
            other = value
            for key in chance.choice(nodes):
                if not isinstance(other, dict | list):
                    break
                try:
                    other = other[key]
                except (KeyError, IndexError):
                    break
            node[last] = copy.deepcopy(other)
        elif action == 4 and isinstance(node, list):
            node.append(copy.deepcopy(node[last]))
        else:
            node[last] = copy.deepcopy(chance.choice(LEAVES))
    return value


def dump(value: Any) -> bytes:
    """JSON text of a value, lone surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def change_json(data: bytes, chance: random.Random) -> bytes:
    """The document changed as a value, or as bytes; now and then something that is hard on a parser."""
    pick = chance.random()
    if pick < 0.6:
        return dump(change_value(json.loads(data), chance))
    if pick < 0.95:
        return change_bytes(data, chance)
    depth = chance.choice((100, 1000, 100_000))
    return chance.choice(
        (
            b"[" * depth,
            b'{"a":' * depth,
            b"[" * depth + b"]" * depth,
            b"9" * depth,
            b'{"a": 1, "a": 2}',
            b"",
            b"\xef\xbb\xbf{}",
        )
    )
