"""What the text-to-image demo says of its judgements, without training anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import demo_text
from trainer.sampling.prompts import open_prompts


def judged(source: str, share: float) -> dict[str, object]:
    """An entry of `metrics.json` as `trainer eval --prompts SOURCE` writes it."""
    settings = {"sample_count": demo_text.NUMBER, "prompts": open_prompts(source, seed=0).record()}
    return {"step": 1, "metrics": {"prompts_obeyed": share}, "settings": settings}


def test_each_share_is_of_its_own_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_text, "RUNS", tmp_path)
    for method, shares in (("none", (0.5, 0.25)), ("ahpa", (0.75, 0.125))):
        (tmp_path / method).mkdir()
        entries = [judged(source, share) for source, share in zip(demo_text.PROMPTS.values(), shares)]
        other = {"step": 1, "metrics": {"FID": 9.0}, "settings": {}}
        (tmp_path / method / "metrics.json").write_text(json.dumps([judged("shapes-text:1", 0.01), *entries, other]))
    said = demo_text.scores()
    assert "combinations trained on 50% without alignment, 75% with AHPA" in said
    assert "held-out ones 25% without alignment, 12% with AHPA" in said
