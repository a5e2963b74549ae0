"""What `featcache derive` does."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from rich.table import Table

from featcache.builder.derive import IMAGES, DeriveRequest, DeriveResult, derive
from featcache.console import console, safe, size_text
from featcache.console_progress import RichProgress
from featcache.errors import UserError
from featcache.paths import check_output
from featcache.read.maps import is_saved_map, save_map
from featcache.settings import is_number

MAX_VARIANCE = 1e30


def derive_feature(
    cache: Path,
    feature: str,
    *,
    components: int | None,
    like: str | None,
    map_file: Path | None,
    images: str | None,
    seed: int | None,
    name: str | None,
    save: Path | None,
) -> None:
    """Derives, writes the map, and prints what its components say of the tokens."""
    if like is not None and map_file is not None:
        raise UserError("--like and --map both say which map to take", remedy="Leave one of them out.")
    if (like or map_file) and (images is not None or seed is not None):
        raise UserError(
            "--images and --seed say where components are looked for, and these are found already",
            remedy="Leave them out, or leave --like and --map out.",
        )
    if save is not None:
        check_output(save, (".safetensors",), example="map.safetensors")
        if save.exists() and not is_saved_map(save):
            raise UserError(f"{save} is there and is no map", remedy="Type another name with --save-map.")
    request = DeriveRequest(
        cache=cache,
        feature=feature,
        components=components,
        like=like,
        map=map_file,
        images=_images(images),
        seed=seed or 0,
        name=name,
    )
    with RichProgress() as progress:
        found = derive(request, progress)
    _print_components(found)
    if save is not None:
        assert found.spec.derived is not None
        save_map(found.spec.derived.map, save)
        console.print(f"map: [bold]{safe(save)}[/bold]")
    if not found.images:
        console.print(f"{safe(found.spec.name)} of {safe(cache)} is complete already: nothing to derive")
    size = size_text(found.spec.bytes_per_sample)
    console.print(f"feature: [bold]{safe(found.spec.name)}[/bold]   {found.spec.shape_text}, {size} per image")


def _images(text: str | None) -> int | None:
    if text is None:
        return IMAGES
    if text == "all":
        return None
    if not is_number(text) or not int(text):
        raise UserError(
            f"--images {text:.40} is not a number of images", remedy="Type --images 10000, or --images all."
        )
    return int(text)


def _print_components(found: DeriveResult) -> None:
    """What each component explains, as far as the map says."""
    assert found.spec.derived is not None
    how = found.spec.derived.how
    variance, total = how.get("variance"), how.get("total_variance")
    if not isinstance(variance, list) or not isinstance(total, float) or not 0 < total < MAX_VARIANCE:
        return
    if not all(isinstance(v, float) and abs(v) < MAX_VARIANCE for v in variance):
        return  # a manifest may say anything there
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("component", "variance", "std", "share", "together"):
        table.add_column(title, justify="right", no_wrap=True)
    for i, (value, until) in enumerate(zip(variance, accumulate(variance)), start=1):
        shares = (f"{100 * value / total:.2f} %", f"{100 * until / total:.2f} %")
        table.add_row(str(i), f"{value:.4g}", f"{max(value, 0) ** 0.5:.4g}", *shares)
    console.print_table(table)
