"""What `trainer analyze` can be asked for. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from featcache.errors import UserError
from featcache.settings import Count, Index, Names, Option, settings, suggest


@settings
class AnalyzeConfig:
    """Options of all diagnostics.

    What and where:
        step: checkpoint (None: the latest).
        weights: `model`, `ema`, which is what samples are drawn with, or `auto`: of diagnostics of gradients `model`,
        with which the alignment heads were trained; of those of representations `ema`, unless a tenth of it or more is
        still the initialisation (a short run with a slow average). Heads are the trained ones always.
        labels: given to the model by diagnostics of representations: `null` or `given`; a given label would tell
        the probe the class (ours, the papers do not say).
        block: depth (1-based) to look at (None: the first that the method taps; without a method REPA's share, a third
        of the blocks).
    Samples:
        samples: for representations (None: 10,000 on a GPU, 512 on the CPU). gradient_samples: for gradients; as
        many again are used to fit probe heads. images: in picture strips. times: timesteps at which representations
        are looked at. bins: of [0, 1] for gradients. seed: of the choice of samples, noise and times. batch_size:
        samples at once.
    Estimators:
        gsnr: `plugin` or `unbiased`. wrt: G-SNR with respect to the `hidden` state or the `block`'s
        parameters. cknna, cka, k: see `trainer.analyze.kernels`. normalize: `none` or `l2`, of pooled
        features before the comparison. against: cached features to compare hidden states with (empty: all). pairs:
        further pairs, each `"a,b"` of cached features or `block3:0.5` (block 3 at t = 0.5).
        checkpoints: how many of a run's checkpoints the gradient angle is followed over, evenly chosen.
        probe_epochs, probe_batch (None: 16,384, at most an eighth of the training part), probe_folds (None: 4 below
        2,000 samples, else 1: one quarter held out). spectrum_top: singular values counted. spectrum_centred: whether
        the mean is removed first. patch: row-major index of the reference patch (None: the token that stands out most).
    """

    step: Annotated[Index | None, Option("Checkpoint. [default: the latest]")] = None
    weights: Literal["auto", "ema", "model"] = "auto"
    labels: Literal["null", "given"] = "null"
    block: Count | None = None

    samples: Annotated[
        Annotated[int, Field(ge=8)] | None, Option("Samples to look at. [default: 10,000; 512 on the CPU]")
    ] = None
    gradient_samples: Annotated[int, Field(ge=2)] = 128
    images: Count = 3
    times: Annotated[tuple[float, ...], Field(strict=False)] = (0.1, 0.3, 0.5, 0.7, 0.9)
    bins: Count = 10
    seed: Annotated[Index, Option("Seed of the choice of samples, noise and times.")] = 0
    batch_size: Count = 32

    gsnr: Literal["plugin", "unbiased"] = "plugin"
    wrt: Literal["hidden", "block"] = "hidden"
    cknna: Literal["unbiased", "biased", "paper"] = "unbiased"
    cka: Literal["biased", "unbiased"] = "unbiased"
    k: Count = 10
    normalize: Literal["none", "l2"] = "none"
    against: Names = ()
    pairs: Names = ()
    checkpoints: Count = 6
    probe_epochs: Count = 90
    probe_batch: Count | None = None
    probe_folds: Count | None = None
    spectrum_top: Count = 50
    spectrum_centred: bool = True
    patch: Index | None = None

    device: Annotated[str, Option("cpu, cuda, cuda:N or auto.")] = "auto"
    data: Annotated[
        str | None,
        Option(
            "Where the cache's images lie, for pictures. [default: $FEATCACHE_DATA, ./data/imagenet, or where they lay when the cache was built; else latents are decoded]"
        ),
    ] = None
    weights_dir: Annotated[
        str | None,
        Option(
            "Folder with pretrained weights, searched before the hub. [default: the hub alone]", typed=Path, parse=str
        ),
    ] = None

    def __post_init__(self) -> None:
        if not self.times or any(not 0 < t < 1 for t in self.times):
            raise UserError(
                f"times are {list(self.times)}, but they must lie between 0 (data) and 1 (noise)",
                remedy="Type for example: --set 'times=[0.1,0.5,0.9]'",
            )
        object.__setattr__(self, "times", tuple(sorted(set(self.times))))


def parse_what(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """`"gsnr,router"` or `"all"` => names, in the order of `known`.

    Raises:
        UserError: a name that is not known.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in (*known, "all"):
            raise UserError(
                f"there is no diagnostic {name!r}",
                remedy=f"{suggest(name, known)}Use any of: {', '.join(known)}, or all.",
            )
    if not names:
        raise UserError("--what is empty", remedy=f"Use any of: {', '.join(known)}, or all.")
    return known if "all" in names else tuple(name for name in known if name in names)
