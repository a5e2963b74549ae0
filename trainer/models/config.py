"""Shapes of the backbones, and what follows from them by counting. Imports no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
# Of LightningDiT alone (its repository's 1.0B and 1.6B), all heads 64 wide.
LARGE_SIZES: dict[str, tuple[int, int, int]] = {"1p0B": (24, 1536, 24), "1p6B": (28, 1792, 28)}
# Of MMDiT alone: REPA's rule, width 32 * depth and as many heads, so that a head is 32 wide. L is the paper's; the others
# are ours by the same rule, B about as large as SiT-B.
TEXT_SIZES: dict[str, tuple[int, int, int]] = {
    size: (depth, 32 * depth, depth) for size, depth in (("Ti", 6), ("S", 12), ("B", 16), ("L", 24), ("XL", 28))
}
PATCH_SIZES = (1, 2, 4, 8)
Attention = Literal["sdpa", "xformers"]
Norm = Literal["layer", "rms"]
FeedForward = Literal["gelu", "swiglu"]

# What a model's name says beside its size: fields of `ModelConfig`.
BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "SiT": {"family": "sit"},
    "DiT": {"family": "dit", "learn_sigma": True},
    "LightningDiT": {"family": "sit", "norm": "rms", "mlp": "swiglu", "rope": True},
    "MMDiT": {"family": "sit"},
}
TEXT_BACKBONE = "MMDiT"  # the one whose condition is text; the others' is a label


def sizes_of(backbone: str) -> dict[str, tuple[int, int, int]]:
    """Depth, width and heads by size, for a key of `BACKBONES`."""
    if backbone == TEXT_BACKBONE:
        return TEXT_SIZES
    return SIZES | LARGE_SIZES if backbone == "LightningDiT" else SIZES


MODEL_NAMES = tuple(f"{b}-{s}/{p}" for b in BACKBONES for s in sizes_of(b) for p in PATCH_SIZES)

TIME_FREQUENCIES = 256  # width of the sinusoidal time embedding, cosine half first


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """A feature that is diffused beside the latents, as the backbone sees it.

    name: of the feature. channels: of a token. side: of its square of tokens; a vector is one token. merged: its tokens,
    brought to the latents' grid, are further channels of theirs (as in ReDi); otherwise it has tokens of its own, before the image's (as in REG).
    """

    name: str
    channels: int
    side: int
    merged: bool

    @property
    def tokens(self) -> int:
        """That it adds to the sequence."""
        return 0 if self.merged else self.side**2


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Text rows as a backbone takes them: of the feature `name` (`text/clip-l`), `tokens` of them, each `width` wide.

    Raises:
        UserError: a number that is not positive.
    """

    name: str
    tokens: int
    width: int

    def __post_init__(self) -> None:
        _check_positive({"tokens": self.tokens, "width": self.width}, f"{self.name}: ")


