"""From images to numbers: image sets, references, `evaluate`, and what bad input gets."""

import itertools
import json
import subprocess
import sys
import tarfile
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.sources.base import sample_order
from featcache.sources.open import open_source
from tests.told import Told
from trainer.evaluate import references
from trainer.evaluate.extractors import Extractor, build_extractor
from trainer.evaluate.images import (
    ArrayImages,
    FolderImages,
    ImageSet,
    NpzImages,
    TarImages,
    open_images,
    prefetch,
)
from trainer.evaluate.judge import _warnings, evaluate
from trainer.evaluate.metrics import frechet_distance, manifold_coverage, moments_of
from trainer.evaluate.references import (
    Statistics,
    compute_statistics,
    load_statistics,
    reference_statistics,
    save_statistics,
    write_statistics,
)

SIDE = 32


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return build_extractor("embedded")


@pytest.fixture(scope="module")
def shapes() -> np.ndarray:
    """Real images of the embedded set: uint8 [240, 32, 32, 3]."""
    source = open_source("shapes", resolution=SIDE, limit=240)
    return np.stack([source.load(i, SIDE)[0] for i in range(240)])


@pytest.fixture(scope="module")
def dark(shapes: np.ndarray) -> np.ndarray:
    """The second half at half its brightness."""
    return shapes[120:] // 2


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray | None = None, **more: np.ndarray) -> Path:
    np.savez(path, *([images] if labels is None else [images, labels]), allow_pickle=False, **more)
    return path


def write_folder(path: Path, images: np.ndarray) -> Path:
    path.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(path / f"{index:06d}.png")
    return path


def write_tar(path: Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for index, image in enumerate(images):
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, format="PNG")
            parts = {"png": buffer.getvalue()}
            if labels is not None:
                parts["cls"] = str(labels[index]).encode()
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{index:06d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    return path


def test_every_kind_of_image_set_yields_the_same_pixels_and_labels(tmp_path: Path, shapes: np.ndarray) -> None:
    images, labels = shapes[:23], np.arange(23) % 5
    np.savez_compressed(tmp_path / "packed.npz", images, labels)
    classes = tmp_path / "classes"
    for index in range(23):  # one folder a class
        folder = classes / f"{labels[index]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index]).save(folder / f"{index:06d}.png")
    by_class = np.argsort(labels, kind="stable")
    shuffled = by_class[sample_order(23, seed=0)]
    sets: dict[str, tuple[ImageSet, np.ndarray]] = {
        "array": (ArrayImages(images=images, classes=labels), np.arange(23)),
        "npz": (open_images(write_npz(tmp_path / "plain.npz", images, labels)), np.arange(23)),
        "packed": (open_images(tmp_path / "packed.npz"), np.arange(23)),
        "tar": (open_images(write_tar(tmp_path / "shard.tar", images, labels)), np.arange(23)),
        "folder": (open_images(classes), shuffled),
        "folder by name": (open_images(classes, by_name=True), by_class),
    }
    for name, (found, order) in sets.items():
        batches = list(found.batches(5))
        assert [len(b) for b in batches] == [5, 5, 5, 5, 3], name
        assert np.array_equal(np.concatenate(batches), images[order]), name
        classes_found = found.labels()
        assert classes_found is not None and np.array_equal(classes_found, labels[order]), name
        assert found.count in (23, None) and (found.count == 23 or name == "tar")


def test_the_first_images_of_a_folder_sorted_by_class_are_of_all_its_classes(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray
) -> None:
    for index, image in enumerate(shapes[:100]):
        folder = tmp_path / f"{index // 10:04d}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    images = open_images(tmp_path)
    labels = images.labels()
    assert labels is not None
    assert len(set(labels[:40])) >= 8, "a fair draw of 40 misses more than two of ten classes once in 10,000 times"
    first = np.concatenate(list(images.batches(40)))[:40]
    some = compute_statistics(images, extractor, limit=40)
    expected = compute_statistics(ArrayImages(images=first), extractor)
    assert some.count == 40 and np.allclose(some.mean, expected.mean)


@given(
    rows=st.integers(0, 300),
    limit=st.integers(0, 60),
    at_once=st.integers(1, 50),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=9),
)
def test_activations_that_are_kept_are_a_fair_draw(rows: int, limit: int, at_once: int, sizes: list[int]) -> None:
    """Whatever the batches: those with the smallest of equally distributed numbers, in their order."""
    x = torch.arange(rows, dtype=torch.float32)[:, None].expand(-1, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "KEPT_AT_ONCE", at_once)
        kept, start = references._Kept(limit), 0
        for size in itertools.cycle(sizes):
            if start >= rows:
                break
            kept.add(x[start : start + size])
            start += size
        found = kept.result()
    wanted = np.sort(np.argsort(np.random.default_rng(0).random(rows))[:limit])
    assert (found is None and not len(wanted)) or (found is not None and found[:, 0].tolist() == wanted.tolist())


