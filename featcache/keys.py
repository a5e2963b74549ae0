"""Names of images, which come from file names: any bytes on Linux, not always UTF-8.

In memory a key is a `str` as Python makes it of a file name: bytes that are no UTF-8 become lone surrogates
(`surrogateescape`). A cache stores the bytes themselves. Where text must be valid Unicode (manifests, tables of
captions) they are written as `\\xNN`.
"""

from __future__ import annotations

import re

_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")
_TO_ESCAPE = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))|[\udc80-\udcff]")


def key_bytes(key: str) -> bytes:
    """A key as it is stored: the bytes of the file name."""
    return key.encode("utf-8", "surrogateescape")


def key_text(stored: bytes) -> str:
    """The key of stored bytes, NUL-padded or not: the inverse of `key_bytes`."""
    return stored.rstrip(b"\0").decode("utf-8", "surrogateescape")


def printable(key: str) -> str:
    """A key as valid Unicode: a byte that is no UTF-8 becomes `\\xNN`, and so does the backslash of what
    looks like that already. Other keys stay as they are.
    """
    return _TO_ESCAPE.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", key)


def from_printable(text: str) -> str:
    """The key that `printable` wrote."""
    return _ESCAPED.sub(lambda match: "\\" if match[1] == "5c" else chr(0xDC00 + int(match[1], 16)), text)
