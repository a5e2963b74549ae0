"""The published numbers are those of the results in the repository."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.attacks import __main__ as campaigns
from tests.attacks import report


def test_the_page_is_up_to_date() -> None:
    text = report.PAGE.read_text()
    assert report.page(text, report.current()) == text, "python -m tests.attacks.report brings it up to date"


def test_a_change_of_the_results_changes_the_page() -> None:
    found = {"trials": 1200, "by_scene": {"gc": 1200}, "failed": {"gc: leaves": 2}, "seconds": 90.0}
    results = {"date": "2026-01-02T03:04:05", "seed": 0, "machine": {"cpu": "X"}, "campaigns": {"kills": found}}
    text = report.page(report.PAGE.read_text(), results)
    assert "| `kills` | 1,200 | 1 | 2 | 2 |" in text
    assert "- 2 x gc: leaves" in text
    assert report.page(text, results) == text
    found["trials"] = 1201
    assert report.page(text, results) != text
    with pytest.raises(ValueError, match="lacks the lines"):
        report.page("# Reliability\n", results)


def test_campaigns_beside_each_other_become_one_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a second call goes on where the first stopped."""
    out, seen = tmp_path / "all.json", []

    def run_process(options: list[str]) -> int:
        name, part = options[1], Path(options[3])
        before = json.loads(part.read_text())["campaigns"][name]["trials"] if part.exists() else 0
        count = int(options[options.index("--count") + 1])
        seen.append((name, before, count))
        part.write_text(json.dumps({"seed": 0, "campaigns": {name: {"trials": count}}}))
        return 0

    monkeypatch.setattr(campaigns, "run_process", run_process)
    for count in (3, 5):
        words = ["tests.attacks", "--only", "flips", "fuzz", "--count", str(count), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", words)
        assert campaigns.main() == 0
        assert json.loads(out.read_text())["campaigns"] == {"flips": {"trials": count}, "fuzz": {"trials": count}}
    assert sorted(seen) == [("flips", 0, 3), ("flips", 3, 5), ("fuzz", 0, 3), ("fuzz", 3, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.json"]