def test_images_of_prompts_are_read_by_the_numbers_in_their_names(tmp_path: Path, shapes: np.ndarray) -> None:
    names = ["0", "1", "2", "9", "10", "11", "100"]
    for name, image in zip(names, shapes):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    (batch,) = open_images(tmp_path, by_name=True).batches(10)
    assert np.array_equal(batch, shapes[: len(names)])


def test_folders_of_real_images_are_cropped_as_adm_does(tmp_path: Path) -> None:
    from featcache.sources.pixels import center_crop

    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    sizes = [(50, 90), (200, 70)]
    originals = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    for index, image in enumerate(originals):
        image.save(tmp_path / "a" / f"{index}.png")
    (batch,) = FolderImages(path=tmp_path, resolution=SIDE, by_name=True).batches(4)
    assert np.array_equal(batch, np.stack([center_crop(image, SIDE) for image in originals]))
    with pytest.raises(UserError, match="square RGB"):
        list(FolderImages(path=tmp_path).batches(4))


def test_evaluate_is_the_metrics_on_the_activations(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray, dark: np.ndarray
) -> None:
    samples = write_npz(tmp_path / "samples.npz", dark)
    result = evaluate(samples, write_folder(tmp_path / "real", shapes[:120]), extractor, batch_size=50)
    real, fake = (extractor.features(torch.from_numpy(x).permute(0, 3, 1, 2))["pool"] for x in (shapes[:120], dark))
    assert real is not None and fake is not None
    covered = manifold_coverage(real, fake)
    assert result["metrics"]["embedded-FID"] == pytest.approx(
        frechet_distance(*moments_of(fake), *moments_of(real)), rel=1e-4
    )
    assert result["metrics"]["embedded-Precision"] == pytest.approx(covered.precision, abs=0.01)
    assert result["metrics"]["embedded-Recall"] == pytest.approx(covered.recall, abs=0.01)
    assert set(result["metrics"]) == {"embedded-FID", "embedded-KID", "embedded-Precision", "embedded-Recall"}
    json.dumps(result)


def test_better_samples_score_better(extractor: Extractor, shapes: np.ndarray, dark: np.ndarray) -> None:
    reference = compute_statistics(ArrayImages(images=shapes[:120]), extractor)
    good = evaluate(ArrayImages(images=shapes[120:]), reference, extractor)["metrics"]
    bad = evaluate(ArrayImages(images=dark), reference, extractor)["metrics"]
    assert good["embedded-FID"] < 0.5 * bad["embedded-FID"]
    assert good["embedded-KID"] < 0.5 * bad["embedded-KID"]
    assert good["embedded-Precision"] > bad["embedded-Precision"]


def test_results_do_not_depend_on_the_batch_size(extractor: Extractor, shapes: np.ndarray, dark: np.ndarray) -> None:
    reference = compute_statistics(ArrayImages(images=shapes[:120]), extractor)
    a, b = (evaluate(ArrayImages(images=dark), reference, extractor, batch_size=size)["metrics"] for size in (7, 120))
    assert a == pytest.approx(b, rel=1e-4)


def test_statistics_survive_a_file_and_carry_their_provenance(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray
) -> None:
    made = compute_statistics(ArrayImages(images=shapes, description="shapes"), extractor, keep_features=50)
    save_statistics(tmp_path / "deep" / "ref.npz", made)
    loaded = load_statistics(tmp_path / "deep" / "ref.npz")
    assert np.array_equal(loaded.mean, made.mean) and np.array_equal(loaded.covariance, made.covariance)
    assert loaded.features is not None and made.features is not None
    assert torch.equal(loaded.features, made.features) and loaded.features.shape == (50, 128)
    assert (loaded.count, loaded.resolution) == (240, SIDE)
    assert loaded.provenance["extractor"] == extractor.provenance
    assert loaded.provenance["source"] == "shapes"
    from_file = evaluate(ArrayImages(images=shapes[:60]), tmp_path / "deep" / "ref.npz", extractor)
    assert from_file["metrics"] == evaluate(ArrayImages(images=shapes[:60]), made, extractor)["metrics"]


