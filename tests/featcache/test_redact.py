"""Secrets in URLs do not survive redaction; what is no secret does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.redact import redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/caches/x", "s3://bucket/caches/x"),
        ("/data/imagenet?x=1", "/data/imagenet?x=1"),
        ("https://user:secret@host:8080/x", "https://***@host:8080/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://host/x?X-Amz-Signature=abc&versionId=3", "https://host/x?X-Amz-Signature=***&versionId=3"),
        ("https://host/x?sig%20nature", "https://host/x?sig%20nature=***"),
        ("PUT https://u:p@host/x failed", "PUT https://***@host/x failed"),
        ("https://host/x#secret", "https://host/x#***"),
    ],
)
def test_examples(text: str, expected: str) -> None:
    assert redact(text) == expected


SECRET = st.text("abcdefXYZ0123456789_-.~", min_size=12, max_size=40)


@given(SECRET, SECRET, SECRET)
def test_no_part_of_a_secret_stays(user: str, password: str, token: str) -> None:
    url = f"https://{user}:{password}@host/path?token={token}&x=1"
    shown = redact(f"reading {url} failed")
    assert user not in shown and password not in shown and token not in shown
    assert redact(shown) == shown
