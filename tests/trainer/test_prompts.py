"""Prompts: read from files and data, picked among captions, encoded as the cache was, kept beside samples."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.encoders.base import Compute, WeightsSource
from featcache.encoders.text import TextEncoder
from featcache.errors import UserError
from featcache.sources import shapes_text
from trainer.requests import SampleSettings
from trainer.sampling import prompts as reading
from trainer.sampling.grid import PROMPT_LINE, PROMPT_SIDE, prompt_picture, prompts_shown, wrap
from trainer.sampling.prompts import PromptEncoder, Prompts, load_prompts, of_settings, open_prompts


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_INDEX", str(tmp_path / "index"))


def test_a_text_file_holds_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  two dogs, running  \n\t\nKatze im Käfig\u2028zwei\rlast".encode())
    found = open_prompts(str(path), seed=0)
    assert found.texts == ("a cat", "two dogs, running", "Katze im Käfig\u2028zwei", "last")
    assert found.source == "text mine.txt", "no path, which is of this machine"
    assert found.sha256 == hashlib.sha256(json.dumps(list(found.texts)).encode()).hexdigest()
    assert found.of([0, 3, 4, 9]) == ["a cat", "last", "a cat", "two dogs, running"]
    other = tmp_path / "prompts"  # without an ending
    other.write_bytes(path.read_bytes())
    assert open_prompts(str(other), seed=5).sha256 == found.sha256


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts"),
        (b" \n\n\t\n", "no prompts"),
        (b"a cat\n\xff\xfe\n", "UTF-8"),
        (b"a cat\na\0b\n", "prompt 2 holds a NUL"),
        (b"a cat\n" + b"x" * 70_000, "prompt 2 has more than 65,536"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        open_prompts(str(path), seed=0)
    assert "bad.txt" in str(caught.value) and caught.value.remedy


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nowhere.txt", "nowhere/at/all", "nowhere.tar", "nowhere"):
        with pytest.raises(UserError, match="nowhere"):
            open_prompts(str(tmp_path / name), seed=0)
    with pytest.raises(UserError, match="no captions of its own"):
        folder = tmp_path / "images/class"
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        open_prompts(str(folder.parent), seed=0)
    with pytest.raises(UserError, match="there is nothing at --prompts a red circle") as sentence:
        open_prompts("a red circle on " * 30, seed=0)
    assert "--prompt TEXT" in str(sentence.value.remedy)
    (tmp_path / "captions.csv").write_text("key,caption\na.jpg,a dog\n")
    with pytest.raises(UserError, match=r"captions\.csv is a table"):
        open_prompts(str(tmp_path / "captions.csv"), seed=0)
    monkeypatch.setattr(reading, "MAX_PROMPTS", 3)
    (tmp_path / "many.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(UserError, match="more than 3 prompts"):
        open_prompts(str(tmp_path / "many.txt"), seed=0)
    with pytest.raises(UserError, match=r"a folder|no file"):
        open_prompts(str(_made(tmp_path / "folder.txt")), seed=0)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_prompts_of_the_embedded_set_are_one_caption_an_image() -> None:
    found = open_prompts("shapes-text:held-out", seed=0)
    captions = [shapes_text.captions_of(i, part=shapes_text.Part.held_out) for i in range(len(found.texts))]
    assert all(text in of for text, of in zip(found.texts, captions))
    places = Counter(of.index(text) for text, of in zip(found.texts, captions))
    assert len(places) == len(captions[0]) and min(places.values()) > len(found.texts) / len(places) * 0.8
    assert "held-out" in found.source
    assert open_prompts("shapes-text:held-out", seed=0).sha256 == found.sha256
    assert open_prompts("shapes-text:held-out", seed=1).sha256 != found.sha256


def test_captions_of_webdataset_and_images_without_any(tmp_path: Path) -> None:
    def picked(captions: list[list[str]], seed: int = 3) -> Prompts:
        path = tmp_path / f"{len(captions)}-{seed}.tar"
        with tarfile.open(path, "w") as tar:
            for i, texts in enumerate(captions):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8)).save(buffer, "PNG")
                members = {"png": buffer.getvalue(), "cls": b"0"}
                members |= {"txt": "\n".join(texts).encode()} if texts else {}
                for ending, data in members.items():
                    entry = tarfile.TarInfo(f"{i:04d}.{ending}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        return open_prompts(str(path), seed=seed)

    five = [[f"{i} {letter}" for letter in "abcde"] for i in range(40)]
    full = picked(five)
    assert [text.split()[0] for text in full.texts] == [str(i) for i in range(40)], "in order"
    assert len({text.split()[1] for text in full.texts}) == 5
    # An image's pick depends on its number alone: neither on how many follow nor on those without captions.
    assert picked(five[:25]).texts == full.texts[:25]
    holes = picked([[] if i % 7 == 3 else of for i, of in enumerate(five)], seed=3)
    assert holes.texts == tuple(text for i, text in enumerate(full.texts) if i % 7 != 3)
    assert holes.remark is not None and "6 images without captions" in holes.remark
    assert full.remark is None


def test_cocos_annotations_with_images_that_have_none_and_seven_captions(tmp_path: Path) -> None:
    counts = [5, 0, 7, 5, 0, 6, 1]  # as in the file, whose annotations lie in any order
    images = [{"id": 100 - i, "file_name": f"COCO_val2014_{i:012d}.jpg"} for i in range(len(counts))]
    owners = [i for i, n in enumerate(counts) for _ in range(n)]
    captions = [{"id": n, "image_id": 100 - i, "caption": f" {i} {n}.\n"} for n, i in enumerate(owners)]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": captions[::-1]}))
    seen: dict[str, set[str]] = {}
    for seed in range(60):
        found = open_prompts(str(path), seed=seed)
        assert [text.split()[0] for text in found.texts] == ["0", "2", "3", "5", "6"], "in the order of the images"
        assert found.texts == open_prompts(str(path), seed=seed).texts
        for text in found.texts:
            seen.setdefault(text.split()[0], set()).add(text)
    assert {image: len(texts) for image, texts in seen.items()} == {"0": 5, "2": 7, "3": 5, "5": 6, "6": 1}
    assert found.source == "COCO's captions captions_val2014.json"
    assert found.remark is not None and "2 images without captions are passed over" in found.remark


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 7), min_size=1, max_size=30))
def test_each_image_gets_one_of_its_own_captions(seed: int, counts: list[int]) -> None:
    captions = [tuple(f"{i}.{j}" for j in range(n)) for i, n in enumerate(counts)]
    if not any(counts):
        with pytest.raises(UserError, match="no prompts"):
            reading._picked(captions, seed=seed, source="x", where="x")
        return
    found = reading._picked(captions, seed=seed, source="x", where="x").texts
    assert [int(text.split(".")[0]) for text in found] == [i for i, n in enumerate(counts) if n]
    assert all(text in captions[int(text.split(".")[0])] for text in found)


def test_what_is_typed(tmp_path: Path) -> None:
    assert of_settings(SampleSettings()) is None
    typed = of_settings(SampleSettings(prompt=("a cat", "a cat", "")))
    assert typed is not None and typed.texts == ("a cat", "a cat", "")
    (tmp_path / "p.txt").write_text("x\n")
    with pytest.raises(UserError, match="both given"):
        of_settings(SampleSettings(prompt=("a",), prompts=str(tmp_path / "p.txt")))
    with pytest.raises(UserError, match="no text in UTF-8"):
        of_settings(SampleSettings(prompt=("a \udcff",)))


# ---- encoding ---------------------------------------------------------------------------------------------------------


def tiny_record(**changed: Any) -> dict[str, Any]:
    encoder = TextEncoder("tiny", WeightsSource(), captions=2)
    return {**encoder.provenance["text/tiny"], **changed}


def test_rows_are_those_of_the_cache() -> None:
    texts = ["a cat", "a red striped triangle on a dark background", ""]
    built = TextEncoder("tiny", WeightsSource(), captions=3, batch_size=2)
    expected = built(built.tokenise([texts]))["text/tiny"][0]
    encode = PromptEncoder("text/tiny", tiny_record(), weights_dir=None, device="cpu")
    rows = encode(texts)
    assert rows.shape == (3, 16, 64) and rows.dtype == torch.float32
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows, encode(texts)), "the same bits each time"


def test_the_precision_of_the_cache_is_taken() -> None:
    texts = ["a cat on a mat"]
    half = TextEncoder("tiny", WeightsSource(), captions=1, compute=Compute(precision="bf16"))
    expected = half(half.tokenise([texts]))["text/tiny"][:, 0]
    rows = PromptEncoder("text/tiny", tiny_record(precision="bf16"), weights_dir=None, device="cpu")(texts)
    full = PromptEncoder("text/tiny", tiny_record(), weights_dir=None, device="cpu")(texts)
    assert torch.equal(rows, expected) and not torch.equal(rows, full)
    # A cache of a GPU in TF32: the CPU has no such products.
    there = PromptEncoder("text/tiny", tiny_record(precision="tf32"), weights_dir=None, device="cpu")(texts)
    assert torch.equal(there, full)


@pytest.mark.slow
def test_random_weights_are_those_of_the_recorded_seed() -> None:
    seven = TextEncoder("clip-l", WeightsSource(random_seed=7), captions=1)
    record = seven.provenance["text/clip-l"]
    encode = PromptEncoder("text/clip-l", record, weights_dir=None, device="cpu")
    expected = seven(seven.tokenise([["a cat"]]))["text/clip-l"][:, 0]
    assert torch.equal(encode(["a cat"]), expected)
    with pytest.raises(UserError, match="other weights"):
        PromptEncoder("text/clip-l", {**record, "seed": 8}, weights_dir=None, device="cpu")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sha256": "0" * 64}, "other weights of tiny"),
        ({"tokenizer": "0" * 64}, "other vocabulary of tiny"),
        ({"name": "clip-x"}, "does not say which text encoder"),
        ({"name": 3}, "does not say which text encoder"),
        ({"precision": "fp8"}, "does not say which text encoder"),
        ({"weights": "random", "seed": None}, "and not of which"),
        ({"weights": "random", "seed": "x"}, "and not of which"),
    ],
)
def test_another_encoder_than_the_caches_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PromptEncoder("text/tiny", tiny_record(**changed), weights_dir=None, device="cpu")
    assert caught.value.remedy


# ---- beside samples, and in their picture -----------------------------------------------------------------------------


def test_prompts_beside_samples_are_read_back(tmp_path: Path) -> None:
    made = Prompts(texts=("a cat", "Käfig\n\u2028 <b>&", "", "a cat"), source="text mine.txt")
    made.save(tmp_path)
    found = load_prompts(tmp_path)
    assert found == made and found is not None and found.sha256 == made.sha256
    assert load_prompts(tmp_path / "elsewhere") is None
    path = tmp_path / "prompts.json"
    content = json.loads(path.read_text("utf-8"))
    for wrong, message in (
        ({**content, "prompts": ["a dog"]}, "other prompts than it says"),
        ({**content, "prompts": []}, "damaged"),
        ({**content, "prompts": [3]}, "damaged"),
        ({k: v for k, v in content.items() if k != "source"}, "damaged"),
        ({**content, "prompts": ["x" * 70_000]}, "damaged"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=message):
            load_prompts(tmp_path)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link"):
        load_prompts(tmp_path)


def test_the_picture_has_prompts_under_the_images() -> None:
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 200, (32, 32, 3), dtype=np.uint8) for _ in range(8)]
    prompts = [f"number {i}" for i in range(7)] + ["a very long prompt that goes on and on " * 9]
    sheet = prompt_picture(images, prompts)
    scale = -(-PROMPT_SIDE // 32)
    side = 32 * scale
    assert sheet.shape[1] == 6 * (side + 4) - 4
    assert np.array_equal(sheet[:side, :side], images[0].repeat(scale, 0).repeat(scale, 1))
    below = sheet[side : side + PROMPT_LINE + 4]
    for column in range(6):
        words = below[:, column * (side + 4) : (column + 1) * (side + 4)]
        assert (words < 128).any(), "its prompt"
    second = side + PROMPT_LINE + 12
    assert np.array_equal(sheet[second : second + side, :side], images[6].repeat(scale, 0).repeat(scale, 1))
    assert (sheet[second + side :, side + 4 : 2 * side + 4] < 128).any()
    assert (sheet[second + side :, 2 * side + 8 :] == 255).all(), "there are but two in the second row"
    assert prompts_shown(3) == [0, 1, 2] and len(prompts_shown(1000)) == 48


@given(st.text(max_size=200), st.integers(20, 400), st.integers(1, 5))
def test_lines_hold_the_words_in_order(text: str, width: int, lines: int) -> None:
    found = wrap(text, width, lines=lines)
    assert len(found) <= lines
    words = "".join("".join(c if c.isprintable() else " " for c in text).split())
    joined = "".join("".join(found).split())
    if joined != words:
        assert found[-1].endswith("…") and words.startswith(joined[:-1])


def test_words_stay_whole_where_they_fit() -> None:
    found = wrap("a red striped triangle on a dark background", 130, lines=5)
    assert " ".join(found) == "a red striped triangle on a dark background" and len(found) > 1
    assert wrap("a red striped triangle on a dark background", 130, lines=1)[0].endswith("…")
    assert wrap("", 100, lines=3) == [] == wrap(" \n", 100, lines=3)
