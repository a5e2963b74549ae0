"""The demo behind `make demo-text`: text-to-image on the embedded default, offline, on the CPU, in a few minutes.

Pictures of textured shapes with captions, a small MMDiT without alignment and with AHPA, and a page with samples of prompts:
of combinations that were trained on, and of some that never were.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from pipelines.demo import TITLES, run_demo

CACHE = Path("caches/demo-text")
RUNS = Path("runs/demo-text")
STEPS = 900

BUILD = f"featcache build --data shapes-text --limit 2000 --encoder tiny --text tiny --batch-size 64 --out {CACHE}"
# Zero-initialised modulations are ours: the published initialisation is PyTorch's.
TRAIN = (
    f"trainer run --method {{method}} --name demo-text/{{method}} --cache {CACHE} --model MMDiT-Ti/2 --condition text/tiny "
    f"--steps {STEPS} --batch-size 32 --lr 3e-3 --set zero_init=true --set warmup_steps=50 --set betas=[0.9,0.95] "
    f"--set time_sampling=lognormal --set ema_decay=0.995 --set ema_warmup=true --set sample_every={STEPS} "
    f"--set checkpoint_every={STEPS // 4} --set keep_checkpoints=1 --set clip=1.0 --set log_every=25"
)
PROMPTS = {"trained": "shapes-text:1", "held-out": "shapes-text:held-out"}
NUMBER = 96
EVAL = (
    "trainer eval runs/demo-text/{method} --prompts {prompts} --num {num} --sampler ode --steps 25 --guidance 2.5 "
    "--extractor embedded --metrics prompts_obeyed"
)
ATTRIBUTES = ("shape", "texture", "colour", "background")


def train_command(method: str) -> str:
    """The line that starts a run, or continues it where an earlier demo was interrupted."""
    resume = " --resume" if (RUNS / method / "config.yaml").exists() else ""
    return TRAIN.format(method=method) + resume


def obeyed(run: Path, prompts: str) -> Mapping[str, float]:
    """What the newest judgement of a run says of the prompts of that source."""
    from trainer.evaluate.prompt_sets import PromptSet
    from trainer.runs.folder import read_metrics
    from trainer.sampling.prompts import open_prompts

    wanted = open_prompts(prompts, seed=0).sha256
    judged = [
        entry for entry in read_metrics(run) if (found := PromptSet.of(entry)) is not None and found.sha256 == wanted
    ]
    return judged[-1]["metrics"]


def scores() -> str:
    """How many prompts were obeyed, in sentences: whichever run wins."""
    told = []
    for name, prompts in PROMPTS.items():
        each = [f"{obeyed(RUNS / method, prompts)['prompts_obeyed']:.0%} {title}" for method, title in TITLES.items()]
        told.append(f"{'of combinations trained on' if name == 'trained' else 'of held-out ones'} {', '.join(each)}")
    return (
        f"Share of prompts obeyed in shape, texture, colour and background, by a classifier of ours: {'; '.join(told)}. "
        "A difference between single runs of this size may be chance."
    )


def write_page() -> Path:
    """The report of both runs."""
    from trainer.report.run import write_run_report

    return write_run_report(
        [RUNS / method for method in TITLES],
        RUNS / "report.html",
        title="Demo: text-to-image with a small MMDiT, without alignment and with AHPA",
        lead="Both runs start from the same weights and see the same images, captions, noise and timesteps; the second also "
        f"aligns an early block with a routed mixture of VAE levels from the cache. {scores()}",
    )


def main() -> int:
    """Builds, trains, samples, judges and reports; returns the exit code."""
    stages = [
        ("cache", [BUILD]),
        ("training", [train_command(method) for method in TITLES]),
        *(
            (f"{name} prompts", [EVAL.format(method=m, prompts=prompts, num=NUMBER) for m in TITLES])
            for name, prompts in PROMPTS.items()
        ),
    ]
    return run_demo(stages, write_page, again="make demo-text")


if __name__ == "__main__":
    sys.exit(main())
