"""Pictures that obey their captions, and the judge that says so."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featcache.encoders import tiny
from featcache.errors import UserError
from featcache.sources import shapes_text
from featcache.sources.shapes_text import ATTRIBUTES, WORDINGS, Attributes, Part, caption
from trainer.evaluate.obeyed import CaptionJudge, can_judge, obeyed, shares

UNSEEN_SET = 5  # neither the pictures that the judge has learned from nor those of its figures
KEYS = ["prompts_obeyed", *(f"prompts_obeyed/{name}" for name in ATTRIBUTES)]


@pytest.fixture(scope="module")
def judge() -> CaptionJudge:
    return CaptionJudge()


def _pictures(part: Part, count: int, resolution: int = 64) -> tuple[NDArray[np.uint8], list[Attributes]]:
    drawn = [shapes_text.render(i, part=part, seed=UNSEEN_SET, resolution=resolution) for i in range(count)]
    return np.stack([image for image, _ in drawn]), [attributes for _, attributes in drawn]


def _prompts(known: Sequence[Attributes]) -> list[str]:
    return [caption(attributes, WORDINGS[i % len(WORDINGS)]) for i, attributes in enumerate(known)]


# A share p of the recorded figures is at least 0.99 (tests/featcache/test_tiny.py); of 200 pictures, fewer than 0.95 would be
# right with a probability of 2e-5.
@pytest.mark.parametrize("part", Part)
def test_pictures_obey_their_own_captions(judge: CaptionJudge, part: Part) -> None:
    images, known = _pictures(part, 200)
    found = judge.obeyed(images, _prompts(known))
    assert list(found) == KEYS and all(share >= 0.95 for share in found.values())


@pytest.mark.parametrize("resolution", [32, 128])
def test_pictures_of_other_sizes_are_read(judge: CaptionJudge, resolution: int) -> None:
    images, known = _pictures(Part.seen, 100, resolution)
    assert judge.obeyed(images, _prompts(known))["prompts_obeyed"] >= 0.9


def test_pictures_through_the_vae_are_read(judge: CaptionJudge) -> None:
    from pipelines.embedded.captions import through

    images, known = _pictures(Part.held_out, 60)
    assert judge.obeyed(through(tiny.load_tiny_vae(), images), _prompts(known))["prompts_obeyed"] >= 0.9


def test_a_wrong_word_is_noticed_and_told_by_attribute(judge: CaptionJudge) -> None:
    images, known = _pictures(Part.seen, 60)
    for name, values in ATTRIBUTES.items():
        wrong = [replace(a, **{name: values[values.index(getattr(a, name)) - 1]}) for a in known]
        found = judge.obeyed(images, _prompts(wrong))
        assert found["prompts_obeyed"] <= 0.05 and found[f"prompts_obeyed/{name}"] <= 0.05
        assert all(found[f"prompts_obeyed/{other}"] >= 0.9 for other in ATTRIBUTES if other != name)


def test_noise_obeys_nothing(judge: CaptionJudge) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    _, known = _pictures(Part.seen, 40)
    assert judge.obeyed(images, _prompts(known))["prompts_obeyed"] <= 0.1


def test_answers_do_not_depend_on_the_batch(judge: CaptionJudge) -> None:
    images, known = _pictures(Part.seen, 30)
    assert CaptionJudge(batch_size=7).read(images) == judge.read(images)
    assert obeyed(images, _prompts(known)) == judge.obeyed(images, _prompts(known))
    order = np.random.default_rng(0).permutation(30)
    assert judge.read(images[order]) == [judge.read(images)[i] for i in order]


@settings(max_examples=50, deadline=None)
@given(right=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=30))
def test_shares_are_counted(right: list[list[bool]]) -> None:
    found = shares(np.array(right))
    assert found["prompts_obeyed"] == pytest.approx(sum(all(row) for row in right) / len(right))
    for at, name in enumerate(ATTRIBUTES):
        assert found[f"prompts_obeyed/{name}"] == pytest.approx(sum(row[at] for row in right) / len(right))
    assert list(found) == KEYS


def test_logits_are_split_as_the_attributes_stand(judge: CaptionJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [len(values) for values in ATTRIBUTES.values()]
    numbers = [[3, 1, 5, 0], [9, 3, 0, 2]]
    offsets = np.cumsum([0, *sizes[:-1]])
    logits = torch.zeros(2, sum(sizes))
    for row, chosen in enumerate(numbers):
        logits[row, torch.as_tensor(offsets + np.array(chosen))] = 1.0
    monkeypatch.setattr(judge, "_network", lambda pixels: logits)
    expected = [Attributes(*(values[i] for values, i in zip(ATTRIBUTES.values(), row, strict=True))) for row in numbers]
    assert judge.read(np.zeros((2, 64, 64, 3), np.uint8)) == expected


def test_which_prompts_can_be_judged() -> None:
    known = [Attributes("star", "plain", "blue", "grey"), Attributes("ring", "checked", "red", "dark")]
    assert can_judge(_prompts(known))
    assert not can_judge([]) and not can_judge([*_prompts(known), "a dog on a sofa"])


def test_prompts_that_cannot_be_judged_are_named(judge: CaptionJudge) -> None:
    images, known = _pictures(Part.seen, 3)
    prompts = _prompts(known)
    with pytest.raises(UserError, match="prompt 2, 'a dog'") as refused:
        judge.obeyed(images, [prompts[0], "a dog", "a cat"])
    assert "a red striped triangle on a dark background" in str(refused.value.remedy)
    with pytest.raises(UserError, match="3 images cannot obey 2 prompts"):
        judge.obeyed(images, prompts[:2])
    with pytest.raises(UserError, match="no images"):
        judge.obeyed(images[:0], [])
    with pytest.raises(UserError, match="float64"):
        judge.obeyed(images / 255, prompts)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"\[3, 3, 64, 64\]"):
        judge.obeyed(images.transpose(0, 3, 1, 2), prompts)


def test_the_record_names_the_weights(judge: CaptionJudge) -> None:
    weights = tiny.weights_path("caption-judge").read_bytes()
    assert judge.provenance["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert len(weights) <= 500_000
