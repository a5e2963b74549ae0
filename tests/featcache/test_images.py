"""Sources and the crop."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import UserError
from featcache.sources.base import fingerprint
from featcache.sources.folder import refuse_unlabelled
from featcache.sources.open import find_data, open_source
from featcache.sources.pixels import BadImage, center_crop, content_hash, decode


def adm_crop_second_way(image: Image.Image, size: int) -> np.ndarray:
    """ADM's formula written from its description: reduce by whole halvings, then one bicubic resize, then a slice."""
    w, h = image.size
    halvings = 0
    while min(w, h) // 2 >= size:
        w, h, halvings = w // 2, h // 2, halvings + 1
    small = image
    for _ in range(halvings):
        small = small.resize((small.size[0] // 2, small.size[1] // 2), Image.Resampling.BOX)
    factor = size / (w if w < h else h)
    large = np.array(small.resize((round(w * factor), round(h * factor)), Image.Resampling.BICUBIC))
    y0 = (large.shape[0] - size) // 2
    x0 = (large.shape[1] - size) // 2
    return large[y0 : y0 + size, x0 : x0 + size]


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(16, 400), height=st.integers(16, 400), size=st.sampled_from([16, 32, 64]))
def test_crop_equals_the_formula_written_a_second_way(width: int, height: int, size: int) -> None:
    image = noise_image(width, height)
    cropped = center_crop(image, size)
    assert cropped.shape == (size, size, 3)
    assert np.array_equal(cropped, adm_crop_second_way(image, size))


def test_crop_of_real_photographs(imagenet_sample: Path) -> None:
    files = sorted(imagenet_sample.rglob("*.JPEG"))[::9]
    assert files
    for file in files:
        image = decode(file.read_bytes(), file.name)
        assert np.array_equal(center_crop(image, 256), adm_crop_second_way(image, 256))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("RGB", "WEBP"), ("1", "PNG")],
)
def test_unusual_modes_decode_like_pil_convert(mode: str, kind: str) -> None:
    data = encoded(noise_image(40, 30, mode), kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    decoded = decode(data, "x")
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), expected)


def test_grayscale_is_replicated_and_alpha_is_dropped_not_blended() -> None:
    gray = np.asarray(decode(encoded(noise_image(20, 20, "L"), "PNG"), "g"))
    assert np.array_equal(gray[..., 0], gray[..., 1])
    assert np.array_equal(gray[..., 0], gray[..., 2])
    pixels = np.full((8, 8, 4), 200, np.uint8)
    pixels[..., 3] = 0  # fully transparent
    assert (np.asarray(decode(encoded(Image.fromarray(pixels), "PNG"), "a")) == 200).all()


def test_exif_orientation_is_not_applied() -> None:
    image = noise_image(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert decode(encoded(image, "JPEG", exif=exif), "e").size == (40, 20)


def test_truncated_file_is_reported_by_key() -> None:
    data = encoded(noise_image(200, 200), "JPEG")
    with pytest.raises(BadImage, match=r"cat/broken\.jpg"):
        decode(data[: len(data) // 2], "cat/broken.jpg")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_bad_image_and_nothing_else(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data, "garbage")


def write_folder(root: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_image(20 + i, 24).save(root / name / f"{i}.png")
    return root


def test_folder_source_sorts_keys_and_numbers_classes(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path / "set", {"b": 2, "a": 1})), resolution=16)
    assert [source.key(i) for i in range(len(source))] == ["a/0.png", "b/0.png", "b/1.png"]
    assert [source.label(i) for i in range(len(source))] == [0, 1, 1]
    assert source.class_names == ("a", "b")
    pixels, content = source.load(0, 16)
    assert pixels.shape == (16, 16, 3)
    assert content == content_hash((tmp_path / "set/a/0.png").read_bytes())


def test_fingerprint_ignores_place_and_order_but_not_content(tmp_path: Path) -> None:
    one = open_source(str(write_folder(tmp_path / "one", {"a": 2, "b": 2})), resolution=16)
    two = open_source(str(write_folder(tmp_path / "two", {"a": 2, "b": 2})), resolution=16)
    assert fingerprint(one, [0, 1, 2, 3]) == fingerprint(two, [3, 1, 0, 2])
    assert fingerprint(one, [0, 1, 2]) != fingerprint(one, [0, 1, 2, 3])
    (tmp_path / "two/a/0.png").write_bytes(b"something else")
    assert fingerprint(one, range(4)) != fingerprint(two, range(4))


@pytest.mark.parametrize("case", ["missing", "file", "empty", "flat"])
def test_unusable_folders_are_explained(tmp_path: Path, case: str) -> None:
    place = tmp_path / "data"
    if case == "file":
        place.write_text("x")
    elif case != "missing":
        place.mkdir()
        if case == "flat":
            noise_image(20, 20).save(place / "a.png")
    with pytest.raises(UserError) as caught:
        refuse_unlabelled(open_source(str(place), resolution=16))
    assert caught.value.remedy


def test_data_is_found_by_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    with pytest.raises(UserError, match="no images"):
        find_data(None)
    (tmp_path / "data/imagenet").mkdir(parents=True)
    assert find_data(None) == "data/imagenet"
    monkeypatch.setenv("FEATCACHE_DATA", "/somewhere")
    assert find_data(None) == "/somewhere"
    assert find_data("here") == "here"


def test_shapes_source_is_regenerable() -> None:
    source = open_source("shapes:3", resolution=32, limit=20)
    again = open_source("shapes:3", resolution=32, limit=20)
    assert len(source) == 20
    assert len({source.key(i) for i in range(20)}) == 20
    for i in (0, 7, 19):
        assert np.array_equal(source.load(i, 32)[0], again.load(i, 32)[0])
        assert source.load(i, 32)[1] == again.load(i, 32)[1]
