"""The procedural image set: determinism, balance, independence of resolution, distinct classes."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import UserError
from featcache.sources import shapes

N_CLASSES = len(shapes.CLASS_NAMES)
indices = st.integers(0, 2**31)
seeds = st.integers(0, 2**31)


@settings(max_examples=25, deadline=None)
@given(index=indices, seed=seeds, resolution=st.sampled_from([8, 33, 64, 96]))
def test_an_image_is_a_function_of_seed_index_and_resolution(index, seed, resolution):
    image, label = shapes.render(index, seed=seed, resolution=resolution)
    np.random.random(3)  # the global stream must not matter
    shapes.render(index + 1, seed=seed, resolution=resolution)
    again, label_again = shapes.render(index, seed=seed, resolution=resolution)
    assert image.shape == (resolution, resolution, 3) and image.dtype == np.uint8
    assert 0 <= label < N_CLASSES and label == label_again
    assert np.array_equal(image, again)


# (seed, index, resolution) => start of the image's SHA-256
RECORDED = {
    (0, 0, 64): "c5e5dc2ccd3da62d",
    (0, 1, 64): "33269b72e1fd0841",
    (0, 7, 33): "5254f4ff5ef407cd",
    (3, 12, 64): "8d3103a0019a8890",
    (731001, 5, 128): "dfdddd491c0dc0a4",
    (731001, 16383, 64): "ecc9d5ff6ffcb56d",
}


def test_images_are_those_that_they_always_were():
    """Recorded before `shapes-text` shared the drawing: caches are checked and repaired by these bytes."""
    for (seed, index, resolution), recorded in RECORDED.items():
        image, _ = shapes.render(index, seed=seed, resolution=resolution)
        assert hashlib.sha256(image.tobytes()).hexdigest().startswith(recorded)


def test_different_indices_and_seeds_give_different_images():
    images, _ = shapes.render_batch(range(50), resolution=16)
    assert len({image.tobytes() for image in images}) == 50
    other, _ = shapes.render_batch(range(50), seed=1, resolution=16)
    assert not any(np.array_equal(a, b) for a, b in zip(images, other))


@settings(max_examples=30, deadline=None)
@given(block=st.integers(0, 10**6), seed=seeds)
def test_every_block_of_ten_holds_each_class_once(block, seed):
    first = block * N_CLASSES
    labels = [shapes.label_of(i, seed=seed) for i in range(first, first + N_CLASSES)]
    assert sorted(labels) == list(range(N_CLASSES))


def test_labels_are_not_in_the_same_order_in_every_block():
    blocks = np.array([shapes.label_of(i) for i in range(200)]).reshape(-1, N_CLASSES)
    assert len({tuple(block) for block in blocks}) == len(blocks)


def test_layers_stay_in_range_before_quantisation():
    for index in range(60):
        image, coverage, _ = shapes.render_layers(index)
        for layer in (image, coverage):
            assert layer.dtype == np.float32
            assert layer.min() >= 0 and layer.max() <= 1


@settings(max_examples=20, deadline=None)
@given(index=indices)
def test_a_halved_render_is_the_render_at_half_the_resolution(index):
    small, label = shapes.render(index, resolution=64)
    large, large_label = shapes.render(index, resolution=128)
    halved = large.astype(np.float64).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    error = np.abs(halved - small)
    assert label == large_label
    # Both sample the same continuous image; they differ only along outlines, where a slope of one pixel's
    # width is averaged differently.
    assert error.mean() < 1.0
    assert np.quantile(error, 0.9) <= 1.0


def test_figures_have_the_area_of_their_geometry():
    # Areas in the figure's own unit, written independently of the distance functions.
    areas = {
        "circle": math.pi * 0.92**2,
        "square": 1.6**2,
        "triangle": 3 * math.sqrt(3) * 0.6**2,
        "star": 10 * 0.5 * 1.1 * 0.5 * math.sin(math.pi / 5),
        "ring": math.pi * (0.97**2 - 0.43**2),
        "cross": 2 * 1.9 * 0.6 - 0.6**2,
        "heart": (2 * 0.56) ** 2 + math.pi * 0.56**2,
        "hexagon": 2 * math.sqrt(3) * 0.85**2,
    }
    line = ((np.arange(1000) + 0.5) / 1000 * 3 - 1.5).astype(np.float32)
    x, y = np.meshgrid(line, line)
    for name, area in areas.items():
        shape, _ = shapes.CLASSES[name]
        measured = float((shape(x, y) < 0).mean()) * 9
        assert measured == pytest.approx(area, rel=0.01), name


def test_every_figure_lies_wholly_inside_the_image():
    for index in range(200):
        _, coverage, label = shapes.render_layers(index)
        border = np.concatenate([coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]])
        assert border.max() == 0, shapes.CLASS_NAMES[label]


def test_figures_stand_out_from_the_ground_in_luminance():
    weights = np.array([0.2126, 0.7152, 0.0722])
    gaps = []
    for index in range(200):
        image, coverage, _ = shapes.render_layers(index, resolution=32)
        luminance = image @ weights
        gaps.append(abs(luminance[coverage > 0.99].mean() - luminance[coverage < 0.01].mean()))
    assert min(gaps) > 0.1


def test_classes_can_be_told_apart_by_shape_alone():
    # Nearest class mean of the coverage masks: no learning, no colour, no texture.
    layers = [shapes.render_layers(i, resolution=32) for i in range(600)]
    masks = np.stack([coverage.ravel() for _, coverage, _ in layers])
    labels = np.array([label for _, _, label in layers])
    known, asked = slice(0, 300), slice(300, 600)
    means = np.stack([masks[known][labels[known] == c].mean(axis=0) for c in range(N_CLASSES)])
    distance = np.square(masks[asked][:, None] - means).sum(axis=-1)  # [300, 10]
    accuracy = (distance.argmin(axis=1) == labels[asked]).mean()
    assert accuracy > 0.8


def test_colour_says_nothing_about_the_class():
    # Mean figure colours of any two classes are closer than the spread within a class.
    colours: dict[int, list] = {c: [] for c in range(N_CLASSES)}
    for index in range(1000):
        image, coverage, label = shapes.render_layers(index, resolution=16)
        colours[label].append((image * coverage[..., None]).sum((0, 1)) / coverage.sum())
    means = np.stack([np.mean(colours[c], axis=0) for c in range(N_CLASSES)])
    spread = np.mean([np.std(colours[c], axis=0).mean() for c in range(N_CLASSES)])
    assert np.abs(means[:, None] - means[None]).mean() < spread


def test_bad_arguments_are_user_errors():
    with pytest.raises(UserError, match="-1"):
        shapes.render(-1)
    with pytest.raises(UserError, match="4 px"):
        shapes.render(0, resolution=4)


@pytest.mark.parametrize("hue", [0.0, 1.0, 2.5, 4.0])
def test_oklch_conversion_inverts(hue):
    # Back through the inverse matrices, written the other way round: sRGB -> linear -> LMS -> Lab.
    lightness, chroma = 0.6, 0.06
    rgb = shapes.oklch_to_srgb(np.array([lightness]), np.array([chroma]), np.array([hue]))[0].astype(np.float64)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lms = np.cbrt(np.linalg.inv(shapes._LMS_TO_RGB) @ linear)
    lab = np.linalg.inv(shapes._OKLAB_TO_LMS) @ lms
    expected = [lightness, chroma * math.cos(hue), chroma * math.sin(hue)]
    assert lab == pytest.approx(expected, abs=1e-5)


def test_grey_of_full_lightness_is_white():
    white = shapes.oklch_to_srgb(np.array([1.0]), np.array([0.0]), np.array([0.0]))
    assert white == pytest.approx(np.ones((1, 3)), abs=1e-4)
