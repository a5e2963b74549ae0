"""The estimate of a run's memory against what a process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.models import TextShape, model_config
from trainer.models.config import takes_text
from trainer.training.memory import Size, activation_bytes, estimate_bytes

TOLERANCE = 0.2
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"

# Peak of the process after a few steps, less its peak before anything was built, beside the estimate.
MEASURE = """
import json, sys
from pathlib import Path
from featcache.machine import peak_rss_bytes
from featcache.progress import Quiet
from featcache.settings import from_mapping
from trainer.runs.config import RunConfig
from trainer.training import loop, outlook
found = {}
class Watched(outlook.Outlook):
    def before(self, cfg, alignment):
        super().before(cfg, alignment)
        found["estimate"] = outlook.estimate_bytes(self.size(cfg, alignment))
        found["before"] = peak_rss_bytes()
def unsaved(*args, **kw):
    found["peak"] = peak_rss_bytes()
loop.Outlook, loop.save_parts = Watched, unsaved
config = from_mapping(RunConfig, json.loads(sys.argv[1]))
loop.train(config, resume=False, watcher=Quiet(), root=Path(sys.argv[2]))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "none", "batch_size": 16},
        {"method": "ahpa", "batch_size": 16},
        {"method": "none", "batch_size": 16, "precision": "bf16"},
        {"method": "none", "batch_size": 16, "accumulate": 2},
        {"method": "none", "batch_size": 2},
    ],
)
def test_it_is_what_a_process_takes(shapes_cache: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    found = measured({"model": "SiT-S/1", "cache": str(shapes_cache), **changes}, tmp_path)
    assert found["estimate"] == pytest.approx(found["peak"] - found["before"], rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"batch_size": 16}, {"batch_size": 16, "precision": "bf16"}, {"batch_size": 2}])
def test_so_it_is_of_text_and_image_together(text_cache: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """288 tokens a block: of the image 256, of the text 32."""
    found = measured({"model": "MMDiT-S/1", "method": "none", "cache": str(text_cache), **changes}, tmp_path)
    assert found["estimate"] == pytest.approx(found["peak"] - found["before"], rel=TOLERANCE)


def measured(changes: dict[str, Any], folder: Path) -> dict[str, float]:
    values = {
        **{"name": "run", "device": "cpu", "steps": 3, "sample_every": 0, "log_every": 3, "checkpoint_every": 3},
        **changes,
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(values), str(folder)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_autograd_keeps_of_the_papers_model() -> None:
    """Against tensors that autograd saved for one image, counted by hooks on tensors without data: 665.9 MB and 400.5 MB."""
    cfg = model_config("SiT-XL/2", latent_channels=4, latent_size=32, num_classes=1000)
    assert activation_bytes(cfg, low=False, compiled=False) == pytest.approx(665.9e6, rel=0.03)
    assert activation_bytes(cfg, low=True, compiled=False) == pytest.approx(400.5e6, rel=0.03)


def test_splitting_divides_what_can_be_divided() -> None:
    cfg = model_config("SiT-XL/2", latent_channels=4, latent_size=32, num_classes=1000)
    size = Size(cfg=cfg, backbone=675_000_000, low=True)
    one, eight = estimate_bytes(size), estimate_bytes(replace(size, ranks=8))
    assert one / 8 < eight < one / 4
    more = estimate_bytes(replace(size, rows=9)) - estimate_bytes(replace(size, rows=8))
    assert more == pytest.approx(1.25 * activation_bytes(cfg, low=True, compiled=False))
    assert estimate_bytes(replace(size, averages=3)) - one == pytest.approx(8 * 675_000_000)


@pytest.mark.parametrize("name", ["SiT-XL/2", "MMDiT-L/2"])
def test_recomputed_blocks_keep_their_inputs_and_one_block(name: str) -> None:
    """Against `benchmarks/memory.py`, which counts what autograd saves under autocast."""
    counted = json.loads((RESULTS / "memory.json").read_text())["results"][name]
    text = TextShape(name="text/clip-l", tokens=77, width=768) if takes_text(name) else None
    cfg = model_config(name, latent_channels=4, latent_size=32, num_classes=1000, text=text)
    kept = counted["blocks"]["per_image"] + counted["recomputed_block_per_image"]
    assert activation_bytes(cfg, low=True, compiled=False, recompute=True) == pytest.approx(kept, rel=0.05)
