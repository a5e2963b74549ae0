"""The pieces of a report page: one self-contained HTML file without scripts."""

from __future__ import annotations

import base64
import html
import io
import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.errors import UserError
from featcache.store import files
from trainer.report.charts import Chart, render_svg

MAX_PICTURE_BYTES = 256 << 20

STYLE = """
:root{color-scheme:light dark;--paper:#fcfcfb;--ink:#1b1d20;--soft:#5b626b;--rule:#d8dadd;--grid:#e4e6e8;
  --wash:#f3f4f4;--note:#8a4b00;--s0:#1a66b0;--s1:#c4541a;--s2:#2a8458;--s3:#8650a6;--s4:#9a7400;
  --s5:#b3316b;--s6:#23828f;--s7:#6a6f76}
@media (prefers-color-scheme:dark){:root{--paper:#17181a;--ink:#e6e7e8;--soft:#a0a6ad;--rule:#3a3d41;
  --grid:#303338;--wash:#1f2124;--note:#e6ab5c;--s0:#6db1f2;--s1:#f0935a;--s2:#67c596;--s3:#c29be0;
  --s4:#d6b445;--s5:#ee82b0;--s6:#65c3d0;--s7:#a5abb3}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",
  Roboto,"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:70rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .4rem;font-weight:650;letter-spacing:-.01em}
h2{font-size:1.15rem;margin:2.75rem 0 .9rem;padding-top:.9rem;border-top:1px solid var(--rule);
  font-weight:650}
p{margin:.4rem 0;max-width:44rem}
.lead{color:var(--soft);font-size:1.0625rem;margin-bottom:.75rem}
.warn{color:var(--note);font-size:.9375rem}
.hint{color:var(--soft);font-size:.875rem;margin:-.4rem 0 1.1rem}
.after{font-size:.9375rem;margin-top:.8rem}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{font-size:.875rem;line-height:1.4;color:var(--soft);margin-top:.45rem}
figcaption b,.charttitle{color:var(--ink);font-weight:600}
.charttitle{font-size:.9375rem;margin:0 0 .15rem}
.images,.charts{display:grid;gap:1.75rem 2rem;align-items:start}
.images{grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
.images.wide{grid-template-columns:minmax(0,1fr)}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
.charts figure{max-width:34rem}
img{display:block;max-width:100%;height:auto;background:var(--wash)}
img.small{width:100%}
svg{display:block;width:100%;height:auto;stroke-linejoin:round;font-family:inherit}
.key{display:flex;flex-wrap:wrap;gap:.1rem 1rem;padding:0;margin:.15rem 0 .1rem;list-style:none;
  font-size:.8125rem;color:var(--soft)}
.key i{display:inline-block;width:1.1rem;height:0;border-top:3px solid;vertical-align:.25em;
  margin-right:.4rem}
.key i.dashed{border-top-style:dashed}
.key span{font-variant-numeric:tabular-nums;color:var(--ink);margin-left:.35rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9375rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem 1.25rem .3rem 0;text-align:right;vertical-align:top;
  border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{text-align:left}
thead td,thead th{border-bottom:1px solid var(--ink);font-weight:600}
tbody th{font-weight:400}
tbody tr.group th{padding-top:1rem;color:var(--soft);font-size:.8125rem;border-bottom-color:var(--rule)}
td small,th small{display:block;color:var(--soft);font-weight:400}
td.best{font-weight:650}
td.text{text-align:right;white-space:normal;max-width:16rem;overflow-wrap:anywhere}
.strips th,.strips td{border:0;padding:.1rem .2rem .1rem 0;vertical-align:middle;text-align:left}
.strips td{width:8rem;min-width:2.6rem}
.strips tbody th{padding-right:.6rem;font-size:.875rem}
.strips .gap td{height:.7rem}
details{margin:.6rem 0;border-bottom:1px solid var(--grid);padding-bottom:.6rem}
summary{cursor:pointer}
pre{font:.8125rem/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--wash);
  padding:.8rem 1rem;overflow-x:auto;margin:.6rem 0}
@media (max-width:30rem){main{padding:1.5rem 1rem 3rem}h1{font-size:1.4rem}table{font-size:.875rem}th,td{
  padding-right:.8rem}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--rule:#bbb;--grid:#ddd;
  --wash:#f4f4f4;--note:#6b3a00;--s0:#1a66b0;--s1:#c4541a;--s2:#2a8458;--s3:#8650a6;--s4:#9a7400;
  --s5:#b3316b;--s6:#23828f;--s7:#555}body{font-size:10pt}main{max-width:none;padding:0}
  h2{break-after:avoid;margin-top:1.5rem}.charts{grid-template-columns:1fr 1fr}
  .images{grid-template-columns:repeat(auto-fit,minmax(30%,1fr))}.scroll{overflow:visible}
  tr{break-inside:avoid}details::details-content{display:block;content-visibility:visible}
  pre{white-space:pre-wrap;overflow-wrap:anywhere}}
"""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One embedded picture.

    Attributes:
        image: a PNG file, or uint8 pixels [H, W, 3].
        caption: one or two sentences, plain text.
        alt: what a reader who cannot see it should know.
        title: opens the caption, in bold.
        section: `samples` (beside the runs' own) or `features` (a section of its own below the curves).
        wide: takes the whole width of the page, for strips and contact sheets.
    """

    image: Path | np.ndarray
    caption: str
    alt: str
    title: str = ""
    section: str = "samples"
    wide: bool = False


def escape(text: object) -> str:
    """Text => HTML, quotes included."""
    return html.escape(str(text), quote=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Whatever Pillow finds wrong with a picture, its refusal of gigantic ones included, as a UserError."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path} is not an image that can be shown: {error}", remedy="Delete the file or draw it again."
        ) from error


def read_pixels(path: Path) -> np.ndarray:
    """A picture's pixels, uint8 [H, W, 3]. Raises UserError if it is none."""
    data = files.read_bounded(path, MAX_PICTURE_BYTES)
    with _explained(path), Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _png(image: Path | np.ndarray) -> tuple[bytes, int, int]:
    if isinstance(image, Path):
        data = files.read_bounded(image, MAX_PICTURE_BYTES)
        with _explained(image):
            with Image.open(io.BytesIO(data)) as opened:
                opened.verify()
                if opened.format == "PNG":
                    return data, *opened.size
            picture = Image.open(io.BytesIO(data)).convert("RGB")
    else:
        picture = Image.fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue(), *picture.size


def image_html(image: Path | np.ndarray, *, alt: str) -> str:
    """`<img>` with the picture as a data URI."""
    data, width, height = _png(image)
    # Grids of small images may grow to their column; larger ones only shrink.
    small = ' class="small"' if width <= 640 else ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
    return f'<img{small} width="{width}" height="{height}" alt="{escape(alt)}" src="{source}">'


def figure_html(figure: Figure) -> str:
    """`<figure>` with picture and caption."""
    title = f"<b>{escape(figure.title.rstrip('.'))}.</b> " if figure.title else ""
    picture = image_html(figure.image, alt=figure.alt)
    return f"<figure>{picture}<figcaption>{title}{escape(figure.caption)}</figcaption></figure>"


def figures_html(figures: Sequence[Figure]) -> str:
    """Pictures side by side where the page is wide enough, wide ones below."""
    narrow = "".join(figure_html(f) for f in figures if not f.wide)
    wide = "".join(figure_html(f) for f in figures if f.wide)
    blocks = [f'<div class="images">{narrow}</div>'] if narrow else []
    if wide:
        blocks.append(f'<div class="images wide">{wide}</div>')
    return "".join(blocks)


def number(value: float) -> str:
    """Four significant digits, without exponents in the usual range."""
    if not math.isfinite(value):
        text = str(value)
    elif value == int(value) and abs(value) < 1e9:
        text = f"{int(value):,}"
    elif abs(value) >= 1000:
        text = f"{value:,.0f}"
    elif abs(value) < 1e-3:
        text = f"{value:.2e}"
    else:
        text = f"{value:.4g}"
    return _typeset(text)


def measure(value: float) -> str:
    """A measured value with decimals that line up: 8.10, 123.4, 0.612."""
    if not math.isfinite(value) or abs(value) >= 1000:
        return number(value)
    if 0 < abs(value) < 0.01:
        return _typeset(f"{value:.2g}")
    return _typeset(f"{value:.{1 if abs(value) >= 100 else 2 if abs(value) >= 2 else 3}f}")


def _typeset(text: str) -> str:
    """Thin spaces between thousands, a real minus sign."""
    return text.replace(",", "\u202f").replace("-", "\u2212")


def chart_html(chart: Chart) -> str:
    """`<figure>` with title, key (with each line's last value) and drawing."""
    keys = []
    for series in chart.series:
        if not len(series.y):
            continue
        style = ' class="dashed"' if series.dashed else ""
        keys.append(
            f'<li><i{style} style="border-color:var(--s{series.colour % 8})"></i>{escape(series.label)}'
            f"<span>{measure(float(series.y[-1]))}</span></li>"
        )
    note = f"<figcaption>{escape(chart.note)}</figcaption>" if chart.note else ""
    return (
        f'<figure><p class="charttitle">{escape(chart.title)}</p><ul class="key">{"".join(keys)}</ul>'
        f"{render_svg(chart)}{note}</figure>"
    )


def charts_html(charts: Sequence[Chart]) -> str:
    """Charts as small multiples."""
    return f'<div class="charts">{"".join(chart_html(c) for c in charts)}</div>' if charts else ""


def page_html(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )
