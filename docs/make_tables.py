"""The tables of docs/encoders.md from the code: `python docs/make_tables.py` rewrites them in the page."""

from __future__ import annotations

import sys
from pathlib import Path

from featcache.encoders.table import CLIP_MEAN, ENCODERS, HALF, IMAGENET_MEAN, TEXTS, VAES, VisionEntry

_CONSTANTS = {IMAGENET_MEAN: "ImageNet", CLIP_MEAN: "CLIP", HALF: "0.5"}


def _preparation(entry: VisionEntry) -> str:
    constants = _CONSTANTS[entry.mean]
    if entry.patch == 16:
        return f"normalise ({constants})"
    steps = f"resize, normalise ({constants})" if entry.resize_first else f"normalise ({constants}), resize"
    return steps + ("" if entry.resize_mode == "bicubic" else f" {entry.resize_mode}")


def _rows(title: list[str], rows: list[list[str]]) -> str:
    lines = [title, ["---"] * len(title), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def vision_table() -> str:
    """One line per encoder, as Markdown."""
    title = ["name", "layers", "width", "patch", "trained at", "input at 256 / 512 px", "preparation", "last norm"]
    title += ["class token", "weights", "licence", "paper"]
    rows = []
    for name, entry in ENCODERS.items():
        inputs = f"{entry.input_px(256)} / {entry.input_px(512)}"
        row = [f"`{name}`", f"0..{entry.final_layer}", entry.width, entry.patch, entry.native_px, inputs]
        row += [_preparation(entry), *("yes" if fact else "no" for fact in (entry.final_norm, entry.class_token))]
        row += [entry.hub_id or entry.weights_page]
        rows.append([str(cell) for cell in [*row, entry.licence, entry.paper]])
    return _rows(title, rows)


def vae_table() -> str:
    """One line per VAE, as Markdown."""
    title = ["name", "class", "downsampling", "channels", "scale", "posterior", "weights", "licence", "what"]
    rows = []
    for name, entry in VAES.items():
        scale = entry.config.get("scaling_factor", 0.18215 if name == "consistency" else "in its file")
        row = [f"`{name}`", entry.model_class, entry.downsampling, entry.latent_channels, scale]
        row += ["yes" if entry.posterior else "no", entry.hub_id or "in the package", entry.licence, entry.note]
        rows.append([str(cell) for cell in row])
    return _rows(title, rows)


def text_table() -> str:
    """One line per text encoder, as Markdown."""
    title = ["name", "tokens", "width", "pooled", "layers", "weights and vocabulary", "licence", "paper", "what"]
    rows = []
    for name, entry in TEXTS.items():
        row = [f"`{name}`", entry.tokens, entry.width, entry.projected, entry.depth, entry.hub_id or "none"]
        rows.append([str(cell) for cell in [*row, entry.licence, entry.paper, entry.note]])
    return _rows(title, rows)


def with_tables(page: str) -> str:
    """The page with its tables put between their markers."""
    for mark, table in (("vision", vision_table()), ("vae", vae_table()), ("text", text_table())):
        start, end = f"<!-- table: {mark} -->\n", f"<!-- end: {mark} -->"
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = f"{before}{start}{table}\n{end}{after}"
    return page


def main() -> None:
    """Rewrites the page given as argument, or encoders.md beside this file."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("encoders.md")
    path.write_text(with_tables(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
