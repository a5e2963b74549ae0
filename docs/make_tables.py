"""Tables of docs/encoders.md and docs/training.md from the code: `python docs/make_tables.py` rewrites them in the pages."""

from __future__ import annotations

import sys
from pathlib import Path

from featcache.encoders.table import CLIP_MEAN, ENCODERS, HALF, IMAGENET_MEAN, TEXTS, VAES, VisionEntry
from featcache.store.manifest import FeatureSpec
from trainer.align import config_class, data_streams, method_names, resolve
from trainer.align.base import FeatureInfo

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
        row = [f"`{name}`", entry.tokens, entry.width, entry.projected or "none", entry.depth, entry.hub_id or "none"]
        rows.append([str(cell) for cell in [*row, entry.licence, entry.paper, entry.note]])
    return _rows(title, rows)


# What the methods read by their defaults at 256 px, the encoder being DINOv2-B: name, decoded shape, codec.
_READ = {
    "vae/moments": ((8, 32, 32), "fp16"),
    "vae/G3": ((4, 256, 512), "int8"),
    "vae/G4": ((4, 256, 512), "int8"),
    "dinov2-b@8": ((256, 768), "int8"),
    "dinov2-b@11": ((256, 768), "int8"),
    "dinov2-b@11.cls": ((768,), "fp16"),
    "dinov2-b@11.pca8": ((256, 8), "fp16"),
}
_IMAGENET, _RATE = 1_281_167, 300


def reading_table() -> str:
    """What each method reads: bytes per image, and at so many images per second."""
    rows = []
    for methods, names in _readers().items():
        specs = [FeatureSpec(name=name, shape=shape, codec=codec) for name, (shape, codec) in _READ.items()]
        read = sum(spec.bytes_per_sample for spec in specs if spec.name in ("vae/moments", *names)) + 8  # the label
        columns = (read / 1e3, read * _RATE / 1e6, 8 * read * _RATE / 1e9, read * _IMAGENET / 1e9)
        features = ", ".join(f"`{name}`" for name in ("vae/moments", *names))
        rows.append(
            [methods, features, *(f"{value:,.{2 if value < 1 else 1 if value < 10 else 0}f}" for value in columns)]
        )
    title = ["method", "reads", "KB an image", "MB/s a GPU", "GB/s for eight", "GB for ImageNet"]
    return _rows(title, rows)


def _readers() -> dict[str, tuple[str, ...]]:
    """Methods, joined where they read alike -> names of what they read beside the latents."""
    available = {name: FeatureInfo(shape=shape) for name, (shape, _) in _READ.items()}
    found: dict[tuple[str, ...], list[str]] = {}
    for method in method_names():
        config = config_class(method)()
        names = {*resolve(method, config, available), *data_streams(method, config, available)}
        found.setdefault(tuple(name for name in _READ if name in names), []).append(f"`{method}`")
    return {", ".join(methods): names for names, methods in found.items()}


TABLES = {"vision": vision_table, "vae": vae_table, "text": text_table, "reading": reading_table}


def with_tables(page: str) -> str:
    """The page with its tables put between their markers."""
    for mark, table in TABLES.items():
        start, end = f"<!-- table: {mark} -->\n", f"<!-- end: {mark} -->"
        if start in page:
            before, _, rest = page.partition(start)
            _, _, after = rest.partition(end)
            page = f"{before}{start}{table()}\n{end}{after}"
    return page


def main() -> None:
    """Rewrites the page given as argument, or those beside this file."""
    for path in [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(Path(__file__).parent.glob("*.md")):
        if (page := with_tables(path.read_text("utf-8"))) != path.read_text("utf-8"):
            path.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
