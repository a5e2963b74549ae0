"""MS-COCO: its annotation files, its flat folders, and the crop of its images."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from typer.testing import CliRunner

import featcache
from featcache.builder.lead import remarks
from featcache.builder.prepare import prepare
from featcache.builder.repair import repair_shards
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.cli import app
from featcache.errors import CacheError, UserError
from featcache.inspect import images_of
from featcache.progress import Quiet
from featcache.share.verify import verify
from featcache.sources.base import fingerprint
from featcache.sources.captions import TableCaptions, open_captions
from featcache.sources.coco import read_annotations
from featcache.sources.open import open_source
from featcache.sources.pixels import CROPS, square_crop
from tests.featcache.store_helpers import tree_digest
from tests.featcache.test_text import shard
from trainer.evaluate.images import CacheImages, FolderImages, open_images

SIZES = ((64, 48), (48, 64), (50, 50), (33, 70), (32, 32), (90, 37))


def write_images(folder: Path, count: int = 10) -> list[str]:
    """Jpegs of photograph-like colours in one folder, named as COCO names them."""
    folder.mkdir(parents=True)
    names = [f"COCO_train2014_{9 + 16 * i:012d}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        width, height = SIZES[i % len(SIZES)]
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / name, quality=90)
    return names


# How many captions each image has: five, some six or seven, two none.
COUNTS = (5, 5, 6, 0, 7, 5, 5, 0, 5, 5)


def coco_document(names: list[str], counts: tuple[int, ...] = COUNTS, **changes: Any) -> dict[str, Any]:
    """A document of the form of `captions_train2014.json`; annotations stand in no order of ids."""
    images = [
        {
            "license": 5,
            "url": f"http://images.example/{name}",
            "file_name": name,
            "id": 9 + 16 * i,
            "width": 64,
            "date_captured": "2013-11-14 16:28:13",
            "height": 48,
        }
        for i, name in enumerate(names)
    ]
    made = [
        {"image_id": 9 + 16 * i, "id": 1000 * (k + 1) + i, "caption": f"Caption {k} of picture {i}, étoile. "}
        for i, count in enumerate(counts)
        for k in reversed(range(count))
    ]
    document = {
        "info": {"description": "made for a test", "year": 2014},
        "images": images,
        "licenses": [{"url": "http://example", "id": 1, "name": "none"}],
        "annotations": made,
    }
    return {**document, **changes}


@pytest.fixture
def coco(tmp_path: Path) -> tuple[Path, Path]:
    """Folder of images and annotation file."""
    names = write_images(tmp_path / "train2014")
    file = tmp_path / "annotations/captions_train2014.json"
    file.parent.mkdir()
    file.write_text(json.dumps(coco_document(names)), "utf-8")
    return tmp_path / "train2014", file


def request(coco: tuple[Path, Path], out: Path | None, **changes: Any) -> BuildRequest:
    base = BuildRequest(
        data=str(coco[0]),
        texts=("tiny",),
        captions=coco[1],
        vae="tiny",
        resolution=32,
        crop="lanczos-square",
        batch_size=4,
        shard_size=4,
        out=out,
        workers=1,
        device="cpu",
    )
    return replace(base, **changes)


def test_captions_come_by_rising_id(coco: tuple[Path, Path]) -> None:
    folder, file = coco
    source = open_source(str(folder), resolution=32)
    captions = open_captions(source, table=file, key=None)
    assert isinstance(captions, TableCaptions)
    assert source.class_names == ("all",) and {source.label(i) for i in range(10)} == {0}
    assert [source.key(i) for i in range(3)] == [f"COCO_train2014_{9 + 16 * i:012d}.jpg" for i in range(3)]
    for i, count in enumerate(COUNTS):
        assert captions.of(i) == tuple(f"Caption {k} of picture {i}, étoile." for k in range(count))
    assert captions.most(range(10)) == 7 and captions.description == "COCO annotations captions_train2014.json"
    assert captions.remark == (
        "2 of 10 images of folder train2014 have no caption, such as 'COCO_train2014_000000000057.jpg'"
    )
    # The order in the file makes no difference.
    document = json.loads(file.read_text())
    document["annotations"].sort(key=lambda item: item["id"])
    document["images"].reverse()
    file.write_text("\ufeff" + json.dumps(document), "utf-8")
    again = open_captions(source, table=file, key=None)
    assert again.identity == captions.identity


@pytest.mark.parametrize("name", ["captions.json", "captions.txt", "captions"])
def test_json_is_known_by_its_name_or_its_first_letter(coco: tuple[Path, Path], name: str) -> None:
    folder, file = coco
    other = file.with_name(name)
    file.rename(other)
    captions = open_captions(open_source(str(folder), resolution=32), table=other, key=None)
    assert len(captions.of(0)) == 5
    other.write_text("key,caption\nCOCO_train2014_000000000009,x\n")
    if name == "captions.json":
        with pytest.raises(UserError, match="no JSON"):
            open_captions(open_source(str(folder), resolution=32), table=other, key=None)
    else:
        assert open_captions(open_source(str(folder), resolution=32), table=other, key=None).of(0) == ("x",)


def test_shards_and_folders_above_have_the_same_captions(coco: tuple[Path, Path], tmp_path: Path) -> None:
    folder, file = coco
    members = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    members |= {name.replace(".jpg", ".cls"): b"0" for name in members}
    for data in (str(shard(tmp_path / "a.tar", dict(sorted(members.items())))), str(tmp_path)):
        source = open_source(data, resolution=32)
        captions = open_captions(source, table=file, key=None)
        found = {source.key(i).rpartition("/")[2].removesuffix(".jpg"): captions.of(i) for i in range(len(source))}
        assert len(found["COCO_train2014_000000000041"]) == 6, data


def test_what_does_not_fit_is_counted_and_shown(coco: tuple[Path, Path]) -> None:
    folder, file = coco
    source = open_source(str(folder), resolution=32)
    document = coco_document([source.key(i) for i in range(10)])
    document["images"].append({"id": 7, "file_name": "COCO_train2014_000000000007.jpg"})
    document["annotations"] += [
        {"image_id": 7, "id": 1, "caption": "of another image"},
        {"image_id": 8, "id": 2, "caption": "of no image"},
        {"image_id": 9, "id": 3, "caption": " \n"},
    ]
    file.write_text(json.dumps(document))
    captions = open_captions(source, table=file, key=None)
    assert captions.remark is not None
    assert captions.remark.startswith(
        f"2 of 45 captions in {file} are of no image of folder train2014, such as 'COCO_train2014_000000000007.jpg'; 2 of 10"
    )
    assert captions.of(0)[0] == "Caption 0 of picture 0, étoile.", "a blank caption is none"
    document["images"].pop()
    file.write_text(json.dumps(document))
    remark = open_captions(source, table=file, key=None).remark
    assert remark is not None and "2 of 45 captions" in remark and "such as 'id 7'" in remark
    document = coco_document([f"COCO_val2014_{i:012d}.jpg" for i in range(10)])
    file.write_text(json.dumps(document))
    with pytest.raises(
        UserError, match="names none of the images of folder train2014, such as 'COCO_train2014"
    ) as caught:
        open_captions(source, table=file, key=None)
    assert "10 others, such as 'COCO_val2014_000000000000.jpg'" in caught.value.what


def image(**changes: Any) -> dict[str, Any]:
    return {"images": [{"id": 9, "file_name": "a.jpg", **changes}], "annotations": []}


def annotation(**changes: Any) -> dict[str, Any]:
    said = {"id": 1, "image_id": 9, "caption": "x", **changes}
    return {**image(), "annotations": [{key: value for key, value in said.items() if value is not ...}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON"),
        ('{"images": [', "no JSON"),
        ('{"images": [], "images": [], "annotations": []}', "a key occurs twice"),
        ("[" * 100_000, "no JSON"),
        (b"\xff\xfe{}", "no JSON in UTF-8"),
        ("[]", "no images and annotations"),
        ("3", "no images and annotations"),
        ({"images": []}, "it has 'images'"),
        ({"images": {}, "annotations": []}, "no list under images"),
        ({"images": [], "annotations": {}}, "no list under annotations"),
        ({"images": [3], "annotations": []}, "image 1"),
        (image(id="9"), "image 1"),
        (image(id=True), "image 1"),
        (image(id=9.0), "image 1"),
        (image(file_name=None), "image 1"),
        (image(file_name=""), "image 1"),
        ({"images": [{"id": 9}], "annotations": []}, "image 1"),
        ({"images": image()["images"] * 2, "annotations": []}, "two images of the id 9"),
        (
            {"images": [*image()["images"], *image(id=8)["images"]], "annotations": []},
            "two images of the file_name 'a.jpg'",
        ),
        (annotation(caption=3), "annotation 1"),
        (annotation(caption=...), "as annotations of objects or keypoints"),
        (annotation(image_id="9"), "annotation 1"),
        (annotation(id=None), "annotation 1"),
        (annotation(caption="\ud800"), "surrogate"),
        ({**image(), "annotations": ["x"]}, "annotation 1"),
        ('{"images": [{"id": 1' + "0" * 5000 + "}]}", "no JSON"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, text: Any, message: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(
        text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
    )
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(file)
    assert str(file) in caught.value.what and caught.value.remedy


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for file in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=re.escape(str(file))):
            read_annotations(file)


def test_two_entries_of_one_image_are_refused(coco: tuple[Path, Path]) -> None:
    folder, file = coco
    source = open_source(str(folder), resolution=32)
    names = [source.key(i) for i in range(10)]
    file.write_text(json.dumps(coco_document([*names, names[0].replace(".jpg", ".png")])))
    with pytest.raises(UserError, match=r"000009\.jpg' and 'COCO_train2014_000000000009\.png' are both"):
        open_captions(source, table=file, key=None)


def test_prompts_can_be_taken_by_image(coco: tuple[Path, Path]) -> None:
    found = read_annotations(coco[1])
    assert [len(captions) for captions in found.of_images()] == list(COUNTS)
    assert found.files[0] == "COCO_train2014_000000000009.jpg" and found.unknown is None


def square_by_hand(image: Image.Image, size: int) -> np.ndarray:
    """U-ViT's crop over arrays: rows floor((H - s) / 2) to floor((H + s) / 2), columns alike, then Lanczos."""
    pixels = np.array(image)
    s = min(pixels.shape[:2])
    top, bottom = int((pixels.shape[0] - s) // 2), int((pixels.shape[0] + s) // 2)
    left, right = int((pixels.shape[1] - s) // 2), int((pixels.shape[1] + s) // 2)
    square = Image.fromarray(pixels[top:bottom, left:right].copy())
    return np.array(square.resize((size, size), Image.Resampling.LANCZOS)).astype(np.uint8)


@given(
    pixels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 70), st.integers(1, 70), st.just(3))),
    size=st.integers(1, 64),
)
@settings(max_examples=80, deadline=None)
def test_the_square_crop_is_u_vits_to_the_byte(pixels: np.ndarray, size: int) -> None:
    image = Image.fromarray(pixels)
    assert np.array_equal(square_crop(image, size), square_by_hand(image, size))


