"""ArtBench's mixed archive is parted by its metadata, into links to the same bytes."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.sources.decoders import decode_pil
from pipelines.artbench import part, read_splits

STYLES = [f"style_{i}" for i in range(10)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Ten styles of three images, the last of each to test with; names have dots and no ending in the table."""
    rows = []
    generator = np.random.Generator(np.random.Philox(key=3))
    for style in STYLES:
        for i in range(3):
            name = f"a.painter_{style} no. {i}"
            file = tmp_path / "mixed" / style / f"{name}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
            rows.append({"name": name, "artist": "x", "label": style, "split": "test" if i == 2 else "train"})
    write(tmp_path / "metadata.csv", rows)
    return tmp_path / "mixed"


def write(file: Path, rows: list[dict[str, str]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, ["name", "artist", "label", "split"])
        table.writeheader()
        table.writerows(rows)


def test_the_parts_are_those_of_the_metadata_and_train(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "artbench"
    assert dict(part(mixed, tmp_path / "metadata.csv", out)) == {"train": 20, "test": 10}
    for path in mixed.glob("*/*"):
        split = "test" if path.stem.endswith("2") else "train"
        assert (out / split / path.parent.name / path.name).read_bytes() == path.read_bytes()
    assert len(list(out.glob("*/*/*"))) == 30
    with pytest.raises(UserError, match="is there already"):
        part(mixed, tmp_path / "metadata.csv", out)
    with pytest.raises(UserError, match="look like parts of a data set"):
        build(BuildRequest(data=str(out), vae="tiny", resolution=32, out=tmp_path / "wrong"), Quiet())
    build(BuildRequest(data=str(out / "train"), vae="tiny", resolution=32, out=tmp_path / "cache"), Quiet())
    dataset = featcache.open(tmp_path / "cache").manifest.dataset
    assert (dataset.count, list(dataset.class_names)) == (20, STYLES)


def test_what_does_not_fit_is_refused_and_leaves_nothing(mixed: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "metadata.csv", tmp_path / "artbench"
    splits = read_splits(table)
    assert len(splits) == 30
    rows = [
        {"name": name, "artist": "x", "label": style, "split": split} for (style, name), split in sorted(splits.items())
    ]
    for content, why in (
        (rows[1:], "1 of 30 images below .* are not in .*, for example style_0/a.painter_style_0 no. 0"),
        (
            [*rows, {**rows[0], "name": "gone"}],
            "1 of 31 images that .* names are not below .*, for example style_0/gone",
        ),
        ([*rows, rows[0]], "line 32: .* is there twice"),
        ([{**rows[0], "split": "validation"}], "is of the split 'validation'"),
    ):
        write(table, content)
        with pytest.raises(UserError, match=why):
            part(mixed, table, out)
        assert not out.exists()
    table.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no column name and label and split"):
        part(mixed, table, out)
    with pytest.raises(UserError, match="cannot be read"):
        part(mixed, tmp_path / "none.csv", out)


def test_as_it_is_typed(mixed: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipelines.artbench",
        str(mixed),
        str(tmp_path / "metadata.csv"),
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "train: 20 images, test: 10 images" in done.stdout and "50,000" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 2 and "is there already" in again.stderr and "Traceback" not in again.stderr


def test_the_crop_leaves_images_of_the_asked_size_as_they_are() -> None:
    """ArtBench's have 256 pixels a side: byte for byte what the file holds."""
    pixels = np.random.Generator(np.random.Philox(key=5)).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind)
        stored = np.asarray(Image.open(io.BytesIO(stream.getvalue())).convert("RGB"))
        assert np.array_equal(decode_pil(stream.getvalue(), "x", 256), stored)
