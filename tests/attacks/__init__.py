"""Attacks on what the product promises: kills, power losses, bit flips, malformed input, links, concurrency.

`python -m tests.attacks --out FILE` runs the campaigns; `docs/reliability.md` says what they are to show. The same
code, with a few seeds, is part of the test suite (`test_*.py` here).
"""

import sys
from pathlib import Path

# The helpers of the store's and the trainer's tests: synthetic caches, a web server, tiny runs.
sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("featcache", "trainer")]
