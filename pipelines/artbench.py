"""Parts ArtBench-10's mixed archive by its metadata: `python -m pipelines.artbench MIXED METADATA.csv OUT`.

The first archive of the 256 x 256 images (liaopeiyuan/artbench, arXiv 2206.11404) has a folder for each of ten styles with
6,000 images, training and test images together; which is which stands in the metadata's column `split`. OUT gets `train/` and
`test/` with a folder for each style, whose files are links to the same bytes (copies where the disk has none). The second
archive is parted already and needs none of this.
"""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from featcache.console import console, run_app, safe
from featcache.errors import UserError
from featcache.paths import typed
from featcache.sources.base import EXTENSIONS
from featcache.store import files

SPLITS = ("train", "test")
WHOLE = {"train": 50_000, "test": 10_000}
_USAGE = "Type: python -m pipelines.artbench MIXED METADATA.csv OUT"


def read_splits(metadata: Path) -> dict[tuple[str, str], str]:
    """(style, file name without its ending) => `train` or `test`.

    Raises:
        UserError: no CSV with the columns name, label and split; another split; an image twice.
    """
    splits: dict[tuple[str, str], str] = {}
    try:
        with metadata.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in ("name", "label", "split") if column not in (reader.fieldnames or ())]
            if missing:
                raise UserError(
                    f"{metadata} has no column {' and '.join(missing)}",
                    remedy="Pass ArtBench's own metadata (ArtBench-10.csv).",
                )
            for row in reader:
                image = str(row["label"]), _stem(str(row["name"]))
                if row["split"] not in SPLITS or image in splits:
                    wrong = "is there twice" if image in splits else f"is of the split {row['split']!r:.40}"
                    raise UserError(f"{metadata}, line {reader.line_num}: {row['name']!s:.100} {wrong}")
                splits[image] = str(row["split"])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{metadata} cannot be read: {error!s:.200}", remedy=_USAGE) from error
    return splits


def _stem(name: str) -> str:
    """Without an ending of images: names have dots of their own."""
    stem, ending = os.path.splitext(name)  # noqa: PTH122 (a name in a table)
    return stem if ending.lower() in EXTENSIONS else name


def part(mixed: Path, metadata: Path, out: Path) -> Counter[str]:
    """Makes `out` with the splits; how many images each has. Whole or not at all.

    Raises:
        UserError: as `read_splits`; images that the metadata does not name, or the other way around; `out` is there.
    """
    if out.exists():
        raise UserError(f"{out} is there already", remedy="Name another folder, or remove this one.")
    splits = read_splits(metadata)
    images = {
        (path.parent.name, _stem(path.name)): path
        for path in sorted(mixed.glob("*/*"))
        if path.suffix.lower() in EXTENSIONS and path.is_file()
    }
    _check(images, splits, mixed, metadata)
    counts: Counter[str] = Counter()
    with files.atomic_directory(out) as made:
        for image, path in images.items():
            folder = made / splits[image] / image[0]
            files.make_directory(folder)
            _link(path, folder / path.name)
            counts[splits[image]] += 1
    return counts


def _check(
    images: Mapping[tuple[str, str], Path], splits: Mapping[tuple[str, str], str], mixed: Path, metadata: Path
) -> None:
    unknown, absent = sorted(images.keys() - splits.keys()), sorted(splits.keys() - images.keys())
    if unknown:
        raise UserError(
            f"{len(unknown):,} of {len(images):,} images below {mixed} are not in {metadata}, for example {'/'.join(unknown[0])}",
            remedy="Pass the 256 x 256 images: those of the original size are others (66,000 files).",
        )
    if absent:
        raise UserError(
            f"{len(absent):,} of {len(splits):,} images that {metadata} names are not below {mixed}, for example "
            f"{'/'.join(absent[0])}",
            remedy="Unpack the whole archive, one folder for each style.",
        )


def _link(path: Path, target: Path) -> None:
    with contextlib.suppress(OSError):
        os.link(path, target)
        return
    shutil.copyfile(path, target)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    mixed: Annotated[Path, typer.Argument(help="Folder with a folder for each style.", show_default=False)],
    metadata: Annotated[Path, typer.Argument(help="ArtBench-10.csv.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to make, e.g. data/artbench.", show_default=False)],
) -> None:
    """Part ArtBench's mixed archive into train and test, as its metadata says."""
    counts = part(mixed, metadata, out)
    console.print(", ".join(f"{split}: {counts[split]:,} images" for split in SPLITS))
    if dict(counts) != WHOLE:
        console.print("[yellow]note:[/yellow] ArtBench-10 has 50,000 images to train with and 10,000 to test with")
    console.print(f"next: featcache build --data {safe(typed(out / 'train'))} --encoder dinov2-b@9,11", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(run_app(app))
