"""Short runs of a model that takes text, and of one that takes labels, beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.progress import Quiet
from featcache.settings import from_mapping
from trainer.runs.config import RunConfig
from trainer.training.loop import train


def make_runs(root: Path, **settings: Any) -> Path:
    """`root/runs` with `text` (two steps on the captions of the embedded set) and `labels` (on the same images)."""
    cache = root / "caches/text"
    build(BuildRequest(data="shapes-text", vae="tiny", limit=24, out=cache, texts=("tiny",), resolution=32), Quiet())
    values = {"cache": str(cache), "batch_size": 4, "device": "cpu", "sample_every": 0, "steps": 2, "lr": 1e-2}
    for name, model in (("text", "MMDiT-Ti/2"), ("labels", "SiT-Ti/2")):
        own = settings if name == "text" else {}
        config = from_mapping(RunConfig, {**values, "model": model, "name": name, **own})
        train(config, resume=False, watcher=Quiet(), root=root / "runs")
    return root / "runs"
