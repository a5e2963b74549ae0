"""YAML from outside: plain values, bounded, never a crash of the process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import UserError
from trainer.runs.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_NODES, parse_yaml, read_yaml

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghi", "bcdefghij")
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LAUGHS, "more than 10,000 values"),
        ("&a [*a]", "a part of itself"),
        ("[*b]", "stands for nothing"),
        ("".join(f"k{i}: {i}\n" for i in range(60_000)), "more than 10,000 values"),
        ("[" * 100_000, "nested more than 32"),
        ("{a: " * 100_000, "nested more than 32"),
        ("- " * 100_000, "nested more than 32"),
        ("a: !!python/object/apply:os.system ['true']", "tag 'tag:yaml.org,2002:python"),
        ("a: !!int abc", "the tag"),
        ("a: !x 3", "the tag"),
        ("steps: 2001-99-99", "not valid YAML"),
        (f"steps: {'9' * 5000}", "not valid YAML"),
        ("steps: 1\nsteps: 2", "'steps' is given twice"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("? [a]\n: b", "not valid YAML"),
        ("---\na: 1\n---\nb: 2", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("<<: 3", "not valid YAML"),
    ],
)
def test_what_is_refused_is_refused_at_once_and_in_one_line(text: str, what: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        parse_yaml(text, "x.yaml")
    assert what in error.value.what and error.value.what.startswith("x.yaml")
    assert "\n" not in error.value.what and len(error.value.what) < 500
    assert time.monotonic() - started < 2


def test_libyaml_would_have_ended_the_process() -> None:
    """Why the events are walked first: not an exception, a crash."""
    code = "import yaml; yaml.load('[' * 100000, yaml.CSafeLoader)"
    if not hasattr(yaml, "CSafeLoader"):
        pytest.skip("this PyYAML has no libyaml")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode < 0


def test_anchors_that_are_small_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc:\n  <<: *a\n  y: 2", "x") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


def test_files_that_are_too_long_or_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: " + "x" * MAX_BYTES)
    with pytest.raises(UserError, match="longer than"):
        read_yaml(path)
    with pytest.raises(UserError, match="not a file"):
        read_yaml(tmp_path)
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml(path)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_values_come_back(value: object) -> None:
    assert parse_yaml(yaml.safe_dump(value), "x") == value


@settings(max_examples=6)
@given(st.integers(MAX_DEPTH - 3, MAX_DEPTH + 3), st.integers(MAX_NODES - 3, MAX_NODES + 3))
def test_the_bounds_are_where_they_are_said_to_be(depth: int, count: int) -> None:
    deep, wide = "[" * depth + "]" * depth, "[" + "1," * (count - 1) + "]"
    for text, fits in ((deep, depth <= MAX_DEPTH), (wide, count <= MAX_NODES)):
        if fits:
            parse_yaml(text, "x")
        else:
            with pytest.raises(UserError, match="holds more than"):
                parse_yaml(text, "x")


@pytest.mark.parametrize("text", ["steps: {}", "{{? {} : 1, ? {} : 2}}", "align: {{ahpa: {{? {} : [{}]}}}}"])
@pytest.mark.parametrize("number", ["0x" + "f" * 6000, "0b" + "1" * 20000, "1" + 200 * ":59", str(1 << 1024)])
def test_numbers_of_thousands_of_digits_are_refused(text: str, number: str) -> None:
    with pytest.raises(UserError, match=r"not valid YAML: a number of [0-9]+ bits"):
        parse_yaml(text.format(*[number] * text.count("{}")), "x")
    assert parse_yaml(f"seed: {(1 << 1024) - 1}", "x") == {"seed": (1 << 1024) - 1}
