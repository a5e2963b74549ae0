"""Trains the tiny VAE, the tiny ViT and the two judges from scratch and measures them.

    python -m pipelines.embedded --data PHOTOGRAPHS --out DIR

writes `vae`, `vit`, `judge` and `caption-judge` as `.safetensors` and `.json`, and `figures.json`, to DIR. The committed files in
`featcache/encoders/tiny/` are the output of this script with its defaults. The VAE and then the caption judge train on one core,
the ViT and then the judge on another. A killed training goes on when the same line is typed again. Every image and every noise draw is a
function of (seed, purpose, step); sums still depend on the machine, so a second run agrees in quality, not in its bytes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save
from torch import Tensor, nn

from featcache.console import print_error, time_text
from featcache.encoders import tiny
from featcache.errors import UserError
from pipelines.embedded import captions, classifiers, measure, vae
from pipelines.embedded.data import (
    LARGE_SHAPES,
    SHAPES,
    TRAIN_SET,
    Material,
    draw_shapes,
    read_photographs,
    split_of,
    to_pixels,
)
from pipelines.embedded.loop import say
from trainer.evaluate.obeyed import CaptionJudge
from trainer.runs.locks import hold


class Part(StrEnum):
    vae = "vae"
    vit = "vit"
    judge = "judge"
    caption_judge = "caption-judge"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long each part trains, in steps of so many images."""

    steps: int
    size: int


PLANS = {
    Part.vae: Plan(steps=12_000, size=8),
    Part.vit: Plan(steps=24_000, size=64),
    Part.judge: Plan(steps=8_000, size=64),
    Part.caption_judge: Plan(steps=3_000, size=64),
}
QUICK = {
    Part.vae: Plan(steps=12, size=4),
    Part.vit: Plan(steps=40, size=16),
    Part.judge: Plan(steps=30, size=16),
    Part.caption_judge: Plan(steps=30, size=16),
}
# Two processes, each on one core.
TEAMS = ((Part.vae, Part.caption_judge), (Part.vit, Part.judge))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process was asked for."""

    data: Path | None
    large: Path | None
    out: Path
    seed: int
    quick: bool
    bfloat16: bool

    def plan(self, part: Part) -> Plan:
        return (QUICK if self.quick else PLANS)[part]

    @cached_property
    def material(self) -> Material:
        share, began = 64 if self.quick else 1, time.monotonic()
        photographs = None
        if self.data is not None:
            photographs = read_photographs(split_of(self.data, "train"), limit=400 if self.quick else None)
        image_set = TRAIN_SET + 2 * self.seed
        material = Material(
            shapes=draw_shapes(SHAPES // share, image_set=image_set),
            large_shapes=draw_shapes(LARGE_SHAPES // share, image_set=image_set, resolution=128, first=SHAPES),
            photographs=photographs,
        )
        say("all", f"training images are in memory after {time_text(time.monotonic() - began)}")
        return material

    @cached_property
    def held_out(self) -> measure.HeldOut:
        return measure.HeldOut(data=self.data, large=self.large, quick=self.quick)


def train_vae(job: Job) -> dict[str, Any]:
    plan, material, held_out = job.plan(Part.vae), job.material, job.held_out
    glance = held_out.glance()

    def look(network: nn.Module) -> str:
        found = {k: vae.psnr(cast(AutoencoderKL, network), iter([x])).mean().item() for k, x in glance.items()}
        return ", ".join(f"{kind} {value:.2f} dB" for kind, value in found.items())

    network, seconds = vae.train(
        material, steps=plan.steps, size=plan.size, seed=job.seed, bfloat16=job.bfloat16, out=job.out, measure=look
    )
    scaling_factor = round(1 / vae.latent_std(network, to_pixels(material.shapes.images[:512])), 5)
    _save(network, vae.CONFIG | {"scaling_factor": scaling_factor}, Part.vae, job.out)
    stored = tiny.load_tiny_vae(folder=job.out)
    return measure.vae_figures(stored, held_out) | _circumstances(job, Part.vae, seconds, material)


def train_vit(job: Job) -> dict[str, Any]:
    material = job.material
    torch.manual_seed(job.seed)
    network = classifiers.build_vit()
    heads = classifiers.Heads(network.embed_dim, material.classes, dense=True)
    seconds = _train_classifier(job, Part.vit, material, network, heads, peak_lr=1e-3, config=classifiers.VIT_CONFIG)
    vit = tiny.load_tiny_vit(folder=job.out)

    def features(pixels: Tensor) -> Tensor:
        return vit.forward_features(pixels)[:, vit.num_prefix_tokens :].mean(1)

    return measure.classifier_figures(vit, features, job.held_out) | _circumstances(job, Part.vit, seconds, material)


def train_judge(job: Job) -> dict[str, Any]:
    material = job.material
    torch.manual_seed(job.seed + 1)
    network = classifiers.build_judge()
    heads = classifiers.Heads(network.num_features, material.classes, dense=False)
    seconds = _train_classifier(
        job, Part.judge, material, network, heads, peak_lr=2e-3, config=classifiers.JUDGE_CONFIG
    )
    judge = tiny.load_judge(folder=job.out)
    return measure.classifier_figures(judge, judge, job.held_out) | _circumstances(job, Part.judge, seconds, material)


def train_caption_judge(job: Job) -> dict[str, Any]:
    """With the VAE of the same folder, where there is one, else with the installed one."""
    plan, count = job.plan(Part.caption_judge), 20 if job.quick else 2000
    own = (job.out / "vae.safetensors").is_file()
    used = tiny.load_tiny_vae(folder=job.out) if own else tiny.load_tiny_vae()
    decoded = captions.DECODED // (64 if job.quick else 1)
    network, seconds = captions.train(
        used, steps=plan.steps, size=plan.size, seed=job.seed, decoded=decoded, out=job.out
    )
    _save(network, captions.CONFIG, Part.caption_judge, job.out)
    found = captions.figures(CaptionJudge(folder=job.out), used, count=count)
    return found | _circumstances(job, Part.caption_judge, seconds)


TRAIN = {
    Part.vae: train_vae,
    Part.vit: train_vit,
    Part.judge: train_judge,
    Part.caption_judge: train_caption_judge,
}
PURPOSES = {Part.vit: 3, Part.judge: 4}


def _train_classifier(
    job: Job, part: Part, material: Material, network: nn.Module, heads: nn.Module, *, peak_lr: float, config: Any
) -> float:
    plan = job.plan(part)
    average, seconds = classifiers.train(
        material,
        network,
        heads,
        name=part.value,
        steps=plan.steps,
        size=plan.size,
        peak_lr=peak_lr,
        seed=job.seed,
        purpose=PURPOSES[part],
        out=job.out,
    )
    _save(average, config, part, job.out)
    return seconds


def _circumstances(job: Job, part: Part, seconds: float, material: Material | None = None) -> dict[str, Any]:
    plan, photographs = job.plan(part), None if material is None else material.photographs
    return measure.circumstances(
        seed=job.seed,
        steps=plan.steps,
        size=plan.size,
        training_photographs=0 if photographs is None else len(photographs.labels),
        seconds=seconds,
        precision="bf16" if job.bfloat16 and part is Part.vae else "fp32",
    )


def _save(module: nn.Module, config: dict[str, Any], part: Part, out: Path) -> None:
    """Weights as fp16 beside their configuration."""
    half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    partial = out / f"{part.value}.partial"
    partial.write_bytes(save(half))
    partial.replace(out / f"{part.value}.safetensors")
    (out / f"{part.value}.json").write_text(json.dumps(config, indent=2) + "\n")


def run_parts(job: Job, parts: list[Part]) -> None:
    """Train and measure the parts, one after another, in this process; each leaves `<part>-figures.json`."""
    torch.set_num_threads(1)
    job.out.mkdir(parents=True, exist_ok=True)
    open_parts = [part for part in parts if not (job.out / f"{part.value}-figures.json").is_file()]
    if not open_parts:
        return
    for part in open_parts:
        figures = TRAIN[part](job)
        partial = job.out / f"{part.value}-figures.partial"
        partial.write_text(json.dumps(figures, indent=2) + "\n")
        partial.replace(job.out / f"{part.value}-figures.json")
        say(part.value, f"done; {_in_short(figures)}")


def _in_short(figures: dict[str, Any]) -> str:
    if "psnr_db" in figures:
        return ", ".join(f"{name} {value['mean']} dB" for name, value in figures["psnr_db"].items())
    if "obeyed" in figures:
        return ", ".join(f"{kind} {100 * value['prompts_obeyed']:.1f} %" for kind, value in figures["obeyed"].items())
    return ", ".join(f"{name} {figures[name]['linear']}" for name in ("shapes", "photographs") if name in figures)


def _side_by_side(words: list[str]) -> None:
    """One process for each of `TEAMS`, with this command line. Raises `UserError` if one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "pipelines.embedded", *words]
    teams = [
        subprocess.Popen([*command, *(w for part in team for w in ("--part", part.value))], env=environment)
        for team in TEAMS
    ]
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # ended or interrupted, this process takes its teams along
    try:
        codes = [team.wait() for team in teams]
    finally:
        for team in teams:
            team.terminate()
            team.wait()
    if any(codes):
        raise UserError("a training failed; what it said stands above", remedy="Type the same line again to go on.")


