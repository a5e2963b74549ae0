"""The embedded set with captions: its attributes, its split, its captions, and caches that draw it again."""

from __future__ import annotations

import itertools
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.cli import app
from featcache.encoders import EncoderChoice
from featcache.errors import UserError
from featcache.inspect import images_of
from featcache.progress import Quiet
from featcache.sources import shapes_text
from featcache.sources.captions import open_captions
from featcache.sources.embedded import is_embedded, open_embedded, recorded_embedded
from featcache.sources.open import find_data, open_source
from featcache.sources.shapes_text import ATTRIBUTES, WORDINGS, Attributes, Part, caption, combinations, parse_caption
from trainer.evaluate.images import CacheImages

EVERYTHING = [Attributes(*values) for values in itertools.product(*ATTRIBUTES.values())]

any_attributes = st.sampled_from(EVERYTHING)
parts = st.sampled_from(list(Part))
seeds = st.integers(0, 2**31)
indices = st.integers(0, 2**31)


def test_the_parts_hold_every_combination_once_and_a_sixth_is_held_out() -> None:
    seen, held_out = set(combinations(Part.seen)), set(combinations(Part.held_out))
    assert seen | held_out == set(EVERYTHING) and not seen & held_out
    assert len(held_out) * 6 == len(EVERYTHING) == 720


def test_every_value_and_every_pair_of_values_occurs_in_training() -> None:
    seen = [astuple(attributes) for attributes in combinations(Part.seen)]
    for (a, first), (b, second) in itertools.combinations(enumerate(ATTRIBUTES.values()), 2):
        assert {(row[a], row[b]) for row in seen} == set(itertools.product(first, second))
    for at, values in enumerate(ATTRIBUTES.values()):
        assert {astuple(attributes)[at] for attributes in combinations(Part.held_out)} == set(values)


def test_which_combinations_are_held_out_stays() -> None:
    """Runs trained on the rest would be judged by what they have seen."""
    first = [" ".join(astuple(a)) for a in combinations(Part.held_out)[::40]]
    assert first == ["circle striped blue dark", "star checked purple dark", "heart spotted red light"]


@settings(max_examples=300, deadline=None)
@given(index=indices, seed=seeds, part=parts)
def test_images_show_combinations_of_their_part(index: int, seed: int, part: Part) -> None:
    assert shapes_text.attributes_of(index, part=part, seed=seed) in set(combinations(part))


def test_combinations_are_drawn_evenly() -> None:
    drawn = [shapes_text.attributes_of(i) for i in range(6000)]
    counts = [drawn.count(attributes) for attributes in combinations(Part.seen)]
    assert min(counts) > 0 and max(counts) < 30  # ten of each on average; Poisson's tail above 29 is 1e-7
    assert [drawn[i].shape for i in range(10)] != list(ATTRIBUTES["shape"])
    assert all(len({a.shape for a in drawn[i : i + 10]}) == 10 for i in range(0, 6000, 10))


@settings(max_examples=20, deadline=None)
@given(index=indices, seed=seeds, part=parts, resolution=st.sampled_from([8, 33, 64]))
def test_an_image_is_a_function_of_part_seed_index_and_resolution(
    index: int, seed: int, part: Part, resolution: int
) -> None:
    image, attributes = shapes_text.render(index, part=part, seed=seed, resolution=resolution)
    shapes_text.render(index + 1, part=part, seed=seed, resolution=resolution)
    again, same = shapes_text.render(index, part=part, seed=seed, resolution=resolution)
    assert image.shape == (resolution, resolution, 3) and image.dtype == np.uint8
    assert np.array_equal(image, again) and attributes == same


def test_parts_seeds_and_indices_give_different_images() -> None:
    drawn = itertools.product(Part, (0, 1), range(40))
    images = [shapes_text.render(i, part=part, seed=seed, resolution=16)[0] for part, seed, i in drawn]
    assert len({image.tobytes() for image in images}) == len(images)


