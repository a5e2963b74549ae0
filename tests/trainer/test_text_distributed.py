"""Runs of a model that takes text on two ranks: as on one, replicated or sharded, with a teacher, compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_condition import text_settings
from test_distributed import Outcome, launch
from tiny_runs import Listener, add_nano, assert_identical, checkpoint_files, log_of

from featcache.settings import to_mapping
from trainer.runs.log import OF_THE_MACHINE
from trainer.sampling.draw import load_run
from trainer.training.loop import train

pytestmark = pytest.mark.slow

STEPS = 4
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "replicated": ("repa", {"label_dropout": 0.5}),
    "teacher": ("ahpa+sra", {}),
    "sharded": ("sra", {"shard": True, "label_dropout": 0.5}),
    "adversarial": ("sara", {"shard": True}),
    "compiled": ("repa", {"compile": True, "align_until": STEPS - 1}),
    "teacher-sharded-compiled": (
        "sra",
        {"compile": True, "shard": True, "align_until": STEPS - 1, "log_every": 2, "sample_every": STEPS - 1},
    ),
    "sharded-compiled": ("none", {"compile": True, "shard": True, "recompute": "blocks"}),
}


def job(cache: Path, kind: str, **kw: Any) -> Any:
    add_nano()
    method, changes = JOBS[kind]
    common = {"steps": STEPS, "name": kind, "clip": 0.5, "checkpoint_every": 2}
    return text_settings(cache, method, **{**common, **changes, **kw})


@pytest.fixture(scope="module")
def outcome(text_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("text-of-two-ranks")
    jobs = [{"name": name, "settings": to_mapping(job(text_cache, name))} for name in JOBS]
    return Outcome(folder / "runs", text_cache, launch(jobs, folder / "runs", folder / "seen"))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("name", JOBS)
def test_two_ranks_follow_one_of_two_micro_batches(outcome: Outcome, tmp_path: Path, name: str) -> None:
    alone = job(outcome.cache, name, accumulate=2, compile=False, recompute="none", sample_every=0)
    one = log_of(train(alone, resume=False, watcher=Listener(), root=tmp_path))
    two = log_of(outcome.root / name)
    for a, b in zip(one, two, strict=True):
        numbers = [k for k in a if k not in OF_THE_MACHINE]
        assert {k: b[k] for k in numbers} == pytest.approx({k: a[k] for k in numbers}, rel=2e-4, abs=2e-5)
    assert max(r["grad_norm"] for r in one) > 0.5, "clipping must have acted"


def test_no_function_nears_the_limit_of_its_graphs(outcome: Outcome) -> None:
    """A sharded model is compiled block by block, and all blocks share the graphs of one function, of which torch makes
    `recompile_limit` before it gives up on it: here that of a block, of the last one (whose text half ends there), and of
    the teacher's, which has no gradient."""
    import torch._dynamo.config

    (seen, other) = (report["teacher-sharded-compiled"] for report in outcome.ranks)
    assert not seen["breaks"]
    assert seen["recompiled"] == other["recompiled"]
    assert max(seen["recompiled"].values()) == 3 < torch._dynamo.config.recompile_limit
    assert seen["graphs"] == 11


@pytest.mark.usefixtures("nano")
def test_a_sharded_run_is_whole_on_the_disk_and_goes_on_alone(outcome: Outcome, tmp_path: Path) -> None:
    import shutil

    path = outcome.root / "sharded"
    saved = checkpoint_files(path, STEPS)["ema"]
    loaded = load_run(path).model.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in loaded.items())
    shutil.copytree(path, tmp_path / "sharded")
    config = job(outcome.cache, "sharded", steps=STEPS + 1, shard=False, accumulate=2)
    train(config, resume=True, watcher=Listener(), root=tmp_path)
    assert len(log_of(tmp_path / "sharded")) == STEPS + 1
    assert_identical(path, tmp_path / "sharded", STEPS)
