"""A few hundred damaged run files of each kind; the campaign tries tens of thousands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_runs

COUNTS = {
    "config": 75,
    "recipe": 50,
    "cache_json": 150,
    "metrics": 50,
    "log": 20,
    "analysis": 30,
    "checkpoint": 30,
    "reference": 150,
}
COUNTS |= {"import": 25}


@pytest.mark.parametrize("kind", fuzz_runs.KINDS)
def test_damaged_run_files_are_user_errors(kind: str, tmp_path: Path) -> None:
    assert fuzz_runs.run(kind, COUNTS[kind], 20, tmp_path) == []


def test_the_fuzzer_notices_what_it_is_there_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other exception, a hang and an error of many lines are all failures."""
    monkeypatch.setattr(fuzz_runs, "LIMIT_S", 0.1)
    from featcache.errors import UserError

    def hang() -> None:
        while True:
            pass

    def lines() -> None:
        raise UserError("one\ntwo")

    def fault() -> None:
        raise KeyError("x")

    def sound() -> None:
        raise UserError("one", remedy="two")

    found = [fuzz_runs._judge(case) for case in (hang, lines, fault, sound)]
    assert [str(problem)[:8] for problem in found] == ["took mor", "not one ", "KeyError", "None"]
