"""How much disk an XL run of 4M steps takes with 40 snapshots, by `trainer.runs.budget`, which the run itself asks.

python benchmarks/disk_budget.py
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from trainer.models import build_model, model_config
from trainer.runs.budget import Sizes, disk_budget
from trainer.runs.config import RunConfig

RESULTS = Path(__file__).parent / "results"
MODEL, STEPS, EVERY = "SiT-XL/2", 4_000_000, 100_000


def rows() -> list[dict[str, Any]]:
    """Bytes by dtype of the snapshots, with and without EDM2's two averages."""
    cfg = model_config(MODEL, latent_channels=4, latent_size=32, num_classes=1000)
    weights = sum(p.numel() for p in build_model(cfg, device="meta").parameters())
    found = []
    for posthoc in ((), (0.05, 0.1)):
        for dtype in ("bf16", "fp32"):
            config = RunConfig(
                model=MODEL,
                steps=STEPS,
                snapshot_every=EVERY,
                snapshot_dtype=dtype,
                posthoc=posthoc,
            ).settled()
            budget = disk_budget(config, Sizes(weights=weights))
            found.append(
                {
                    "snapshot_dtype": dtype,
                    "averages": [str(average) for average in config.averages],
                    "further_memory_bytes": 4 * weights * (len(config.averages) - 1),
                    "checkpoint_bytes": budget.checkpoint_bytes,
                    "checkpoints": budget.checkpoints,
                    "snapshot_bytes": budget.snapshot_bytes,
                    "snapshots": budget.snapshots,
                    "total_bytes": budget.total_bytes,
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """As Markdown, in GB of 10^9 bytes."""

    def gb(count: int) -> str:
        return f"{count / 1e9:.1f} GB"

    lines = [
        "| averages | snapshots | a checkpoint | three of them | a snapshot | 40 of them | together | more memory on the device |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        cells = [
            ", ".join(f"`{average}`" for average in row["averages"]),
            row["snapshot_dtype"],
            gb(row["checkpoint_bytes"]),
            gb(row["checkpoint_bytes"] * row["checkpoints"]),
            gb(row["snapshot_bytes"]),
            gb(row["snapshot_bytes"] * row["snapshots"]),
            gb(row["total_bytes"]),
            gb(row["further_memory_bytes"]) if row["further_memory_bytes"] else "none",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    made = rows()
    record = {
        "command": "python benchmarks/disk_budget.py",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": MODEL,
        "steps": STEPS,
        "snapshot_every": EVERY,
        "rows": made,
    }
    (RESULTS / "disk-budget.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(made))
