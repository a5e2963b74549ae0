"""An interval of time: equal however it is written, and one text for it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.settings import from_mapping
from trainer.interval import Interval
from trainer.runs.published import Sampling

TIMES = st.floats(0, 1)


@pytest.mark.parametrize("value", ["0,0.7", "0.0,0.70", " 0 , 7e-1", "-0.0,.7", [0, 0.7], (0.0, 0.7), ["0", "0.7"]])
def test_spellings_are_one_interval(value: object) -> None:
    parsed = Interval.parse(value)
    assert parsed == Interval(0, 0.7) and hash(parsed) == hash(Interval(0, 0.7)) and str(parsed) == "0,0.7"
    assert Interval.parse(parsed) is parsed


def test_all_times() -> None:
    assert str(Interval()) == "0,1" and Interval.parse("0.0,1.0") == Interval() == Interval(0, 1)
    assert 0 in Interval() and 1 in Interval() and 0.3 not in Interval(0.4, 1)


@given(TIMES, TIMES)
def test_the_text_reads_as_the_same_interval(a: float, b: float) -> None:
    interval = Interval(min(a, b), max(a, b))
    assert Interval.parse(str(interval)) == interval


@pytest.mark.parametrize(
    "value", ["", "0", "0,0.5,1", "a,b", "0;1", None, 3, [0], [0, None], [False, True], [[0, 1]], {"low": 0}, b"01"]
)
def test_what_is_no_interval_is_explained(value: object) -> None:
    with pytest.raises(UserError, match="not an interval"):
        Interval.parse(value)


@pytest.mark.parametrize("value", ["0.9,0.1", "-0.1,1", "0,1.1", "nan,1", "0,nan", "0,inf"])
def test_impossible_bounds_are_explained(value: str) -> None:
    with pytest.raises(UserError, match="interval of t"):
        Interval.parse(value)


def test_recipes_hold_intervals() -> None:
    drawn = from_mapping(Sampling, {"guidance": 1.8, "interval": [0, 0.7]})
    assert drawn.interval == Interval(0, 0.7)
    assert str(drawn) == "guidance 1.8 in [0, 0.7]"
    with pytest.raises(UserError, match="not an interval"):
        from_mapping(Sampling, {"interval": 0.7})


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["sample", "runs/none", "--interval", "0.9,0.1"], "interval of t from 0.9"),
        (["sample", "runs/none", "--classes", "3,x"], "not a list of classes"),
        (["eval", "runs/none", "--interval", "0"], "not an interval"),
        (["eval", "runs/none", "--classes", "**"], "not a list of classes"),
    ],
)
def test_values_are_read_as_they_are_typed(words: list[str], match: str) -> None:
    """Before anything else is looked at, the run among others."""
    from typer.testing import CliRunner

    from trainer.cli import app

    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError) and re.search(match, done.exception.what)
