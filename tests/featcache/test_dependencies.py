"""What featcache imports is what the project declares."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imported(folder: Path) -> set[str]:
    """Packages outside the standard library and this project that files import by name, wherever in them."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"featcache", "trainer"}


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}  # type: ignore[index]
    providers = packages_distributions()
    packages = imported(ROOT / "featcache") - {"_typeshed"}  # of type checkers: nothing imports it when it runs
    assert {"torch", "tokenizers"} <= packages
    missing = {
        name for name in packages if not declared & {d.lower().replace("_", "-") for d in providers.get(name, [name])}
    }
    assert missing == set()
