"""What sampling and evaluation are asked for: each option of `trainer sample` and `trainer eval`, once. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PlainValidator

from featcache.errors import UserError
from featcache.settings import Count, FilePath, Index, Names, NotNegative, Option, Positive, settings
from trainer.averages import Weights
from trainer.classes import Classes
from trainer.interval import Interval, ParsedInterval
from trainer.sweep import Sweep

ParsedClasses = Annotated[Classes, PlainValidator(Classes.parse)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]

WEIGHTS = (
    "ema (averaged), raw (as the optimiser left them), ema:DECAY (of the run's ema_decays) or power:SIGMA_REL (of its posthoc, "
    "or made of them). [default: ema]"
)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@settings
class SampleSettings:
    """How samples are to be drawn. What is None is left to who draws.

    sampler: None takes the family's default. interval: of t, in which to guide. checkpoint: a step, None the latest
    checkpoint. weights: see `trainer.averages.Average`.
    precision, compile: see `trainer.sampling.inference.choose_arithmetic`. prompt, prompts: what a model that takes text
    draws, one of the two: texts, or what `trainer.sampling.prompts.open_prompts` opens; image i is of prompt i modulo
    their number.
    """

    num: Annotated[
        Count | None, Option("Samples to judge. [default: 50,000, by prompt one each; fewer on the CPU]")
    ] = None
    sampler: Annotated[
        str | None, Option("As for sample. [default: the recipe's, else sde or ddpm; on the CPU ode or ddim]")
    ] = None
    steps: Annotated[Count | None, Option("Sampling steps. [default: the recipe's, else 250; 32 on the CPU]")] = None
    shift: Annotated[
        Positive | None, Option("Shift of the times, above 1 towards noise. [default: the recipe's, else 1: none]")
    ] = None
    guidance: Annotated[
        NotNegative | None, Option("Classifier-free guidance scale. [default: the recipe's, else 1: none]")
    ] = None
    interval: Annotated[
        ParsedInterval | None,
        Option(
            "Interval of t in which to guide: LOW,HIGH. [default: the recipe's at its --guidance, else 0,1]",
            typed=str,
            parse=Interval.parse,
        ),
    ] = None
    guided_channels: Annotated[
        Count | None,
        Option("Guide only the first so many channels. [default: the recipe's at its --guidance, else all]"),
    ] = None
    stream_guidance: Annotated[
        NotNegative | None,
        Option(
            "With --guidance: the scale for features diffused beside the latents. [default: the recipe's, else they are not guided]"
        ),
    ] = None
    representation_guidance: Annotated[
        NotNegative | None,
        Option(
            "Instead of --guidance: scale of guidance by the features diffused beside the latents (ReDi). [default: the recipe's, else 1: none]"
        ),
    ] = None
    classes: Annotated[
        ParsedClasses | None,
        Option(
            "balanced, random, or a list such as 207,360,387. [default: the recipe's, else balanced]",
            typed=str,
            parse=Classes.parse,
        ),
    ] = None
    prompt: Annotated[
        Texts, Option("Of a model that takes text: draw this; repeatable. [default: none]", typed=list[str])
    ] = ()
    prompts: Annotated[
        str | None,
        Option(
            "Of a model that takes text: draw these, one each: a text file (a prompt a line), COCO's captions_*.json, or data "
            "with captions (shapes-text). [default: none]"
        ),
    ] = None
    pixels: Annotated[
        Literal["round", "truncate"] | None,
        Option("round (ADM, DiT, SiT) or truncate (REPA) to 8 bits. [default: the recipe's, else round]"),
    ] = None
    weights: Annotated[Weights | None, Option(WEIGHTS, typed=str)] = None
    seed: Annotated[Index, Option("With its index it fixes a sample's noise.")] = 0
    checkpoint: Annotated[
        Index | None, Option("Checkpoint or snapshot. [default: the latest checkpoint]", flag="--step")
    ] = None
    batch_size: Annotated[Count, Option("Images at once.")] = 64
    device: Annotated[str, Option("cpu, cuda, cuda:N or auto.")] = "auto"
    weights_dir: Annotated[
        str | None,
        Option(
            "Folder with pretrained weights, searched before the hub. [default: the hub alone]", typed=Path, parse=str
        ),
    ] = None
    precision: Annotated[
        str, Option("fp32, tf32 or bf16 (autocast of the backbone); auto is tf32 on a GPU, else fp32.")
    ] = "auto"
    compile: Annotated[bool | None, Option("Compile the backbone. [default: on a GPU]")] = None


@settings
class SampleRequest(SampleSettings):
    """Settings without a gap, and what is to be written: see `trainer.sampling.run.SampleResult`. out: None names
    the folder itself."""

    num: Annotated[Count, Option("How many images. [default: 64; of prompts one each]")] = 64
    sampler: Annotated[
        str | None, Option("SiT, LightningDiT: sde, ode, heun, dopri5. DiT: ddpm, ddim. [default: sde; of DiT ddpm]")
    ] = None
    steps: Annotated[Count, Option("Sampling steps.")] = 250
    shift: Annotated[Positive, Option("Shift of the times, above 1 towards noise; 1 is none.")] = 1.0
    guidance: Annotated[NotNegative, Option("Classifier-free guidance scale; 1 is none.")] = 1.0
    interval: Annotated[
        ParsedInterval, Option("Interval of t in which to guide: LOW,HIGH.", typed=str, parse=Interval.parse)
    ] = Interval()
    guided_channels: Annotated[Count | None, Option("Guide only the first so many channels. [default: all]")] = None
    stream_guidance: Annotated[
        NotNegative | None,
        Option(
            "With --guidance: the scale for features diffused beside the latents (REG's class token). [default: they are not guided]"
        ),
    ] = None
    representation_guidance: Annotated[
        NotNegative,
        Option(
            "Instead of --guidance: scale of guidance by the features diffused beside the latents (ReDi); 1 is none."
        ),
    ] = 1.0
    classes: Annotated[
        ParsedClasses, Option("balanced, random, or a list such as 207,360,387.", typed=str, parse=Classes.parse)
    ] = Classes()
    pixels: Annotated[Literal["round", "truncate"], Option("round (ADM, DiT, SiT) or truncate (REPA) to 8 bits.")] = (
        "round"
    )
    weights: Annotated[Weights, Option(WEIGHTS, typed=str)] = "ema"
    format: Annotated[Literal["npz", "wds", "png"], Option("npz (ADM's layout), wds (a WebDataset shard) or png.")] = (
        "npz"
    )
    out: Annotated[FilePath | None, Option("Folder to write to. [default: one below RUN/samples]")] = None


@settings
class EvalRequest:
    """What `trainer eval` is asked for.

    settings: how to draw; where one is None, what the run's recipe says of its published figures, else the default of
    the device (the constants of `trainer.evaluate.run`). The recipe's interval goes with the recipe's guidance scale
    alone: with another one the default is to guide at all times. The judge takes number, seed, batch size, device and
    weights' folder from it too. figure: name of the recipe whose published figures the run is judged beside, instead of
    its own: drawn at that recipe's step and with its sampler and evaluations on any device. sweep: judge once for each
    value of one setting, see `trainer.evaluate.sweep`.
    """

    settings: SampleSettings = SampleSettings()
    figure: Annotated[
        str | None,
        Option("Draw as the samples of this recipe's published figures, at its step. [default: the run's own]"),
    ] = None
    sweep: Annotated[
        Sweep | None,
        Option(
            "Judge at many values of one setting: guidance=1.0:2.5:0.1, guidance=1.0,1.5,2.0, interval_high=0:1:0.1. [default: at one]",
            typed=str,
            parse=Sweep.parse,
        ),
    ] = None
    extractor: Annotated[
        str,
        Option("inception, dinov2, embedded, embedded-vit; auto takes inception where its weights are, else embedded."),
    ] = "auto"
    reference: Annotated[
        str | None, Option("Reference images or statistics: npz or folder. [default: the cache's own images]")
    ] = None
    metrics: Annotated[
        Names,
        Option(
            "fid, sfid, is, precision, recall, kid; of samples by prompt also clip_score, pick_score, prompts_obeyed. Join with "
            "commas. [default: all of the extractor, and prompts_obeyed of prompts of the embedded set]",
            typed=str,
            parse=_names,
        ),
    ] = ()
    bootstrap: Annotated[Index, Option("Replicates behind 95 % intervals; 0 is none.")] = 0
    data: Annotated[
        str | None,
        Option(
            "Where the cache's images lie. [default: $FEATCACHE_DATA, ./data/imagenet, or where they lay when the cache was built]"
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.settings.num is not None and self.settings.num < 2:
            raise UserError(f"--num {self.settings.num} is too few to judge", remedy="Type --num 2 or more.")
