"""The figures of `docs/embedded.md` from `figures.json`: `python -m pipelines.embedded.tables` rewrites them in the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.encoders import tiny
from featcache.sources.shapes_text import ATTRIBUTES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "embedded.md"
BEGIN, END = "<!-- begin: figures -->", "<!-- end: figures -->"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def page_tables(figures: Mapping[str, Any]) -> str:
    """All tables and lists of the page that state figures, as Markdown."""
    return "\n\n".join(
        [
            _psnr(figures["vae"]),
            _levels(figures["vae"]),
            _probes(figures["vae"]),
            _classes(figures),
            _captions(figures["caption-judge"]),
            _runs(figures),
        ]
    )


def _psnr(vae: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{found['mean']:.2f} dB", f"{found['lowest']:.2f} dB", f"{found['images']:,}")
        for name, found in vae["psnr_db"].items()
    ]
    return _table(["PSNR of the VAE on unseen images", "mean", "lowest", "images"], rows)


def _levels(vae: Mapping[str, Any]) -> str:
    kind = "photographs" if "photographs" in vae["levels"] else "shapes"
    rows = [
        (
            f"`{name}`",
            f"{row['rms']:.2f}",
            _percent(row["mean_share"]),
            f"{row['rank']:.1f}",
            "" if row["cosine"] is None else f"{row['cosine']:.3f}",
            "" if row["branch"] is None else _percent(row["branch"]),
        )
        for name, row in vae["levels"][kind].items()
    ]
    head = [
        f"levels, 100 {kind} of 64 px",
        "rms",
        "share of the mean",
        "effective rank",
        "cosine to the one before",
        "branch",
    ]
    return _table(head, rows)


def _probes(vae: Mapping[str, Any]) -> str:
    kinds = list(vae["probes"])
    names = {
        "down3.res0": "`down3.res0`, the last of G3",
        "mid.res1": "`mid.res1`, the last of G4",
        "latent": "the latent, all cells",
    }
    rows = [
        (
            names.get(name, name if "latent" in name else f"`{name}`"),
            *(_percent(vae["probes"][kind][name]) for kind in kinds),
        )
        for name in vae["probes"][kinds[0]]
    ]
    return _table(["class, read linearly from pooled", *kinds], rows)


def _classes(figures: Mapping[str, Any]) -> str:
    kinds = [kind for kind in ("shapes", "photographs") if kind in figures["vit"]]
    rows = [
        (label, *(_percent(figures[part][kind][how]) for kind in kinds for how in ("linear", "neighbours")))
        for part, label in (("vit", "ViT, mean patch token"), ("judge", "judge, pooled features"))
    ]
    head = [
        "class of unseen images, read from",
        *(f"{kind}, {how}" for kind in kinds for how in ("linear", "10 neighbours")),
    ]
    return _table(head, rows)


def _captions(judge: Mapping[str, Any]) -> str:
    rows = [
        (
            kind,
            *(_percent(share) for share in shares.values()),
        )  # all four first, as `trainer.evaluate.obeyed.shares` does
        for kind, shares in judge["obeyed"].items()
    ]
    return _table([f"caption judge, {judge['pictures']:,} unseen pictures each", "all four", *ATTRIBUTES], rows)


def _runs(figures: Mapping[str, Any]) -> str:
    lines = []
    for part in tiny.NAMES:
        run = figures[part]
        machine = run["machine"]
        lines.append(
            f"- `{part}`: {run['parameters']:,} parameters; {run['steps']:,} steps of {run['batch_size']} images"
            f"{_photographs(run['training_photographs'])}, {run['precision']}; `{run['command']}`; "
            f"{run['train_seconds'] / 60:.0f} minutes on {machine['threads']} thread of {machine['cpu']}, {run['date']}, "
            f"torch {machine['packages']['torch']}."
        )
    return "\n".join(lines)


def _photographs(count: int) -> str:
    return f" ({count:,} photographs to choose from)" if count else ""


def rewrite(page: Path, figures: Mapping[str, Any]) -> None:
    text = page.read_text()
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{page_tables(figures)}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    rewrite(PAGE, json.loads((tiny.FOLDER / "figures.json").read_text()))
