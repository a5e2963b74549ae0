"""What a paper reports for a row of its tables, and how the samples behind the figures were drawn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import PlainValidator

from featcache.errors import UserError
from featcache.settings import Count, Names, NotNegative, Positive, from_mapping, settings
from trainer.classes import Classes
from trainer.interval import Interval, ParsedInterval, plain

METRICS = ("FID", "sFID", "IS", "Precision", "Recall", "pick_score")
MEASURES = ("G-SNR",)  # which `trainer analyze` takes of a model, not `trainer eval` of its samples

# What published figures are measured against => its file, where it is one, and what it is.
REFERENCES: Mapping[str, tuple[str | None, str]] = {
    "adm-256": ("VIRTUAL_imagenet256_labeled.npz", "ADM's reference batch of ImageNet at 256 px"),
    "adm-512": ("VIRTUAL_imagenet512.npz", "ADM's reference batch of ImageNet at 512 px"),
    "train": (None, "the training images by ADM's crop"),
    "coco-val": (None, "the validation images of COCO 2014 by the cache's crop"),
}
# References that are neither a file nor the images that a run was trained on => the folder to pass.
OTHER_FOLDERS: Mapping[str, str] = {"coco-val": "coco/val2014"}
# Prompts that published text-to-image samples were drawn for => the arguments of `trainer eval` for them and for the images
# that they are compared with, below a folder `coco`; and what they are.
PUBLISHED_SAMPLES = 30_000, 40_192  # U-ViT's and REPA's numbers of samples by prompt
COCO_VAL, COCO_VAL_FILE = "coco-val", "captions_val2014.json"
PROMPTS: Mapping[str, tuple[str, str]] = {
    COCO_VAL: (
        f"--prompts coco/annotations/{COCO_VAL_FILE} --reference coco/val2014",
        "a caption of each of the first validation images of COCO 2014",
    ),
}

# Tables by paper, as our copies of the papers number them. SRA's have lost their captions; its text calls the
# component-wise analysis Table 3.2 and all system-level comparisons Table 3.3, of which the one of MMDiT is named by what it
# compares; F is that of its Appendix F. LightningDiT's is the table of results in its
# repository, images/results.png, which has no number there. Of REG's and ReDi's, those whose number we do not know are named by what they compare.
PAPER_TABLES: Mapping[str, tuple[str, ...]] = {
    "REPA": tuple(str(n) for n in range(1, 13)),
    "SARA": ("1a", "1b", "2", "3", "4", "5"),
    "DyA": tuple(str(n) for n in range(1, 8)),
    "AHPA": (
        *(str(n) for n in range(1, 8)),
        *("A.8", "A.9", "B.10", "B.11", "C.12", "D.13", "D.14", "D.15", "D.16", "D.17", "E.18", "F.19", "G.20", "I.21"),
    ),
    "SRA": ("3.2", "3.3", "F", "text-to-image"),
    "LightningDiT": ("results",),
    "REG": ("8", "9", "guidance", "512px", "beta", "depth", "encoder", "entanglement"),
    "ReDi": ("convergence", "guided", "representation-guidance", "components"),
}
# The samplers that have a grid of times to shift.
SHIFTED = ("sde", "ode", "heun")

_SOURCE = re.compile(r"(?P<paper>\w+), Table (?P<table>\S+)")


@settings
class Variant:
    """A guidance that figures of an unknown or disputed one may have been drawn with. why: who says so."""

    guidance: NotNegative
    why: str
    interval: ParsedInterval = Interval()
    channels: Count | None = None

    @property
    def flags(self) -> str:
        """As typed."""
        parts = [f"--guidance {plain(self.guidance)}"]
        parts += [f"--interval {self.interval}"] if self.interval != Interval() else []
        parts += [f"--guided-channels {self.channels}"] if self.channels is not None else []
        return " ".join(parts)


UNGUIDED = Variant(guidance=1.0, why="without guidance")


def _variants(values: object) -> tuple[Variant, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError("it must be a list of variants, each with guidance and why")
    if not all(isinstance(value, Variant | Mapping) for value in values):
        raise ValueError("each variant must hold keys and values: guidance, why, interval, channels")
    where = "published.sampling.variants"
    return tuple(v if isinstance(v, Variant) else from_mapping(Variant, v, where=where) for v in values)


@settings
class Sampling:
    """How the samples behind published figures were drawn and what they were compared with; None where the paper does
    not say.

    sampler: `sde` (Euler-Maruyama), `ode` (Euler), `heun` or `ddpm`. steps: function evaluations. num: how many samples.
    shift: of the times. guidance: classifier-free guidance scale, 1 for none. interval: of t, in which it acted.
    channels: the first so many were guided, None: all. stream_guidance, representation_guidance: see
    `trainer.diffusion.guidance.Guidance`. variants: what else it may have been, by whom. classes: `random`, or
    `balanced`, each class alike. pixels: how they became 8 bits, see `trainer.sampling.draw.SampleConfig`.
    prompts: one of `PROMPTS`, of a text-to-image row. reference: one of `REFERENCES`. also: further references that we judge by, as typed.
    """

    sampler: Literal["sde", "ode", "heun", "ddpm"] | None = None
    steps: Count | None = None
    shift: Positive = 1.0
    guidance: float | None = 1.0
    interval: ParsedInterval = Interval()
    channels: Count | None = None
    stream_guidance: Positive | None = None
    representation_guidance: Positive = 1.0
    variants: Annotated[tuple[Variant, ...], PlainValidator(_variants)] = ()
    num: Count | None = None
    classes: Literal["balanced", "random"] | None = None
    pixels: Literal["round", "truncate"] | None = None
    prompts: Literal["coco-val"] | None = None
    reference: Literal["adm-256", "adm-512", "train", "coco-val"] | None = None
    also: Names = ()

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
        """What `str` leaves out: number, labels, rounding and reference, as far as they are known."""
        known = {
            "num": None if self.num is None else f"{self.num:,}",
            "classes": self.classes,
            "pixels": self.pixels,
            "prompts": self.prompts,
            "reference": self.reference,
        }
        return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)

    @property
    def options(self) -> tuple[Variant, ...]:
        """Where the scale is not known, what one may draw with: the variants, and none."""
        return (*(v for v in self.variants if v.guidance != 1), UNGUIDED)

    def leaves_open(self, asked: Mapping[str, Any]) -> bool:
        """Whether the samples were guided by a scale that nobody knows, and `asked` has none either."""
        by_streams = asked.get("representation_guidance")
        return self.guidance is None and asked.get("guidance") is None and by_streams in (None, 1)

    def settings(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """These, by the names of `trainer.requests.SampleSettings`, where `asked` has none; without sampler and steps.

        Interval, channels and the streams' scale belong to the guidance scale: with another one they are not these. So does
        the shift to a sampler that takes one.

        Raises:
            UserError: the scale is not known, and none is asked for.
        """
        if self.leaves_open(asked):
            raise UserError(
                "these samples were drawn with guidance, and its scale is not known",
                remedy=f"Type a scale: {'   or '.join(option.flags for option in self.options)}",
            )
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

    source: reads `AHPA, Table 3`. metrics: FID, sFID, IS, Precision, Recall and PickScore, as far as the table has them; or G-SNR
    alone, which is no metric of samples.

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
            if metric not in (*METRICS, *MEASURES):
                near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.3)
                hint = f"Did you mean {near[0]}?" if near else f"Metrics: {', '.join(METRICS)}"
                raise UserError(f"published.metrics holds an unknown metric {metric!r:.80}", remedy=hint)

    @property
    def paper(self) -> str:
        return self.source.partition(",")[0]

    @property
    def is_of_samples(self) -> bool:
        """Whether samples are judged for it; else `trainer analyze` measures it."""
        return not self.metrics or not set(self.metrics) <= set(MEASURES)

    def settings(self, asked: Mapping[str, Any], command: str) -> dict[str, Any]:
        """As `Sampling.settings`. command: what was typed, for the remedy: `trainer eval runs/a --figure ahpa/b2`.

        Raises:
            UserError: the paper does not give the scale and none is asked for, or the figures are not of samples.
        """
        if not self.is_of_samples:
            raise UserError(
                f"{self.source} gives {', '.join(self.metrics)}, which is measured on a model, not on samples",
                remedy="Type: trainer analyze RUN --what gsnr",
            )
        sampling = self.sampling or Sampling()
        if sampling.leaves_open(asked):
            lines = [f"\n  {command} {option.flags}   ({option.why})" for option in sampling.options]
            lines.append(
                f"\n  {command.replace('trainer sample', 'trainer eval')} --sweep guidance=1.0:2.5:0.1   (the curve)"
            )
            raise UserError(
                f"the figures of {self.source} were drawn with guidance, and the paper does not give its scale",
                remedy=f"Choose one:{''.join(lines)}",
            )
        return sampling.settings(asked)

    def figures(self) -> dict[str, str]:
        """The metrics with the papers' decimals: at least two for sFID, precision, recall and PickScore, else at least one."""
        shown = {}
        for metric, value in self.metrics.items():
            digits = 2 if metric in ("sFID", "Precision", "Recall", "pick_score") else 1
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