def _use_bfloat16(precision: Precision) -> bool:
    supported = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    return precision is Precision.bf16 or (precision is Precision.auto and supported)


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for weights, configurations, figures and states.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with train-*.zip and val.zip of 64 px photographs, a folder a class.")
    ] = None,
    large: Annotated[Path | None, typer.Option(help="Folder of larger JPEGs, to measure at 128 px.")] = None,
    part: Annotated[list[Part] | None, typer.Option(help="What to train. [default: all, two at a time]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, images and noise.")] = 0,
    precision: Annotated[
        Precision, typer.Option(help="Of the VAE's training; auto: bf16 where the CPU computes with it.")
    ] = Precision.auto,
    quick: Annotated[bool, typer.Option(help="A few steps on few images, to see that all of it runs.")] = False,
) -> None:
    """Train the embedded encoders and the judges; write weights and figures.json to --out."""
    if out is None:
        if not quick:
            raise UserError("the weights need a place", remedy="Pass --out DIR; with --quick it may be left out.")
        out = Path(tempfile.mkdtemp(prefix="embedded-"))
    out.mkdir(parents=True, exist_ok=True)
    job = Job(data=data, large=large, out=out, seed=seed, quick=quick, bfloat16=_use_bfloat16(precision))
    if part:
        with hold(out / part[0].value, "training", remedy="Wait for it, or end it; the same line then goes on."):
            run_parts(job, part)
        return
    if data is None:
        say("all", "no photographs (--data): everything is trained on shapes alone, and photographs will look poor")
    words = ["--out", str(out), "--seed", str(seed), "--precision", precision.value, *(["--quick"] if quick else [])]
    for name, value in (("--data", data), ("--large", large)):
        words += [name, str(value)] if value is not None else []
    _side_by_side(words)
    figures = {p.value: json.loads((out / f"{p.value}-figures.json").read_text()) for p in Part}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    say(
        "all",
        f"{out / 'figures.json'}; copy *.safetensors, {', '.join(f'{part.value}.json' for part in Part)} and figures.json "
        "of that folder",
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        say("all", "interrupted; the same line goes on")
        sys.exit(130)
