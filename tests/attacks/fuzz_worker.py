"""One worker process of the fuzzing campaign: a job a line, `[module, kind, count, seed, folder]` as JSON."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import sys
from pathlib import Path

# Address space: torch and its libraries reserve gigabytes without using them.
LIMIT_BYTES = 16 << 30
HANG_S = 60


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    for line in sys.stdin:
        module, kind, count, seed, folder = json.loads(line)
        # Where it hangs, for the report, a moment before it is ended.
        faulthandler.dump_traceback_later(HANG_S - 5, file=sys.stderr)
        found = importlib.import_module(f"tests.attacks.{module}").run(kind, count, seed, Path(folder))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
