"""Shapes of the backbones, and what follows from them by counting. Imports no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from featcache.errors import UserError

# name: depth, width, heads. S to XL as in DiT (Peebles & Xie 2023, Table 1) and SiT; Ti is ours, for demos
# and tests.
SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCH_SIZES = (1, 2, 4, 8)
Attention = Literal["sdpa", "xformers"]
FAMILIES = ("SiT", "DiT")
MODEL_NAMES = tuple(f"{f}-{s}/{p}" for f in FAMILIES for s in SIZES for p in PATCH_SIZES)

TIME_FREQUENCIES = 256  # width of the sinusoidal time embedding, cosine half first


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One backbone.

    Args:
        family: `sit` (velocity, t in [0, 1], t = 1 is noise) or `dit` (noise prediction, t = DDPM step 0..999).
        depth: number of blocks.
        width: hidden size; divisible by `heads` and by 4 (2-D sin-cos positions).
        heads: attention heads.
        patch_size: side of a square patch of the latent.
        latent_channels, latent_size: the latent is [latent_channels, latent_size, latent_size].
        num_classes: labels are 0..num_classes-1; `num_classes` itself is the null label.
        qk_norm: LayerNorm over each head's queries and keys, as in REPA's code.
        learn_sigma: predict the variance's interpolation values beside the noise (DiT only).
        attention: `sdpa` (torch) or `xformers`.
        mlp_ratio: hidden width of the MLP over `width`.

    Raises:
        UserError: values that do not fit together.
    """

    family: Literal["sit", "dit"]
    depth: int
    width: int
    heads: int
    patch_size: int
    latent_channels: int
    latent_size: int
    num_classes: int
    qk_norm: bool = False
    learn_sigma: bool = False
    attention: Attention = "sdpa"
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        for name in (
            "depth",
            "width",
            "heads",
            "patch_size",
            "latent_channels",
            "latent_size",
            "num_classes",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name} is {value!r}, but it must be a positive integer.")
        if self.family not in ("sit", "dit"):
            raise UserError(f"Unknown model family {self.family!r}.", remedy="Use 'sit' or 'dit'.")
        if self.attention not in ("sdpa", "xformers"):
            raise UserError(f"Unknown attention {self.attention!r}.", remedy="Use 'sdpa' or 'xformers'.")
        if self.latent_size % self.patch_size:
            fitting = [p for p in PATCH_SIZES if self.latent_size % p == 0]
            raise UserError(
                f"A latent of {self.latent_size} x {self.latent_size} cannot be cut into patches of "
                f"{self.patch_size} x {self.patch_size}.",
                remedy=f"Use a model with patch size {' or '.join(map(str, fitting))}, or a cache of another "
                "resolution.",
            )
        if self.width % self.heads or self.width % 4:
            raise UserError(
                f"width {self.width} with {self.heads} heads: the width must be divisible by the number of "
                "heads and by 4."
            )
        if self.learn_sigma and self.family == "sit":
            raise UserError(
                "SiT predicts a velocity and no variance, so learn_sigma cannot be set.",
                remedy="Leave learn_sigma out; importing an official SiT drops its unused variance channels.",
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def grid(self) -> int:
        """Tokens along one side."""
        return self.latent_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def out_channels(self) -> int:
        return self.latent_channels * (2 if self.learn_sigma else 1)

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


def model_config(
    name: str,
    *,
    latent_channels: int,
    latent_size: int,
    num_classes: int,
    qk_norm: bool = False,
    attention: Attention = "sdpa",
) -> ModelConfig:
    """The configuration of a named model such as `SiT-B/2` or `DiT-XL/4`; DiT learns its variance.

    Raises:
        UserError: an unknown name, or values that do not fit together.
    """
    match = re.fullmatch(r"(SiT|DiT)-(\w+)/(\d+)", name)
    if match is None or match[2] not in SIZES or int(match[3]) not in PATCH_SIZES:
        close = difflib.get_close_matches(name, MODEL_NAMES, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"Unknown model {name!r:.80}.",
            remedy=f"{hint}Models are SiT or DiT, a size ({', '.join(SIZES)}), a slash and a patch size "
            f"({', '.join(map(str, PATCH_SIZES))}): for example 'SiT-B/2'.",
        )
    depth, width, heads = SIZES[match[2]]
    family: Literal["sit", "dit"] = "sit" if match[1] == "SiT" else "dit"
    return ModelConfig(
        family=family,
        depth=depth,
        width=width,
        heads=heads,
        patch_size=int(match[3]),
        latent_channels=latent_channels,
        latent_size=latent_size,
        num_classes=num_classes,
        qk_norm=qk_norm,
        learn_sigma=family == "dit",
        attention=attention,
    )


def forward_flops(cfg: ModelConfig, *, depth: int | None = None) -> int:
    """Floating-point operations of one image's forward pass: matrix products and attention, 2 per multiply-add.

    Norms, activations and embedding look-ups are left out, as usual for model FLOPs utilisation. A training
    step costs three times this figure. With `depth`, only that many blocks are counted and the final
    layer is not (a forward pass with `stop_after=depth`).
    """
    N, D, M = cfg.tokens, cfg.width, cfg.mlp_width
    patch = cfg.patch_size**2
    embed = N * D * patch * cfg.latent_channels + TIME_FREQUENCIES * D + D * D
    block = N * (4 * D * D + 2 * D * M) + 2 * N * N * D + 6 * D * D
    final = 2 * D * D + N * D * patch * cfg.out_channels
    if depth is None:
        return 2 * (embed + cfg.depth * block + final)
    return 2 * (embed + depth * block)