def test_statistics_are_made_from_any_images_in_one_call(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray
) -> None:
    folder = write_folder(tmp_path / "real", np.repeat(np.repeat(shapes[:12], 2, 1), 2, 2))
    made = write_statistics(folder, tmp_path / "ref.npz", extractor, resolution=SIDE, features=5, limit=10)
    loaded = load_statistics(tmp_path / "ref.npz")
    assert loaded.features is not None
    assert (loaded.count, loaded.resolution, len(loaded.features)) == (10, SIDE, 5)
    assert np.array_equal(loaded.mean, made.mean)
    with pytest.raises(UserError, match=r"does not end in \.npz"):
        write_statistics(folder, tmp_path / "ref.pt", extractor)


def test_statistics_of_another_extractor_or_resolution_are_refused(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray
) -> None:
    path = tmp_path / "ref.npz"
    save_statistics(path, compute_statistics(ArrayImages(images=shapes[:20]), extractor))
    with pytest.raises(UserError, match=r"another extractor.*weights_sha256"):
        evaluate(ArrayImages(images=shapes[:20]), path, build_extractor("embedded", random_weights=0))
    large = np.repeat(np.repeat(shapes[:20], 2, 1), 2, 2)
    with pytest.raises(UserError, match="32 pixels, the samples have 64"):
        evaluate(ArrayImages(images=large), path, extractor)
    with pytest.raises(UserError, match="32 pixels, the samples have 64"):
        evaluate(ArrayImages(images=large), write_npz(tmp_path / "small.npz", shapes[:20]), extractor)


def test_adm_references_give_images_to_other_extractors_and_moments_to_inception(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray
) -> None:
    """An ADM batch with moments that its images do not have: only the standard Inception may use them."""
    dims = {"mu": 2048, "mu_s": 2023}
    moments: dict[str, np.ndarray] = {n: np.full(d, 7.0) for n, d in dims.items()}
    moments |= {"sigma": np.eye(2048), "sigma_s": np.eye(2023)}
    path = write_npz(tmp_path / "adm.npz", shapes[:30], **moments)
    ours = reference_statistics(path, extractor, resolution=SIDE, need_features=False)
    expected = compute_statistics(ArrayImages(images=shapes[:30]), extractor)
    assert np.array_equal(ours.mean, expected.mean)
    stored = load_statistics(path)
    assert stored.resolution == SIDE and stored.mean[0] == 7 and stored.spatial_mean is not None

    class StandardInception:
        name, is_standard = "inception", True

    inception = reference_statistics(path, StandardInception(), resolution=SIDE, need_features=False)  # type: ignore[arg-type]
    assert inception.mean[0] == 7 and inception.spatial_covariance is not None


def test_bootstrap_intervals_hold_the_values(extractor: Extractor, shapes: np.ndarray, dark: np.ndarray) -> None:
    reference = compute_statistics(ArrayImages(images=shapes[:120]), extractor)
    mixed = np.concatenate([dark[:60], shapes[180:]])
    result = evaluate(ArrayImages(images=mixed), reference, extractor, bootstrap=40)
    assert set(result["intervals"]) == {"embedded-FID", "embedded-Precision", "embedded-Recall"}
    for name, (low, high) in result["intervals"].items():
        assert low <= result["metrics"][name] <= high and high > low
    assert result["details"]["embedded-KID"]["standard_deviation"] > 0
    again = evaluate(ArrayImages(images=mixed), reference, extractor, bootstrap=40)
    assert again["intervals"] == result["intervals"]


def test_few_samples_are_warned_about_and_embedded_numbers_labelled(extractor: Extractor, shapes: np.ndarray) -> None:
    result = evaluate(
        ArrayImages(images=shapes[:60]), compute_statistics(ArrayImages(images=shapes), extractor), extractor
    )
    assert any("60 samples is biased" in w for w in result["warnings"])
    assert any("not FID" in w for w in result["warnings"])
    assert "FID" not in result["metrics"]


