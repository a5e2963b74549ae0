"""How often runs log, save and draw grids where nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_runs import Listener, log_of, settings

from featcache.settings import from_mapping
from trainer.runs.config import RunConfig
from trainer.runs.folder import load_config
from trainer.runs.intervals import GRID_IMAGES, grid_interval, log_interval, save_interval
from trainer.training.loop import train


@pytest.mark.parametrize("steps", [1, 7, 49, 50, 51, 120, 500, 4999, 5000, 40_000, 400_000, 4_000_000])
def test_short_runs_have_as_many_lines_and_checkpoints_as_long_ones_have_at_least(steps: int) -> None:
    log, saved = log_interval(steps), save_interval(steps)
    assert 1 <= log <= 100 and steps // log >= min(50, steps)
    assert 100 <= saved <= 10_000 and (saved == 100 or steps // saved >= 5)
    if steps >= 50_000:
        assert (log, saved) == (100, 10_000)


@pytest.mark.parametrize("batch", [4, 64, 256])
@pytest.mark.parametrize("steps", [2, 100, 500, 5000, 39_999, 40_000, 400_000])
def test_grids_come_four_times_or_as_often_as_they_are_worth_it(steps: int, batch: int) -> None:
    interval = grid_interval(steps, batch)
    if steps >= 40_000:
        assert interval == 10_000
    elif interval:
        grids = steps // interval
        assert 1 <= grids <= 4 and grids * GRID_IMAGES <= 0.1 * steps * batch
    else:
        assert 0.1 * steps * batch < GRID_IMAGES
    if steps >= 5000 and batch >= 64 and steps < 40_000:
        assert interval == -(-steps // 4)


def test_what_is_typed_wins_and_is_kept() -> None:
    typed = from_mapping(
        RunConfig, {"steps": 500, "log_every": 7, "sample_every": 0, "checkpoint_every": 300}
    ).settled()
    assert (typed.log_every, typed.sample_every, typed.checkpoint_every) == (7, 0, 300)
    chosen = from_mapping(RunConfig, {"steps": 500}).settled()
    assert (chosen.log_every, chosen.sample_every, chosen.checkpoint_every) == (10, 125, 100)


@pytest.mark.usefixtures("nano")
def test_a_resumed_run_goes_on_as_its_config_says(shapes_cache: Path, tmp_path: Path) -> None:
    """Also one of before there was a choice, which holds 100 and 10,000."""
    open_ = {"log_every": None, "sample_every": None, "checkpoint_every": None}
    run = train(settings(shapes_cache, steps=3, **open_), resume=False, watcher=Listener(), root=tmp_path)
    assert [record["step"] for record in log_of(run)] == [1, 2, 3]
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert (values["log_every"], values["sample_every"], values["checkpoint_every"]) == (1, 0, 100)
    values |= {"log_every": 100, "sample_every": 10_000, "checkpoint_every": 10_000}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    from dataclasses import replace

    again = replace(load_config(run), steps=6)
    assert (again.log_every, again.sample_every, again.checkpoint_every) == (100, 10_000, 10_000)
    train(again, resume=True, watcher=Listener(), root=tmp_path)
    assert [record["step"] for record in log_of(run)] == [1, 2, 3, 6]
