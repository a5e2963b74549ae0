"""What the name of a feature that a vision encoder made says. No torch here.

| name | per sample | what |
| --- | --- | --- |
| `dinov2-b@11` | `[T, C]` | patch tokens after block 11, counted from 0 |
| `dinov2-b@11.cls` | `[C]` | the class token after that block |
| `dinov2-b@11.pca8` | `[T, K]` | derived from the patch tokens (`featcache derive`); any part but `cls` |

Other features are named by what is before a `/` (`vae/moments`, `vae/G3`, `text/clip-l`), or are of the samples themselves.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CLASS_TOKEN = "cls"
_LAYER = re.compile(r"(?P<encoder>[^/@]+)@(?P<layer>[0-9]{1,9})(?:\.(?P<part>.+))?")


@dataclass(frozen=True, kw_only=True)
class LayerFeature:
    """What an encoder's block gave: part is '' for its patch tokens, `cls` for its class token, else the name of what was
    derived from the patch tokens."""

    encoder: str
    layer: int
    part: str = ""

    def __str__(self) -> str:
        return f"{self.encoder}@{self.layer}" + (f".{self.part}" if self.part else "")

    @property
    def is_tokens(self) -> bool:
        """Whether these are the block's patch tokens."""
        return not self.part

    @property
    def is_class_token(self) -> bool:
        return self.part == CLASS_TOKEN

    @property
    def is_derived(self) -> bool:
        """Whether it was made of the block's patch tokens."""
        return bool(self.part) and not self.is_class_token


def layer_feature(name: str) -> LayerFeature | None:
    """The parts of `<encoder>@<layer>[.<part>]`; None for any other name."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    return LayerFeature(encoder=match["encoder"], layer=int(match["layer"]), part=match["part"] or "")


def is_tokens(name: str) -> bool:
    """Whether a feature is the patch tokens of an encoder's block, as the encoder gave them."""
    parts = layer_feature(name)
    return parts is not None and parts.is_tokens


def is_class_token(name: str) -> bool:
    """Whether a feature is the class token of an encoder's block."""
    parts = layer_feature(name)
    return parts is not None and parts.is_class_token
