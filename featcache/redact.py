"""URLs without the secrets in them: for whatever is stored, printed or logged."""

from __future__ import annotations

import re

# One slash will do: paths make one of two. Quotes end a URL, but not inside of a password. The first part looks back so
# that a long word costs one look at each of its letters.
_URL = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]+://?(?:[^\s/?#@]*@)?[^\s'\"<>]+")
_HIDDEN = "***"
_PORT = re.compile(r"\A[^:]*\Z|:\d*\Z|\A\[")  # a host without a colon, with a port, or a number of IPv6
# Parameters of a query that name or page something and cannot grant access; the value of any other one is hidden.
_HARMLESS = frozenset({"download", "versionid", "generation", "region", "list-type", "prefix", "delimiter"})


def redact(text: str) -> str:
    """`text` with user names, passwords and query values of every URL in it replaced by `***`.

    `https://user:secret@host/x?X-Amz-Signature=abc` becomes `https://***@host/x?X-Amz-Signature=***`. A text without
    such parts comes back unchanged, so redacting twice does nothing more.
    """
    return _URL.sub(lambda match: _redact_url(match[0]), text)


def is_redacted(text: str) -> bool:
    """Whether `text` is a URL that lost something to `redact`, so that nothing can be opened with it."""
    return _URL.fullmatch(text) is not None and _HIDDEN in text


def _redact_url(url: str) -> str:
    scheme, slashes, rest = re.split(r"(:/+)", url, maxsplit=1)
    rest, hash_mark, _ = rest.partition("#")
    rest, question_mark, query = rest.partition("?")
    netloc, slash, path = rest.partition("/")
    if "@" not in netloc and not _PORT.search(netloc) and "@" in path:
        # A password with a slash in it: what follows the colon is no port.
        host, slash, path = rest.rpartition("@")[2].partition("/")
        netloc = f"{_HIDDEN}@{host}"
    if "@" in netloc:
        netloc = f"{_HIDDEN}@{netloc.rpartition('@')[2]}"
    query = "&".join(map(_redact_parameter, query.split("&")))
    fragment = _HIDDEN if hash_mark else ""
    return f"{scheme}{slashes}{netloc}{slash}{path}{question_mark}{query}{hash_mark}{fragment}"


def _redact_parameter(parameter: str) -> str:
    """One of a query; a token may stand there alone, without a name."""
    name, equals, value = parameter.partition("=")
    if not equals:
        return _HIDDEN if parameter else ""
    return f"{name}={value if name.lower() in _HARMLESS else _HIDDEN}"