def _figure_pixels(attributes: Attributes, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [N, 3] in [0, 1] of the figure's middle, and of the image's rim."""
    image = shapes_text.draw(attributes, numbers)
    assert image.min() >= 0 and image.max() <= 1
    return image[24:40, 24:40].reshape(-1, 3), np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def test_colours_and_backgrounds_are_what_they_are_called() -> None:
    """By hue and lightness as HSV has them, which the drawing does not use."""
    import colorsys

    hues = {"red": 0, "orange": 30, "yellow": 55, "green": 125, "blue": 215, "purple": 275}
    rng = np.random.default_rng(3)
    for attributes in EVERYTHING:
        if attributes.shape != "square" or attributes.texture != "plain":
            continue
        for _ in range(4):
            figure, rim = _figure_pixels(attributes, rng.random(16))
            hue, saturation, _ = colorsys.rgb_to_hsv(*figure.mean(0).tolist())
            away = abs((360 * hue - hues[attributes.colour] + 180) % 360 - 180)
            assert away < 15 and saturation > 0.6, attributes
            grey = rim.mean()
            assert {"dark": grey < 0.3, "grey": 0.35 < grey < 0.65, "light": grey > 0.75}[attributes.background]
            assert np.ptp(rim, axis=1).max() < 0.12, "grounds have no colour to speak of"


def test_textures_show() -> None:
    """In the middle of a square a plain figure is of one tone; each of the others has two."""
    rng = np.random.default_rng(4)
    for texture, colour, background in itertools.product(*list(ATTRIBUTES.values())[1:]):
        figure, _ = _figure_pixels(Attributes("square", texture, colour, background), rng.random(16))
        contrast = np.ptp(figure, axis=0).max()
        assert contrast < 0.15 if texture == "plain" else contrast > 0.3, (texture, colour, background)


@settings(max_examples=50, deadline=None)
@given(attributes=any_attributes)
def test_every_wording_of_every_combination_is_read(attributes: Attributes) -> None:
    for wording in WORDINGS:
        assert parse_caption(caption(attributes, wording)) == attributes
    assert len({caption(attributes, wording) for wording in WORDINGS}) == len(WORDINGS) >= 4


@settings(max_examples=100, deadline=None)
@given(attributes=any_attributes, data=st.data())
def test_words_are_read_in_any_order_and_writing(attributes: Attributes, data: st.DataObject) -> None:
    words = [*astuple(attributes), "a", "the", "picture"]
    shuffled = data.draw(st.permutations(words))
    writing = data.draw(st.sampled_from([str.upper, str.title, str.lower]))
    joint = data.draw(st.sampled_from([" ", ", ", " - ", ";\n"]))
    assert parse_caption(writing(joint.join(shuffled)) + data.draw(st.sampled_from(["", ".", "!"]))) == attributes


@settings(max_examples=100, deadline=None)
@given(attributes=any_attributes, missing=st.sampled_from(list(ATTRIBUTES)), other=any_attributes)
def test_a_missing_or_a_second_word_of_an_attribute_is_no_caption(
    attributes: Attributes, missing: str, other: Attributes
) -> None:
    words = [value for name, value in zip(ATTRIBUTES, astuple(attributes), strict=True) if name != missing]
    assert parse_caption(" ".join(words)) is None
    assert parse_caption(" ".join([*astuple(attributes), getattr(other, missing)])) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "a cat on a sofa", "a red striped triangle", "circles: red striped dark",
        "a triangle, striped, not red, on a dark background", "a striped red triangle or a dark background",
    ],
)  # fmt: skip
def test_other_texts_are_no_captions(text: str) -> None:
    assert parse_caption(text) is None


@pytest.mark.parametrize(
    ("text", "attributes"),
    [
        ("A violet, dotted moon on bright ground.", Attributes("crescent", "spotted", "purple", "light")),
        ("gray backdrop; CHEQUERED orange arrow", Attributes("arrow", "checked", "orange", "grey")),
        ("on dark ground, a striped triangle in red", Attributes("triangle", "striped", "red", "dark")),
    ],
)
def test_other_words_for_the_same_are_read(text: str, attributes: Attributes) -> None:
    assert parse_caption(text) == attributes


def test_articles_agree() -> None:
    orange = Attributes("arrow", "plain", "orange", "dark")
    assert caption(orange, WORDINGS[0]) == "an orange plain arrow on a dark background"
    assert caption(replace(orange, colour="red"), WORDINGS[3]) == "an arrow, red and plain, against a dark background"


@settings(max_examples=50, deadline=None)
@given(index=indices, seed=seeds, part=parts)
def test_an_image_has_four_captions_of_its_attributes(index: int, seed: int, part: Part) -> None:
    captions = shapes_text.captions_of(index, part=part, seed=seed)
    assert len(set(captions)) == len(captions) == 4
    assert {parse_caption(text) for text in captions} == {shapes_text.attributes_of(index, part=part, seed=seed)}
    assert captions == shapes_text.captions_of(index, part=part, seed=seed)


# What --data names.


@pytest.mark.parametrize(
    ("data", "part", "seed"),
    [
        ("shapes-text", Part.seen, 0), ("shapes-text:7", Part.seen, 7),
        ("shapes-text:held-out", Part.held_out, 0), ("shapes-text:held-out:7", Part.held_out, 7),
    ],
)  # fmt: skip
def test_the_set_is_opened_and_found_again_by_its_description(data: str, part: Part, seed: int) -> None:
    source: Any = open_source(data, resolution=32, limit=20)
    assert (source.part, source.seed, len(source)) == (part, seed, 20)
    assert recorded_embedded(source.description) is not None
    again, count = recorded_embedded(source.description) or ("", 0)
    assert open_embedded(again, resolution=32, limit=count) == source
    keys = [source.key(i) for i in range(20)]
    assert len(set(keys)) == 20 and all(key.startswith(f"{source.name}/{seed}/") for key in keys)
    pixels, _ = source.load(3, 32)
    drawn, attributes = shapes_text.render(3, part=part, seed=seed, resolution=32)
    assert np.array_equal(pixels, drawn) and source.class_names[source.label(3)] == attributes.shape


def test_its_default_size_and_its_captions() -> None:
    source = open_source("shapes-text", resolution=64)
    captions = open_captions(source, table=None, key=None)
    assert len(source) == 2000 and captions.most(range(2000)) == 4
    assert captions.of(5) == shapes_text.captions_of(5)
    assert captions.identity != open_captions(open_source("shapes", resolution=64), table=None, key=None).identity


@pytest.mark.parametrize("data", ["shapes-text:heldout", "shapes-text:-1", "shapes-text:held-out:x", "shapes-text:1:2"])
def test_other_variants_are_refused_with_those_there_are(data: str) -> None:
    with pytest.raises(UserError, match="seed, 'held-out' or 'held-out:SEED'") as refused:
        open_source(data, resolution=64)
    assert "--data shapes-text:held-out" in str(refused.value.remedy)


def test_only_the_embedded_sets_are_taken_for_embedded() -> None:
    assert is_embedded("shapes") and is_embedded("shapes:1") and is_embedded("shapes-text:held-out")
    assert not any(map(is_embedded, ("shapes-texture", "shapes/", "./shapes-text", "shape")))
    for description in ("folder x", "shapes-texture seed=0 count=3", "shapes-text seed=0", "shapes-text count=3"):
        assert recorded_embedded(description) is None
    assert recorded_embedded("shapes-text seed=0 count=99999999999") is None


@pytest.mark.parametrize("data", ["shapes-text", "shapes-text:held-out:3"])
def test_a_cache_of_it_draws_its_images_again_and_is_added_to(data: str, tmp_path: Path) -> None:
    tiny = (EncoderChoice(name="tiny", layers=(5,)),)
    common: dict[str, Any] = {"data": data, "limit": 10, "batch_size": 4, "workers": 1, "device": "cpu"}
    build(BuildRequest(levels=("G4",), encoders=(), vae="tiny", resolution=32, out=tmp_path / "c", **common), Quiet())
    cache = featcache.open(tmp_path / "c")
    again = find_data(None, into=tmp_path / "c")
    build(BuildRequest(data=again, into=tmp_path / "c", encoders=tiny, batch_size=4, workers=1, device="cpu"), Quiet())
    cache = featcache.open(tmp_path / "c")
    source: Any = open_source(data, resolution=32, limit=10)
    assert "tiny@5" in cache.features and len(cache) == 10
    shown = images_of(cache, None, range(10))
    drawn = {source.load(i, 32)[0].tobytes() for i in range(10)}
    assert {image.tobytes() for image in shown} == drawn
    reference = next(CacheImages(cache=cache).batches(10))
    assert np.array_equal(reference, shown)
    victim = sorted((tmp_path / "c/vae/moments").glob("c.*"))[0]
    before = victim.read_bytes()
    victim.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "c")]).exit_code == 1
    mended = CliRunner().invoke(app, ["verify", str(tmp_path / "c"), "--repair"])
    assert mended.exit_code == 0, mended.output
    assert victim.read_bytes() == before
    sheet = CliRunner().invoke(app, ["inspect", str(tmp_path / "c"), "--count", "2", "--out", str(tmp_path / "c.png")])
    assert sheet.exit_code == 0 and (tmp_path / "c.png").is_file(), sheet.output
