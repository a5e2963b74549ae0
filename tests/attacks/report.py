"""Puts the results of a full campaign into docs/reliability.md: `python -m tests.attacks.report [--check]`.

The table stands between two marks in the page; nothing else of it changes. With --check nothing is written, and the exit
code is 1 if the page is not up to date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.attacks.processes import ROOT

PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "tests" / "attacks" / "results" / "campaign.json"
BEGIN, END = "<!-- results of the campaign -->\n", "<!-- end of the results -->\n"


def table(results: dict[str, Any] | None) -> str:
    """The results in words and a table; without any, that there are none."""
    if results is None:
        return "There is no result of a full campaign yet: `python -m tests.attacks --out tests/attacks/results/campaign.json`.\n"
    machine = results["machine"]
    lines = [
        f"Results of {results['date'][:10]} (seed {results['seed']}; "
        f"{machine.get('cpu', 'unknown processor')}; `tests/attacks/results/campaign.json`):\n",
        "| campaign | trials | scenes | failures | minutes | commit |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, found in sorted(results["campaigns"].items()):
        failures = sum(found["failed"].values())
        commit = str(found.get("commit") or results.get("commit", ""))[:7]
        figures = f"{found['trials']:,} | {len(found['by_scene'])} | {failures} | {found['seconds'] / 60:.0f}"
        lines.append(f"| `{name}` | {figures} | {commit} |")
    kinds = {kind: n for found in results["campaigns"].values() for kind, n in found["failed"].items()}
    if kinds:
        lines += ["\nFailures:\n", *(f"- {n} x {kind}" for kind, n in sorted(kinds.items()))]
    return "\n".join(lines) + "\n"


def page(text: str, results: dict[str, Any] | None) -> str:
    """The page with these results; raises ValueError where it has no place for them."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def current(path: Path = RESULTS) -> dict[str, Any] | None:
    """The results that are in the repository, None if there are none."""
    return json.loads(path.read_text()) if path.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="Write nothing; exit code 1 if the page is out of date.")
    given = parser.parse_args()
    now, text = page(PAGE.read_text(), current()), PAGE.read_text()
    if now != text and not given.check:
        PAGE.write_text(now)
    return int(given.check and now != text)


if __name__ == "__main__":
    sys.exit(main())
