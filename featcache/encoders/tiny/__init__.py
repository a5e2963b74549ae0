"""The embedded default: a VAE and a vision transformer small enough to ship with the code, and two judges.

All are trained by `python -m pipelines.embedded`, whose figures stand in `figures.json`. VAE and ViT are real instances of the classes that the full-size encoders use (`diffusers.AutoencoderKL` with
SD-VAE's four-stage layout, `timm`'s `VisionTransformer`), so whatever reads a level or a token layer from
those reads it from these.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors.torch import load_file
from torch import nn

from featcache.errors import UserError

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer

# Late below: diffusers and timm take seconds to load.
Module = TypeVar("Module", bound=nn.Module)

NAMES: tuple[str, ...] = ("vae", "vit", "judge", "caption-judge")

FOLDER = Path(__file__).resolve().parent


def weights_path(name: str, *, folder: Path = FOLDER) -> Path:
    """Path of the weights of one of `NAMES`. Raises `UserError` for another name or a missing file."""
    if name not in NAMES:
        raise UserError(f"there is no tiny encoder named {name!r}", remedy=f"use one of: {', '.join(NAMES)}")
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(
            f"the weights of the tiny {name} are missing: {path} does not exist",
            remedy="reinstall the package, or train them: python -m pipelines.embedded",
        )
    return path


def weights_sha256(name: str, *, folder: Path = FOLDER) -> str:
    """SHA-256 of the stored weights of one of `NAMES`, in hexadecimal. Raises as `weights_path` does."""
    return hashlib.sha256(weights_path(name, folder=folder).read_bytes()).hexdigest()


def load_tiny_vae(*, folder: Path = FOLDER) -> AutoencoderKL:
    """The tiny VAE in eval mode, float32, frozen: RGB `[B, 3, H, W]` in [-1, 1] => moments at H/8 x W/8.

    Scaled latents `sample * config.scaling_factor` have unit standard deviation over the shapes set.
    Raises `UserError` if the weights are missing.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae: AutoencoderKL = AutoencoderKL(**_config("vae", folder))
    return _fill(vae, weights_path("vae", folder=folder))


def load_tiny_vit(*, folder: Path = FOLDER) -> VisionTransformer:
    """The tiny ViT in eval mode, float32, frozen, without a head (`num_classes` 0).

    Input: RGB `[B, 3, H, W]`, [0, 1] normalised by mean 0.5 and std 0.5, sides divisible by 16; away from
    64 px the position table is resampled. `forward_features` returns `[B, 1 + N, D]`: a class token that no
    loss has seen, then N patch tokens. Trained with labels (classes; coverage and mean colour of each
    patch). Raises `UserError` if the weights are missing.
    """
    from timm.models.vision_transformer import VisionTransformer

    return _fill(VisionTransformer(**_config("vit", folder)), weights_path("vit", folder=folder))


def load_caption_judge(*, folder: Path = FOLDER) -> ResNet:
    """The caption judge in eval mode, float32, frozen: RGB `[B, 3, 64, 64]` in [-1, 1] => logits `[B, 23]`.

    The logits are of the values of `featcache.sources.shapes_text.ATTRIBUTES`, one attribute after another;
    `trainer.evaluate.obeyed` reads them. Raises `UserError` if the weights are missing.
    """
    return _resnet("caption-judge", folder)


def load_judge(*, folder: Path = FOLDER) -> ResNet:
    """The judge in eval mode, float32, frozen, without a head: RGB `[B, 3, H, W]` in [-1, 1] => features `[B, 128]`.

    A small residual network trained with labels, apart from the encoders: no method aligns with it, so that distances in
    its features may judge them all. Raises `UserError` if the weights are missing.
    """
    return _resnet("judge", folder)


def _resnet(name: str, folder: Path) -> ResNet:
    from timm.models.resnet import BasicBlock, ResNet

    # timm annotates the class of a block as if it were an instance
    network = ResNet(block=BasicBlock, **_config(name, folder))  # type: ignore[arg-type]
    return _fill(network, weights_path(name, folder=folder))


def _config(name: str, folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return config


def _fill(module: Module, path: Path) -> Module:
    # Stored as fp16 to halve the download; computed with as fp32.
    module.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return module.eval().requires_grad_(False)
