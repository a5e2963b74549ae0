"""Guidance as a wrapper around the model: classifier-free (Ho & Salimans 2022), or by a stream that is left out (ReDi)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from featcache.errors import UserError
from trainer.interval import Interval
from trainer.models.transformer import ModelOutput

if TYPE_CHECKING:
    from trainer.diffusion.samplers import ModelFn
    from trainer.diffusion.streams import Layout

# Entries of a state's axis 1, and the scale that their difference to the reference is taken by; None: not guided.
Spans = Sequence[tuple[int, float | None]]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How to guide.

    Args:
        scale: 1 is no guidance (and costs no second evaluation); the guided prediction is
            `unconditional + scale * (conditional - unconditional)`.
        interval: of t, in which to guide (Kynkaanniemi et al. 2024). For DDPM models t is the step divided by 999.
        channels: guide the first so many channels of the latents only: None for all (REPA), 3 as the public SiT and
            DiT do.
        streams: the scale for what is diffused beside the latents; None: they are not guided, as in ReDi. Only where the
            latents are, as in REG's code.
        representation: scale of representation guidance (ReDi): the reference has all streams set to zero and the
            same label, and everything is guided. 1 is none.

    Raises:
        UserError: no channel, both kinds of guidance at once, or what has no effect on the one.
    """

    scale: float = 1.0
    interval: Interval = Interval()  # noqa: RUF009 (frozen)
    channels: int | None = None
    streams: float | None = None
    representation: float = 1.0

    def __post_init__(self) -> None:
        if self.channels is not None and self.channels < 1:
            raise UserError(
                f"{self.channels} guided channels were asked for.", remedy="Use at least 1, or none for all."
            )
        if self.representation != 1 and self.channels is not None:
            raise UserError(
                "representation guidance guides all channels, and some were asked for",
                remedy="Leave --guided-channels out.",
            )
        if self.representation != 1 and self.scale != 1:
            raise UserError(
                "classifier-free guidance and representation guidance were both asked for, and each has a reference of its own",
                remedy="Leave --guidance or --representation-guidance out.",
            )
        if self.streams is not None and self.scale == 1:
            raise UserError(
                "--stream-guidance has no effect without --guidance: the streams are guided where the latents are",
                remedy="Type --guidance too, or leave --stream-guidance out.",
            )

    def active(self, t: float) -> bool:
        """Whether it changes anything at this time."""
        return (self.scale != 1 or self.representation != 1) and t in self.interval

    def spans(self, layout: Layout) -> Spans:
        """Which entries of a state are guided, and how strongly."""
        if self.representation != 1:
            return [(sum(layout.sizes), self.representation)]
        latents, *others = layout.sizes
        channels = layout.cfg.latent_channels
        guided = latents // channels * min(self.channels or channels, channels)
        return [(guided, self.scale), (latents - guided, None), *((size, self.streams) for size in others)]

    def record(self) -> dict[str, object]:
        """Plain values, as `settings.json` beside samples holds them; what has its default and was not always there is
        left out."""
        values: dict[str, object] = {
            "scale": self.scale,
            "low": self.interval.low,
            "high": self.interval.high,
            "channels": self.channels,
        }
        values |= {"streams": self.streams} if self.streams is not None else {}
        return values | ({"representation": self.representation} if self.representation != 1 else {})


def guided(
    model: Callable[[Tensor, Tensor, Tensor], ModelOutput],
    condition: Tensor,
    *,
    null: int | Tensor | None,
    guidance: Guidance = Guidance(),
    time_range: float = 1.0,
    layout: Layout | None = None,
) -> ModelFn:
    """Bind a model to a condition of each sample and a guidance: the `model_fn(x, t)` that samplers take.

    Inside the interval the batch is doubled, conditional half first. Only the guided entries are combined; all others, also
    a learned variance, are the conditional half's, as in the public code.

    Args:
        model: (x [B, C, h, w] or [B, S], t [B], y [B]) -> `ModelOutput` with a prediction of that shape (or 2C channels).
        condition: labels, [B] int64, or text rows, [B, T, W].
        null: condition of the unconditional half: the number of classes, or the rows of the text '', [T, W]. None where
            guidance needs none.
        time_range: what t = 1 in the guidance interval is for the model: see
            `trainer.diffusion.transport.Transport`.
        layout: where the streams lie in x; None: x is the latents.

    Raises:
        UserError: classifier-free guidance without a null condition.
    """
    by_condition = guidance.representation == 1
    if by_condition and guidance.scale != 1 and null is None:
        raise UserError(
            "classifier-free guidance of a model that takes text needs the text of '', and none was given",
            remedy="Give null=, as trainer.runs.empty_text.of_run has it, or take no guidance.",
        )
    other = condition if null is None or not by_condition else null_like(condition, null)
    both = torch.cat([condition, other])

    def reference(x: Tensor) -> Tensor:
        if by_condition or layout is None:
            return x
        latents = layout.sizes[0]
        return torch.cat([x[:, :latents], torch.zeros_like(x[:, latents:])], dim=1)

    def model_fn(x: Tensor, t: float, *, interval_t: float | None = None) -> Tensor:
        B, C = x.shape[:2]
        time_dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no steps such as 0.501 or 501
        if not guidance.active((t if interval_t is None else interval_t) / time_range):
            prediction = model(x, x.new_full((B,), t, dtype=time_dtype), condition).prediction
            assert prediction is not None
            return prediction
        prediction = model(torch.cat([x, reference(x)]), x.new_full((2 * B,), t, dtype=time_dtype), both).prediction
        assert prediction is not None
        conditional, unconditional = prediction.chunk(2)
        if layout is None:
            K = C if guidance.channels is None else min(guidance.channels, C)
            spans: Spans = [(K, guidance.scale)]
        else:
            spans = guidance.spans(layout)
        return _combined(conditional, unconditional, spans)

    return model_fn


def null_like(condition: Tensor, null: int | Tensor) -> Tensor:
    """The null condition for each sample of `condition`: labels [B], or text rows [B, T, W] of one `null` [T, W]."""
    if isinstance(null, Tensor):
        return null.to(condition).expand_as(condition)
    return torch.full_like(condition, null)


def _combined(out: Tensor, reference: Tensor, spans: Spans) -> Tensor:
    """`reference + scale * (out - reference)` in the spans of axis 1; `out` where none guides, and behind the last."""
    parts, start = [], 0
    for size, scale in spans:
        first, base = out[:, start : start + size], reference[:, start : start + size]
        parts.append(first if scale is None else base + scale * (first - base))
        start += size
    return torch.cat([*parts, out[:, start:]], dim=1)
