"""URLs without the secrets in them: for whatever is stored, printed or logged."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, urlsplit

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_HIDDEN = "***"
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
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.split("://")[0] + "://" + _HIDDEN
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{_HIDDEN}@{host}" if at and user else parts.netloc
    query = parts.query
    if query:
        pairs = parse_qsl(query, keep_blank_values=True)
        shown = [f"{quote(name)}={quote(value) if name.lower() in _HARMLESS else _HIDDEN}" for name, value in pairs]
        query = "&".join(shown) if pairs else _HIDDEN
    fragment = _HIDDEN if parts.fragment else ""
    return parts._replace(netloc=netloc, query=query, fragment=fragment).geturl()
