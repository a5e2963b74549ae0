"""Judged samples on top of a report: the right ones, class by class, beside real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import CacheError
from trainer.report.data import RunData
from trainer.report.judged import judged_samples
from trainer.report.report import incomparable, write_comparison

SIDE, CLASSES = 4, (0, 1, 2)
SAMPLER = {"sampler": "ode", "steps": 25, "seed": 0}


def run(root: Path, name: str, **judged: Any) -> RunData:
    """A run with two drawn folders, of which `judged` (settings on top of `SAMPLER`) is the one evaluated last."""
    for folder, seed, grey in (("a", 0, 50), ("b", 1, 200)):
        place = root / name / "samples" / folder
        place.mkdir(parents=True)
        (place / "settings.json").write_text(json.dumps({"run": name, "step": 8, **SAMPLER, "seed": seed}))
        rows = np.repeat(grey + np.arange(3, dtype=np.uint8), SIDE)
        Image.fromarray(np.tile(rows[:, None, None], (1, 8 * SIDE, 3))).save(place / "grid.png")
    entry = {"step": 8, "sampler": {**SAMPLER, **judged}, "metrics": {"embedded-FID": 1.0}}
    dataset = {"preprocessing": {"resolution": SIDE}, "class_names": ["x", "y", "z"]}
    return RunData(name=name, path=root / name, evaluations=[{"step": 4}, entry], cache={"dataset": dataset})


def test_the_grid_is_that_of_the_latest_judgement(tmp_path: Path) -> None:
    found = judged_samples([run(tmp_path, "r", seed=1)], CLASSES, ("x", "y", "z"), {})
    assert found is not None and found.names == ("r",) and list(found.rows) == ["x", "y", "z"]
    for label, (strip,) in enumerate(found.rows.values()):
        assert strip is not None and strip.shape[0] == SIDE and (strip == 200 + label).all()


def test_real_images_stand_first_and_classes_without_one_stay_empty(tmp_path: Path) -> None:
    real = {label: np.full((8, SIDE, SIDE, 3), label, np.uint8) for label in (0, 2)}
    runs = [run(tmp_path, "r"), run(tmp_path, "s")]
    found = judged_samples(runs, CLASSES, ("same", "same", "z"), real)
    assert found is not None and found.names == ("real images", "r", "s")
    assert list(found.rows) == ["same", "same (1)", "z"]
    first, second, third = (strips[0] for strips in found.rows.values())
    assert second is None and first is not None and third is not None and (third == 2).all()
    assert first.shape == (SIDE, 5 * SIDE, 3) == found.rows["z"][1].shape  # type: ignore[union-attr]
    assert "in every run starts from the same noise" in found.note
    page = write_comparison(tmp_path / "p.html", runs, judged_samples=found).read_text()
    assert page.index("Judged samples") < page.index("Numbers")
    assert page.count('class="judged"') == 1 and page.count("s, same (1)") == 1


def test_other_seeds_are_said(tmp_path: Path) -> None:
    found = judged_samples([run(tmp_path, "r"), run(tmp_path, "s", seed=1)], CLASSES, ("x", "y", "z"), {})
    assert found is not None and "different seeds" in found.note


@pytest.mark.parametrize("judged", [{"seed": 7}, {"steps": 50}])
def test_samples_that_are_gone_are_not_replaced_by_others(tmp_path: Path, judged: dict[str, int]) -> None:
    assert judged_samples([run(tmp_path, "r", **judged)], CLASSES, ("x", "y", "z"), {}) is None


def test_a_run_that_nobody_judged_shows_none(tmp_path: Path) -> None:
    assert judged_samples([RunData(name="r", path=tmp_path)], CLASSES, ("x", "y", "z"), {}) is None


@pytest.mark.parametrize("linked", ["samples/a/grid.png", "samples/a/settings.json", "samples/a", "samples"])
def test_a_link_in_a_received_run_is_not_followed(tmp_path: Path, linked: str) -> None:
    data = run(tmp_path, "r")
    path = tmp_path / "r" / linked
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="link"):
        judged_samples([data], CLASSES, ("x", "y", "z"), {})


def test_runs_judged_by_other_weights_are_told_apart(tmp_path: Path) -> None:
    def judged(name: str, extractor: str, weights: str) -> RunData:
        settings = {"extractor": {"extractor": extractor, "weights_sha256": weights}}
        return RunData(name=name, evaluations=[{"settings": settings, "metrics": {}}])

    runs = [judged("a", "embedded", "1" * 64), judged("b", "embedded", "2" * 64), judged("c", "inception", "3" * 64)]
    (said,) = incomparable(runs)
    assert "111111111111: a; 222222222222: b" in said and "inception" not in said
    assert not incomparable([runs[0], runs[0], runs[2], RunData(name="d")])