def test_fewer_samples_than_asked(extractor: Extractor, shapes: np.ndarray, tmp_path: Path) -> None:
    reference = compute_statistics(ArrayImages(images=shapes), extractor)
    with pytest.raises(UserError, match="holds 20 samples, 50 were asked for"):
        evaluate(ArrayImages(images=shapes[:20]), reference, extractor, count=50)
    with pytest.raises(UserError, match="holds 20 samples, 50 were asked for"):  # known only after reading
        evaluate(write_tar(tmp_path / "few.tar", shapes[:20]), reference, extractor, count=50)
    judged = evaluate(ArrayImages(images=shapes), reference, extractor, count=50)
    assert judged["settings"]["sample_count"] == 50
    only = evaluate(ArrayImages(images=shapes[:50]), reference, extractor)
    assert judged["metrics"] == pytest.approx(only["metrics"], rel=1e-6)


def test_labels_are_recorded_or_missed(extractor: Extractor, shapes: np.ndarray) -> None:
    reference = compute_statistics(ArrayImages(images=shapes), extractor)
    labelled = ArrayImages(images=shapes[:10], classes=np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]))
    result = evaluate(labelled, reference, extractor, metrics=["fid"], require_labels=True)
    assert result["settings"]["labels"] == {"classes": 3, "fewest": 3, "most": 4}
    with pytest.raises(UserError, match="holds no labels"):
        evaluate(ArrayImages(images=shapes[:10]), reference, extractor, require_labels=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.astype(np.float32) / 255, "float32 images"),
        (lambda x: x.transpose(0, 3, 1, 2), "shape"),
        (lambda x: x[:, :16], "square RGB"),
        (lambda x: x[..., 0], "square RGB"),
    ],
)
def test_wrong_type_or_size_is_refused_before_reading(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray, make: object, message: str
) -> None:
    path = write_npz(tmp_path / "bad.npz", make(shapes[:8]))  # type: ignore[operator]
    reference = compute_statistics(ArrayImages(images=shapes[:20]), extractor)
    with pytest.raises(UserError, match=message):
        evaluate(path, reference, extractor)


def test_images_of_mixed_sizes_are_refused_by_name(tmp_path: Path, extractor: Extractor, shapes: np.ndarray) -> None:
    folder = write_folder(tmp_path / "mixed", shapes[:3])
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "odd.png")
    reference = compute_statistics(ArrayImages(images=shapes[:20]), extractor)
    with pytest.raises(UserError, match=r"odd\.png holds images of 64 pixels beside images of 32"):
        evaluate(folder, reference, extractor)


