"""Judged samples on top of a report: the right ones, class by class, beside real images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import CacheError, UserError
from trainer.report.data import RunData
from trainer.report.judged import judged_samples
from trainer.report.report import incomparable, write_comparison, write_report
from trainer.sampling.prompts import Prompts

SIDE, COUNT = 4, 90
SAMPLER = {"sampler": "ode", "steps": 25, "seed": 0}


def run(root: Path, name: str, **judged: Any) -> RunData:
    """A run with two drawn folders, of which `judged` (settings on top of `SAMPLER`) is the one evaluated last."""
    for folder, seed, grey in (("a", 0, 50), ("b", 1, 200)):
        place = root / name / "samples" / folder
        place.mkdir(parents=True)
        (place / "settings.json").write_text(json.dumps({"run": name, "step": 8, **SAMPLER, "seed": seed}))
        labels = np.arange(COUNT) % 3
        pixels = np.broadcast_to((grey + labels).astype(np.uint8)[:, None, None, None], (COUNT, SIDE, SIDE, 3))
        np.savez(place / f"samples_{COUNT}.npz", arr_0=pixels, arr_1=labels)
    settings = {"sample_count": COUNT}
    entry = {"step": 8, "sampler": {**SAMPLER, **judged}, "settings": settings, "metrics": {"embedded-FID": 1.0}}
    dataset = {"preprocessing": {"resolution": SIDE}, "class_names": ["x", "y", "z"]}
    return RunData(name=name, path=root / name, evaluations=[{"step": 4}, entry], cache={"dataset": dataset})


def text_run(
    root: Path, name: str, texts: Sequence[str], *, count: int = COUNT, source: str = "text p.txt", place: str = "a"
) -> RunData:
    """A run judged by `count` samples of prompts; sample i is grey i."""
    prompts = Prompts(texts=tuple(texts), source=source)
    folder = root / name / "samples" / place
    folder.mkdir(parents=True)
    sampler = {**SAMPLER, "prompts": prompts.sha256}
    (folder / "settings.json").write_text(json.dumps({"run": name, "step": 8, **sampler}))
    prompts.save(folder)
    grey = np.arange(count, dtype=np.uint8)[:, None, None, None]
    np.savez(folder / f"samples_{count}.npz", arr_0=np.broadcast_to(grey, (count, SIDE, SIDE, 3)))
    settings = {"sample_count": count, "prompts": prompts.record()}
    entry = {"step": 8, "sampler": sampler, "settings": settings, "metrics": {"clip_score": 0.25}}
    dataset = {"preprocessing": {"resolution": SIDE}, "class_names": ["(none)"]}
    config = {"condition": "text/tiny"}
    return RunData(name=name, path=root / name, evaluations=[entry], cache={"dataset": dataset}, config=config)


def no_images(classes: Sequence[int], count: int) -> dict[int, np.ndarray]:
    return {}


def test_the_samples_are_those_of_the_latest_judgement(tmp_path: Path) -> None:
    (found,) = judged_samples([run(tmp_path, "r", seed=1)], ("x", "y", "z"), no_images)
    assert [name for name, _ in found.rows] == ["x", "y", "z"] and not found.of_prompts
    for label, (_, strips) in enumerate(found.rows):
        assert list(strips) == ["r"]
        assert strips["r"].shape == (SIDE, 8 * SIDE, 3) and (strips["r"] == 200 + label).all()


def test_real_images_stand_first_and_classes_without_one_have_none(tmp_path: Path) -> None:
    def real(classes: Sequence[int], count: int) -> dict[int, np.ndarray]:
        assert list(classes) == [0, 1, 2]
        return {label: np.full((count, SIDE, SIDE, 3), label, np.uint8) for label in (0, 2)}

    runs = [run(tmp_path, "r"), run(tmp_path, "s")]
    (found,) = judged_samples(runs, ("same", "same", "z"), real)
    assert found.same_noise
    assert [name for name, _ in found.rows] == ["same (0)", "same (1)", "z"]
    first, second, third = (strips for _, strips in found.rows)
    assert list(first) == ["real images", "r", "s"] and list(second) == ["r", "s"]
    assert (third["real images"] == 2).all() and third["real images"].shape == (SIDE, 5 * SIDE, 3) == third["s"].shape
    assert "in every run starts from the same noise" in found.note
    page = write_comparison(tmp_path / "p.html", runs, judged_samples=[found]).read_text()
    assert page.index("Judged samples") < page.index("Numbers")
    assert page.count('class="judged"') == 1 and page.count('alt="s, same (1)"') == 1


def test_classes_of_few_samples_are_shown_in_greater_number(tmp_path: Path) -> None:
    data = run(tmp_path, "r")
    assert data.path is not None
    labels = np.arange(COUNT)  # one of each class
    pixels = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (COUNT, SIDE, SIDE, 3))
    np.savez(data.path / "samples/a" / f"samples_{COUNT}.npz", arr_0=pixels, arr_1=labels)
    (found,) = judged_samples([data], (), no_images)
    assert len(found.rows) == 80
    for name, strips in found.rows:
        assert strips["r"].shape == (SIDE, SIDE, 3) and (strips["r"] == int(name)).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"sampler": "sde"}])
def test_samples_that_were_drawn_otherwise_are_said_to_be(tmp_path: Path, other: dict[str, Any]) -> None:
    second = run(tmp_path, "s", **other)
    if "sampler" in other:
        (tmp_path / "s/samples/a/settings.json").write_text(json.dumps({"step": 8, **SAMPLER, **other}))
    (found,) = judged_samples([run(tmp_path, "r"), second], ("x", "y", "z"), no_images)
    assert "different settings" in found.note and not found.same_noise


def test_samples_of_raw_weights_do_not_pass_for_those_judged(tmp_path: Path) -> None:
    data = run(tmp_path, "r")
    path = tmp_path / "r/samples/a/settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "weights": "raw"}))
    assert judged_samples([data], ("x", "y", "z"), no_images) == []


def test_a_run_nobody_judged_keeps_the_others_from_being_called_alike(tmp_path: Path) -> None:
    (found,) = judged_samples([run(tmp_path, "r"), RunData(name="s")], ("x", "y", "z"), no_images)
    assert not found.same_noise


@pytest.mark.parametrize("judged", [{"seed": 7}, {"steps": 50}])
def test_samples_that_are_gone_are_not_replaced_by_others(tmp_path: Path, judged: dict[str, int]) -> None:
    assert judged_samples([run(tmp_path, "r", **judged)], ("x", "y", "z"), no_images) == []


def test_a_run_that_nobody_judged_shows_none(tmp_path: Path) -> None:
    assert judged_samples([RunData(name="r", path=tmp_path)], ("x", "y", "z"), no_images) == []


@pytest.mark.parametrize("linked", ["samples/a/samples_90.npz", "samples/a/settings.json", "samples/a", "samples"])
def test_a_link_in_a_received_run_is_not_followed(tmp_path: Path, linked: str) -> None:
    data = run(tmp_path, "r")
    path = tmp_path / "r" / linked
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match="link"):
        judged_samples([data], ("x", "y", "z"), no_images)


def test_runs_judged_by_other_weights_are_told_apart(tmp_path: Path) -> None:
    def judged(name: str, extractor: str, weights: str) -> RunData:
        settings = {"extractor": {"extractor": extractor, "weights_sha256": weights}}
        return RunData(name=name, evaluations=[{"settings": settings, "metrics": {}}])

    runs = [judged("a", "embedded", "1" * 64), judged("b", "embedded", "2" * 64), judged("c", "inception", "3" * 64)]
    (said,) = incomparable(runs)
    assert "111111111111: a; 222222222222: b" in said and "inception" not in said
    assert not incomparable([runs[0], runs[0], runs[2], RunData(name="d")])


# ---- by prompt --------------------------------------------------------------------------------------------------------

LONG = "a picture of " + "many small things, " * 60
NASTY = ('<script>alert("x")</script> & a \u202e dog', LONG, "a cat", "a cat", "")


def greys(strip: np.ndarray) -> list[int]:
    """Of each tile its grey."""
    return [int(strip[0, left, 0]) for left in range(0, strip.shape[1], SIDE)]


def test_samples_by_prompt_stand_above_their_prompts(tmp_path: Path) -> None:
    data = text_run(tmp_path, "r", NASTY, count=12)
    (found,) = judged_samples([data], (), no_images)
    assert found.of_prompts and [name for name, _ in found.rows][2:] == ["a cat", "a cat", ""]
    # Image i is of prompt i modulo 5.
    assert [greys(strips["r"]) for _, strips in found.rows] == [[0, 5, 10], [1, 6, 11], [2, 7], [3, 8], [4, 9]]
    assert "text p.txt, all 5, digest" in found.note and len(found.rows[1][0]) <= 200 and found.rows[1][0].endswith("…")
    page = write_report(tmp_path / "p.html", [data], title="t", judged_samples=[found]).read_text()
    assert "<script" not in page and "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt; &amp; a" in page
    assert "\u202e" not in page, "marks that reorder text are shown, not obeyed"
    assert page.index('class="judged prompts"') < page.index("<figcaption>a cat</figcaption>")


def test_one_prompt_and_more_prompts_than_samples(tmp_path: Path) -> None:
    (one,) = judged_samples([text_run(tmp_path, "one", ["a cat"], count=20)], (), no_images)
    assert [(name, greys(strips["one"])) for name, strips in one.rows] == [("a cat", list(range(8)))]
    many = text_run(tmp_path, "many", [f"prompt {i}" for i in range(500)], count=9)
    (few,) = judged_samples([many], (), no_images)
    assert [name for name, _ in few.rows] == [f"prompt {i}" for i in range(9)]
    assert "the first 9 prompts" in few.note and "text p.txt, the first 9 of 500, digest" in few.note


def test_runs_on_other_prompts_and_on_classes_are_shown_apart(tmp_path: Path) -> None:
    a, b = text_run(tmp_path, "a", ["x", "y"]), text_run(tmp_path, "b", ["x", "y"])
    c, classes = text_run(tmp_path, "c", ["z"], source="text q.txt"), run(tmp_path, "d")
    (both,) = judged_samples([a, b], (), no_images)
    assert both.same_noise and [list(strips) for _, strips in both.rows] == [["a", "b"]] * 2
    found = judged_samples([a, b, c, classes], ("k", "l", "m"), no_images)
    assert [shown.of_prompts for shown in found] == [False, True, True]
    assert [[name for name, _ in shown.rows] for shown in found] == [["k", "l", "m"], ["x", "y"], ["z"]]
    assert not any(shown.same_noise for shown in found)
    page = write_comparison(tmp_path / "p.html", [a, b, c, classes], judged_samples=found).read_text()
    assert page.count('class="judged prompts"') == 2 and page.count('class="judged"') == 1


def test_each_set_of_prompts_is_shown_by_its_latest_judgement(tmp_path: Path) -> None:
    one, two = text_run(tmp_path, "r", ["x", "y"], place="a"), text_run(tmp_path, "r", ["z"], place="b")
    both = replace(one, evaluations=[*two.evaluations, *one.evaluations])
    found = judged_samples([both], (), no_images)
    assert [[name for name, _ in shown.rows] for shown in found] == [["x", "y"], ["z"]]
    assert ["all 2" in shown.note for shown in found] == [True, False]


def test_prompts_that_are_not_those_of_the_samples_are_refused(tmp_path: Path) -> None:
    data = text_run(tmp_path, "r", ["a cat"])
    path = tmp_path / "r/samples/a/prompts.json"
    path.write_text(path.read_text().replace("a cat", "a dog"))
    with pytest.raises(UserError, match="checksum differs"):
        judged_samples([data], (), no_images)
    other = Prompts(texts=("a dog",), source="text p.txt")
    other.save(path.parent)
    with pytest.raises(UserError, match="other prompts than the samples beside it are of"):
        judged_samples([data], (), no_images)
    path.unlink()
    assert judged_samples([data], (), no_images) == []
