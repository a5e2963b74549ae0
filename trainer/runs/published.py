"""What a paper reports for a row of its tables, and how the samples behind the figures were drawn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal

from featcache.errors import UserError
from featcache.settings import Count, Positive, from_mapping, settings
from trainer.classes import Classes
from trainer.interval import Interval, ParsedInterval

METRICS = ("FID", "sFID", "IS", "Precision", "Recall")

# Tables by paper, as our copies of the papers number them. SRA's have lost their captions; its text calls the
# component-wise analysis Table 3.2 and all system-level comparisons Table 3.3. LightningDiT's is the table of results in its
# repository, images/results.png, which has no number there. Of REG's and ReDi's, those whose number we do not know are named by what they compare.
PAPER_TABLES: Mapping[str, tuple[str, ...]] = {
    "REPA": tuple(str(n) for n in range(1, 13)),
    "SARA": ("1a", "1b", "2", "3", "4", "5"),
    "DyA": tuple(str(n) for n in range(1, 8)),
    "AHPA": (
        *(str(n) for n in range(1, 8)),
        *("A.8", "A.9", "B.10", "B.11", "C.12", "D.13", "D.14", "D.15", "D.16", "D.17", "E.18", "F.19", "G.20", "I.21"),
    ),
    "SRA": ("3.2", "3.3"),
    "LightningDiT": ("results",),
    "REG": ("8", "9", "guidance", "512px", "beta", "depth", "encoder", "entanglement"),
    "ReDi": ("convergence", "guided", "representation-guidance", "components"),
}
UNKNOWN_SCALE = "the recipe's figures were drawn with guidance of a scale its paper does not give; drawing without"

# The samplers that have a grid of times to shift.
SHIFTED = ("sde", "ode", "heun")

_SOURCE = re.compile(r"(?P<paper>\w+), Table (?P<table>\S+)")


@settings
class Sampling:
    """How the samples behind published figures were drawn; None where the paper does not say.

    sampler: `sde` (Euler-Maruyama), `ode` (Euler), `heun` or `ddpm`. steps: function evaluations.
    shift: of the times. guidance: classifier-free guidance scale, 1 for none. interval: of t, in which it acted.
    channels: the first so many were guided, None: all. stream_guidance, representation_guidance: see
    `trainer.diffusion.guidance.Guidance`. classes: `random`, or `balanced`, each class alike. pixels: how
    they became 8 bits, see `trainer.sampling.draw.SampleConfig`.
    """

    sampler: Literal["sde", "ode", "heun", "ddpm"] | None = None
    steps: Count | None = None
    shift: Positive = 1.0
    guidance: float | None = 1.0
    interval: ParsedInterval = Interval()
    channels: Count | None = None
    stream_guidance: Positive | None = None
    representation_guidance: Positive = 1.0
    classes: Literal["balanced", "random"] | None = None
    pixels: Literal["round", "truncate"] | None = None

    def __str__(self) -> str:
        drawn = " ".join(str(part) for part in (self.sampler, self.steps) if part is not None)
        guided = ""
        if self.guidance is None:
            guided = "guided, scale not given"
        elif self.guidance != 1:
            low, high = self.interval.low, self.interval.high
            guided = f"guidance {self.guidance:g}" + ("" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]")
        if guided and self.channels is not None:
            guided += f" of {self.channels} channels"
        if guided and self.stream_guidance is not None:
            guided += f", of the streams {self.stream_guidance:g}"
        if self.representation_guidance != 1:
            guided = f"representation guidance {self.representation_guidance:g}"
        shift = "" if self.shift == 1 else f"times shifted by {self.shift:g}"
        return ", ".join(part for part in (drawn, shift, guided) if part)

    @property
    def further(self) -> str:
        """What `str` leaves out: labels and rounding, as far as they are known."""
        known = {"classes": self.classes, "pixels": self.pixels}
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)

    def settings(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """These, by the names of `trainer.requests.SampleSettings`, where `asked` has none; without sampler and steps.

        Interval, channels and the streams' scale belong to the guidance scale: with another one they are not these. So does
        the shift to a sampler that takes one. An unknown scale is none at all, or whichever is asked for.
        """
        found = {name: value for name, value in asked.items() if value is not None}
        unguided = self.guidance is None or found.get("representation_guidance", 1) != 1
        scale = found.setdefault("guidance", 1.0 if unguided else self.guidance)
        by_streams = found.setdefault("representation_guidance", self.representation_guidance if scale == 1 else 1.0)
        if self.guidance in (None, scale) and by_streams == self.representation_guidance:
            found.setdefault("interval", self.interval)
            found.setdefault("guided_channels", self.channels)
            found.setdefault("stream_guidance", self.stream_guidance)
        if found.get("sampler", self.sampler) in (None, *SHIFTED):
            found.setdefault("shift", self.shift)
        if self.classes is not None:
            found.setdefault("classes", Classes.parse(self.classes))
        if self.pixels is not None:
            found.setdefault("pixels", self.pixels)
        return found


@settings
class Published:
    """What a paper reports for a row.

    source: reads `AHPA, Table 3`. metrics: FID, sFID, IS, Precision and Recall, as far as the table has them.

    Raises:
        UserError: an unknown metric, a paper or table that does not exist.
    """

    source: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        match = _SOURCE.fullmatch(self.source)
        if match is None or match["table"] not in PAPER_TABLES.get(match["paper"], ()):
            raise UserError(
                f"published.source {self.source!r:.80} names no table of a known paper",
                remedy=f"Write for example 'AHPA, Table 3'; papers: {', '.join(PAPER_TABLES)}.",
            )
        for metric in self.metrics:
            if metric not in METRICS:
                near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.3)
                hint = f"Did you mean {near[0]}?" if near else f"Metrics: {', '.join(METRICS)}"
                raise UserError(f"published.metrics holds an unknown metric {metric!r:.80}", remedy=hint)

    @property
    def paper(self) -> str:
        return self.source.partition(",")[0]

    def figures(self) -> dict[str, str]:
        """The metrics with the papers' decimals: at least two for sFID, precision and recall, else at least one."""
        shown = {}
        for metric, value in self.metrics.items():
            digits = 2 if metric in ("sFID", "Precision", "Recall") else 1
            shown[metric] = max(f"{value:.{digits}f}", repr(float(value)), key=len)
        return shown


def parse_published(values: object) -> Published:
    """What a recipe or a run's configuration says under `published`.

    Raises:
        UserError: it is not well formed, or as `Published`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"published must hold source, metrics and sampling, not {values!r:.80}")
    entry = dict(values)
    sampling = entry.pop("sampling", None)
    if sampling is not None:
        if not isinstance(sampling, Mapping):
            raise UserError(f"published.sampling must hold keys and values, not {sampling!r:.80}")
        entry["sampling"] = from_mapping(Sampling, sampling, where="published.sampling")
    if "source" not in entry:
        raise UserError("published has no source", remedy="Write for example: source: AHPA, Table 3")
    return from_mapping(Published, entry, where="published")
