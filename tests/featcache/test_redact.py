"""Secrets in URLs do not survive redaction; what is no secret does."""

import time

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
        ("https://host/x?sig%20nature", "https://host/x?***"),
        ("https://host/x?0123token&versionId=3", "https://host/x?***&versionId=3"),
        ("https:/user:secret@host/x", "https:/***@host/x"),
        ("there is no cache at https:/host/x?token=abc", "there is no cache at https:/host/x?token=***"),
        ("HTTPS://user:secret@host/x", "HTTPS://***@host/x"),
        ("https://user:se\"c'<>ret@host/x", "https://***@host/x"),
        ("s3://KEY:sec/ret+x@bucket/x@2", "s3://***@2"),
        ("s3://KEY:sec/ret@bucket/x", "s3://***@bucket/x"),
        ("hf://datasets/owner/name@main/x", "hf://datasets/owner/name@main/x"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("http://[::1]:80/a@b", "http://[::1]:80/a@b"),
        ("http://[::1/a", "http://[::1/a"),
        ("'https://host' and 'a@b'", "'https://host' and 'a@b'"),
        ("no method 'a' in file:///x/y", "no method 'a' in file:///x/y"),
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


def test_a_long_word_takes_no_time() -> None:
    """A text from anybody: quadratic time would be minutes here."""
    start = time.monotonic()
    for piece in ("a", "a:", "a:/", "a://", "a://b@", "@", "a.", "://?&"):
        redact(piece * (1_000_000 // len(piece)))
    assert time.monotonic() - start < 10