def test_a_cache_of_coco(coco: tuple[Path, Path], tmp_path: Path) -> None:
    """As typed: what is written, and whoever looks at the images again sees them through the same crop."""
    folder, file = coco
    out = tmp_path / "c"
    line = [
        "build",
        "--data",
        str(folder),
        "--captions",
        str(file),
        "--text",
        "tiny",
        "--crop",
        "lanczos-square",
        "--vae",
        "tiny",
    ]
    line += ["--resolution", "32", "--batch-size", "4", "--shard-size", "4", "--device", "cpu", "--out", str(out)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    cache = featcache.open(out)
    dataset = cache.manifest.dataset
    assert dataset.preprocessing["crop"] == "lanczos-square" and dataset.class_names == ("all",)
    assert cache.features["text/tiny"].shape == (7, 16, 64)
    assert not cache.labels().any()
    counts = cache.read(range(10), ["text/count", "key"])
    assert {int(key[15:27]): int(n) for key, n in zip(counts["key"], counts["text/count"])} == {
        9 + 16 * i: n for i, n in enumerate(COUNTS)
    }
    images = np.stack([square_by_hand(Image.open(folder / key).convert("RGB"), 32) for key in counts["key"]])
    assert np.array_equal(images_of(cache, str(folder), range(10)), images)
    assert np.array_equal(np.concatenate(list(CacheImages(cache=cache, data=str(folder)).batches(4))), images)
    folder_images = FolderImages(path=folder, resolution=32, crop="lanczos-square", by_name=True)
    by_name = np.concatenate(list(folder_images.batches(3)))
    assert np.array_equal(by_name, images[np.argsort(counts["key"])])
    adm = np.concatenate(list(open_images(folder, resolution=32, by_name=True).batches(3)))
    assert not np.array_equal(by_name, adm)


def test_features_that_join_and_repairs_take_the_caches_crop(coco: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "c"
    plan = prepare(request(coco, out), device="cpu")
    assert any("have no caption" in line for line in remarks(plan))
    build(request(coco, out), Quiet())
    before = tree_digest(out)
    levels = {"texts": (), "captions": None, "levels": ("G3",), "crop": None, "levels_codec": "fp32"}
    build(request(coco, None, into=out, **levels), Quiet())
    whole = tmp_path / "whole"
    build(request(coco, whole, levels=("G3",), levels_codec="fp32"), Quiet())
    a, b = (featcache.open(path).read(range(10), ["vae/G3", "vae/moments"]) for path in (out, whole))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    with pytest.raises(CacheError, match="cropped by 'lanczos-square'") as caught:
        prepare(request(coco, None, into=out, **{**levels, "crop": "adm"}), device="cpu")
    assert "or type lanczos-square" in str(caught.value.remedy)
    shard = out / "vae/moments/c.1.0.0.0"
    shard.write_bytes(b"x" * shard.stat().st_size)
    text = next((out / "text/tiny").glob("c.0.*"))
    text.unlink()
    damaged = verify(out).damaged
    assert set(damaged) == {"vae/moments", "text/tiny"}
    repair_shards(out, damaged, data=str(coco[0]), weights_dir=None, device="cpu", progress=Quiet(), captions=coco[1])
    assert {name: digest for name, digest in tree_digest(out).items() if name in before and name != "zarr.json"} == {
        name: digest for name, digest in before.items() if name != "zarr.json"
    }


def test_the_crop_decides_the_bytes_and_not_the_identity(coco: tuple[Path, Path], tmp_path: Path) -> None:
    for crop in ("adm", "lanczos-square"):
        build(request(coco, tmp_path / crop, crop=crop), Quiet())
        assert featcache.open(tmp_path / crop).manifest.dataset.preprocessing["crop"] == CROPS[crop]
    a, b = (featcache.open(tmp_path / crop) for crop in ("adm", "lanczos-square"))
    assert a.manifest.dataset.fingerprint == b.manifest.dataset.fingerprint
    assert not np.array_equal(a.read([0], ["vae/moments"])["vae/moments"], b.read([0], ["vae/moments"])["vae/moments"])
    with pytest.raises(CacheError, match="crop: adm-center-crop there, lanczos-square here"):
        build(request(coco, tmp_path / "adm"), Quiet())


def test_a_fast_decoder_is_refused_with_it(coco: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("simplejpeg")
    with pytest.raises(UserError, match="--decode turbo") as caught:
        prepare(request(coco, tmp_path / "c", decode="turbo"), device="cpu")
    assert caught.value.remedy == "Leave --decode out."


def test_flat_folders_need_captions(coco: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class folders") as caught:
        prepare(request(coco, tmp_path / "c", texts=(), captions=None), device="cpu")
    assert "--text clip-l --captions FILE" in str(caught.value.remedy)
    with pytest.raises(UserError, match="no captions of its own") as caught:
        prepare(request(coco, tmp_path / "c", captions=None), device="cpu")
    assert "captions_train2014.json" in str(caught.value.remedy)
    # Its name is no part of what the images are.
    source = open_source(str(coco[0]), resolution=32)
    found = fingerprint(source, range(10))
    coco[0].rename(tmp_path / "renamed")
    assert fingerprint(open_source(str(tmp_path / "renamed"), resolution=32), range(10)) == found


def test_five_captions_of_seven_are_kept(coco: tuple[Path, Path], tmp_path: Path) -> None:
    build(request(coco, tmp_path / "c", captions_per_image=5), Quiet())
    cache = featcache.open(tmp_path / "c")
    assert cache.features["text/tiny"].shape == (5, 16, 64)
    assert sorted(cache.read(range(10), ["text/count"])["text/count"].tolist()) == sorted(min(n, 5) for n in COUNTS)


def planned(folder: Path, count: int, *words: str) -> str:
    """What `featcache plan` says, as typed, of so many images of five captions each. The images are empty files, so that
    whoever looks into one fails."""
    (folder / "train2014").mkdir()
    names = [f"COCO_train2014_{i:012d}.jpg" for i in range(count)]
    for name in names:
        (folder / "train2014" / name).touch()
    (folder / "captions_train2014.json").write_text(json.dumps(coco_document(names, (5,) * count)))
    line = ["plan", "--data", str(folder / "train2014"), "--captions", str(folder / "captions_train2014.json")]
    done = CliRunner().invoke(app, [*line, "--crop", "lanczos-square", "--device", "cpu", *words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_a_plan_of_captions_says_the_bytes_and_opens_no_image(tmp_path: Path) -> None:
    said = planned(tmp_path, 40, "--text", "tiny", "--vae", "tiny", "--resolution", "32", "--steps-per-s", "10")
    row = 16 * 64 * 2  # one caption's, in fp16
    assert f"text/tiny 5x16x64 fp16 {5 * row / 1e3:.3g} KB {40 * 5 * row / 1e3:.3g} KB" in said
    # A step reads one caption's rows, its pooled vector and its length, how many there are, and the moments.
    read = row + 32 * 2 + 4 + 4 + 2 * 16 * 4 * 4 * 2
    assert f"at 10 steps/s and batch 256 reads {10 * 256 * read / 1e6:.3g} MB/s (one of 5 captions)" in said


@pytest.mark.slow
def test_a_plan_of_all_of_coco(tmp_path: Path) -> None:
    """82,783 images by CLIP ViT-L/14 and SD's VAE, as the text-to-image papers have them."""
    n, row = 82_783, 77 * 768 * 2
    said = planned(tmp_path, n, "--text", "clip-l")
    assert f"text/clip-l 5x77x768 fp16 {5 * row / 1e3:.3g} KB {n * 5 * row / 1e9:.3g} GB" in said
    assert f"vae/moments 8x32x32 fp16 16.4 KB {n * 8 * 32 * 32 * 2 / 1e9:.3g} GB" in said
    assert "49 GB" in said and "82,783 images in about" in said
    read = row + 768 * 2 + 4 + 4 + 8 * 32 * 32 * 2
    assert f"reads {2 * 256 * read / 1e6:.3g} MB/s (one of 5 captions)" in said
