"""The caption judge: a small residual network that reads shape, texture, colour and background from a picture.

Half of each batch is drawn afresh, uniformly over all combinations, those that `shapes-text` holds out too. The other half
are pictures as the tiny VAE decodes them from latents with a little noise, which is what samples of a latent model
look like at best: so a picture is not judged by the sharpness of its edges.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from featcache.sources import shapes, shapes_text
from featcache.sources.shapes_text import ATTRIBUTES, Attributes, Part
from pipelines.embedded import loop
from pipelines.embedded.data import HELD_OUT_SET, TRAIN_SET, numbers, to_pixels
from trainer.evaluate.obeyed import CaptionJudge, shares

SIZES = [len(values) for values in ATTRIBUTES.values()]
CONFIG: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [16, 32, 48, 64], "num_classes": sum(SIZES)}
EVERYTHING = tuple(itertools.product(*map(range, SIZES)))
DECODED = 6_144  # pictures that go through the VAE, once; every further visit mirrors half of them
CHUNK = 64
NOISE = 0.3  # at most, added to latents of unit standard deviation
PEAK_LR = 2e-3
DECODED_PURPOSE, BATCH_PURPOSE = 5, 6


def build() -> ResNet:
    """Four stages of one basic block each; logits `[B, 23]`, those of `ATTRIBUTES` one after another."""
    return ResNet(block=BasicBlock, **CONFIG)  # type: ignore[arg-type]  # timm's annotation is of an instance


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Pictures uint8 `[N, 64, 64, 3]` with the numbers of their attributes' values, `[N, 4]`."""

    images: NDArray[np.uint8]
    values: NDArray[np.int64]


def draw(count: int, rng: np.random.Generator) -> Labelled:
    """Pictures of combinations drawn uniformly from all of them."""
    values = np.array(EVERYTHING)[rng.integers(0, len(EVERYTHING), count)]
    named = [Attributes(*(names[i] for names, i in zip(ATTRIBUTES.values(), row, strict=True))) for row in values]
    images = [shapes.quantised(shapes_text.draw(attributes, rng.random(16))) for attributes in named]
    return Labelled(images=np.stack(images), values=values)


@torch.no_grad()
def through(vae: AutoencoderKL, images: NDArray[np.uint8], *, noise: float = 0.0, seed: int = 0) -> NDArray[np.uint8]:
    """Pictures as the VAE decodes them from their posterior's mean.

    noise: each picture's latents get Gaussian noise of a standard deviation uniform in [0, noise], in units of the
    latents' own.
    """
    generator, decoded = torch.Generator().manual_seed(seed), []
    for first in range(0, len(images), CHUNK):
        z = vae.encode(to_pixels(images[first : first + CHUNK])).latent_dist.mode() * vae.config["scaling_factor"]
        amount = noise * torch.rand(len(z), 1, 1, 1, generator=generator)
        z = z + amount * torch.randn(z.shape, generator=generator)
        x = vae.decode(z / vae.config["scaling_factor"]).sample.clamp(-1, 1)
        decoded.append(((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(decoded)


def batch(decoded: Labelled, step: int, size: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Pixels `[B, 3, 64, 64]` in [-1, 1] and values `[B, 4]` of step `step`, mirrored at random."""
    rng = numbers(seed, BATCH_PURPOSE, step)
    drawn, picks = draw(size // 2, rng), rng.integers(0, len(decoded.values), size - size // 2)
    images = np.concatenate([drawn.images, decoded.images[picks]])
    mirrored = rng.random(size) < 0.5
    images[mirrored] = images[mirrored, :, ::-1]
    return to_pixels(images), torch.from_numpy(np.concatenate([drawn.values, decoded.values[picks]]))


def loss_of(logits: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of each attribute."""
    heads = zip(ATTRIBUTES, logits.split(SIZES, dim=1), values.unbind(1), strict=True)
    return {name: F.cross_entropy(head, known) for name, head, known in heads}


def train(vae: AutoencoderKL, *, steps: int, size: int, seed: int, decoded: int, out: Path) -> tuple[nn.Module, float]:
    """The averaged network and the seconds that its training took, those of the VAE's pictures left out."""
    originals = draw(decoded, numbers(seed, DECODED_PURPOSE, TRAIN_SET))
    shown = Labelled(images=through(vae, originals.images, noise=NOISE, seed=seed), values=originals.values)
    loop.say("caption-judge", f"{decoded:,} pictures are through the VAE")
    torch.manual_seed(seed + 2)
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=0.05)
    parts = loop.Parts(network=network, average=loop.averaged(network), heads=nn.Module(), optimizers=(optimizer,))

    def update(step: int) -> dict[str, Tensor]:
        pixels, values = batch(shown, step, size, seed=seed)
        told = loss_of(network(pixels), values)
        optimizer.param_groups[0]["lr"] = PEAK_LR * loop.rate(step, steps)
        optimizer.zero_grad()
        torch.stack(list(told.values())).sum().backward()
        optimizer.step()
        return told

    settings = {"part": "caption-judge", "steps": steps, "size": size, "seed": seed, "decoded": decoded}
    seconds = loop.run("caption-judge", parts, update, steps=steps, settings=settings, out=out)
    return parts.average, seconds


def _pictures(part: Part, count: int, resolution: int) -> tuple[NDArray[np.uint8], list[Attributes]]:
    drawn = [shapes_text.render(i, part=part, seed=HELD_OUT_SET, resolution=resolution) for i in range(count)]
    return np.stack([image for image, _ in drawn]), [attributes for _, attributes in drawn]


def figures(judge: CaptionJudge, vae: AutoencoderKL, *, count: int) -> dict[str, Any]:
    """How often the stored judge is right about pictures that it has not seen, `count` of each kind, and how many obey the
    caption of another picture of their kind."""
    found: dict[str, Any] = {}
    for part in Part:
        images, known = _pictures(part, count, 64)
        found[f"{part}, drawn"] = _shares(judge, images, known)
        found[f"{part}, through the VAE"] = _shares(judge, through(vae, images), known)
        found[f"{part}, captions of others"] = _shares(judge, images, known[count // 2 :] + known[: count // 2])
    for resolution in (32, 128):
        found[f"seen, drawn, {resolution} px"] = _shares(judge, *_pictures(Part.seen, count, resolution))
    weights = sum(p.numel() for p in build().parameters())
    return {"obeyed": found, "pictures": count, "parameters": weights}


def _shares(judge: CaptionJudge, images: NDArray[np.uint8], known: Sequence[Attributes]) -> dict[str, float]:
    prompts = [shapes_text.caption(attributes, shapes_text.WORDINGS[0]) for attributes in known]
    return {name: round(share, 4) for name, share in shares(judge.right(images, prompts)).items()}