def test_truncated_and_foreign_files(tmp_path: Path, shapes: np.ndarray) -> None:
    with pytest.raises(UserError, match="there is nothing at"):
        open_images(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(UserError, match="not a readable npz"):
        list(NpzImages(path=tmp_path / "text.npz").batches(4))
    np.savez(tmp_path / "other.npz", images=shapes[:4])
    with pytest.raises(UserError, match="has no array 'arr_0'"):
        list(NpzImages(path=tmp_path / "other.npz").batches(4))
    np.savez(tmp_path / "objects.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match="object"):
        list(NpzImages(path=tmp_path / "objects.npz").batches(4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        open_images(tmp_path / "empty")
    folder = write_folder(tmp_path / "broken", shapes[:2])
    data = (folder / "000001.png").read_bytes()
    (folder / "000001.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="000001"):
        list(FolderImages(path=folder).batches(4))
    with pytest.raises(UserError, match="holds no statistics"):
        load_statistics(write_npz(tmp_path / "images.npz", shapes[:4]))
    with pytest.raises(UserError, match="no samples"):
        tarfile.open(tmp_path / "empty.tar", "w").close()
        list(TarImages(pattern=str(tmp_path / "empty.tar")).batches(4))


def test_unknown_metrics_and_extractors_list_the_valid_ones(extractor: Extractor, shapes: np.ndarray) -> None:
    with pytest.raises(UserError, match="inception, embedded, embedded-vit, dinov2"):
        build_extractor("vgg")
    reference = compute_statistics(ArrayImages(images=shapes[:20]), extractor)
    for metric in ("inception_score", "nonsense"):
        with pytest.raises(UserError, match="fid, precision, recall, kid"):
            evaluate(ArrayImages(images=shapes[:20]), reference, extractor, metrics=[metric])


def test_metrics_that_need_activations_say_so(tmp_path: Path, extractor: Extractor, shapes: np.ndarray) -> None:
    save_statistics(
        tmp_path / "moments.npz", compute_statistics(ArrayImages(images=shapes), extractor, keep_features=0)
    )
    samples = ArrayImages(images=shapes[:20])
    with pytest.raises(UserError, match="moments only"):
        evaluate(samples, tmp_path / "moments.npz", extractor)
    only_fid = evaluate(samples, tmp_path / "moments.npz", extractor, metrics=["fid"])
    assert list(only_fid["metrics"]) == ["embedded-FID"]


def test_prefetch_keeps_order_passes_errors_and_stops() -> None:
    made: list[int] = []

    def items(stop: int, fail_at: int | None = None) -> Iterator[int]:
        for i in range(stop):
            if i == fail_at:
                raise ValueError("bad item")
            made.append(i)
            yield i

    assert list(prefetch(items(50), depth=3)) == list(range(50))
    with pytest.raises(ValueError, match="bad item"):
        list(prefetch(items(50, fail_at=4), depth=3))
    made.clear()
    stream = prefetch(items(10_000), depth=3)
    assert next(stream) == 0
    stream.close()
    assert len(made) < 10


def test_progress_and_times_are_reported(extractor: Extractor, shapes: np.ndarray) -> None:
    told = Told()
    result = evaluate(
        samples := ArrayImages(images=shapes[:50]),
        compute_statistics(samples, extractor),
        extractor,
        batch_size=20,
        bootstrap=3,
        progress=told,
    )
    first, *bootstraps = told.tasks
    assert first == ("features of the samples", 50, 0, "images") and told.counts[:3] == [20, 20, 10]
    assert {(total, unit) for _, total, _, unit in bootstraps} == {(3, "replicates")}
    assert told.counts[3:] == [1] * 3 * len(bootstraps)
    assert set(result["time_s"]) == {"samples", "reference", "metrics"}


def test_statistics_that_do_not_say_what_they_are_of_are_told_apart(extractor: Extractor, shapes: np.ndarray) -> None:
    first, second = (
        replace(compute_statistics(ArrayImages(images=part), extractor), provenance={}, count=None)
        for part in (shapes[:100], shapes[100:200])
    )
    judged = [evaluate(ArrayImages(images=shapes[:50]), each, extractor) for each in (first, second, first)]
    names = [each["settings"]["reference"] for each in judged]
    assert names[0] == names[2] != names[1]
    assert not any("does not say which network" in warning for each in judged for warning in each["warnings"])


def test_what_is_doubtful_of_a_reference_is_said(extractor: Extractor, shapes: np.ndarray) -> None:
    made = compute_statistics(ArrayImages(images=shapes), extractor, keep_features=50)
    judged = compute_statistics(ArrayImages(images=shapes[:50]), extractor)
    earlier = replace(made, provenance={k: v for k, v in made.provenance.items() if k != "drawn"})

    def said(reference: Statistics, *metrics: str, network: Extractor = extractor) -> str:
        return " ".join(_warnings(metrics, judged, reference, network, by_prompt=False))

    first = "activations are of its first images"
    assert first in said(earlier, "precision") and first not in said(earlier, "fid") + said(made, "precision")
    whole = replace(compute_statistics(ArrayImages(images=shapes), extractor), provenance={})
    assert first not in said(whole, "precision"), "all are there"
    inception: Any = SimpleNamespace(name="inception", is_standard=True, metric_names={"fid": "FID"})
    outside, adm = (replace(whole, spatial_mean=mean) for mean in (None, np.zeros(2023)))
    network = "does not say which network"
    assert network in said(outside, "fid", network=inception)
    assert network not in said(adm, "fid", network=inception) + said(made, "fid", network=inception)
    assert "holds 240 images" in said(made, "fid", network=inception)


@pytest.mark.parametrize("kind", ["lopsided", "negative"])
def test_a_covariance_that_is_none_is_refused(
    tmp_path: Path, extractor: Extractor, shapes: np.ndarray, kind: str
) -> None:
    made = compute_statistics(ArrayImages(images=shapes[:50]), extractor)
    covariance = made.covariance.copy()
    if kind == "lopsided":
        covariance[0, 1] += np.abs(covariance).max()
    else:
        covariance[3, 3] = -1e-3
    save_statistics(tmp_path / "reference.npz", replace(made, covariance=covariance))
    with pytest.raises(UserError, match="sigma is no covariance"):
        load_statistics(tmp_path / "reference.npz")


@pytest.mark.slow
def test_inception_end_to_end_with_random_weights(shapes: np.ndarray, dark: np.ndarray) -> None:
    """All of ADM's metrics through the full-size network."""
    inception = build_extractor("inception", random_weights=0)
    reference = compute_statistics(ArrayImages(images=shapes[:24]), inception, batch_size=12)
    result = evaluate(ArrayImages(images=dark[:24]), reference, inception, batch_size=12)
    assert set(result["metrics"]) == {
        f"random-inception-{m}" for m in ("FID", "sFID", "IS", "Precision", "Recall", "KID")
    }
    assert all(np.isfinite(v) for v in result["metrics"].values())
    same = evaluate(ArrayImages(images=shapes[:24]), reference, inception, batch_size=12)["metrics"]
    assert same["random-inception-FID"] == pytest.approx(0, abs=1e-6 * result["metrics"]["random-inception-FID"] + 1e-9)
    assert same["random-inception-Precision"] == same["random-inception-Recall"] == 1


@pytest.mark.slow
def test_dinov2_with_random_weights(shapes: np.ndarray) -> None:
    dinov2 = build_extractor("dinov2", random_weights=0)
    pool = dinov2.features(torch.from_numpy(shapes[:2]).permute(0, 3, 1, 2))["pool"]
    assert pool is not None and pool.shape == (2, 1024) and bool(pool.isfinite().all())
    assert set(dinov2.metric_names.values()) == {
        "random-dinov2-FID", "random-dinov2-KID", "random-dinov2-Precision", "random-dinov2-Recall",
    }  # fmt: skip


def build_cache(path: Path, data: str, **options: object) -> Path:
    """A small cache of the tiny VAE's moments."""
    from featcache.builder.request import BuildRequest
    from featcache.builder.run import build

    request = BuildRequest(data=data, vae="tiny", resolution=SIDE, device="cpu", out=path, **options)  # type: ignore[arg-type]
    return build(request, Quiet()).path


def test_a_caches_own_images_are_the_ones_it_encoded(tmp_path: Path, extractor: Extractor, shapes: np.ndarray) -> None:
    path = build_cache(tmp_path / "cache", "shapes", limit=20)
    images = open_images(path)
    pixels = np.concatenate(list(images.batches(8)))
    import featcache

    keys = featcache.open(path).keys()
    by_key = np.array([int(key.rsplit("/", 1)[1]) for key in keys])
    assert sorted(by_key) == list(range(20)) and list(by_key) != list(range(20))
    assert np.array_equal(pixels, shapes[by_key])
    labels = images.labels()
    assert labels is not None
    assert np.array_equal(labels, [open_source("shapes", resolution=SIDE, limit=20).label(i) for i in by_key])
    result = evaluate(ArrayImages(images=shapes[20:60]), path, extractor)
    assert result["settings"]["reference_count"] == 20
    assert result["settings"]["reference"].startswith("images of cache shapes")


def test_a_folders_cache_needs_its_folder_and_leaves_skipped_images_out(tmp_path: Path, shapes: np.ndarray) -> None:
    folder = tmp_path / "data"
    write_folder(folder / "a", shapes[:5])
    (folder / "a" / "000002.png").write_bytes(b"not a picture")
    path = build_cache(tmp_path / "cache", str(folder), on_bad_image="skip")
    with pytest.raises(UserError, match="built from a folder") as caught:
        list(open_images(path).batches(8))
    assert caught.value.remedy is not None and "--data DIR" in caught.value.remedy
    (batch,) = open_images(path, data=str(folder)).batches(8)
    kept = {shapes[i].tobytes() for i in (0, 1, 3, 4)}
    assert {image.tobytes() for image in batch} == kept and len(batch) == 4


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """Peak memory of a fresh process over 480 MB of images that are made as they are read."""
    script = """
        import resource, numpy as np, torch
        from trainer.evaluate.references import compute_statistics

        class Drawn:
            description, count = "drawn", None
            def __init__(self, n): self.n = n
            def labels(self): return None
            def batches(self, size):
                for i in range(0, self.n, size):
                    yield np.random.default_rng(i).integers(0, 256, (size, 128, 128, 3), dtype=np.uint8)

        class Means:
            name, resolution, is_standard, metric_names = "means", None, False, {"fid": "means-FID"}
            feature_dims, provenance, device = {"pool": 48}, {}, torch.device("cpu")
            def features(self, x):
                pool = torch.nn.functional.adaptive_avg_pool2d(x.float(), 4).flatten(1)
                return {"pool": pool, "spatial": None, "logits": None}

        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        compute_statistics(Drawn(320), Means(), batch_size=32, keep_features=100)
        before = peak()
        made = compute_statistics(Drawn(9600), Means(), batch_size=32, keep_features=100)
        assert made.count == 9600 and len(made.features) == 100
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * unit < 32 * 2**20
