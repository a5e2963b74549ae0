"""Runs with streams on two ranks: as on one, replicated or sharded, their statistics computed by the run itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import Outcome, launch
from tiny_runs import Listener, add_nano, assert_identical, checkpoint_files, log_of, settings

import featcache
from featcache.read.normalization import compute, load
from featcache.settings import to_mapping
from trainer.runs import folder as runs
from trainer.runs.log import OF_THE_MACHINE
from trainer.sampling.draw import load_run
from trainer.training.loop import train

pytestmark = pytest.mark.slow  # one such run is among test_distributed.py's

STEPS = 4
CLS, PCA = "tiny@5.cls", "tiny@5.pca4"
STREAMS: dict[str, Any] = {
    CLS: {"weight": 0.1, "dropout": 0.3},
    PCA: {"normalization": "position", "dropout": 0.3},
    "tiny@2": {"embed": "own", "weight": 0.2},
}
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "computed": ("none", {"streams": STREAMS, "normalization": "channel"}),
    "reg": ("reg", {}),
    "sharded": ("reg", {"streams": STREAMS, "shard": True}),
    "redi": ("redi+repa", {"align": {"redi": {"dropout": 0.5}, "repa": {"head_width": 24}}, "shard": True}),
    "compiled": ("redi+reg", {"compile": True, "align_until": STEPS - 1, "streams": {CLS: {"normalization": "position"}}}),
}  # fmt: skip


def job(cache: Path, kind: str, **kw: Any) -> Any:
    add_nano()
    method, changes = JOBS[kind]
    common = {"steps": STEPS, "name": kind, "clip": 0.5, "checkpoint_every": 2}
    return settings(cache, method, **{**common, **changes, **kw})


@pytest.fixture(scope="module")
def outcome(streams_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("streams-of-two-ranks")
    jobs: list[dict[str, Any]] = [{"name": name, "settings": to_mapping(job(streams_cache, name))} for name in JOBS]
    stopped = to_mapping(job(streams_cache, "sharded", name="stopped"))
    jobs += [
        {"name": "stopped", "settings": {**stopped, "steps": 50}, "signal_rank": 1, "signal_step": 1},
        {"name": "stopped-again", "settings": stopped, "resume": True},
    ]
    return Outcome(folder / "runs", streams_cache, launch(jobs, folder / "runs", folder / "seen"))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_follow_one_of_two_micro_batches(outcome: Outcome, tmp_path: Path, name: str) -> None:
    alone = job(outcome.cache, name, accumulate=2, compile=False)
    one = log_of(train(alone, resume=False, watcher=Listener(), root=tmp_path))
    two = log_of(outcome.root / name)
    for a, b in zip(one, two, strict=True):
        numbers = [k for k in a if k not in OF_THE_MACHINE]
        assert {k: b[k] for k in numbers} == pytest.approx({k: a[k] for k in numbers}, rel=2e-4, abs=2e-5)
        assert any(k.startswith("denoise/") for k in numbers)
    assert max(r["grad_norm"] for r in one) > 0.5, "clipping must have acted"


def test_two_ranks_compute_the_statistics_of_the_whole_cache(outcome: Outcome) -> None:
    """Once, and have them to the bit."""
    cache = featcache.open(outcome.cache)
    for name, stream in (("computed", CLS), ("computed", PCA), ("computed", "tiny@2"), ("sharded", PCA)):
        found = load(outcome.root / name / f"normalization-{stream}.safetensors")
        wanted = compute(cache, stream, STREAMS[stream].get("normalization", "channel"))
        assert torch.equal(found.mean.flatten(), wanted.mean.flatten())
        assert torch.equal(found.std.flatten(), wanted.std.flatten())
        assert (found.feature, found.fingerprint) == (stream, cache.fingerprint)


@pytest.mark.usefixtures("nano")
def test_a_sharded_run_with_tokens_of_streams_goes_on(outcome: Outcome, tmp_path: Path) -> None:
    """On two ranks after a stop, to the bit; on one, from its checkpoint, which is laid out as a whole model's."""
    assert [seen["stopped"]["exit"] for seen in outcome.ranks] == [128 + 15] * 2
    assert_identical(outcome.root / "sharded", outcome.root / "stopped", STEPS)
    whole = train(job(outcome.cache, "sharded", shard=False), resume=False, watcher=Listener(), root=tmp_path)
    ours, sharded = (checkpoint_files(path, STEPS) for path in (whole, outcome.root / "sharded"))
    for stem, tensors in ours.items():
        assert tensors.keys() == sharded[stem].keys()
        for key, value in tensors.items():
            assert (sharded[stem][key].shape, sharded[stem][key].dtype) == (value.shape, value.dtype), key
            assert torch.allclose(value, sharded[stem][key], atol=2e-3) or stem == "optimizer", key
    loaded = load_run(outcome.root / "sharded")
    assert [s.name for s in loaded.model.cfg.own_streams] == [CLS, "tiny@2"]
    config = runs.load_config(outcome.root / "sharded")
    assert config.streams[CLS] == {"weight": 0.1, "normalization": "none", "statistics": None, "embed": "own", "dropout": 0.3}  # fmt: skip