def _check_positive(values: Mapping[str, object], where: str = "") -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}{name} is {value!r}, but it must be a positive integer.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One backbone.

    Args:
        family: what time and prediction mean: `sit` (velocity, t in [0, 1], t = 1 is noise; LightningDiT too) or `dit`
            (noise prediction, t = DDPM step 0..999).
        depth: number of blocks.
        width: hidden size; divisible by `heads` and by 4 (2-D sin-cos positions).
        heads: attention heads.
        patch_size: side of a square patch of the latent.
        latent_channels, latent_size: the latent is [latent_channels, latent_size, latent_size].
        num_classes: labels are 0..num_classes-1; `num_classes` itself is the null label.
        qk_norm: a norm of the same kind over each head's queries and keys, as in REPA's and LightningDiT's code.
        learn_sigma: predict the variance's interpolation values beside the noise (DiT only).
        attention: `sdpa` (torch) or `xformers`.
        mlp_ratio: hidden width of the MLP over `width`, before `swiglu` takes 2/3 of it.
        norm: `layer` (LayerNorm without parameters of its own) or `rms` (RMSNorm with a weight).
        mlp: `gelu` (two layers) or `swiglu` (gated, three).
        rope: rotate queries and keys by the token's row and column, beside the sin-cos table.
        streams: what is diffused beside the latents.
        text: the condition is text (MMDiT) of this shape instead of a label; `num_classes` then means nothing.
        zero_init: of MMDiT: modulations and output start at zero, as all other backbones' do; the published one starts
            with PyTorch's default everywhere.

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
    norm: Norm = "layer"
    mlp: FeedForward = "gelu"
    rope: bool = False
    streams: tuple[StreamShape, ...] = ()
    text: TextShape | None = None
    zero_init: bool = False

    def __post_init__(self) -> None:
        sizes = ("depth", "width", "heads", "patch_size", "latent_channels", "latent_size", "num_classes")
        _check_positive({name: getattr(self, name) for name in sizes})
        if self.family not in ("sit", "dit"):
            raise UserError(f"Unknown model family {self.family!r}.", remedy="Use 'sit' or 'dit'.")
        if self.attention not in ("sdpa", "xformers"):
            raise UserError(f"Unknown attention {self.attention!r}.", remedy="Use 'sdpa' or 'xformers'.")
        if self.norm not in ("layer", "rms"):
            raise UserError(f"Unknown norm {self.norm!r}.", remedy="Use 'layer' or 'rms'.")
        if self.mlp not in ("gelu", "swiglu"):
            raise UserError(f"Unknown MLP {self.mlp!r}.", remedy="Use 'gelu' or 'swiglu'.")
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
        if self.rope and self.width // self.heads % 4:
            raise UserError(
                f"width {self.width} with {self.heads} heads: rotary positions need heads whose width is divisible by 4."
            )
        if self.learn_sigma and self.family == "sit":
            raise UserError(
                "SiT predicts a velocity and no variance, so learn_sigma cannot be set.",
                remedy="Leave learn_sigma out; importing an official SiT drops its unused variance channels.",
            )
        if self.family == "dit" and self.own_streams:
            raise UserError(
                f"{self.own_streams[0].name} would have tokens of its own, and DiT's loss with its learned variance is of "
                "latents alone",
                remedy="Take a SiT or LightningDiT, or (tokens) merge them into the latents: embed: merged.",
            )

        self._check_text()

    def _check_text(self) -> None:
        if self.text is None:
            if self.zero_init:
                raise UserError(
                    "zero_init is MMDiT's: all other backbones start with zero modulations and output anyway",
                    remedy="Leave zero_init out.",
                )
            return
        if self.streams:
            raise UserError(
                f"{self.streams[0].name} is to be diffused beside the latents, and {TEXT_BACKBONE} draws latents alone",
                remedy="Leave the streams (and methods that bring some, such as reg and redi) out, or train a SiT or "
                "LightningDiT on labels.",
            )
        if self.family != "sit" or (self.norm, self.mlp, self.rope) != ("layer", "gelu", False):
            raise UserError(
                f"{TEXT_BACKBONE} has SiT's layers and family: no other norm, MLP or position goes with text."
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent."""
        return self.latent_channels, self.latent_size, self.latent_size

    @property
    def grid(self) -> int:
        """The image's tokens along one side."""
        return self.latent_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Of the image."""
        return self.grid**2

    @property
    def own_streams(self) -> tuple[StreamShape, ...]:
        """Streams with tokens of their own."""
        return tuple(stream for stream in self.streams if not stream.merged)

    @property
    def stream_tokens(self) -> int:
        """Tokens of all streams, which stand before the image's."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def sequence(self) -> int:
        """Tokens of a block: of the image and of all that stands before them."""
        return self.tokens + self.stream_tokens + (0 if self.text is None else self.text.tokens)

    @property
    def in_channels(self) -> int:
        """Of the latents and what is merged into them."""
        return self.latent_channels + sum(stream.channels for stream in self.streams if stream.merged)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP; a gated one has 2/3, rounded down, so that its three layers weigh as much as two."""
        hidden = int(self.width * self.mlp_ratio)
        return int(2 / 3 * hidden) if self.mlp == "swiglu" else hidden

    @property
    def backbone(self) -> str | None:
        """Key of `BACKBONES` whose layers these are; None for a mixture that has no name."""
        if self.text is not None:
            return TEXT_BACKBONE
        flags = (self.norm, self.mlp, self.rope)
        if flags == ("rms", "swiglu", True) and self.family == "sit":
            return "LightningDiT"
        if flags != ("layer", "gelu", False):
            return None
        return "SiT" if self.family == "sit" else "DiT"

    @property
    def name(self) -> str | None:
        """Such as `SiT-XL/2`; None where no named model has this shape."""
        shape = (self.depth, self.width, self.heads)
        sizes = {} if self.backbone is None else sizes_of(self.backbone)
        return next((f"{self.backbone}-{size}/{self.patch_size}" for size in sizes if sizes[size] == shape), None)


def model_config(
    name: str,
    *,
    latent_channels: int,
    latent_size: int,
    num_classes: int,
    qk_norm: bool = False,
    attention: Attention = "sdpa",
    streams: tuple[StreamShape, ...] = (),
    text: TextShape | None = None,
    zero_init: bool = False,
) -> ModelConfig:
    """The configuration of a named model such as `SiT-B/2`, `DiT-XL/4` (learns its variance), `LightningDiT-XL/1` or
    `MMDiT-L/2` (takes text).

    Raises:
        UserError: an unknown name, values that do not fit together, or text where the model takes labels and vice versa.
    """
    match = re.fullmatch(rf"({'|'.join(BACKBONES)})-(\w+)/(\d+)", name)
    if match is None or match[2] not in sizes_of(match[1]) or int(match[3]) not in PATCH_SIZES:
        close = difflib.get_close_matches(name, MODEL_NAMES, n=1, cutoff=0.5)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"Unknown model {name!r:.80}.",
            remedy=f"{hint}Models are {', '.join(BACKBONES)}, then a size ({', '.join(SIZES)}; of LightningDiT also "
            f"{', '.join(LARGE_SIZES)}), a slash and a patch size ({', '.join(map(str, PATCH_SIZES))}): for example "
            "'SiT-B/2'.",
        )
    if match[1] == TEXT_BACKBONE and text is None:
        raise UserError(
            f"{name} takes text, and it is not said which", remedy="Type for example: --condition text/clip-l"
        )
    if match[1] != TEXT_BACKBONE and text is not None:
        raise UserError(
            f"{name} takes labels, and its condition is to be {text.name}",
            remedy=f"Leave --condition out, or take a model that takes text, such as --model {TEXT_BACKBONE}-L/2",
        )
    depth, width, heads = sizes_of(match[1])[match[2]]
    return ModelConfig(
        depth=depth,
        width=width,
        heads=heads,
        patch_size=int(match[3]),
        latent_channels=latent_channels,
        latent_size=latent_size,
        num_classes=num_classes,
        qk_norm=qk_norm,
        attention=attention,
        streams=streams,
        text=text,
        zero_init=zero_init,
        **BACKBONES[match[1]],
    )


def takes_text(name: str) -> bool:
    """Whether the condition of a model of this name is text."""
    return name.startswith(f"{TEXT_BACKBONE}-")


def forward_flops(cfg: ModelConfig, *, depth: int | None = None) -> int:
    """Floating-point operations of one image's forward pass: matrix products and attention, 2 per multiply-add.

    Norms, activations and embedding look-ups are left out, as usual for model FLOPs utilisation. A training
    step costs three times this figure. With `depth`, only that many blocks are counted and the final
    layer is not (a forward pass with `stop_after=depth`).
    """
    if cfg.text is not None:
        return _joint_flops(cfg, cfg.text, depth)
    N, D, M = cfg.tokens + cfg.stream_tokens, cfg.width, cfg.mlp_width
    own = sum(stream.tokens * D * stream.channels for stream in cfg.own_streams)
    mlp = (3 if cfg.mlp == "swiglu" else 2) * D * M
    block = N * (4 * D * D + mlp) + 2 * N * N * D + 6 * D * D
    embed, final = _embed_and_final(cfg)
    if depth is None:
        return 2 * (embed + own + cfg.depth * block + final + own)
    return 2 * (embed + own + depth * block)


def _embed_and_final(cfg: ModelConfig) -> tuple[int, int]:
    """Multiply-adds of the embeddings of latents and time, and of the final layer."""
    image, D, patch = cfg.tokens, cfg.width, cfg.patch_size**2
    embed = image * D * patch * cfg.in_channels + TIME_FREQUENCIES * D + D * D
    return embed, 2 * D * D + image * D * patch * cfg.out_channels


def _joint_flops(cfg: ModelConfig, text: TextShape, depth: int | None) -> int:
    """As `forward_flops`, of blocks over text and image whose last one leaves out what follows the text."""
    N, T, D, M = cfg.tokens, text.tokens, cfg.width, cfg.mlp_width
    block = (N + T) * (4 * D * D + 2 * D * M) + 2 * (N + T) ** 2 * D + 12 * D * D
    last = N * (4 * D * D + 2 * D * M) + 2 * N * (N + T) * D + 8 * D * D + T * 3 * D * D
    embed, final = _embed_and_final(cfg)
    embed += T * text.width * D
    blocks = cfg.depth if depth is None else depth
    total = embed + blocks * block + (last - block if blocks == cfg.depth else 0)
    return 2 * (total + (final if depth is None else 0))
