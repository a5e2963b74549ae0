"""How long an example takes depends on the machine: a slow one must not fail a test that is right."""

from __future__ import annotations

import re
from pathlib import Path

import hypothesis

GIVEN = re.compile(r"\bsettings\([^)]*deadline=(?!None)")


def test_no_example_has_a_deadline() -> None:
    assert hypothesis.settings().deadline is None
    modules = [path for path in Path(__file__).parent.rglob("*.py") if "import settings" in path.read_text()]
    assert modules and not [path for path in modules if GIVEN.search(path.read_text())]
    assert GIVEN.search("@settings(max_examples=3, {}=200)".format("deadline"))
