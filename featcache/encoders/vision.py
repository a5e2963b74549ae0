"""Vision encoders: raw pixels => patch tokens of chosen layers.

Preprocessing follows REPA's code: the ADM crop scaled to [0, 1], normalised, *then* resized to the encoder's input
(bicubic, no antialiasing), so that a 256-px image at input 224 and patch 14 gives 16x16 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.encoders.base import (
    WeightsSource,
    find_weights,
    load_file,
    seeded,
    unavailable,
    weights_sha256,
)
from featcache.encoders.hub import HubUnreachable, hub_file
from featcache.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class VisionEntry:
    """One selectable vision encoder.

    input_per_256: side of the encoder's input in pixels for a 256-px image; scales with the resolution.
    hub_id: repository with timm-format weights; None for the embedded one.
    """

    timm_name: str
    hub_id: str | None
    patch: int
    depth: int
    width: int
    input_per_256: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    default_layers: tuple[int, ...] = ()


def _dinov2(size: str, depth: int, width: int) -> VisionEntry:
    name = f"vit_{size}_patch14_dinov2.lvd142m"
    return VisionEntry(
        timm_name=name, hub_id=f"timm/{name}", patch=14, depth=depth, width=width, input_per_256=224
    )


ENCODERS: Mapping[str, VisionEntry] = {
    "dinov2-s": _dinov2("small", 12, 384),
    "dinov2-b": _dinov2("base", 12, 768),
    "dinov2-l": _dinov2("large", 24, 1024),
    "dinov2-g": _dinov2("giant", 40, 1536),
}


def load_vision(name: str, weights: WeightsSource, *, input_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """A frozen timm vision transformer for square inputs of ``input_size`` px, and where its weights came from.

    Position embeddings are resampled to the input's grid by timm, as REPA does.

    Raises:
        UserError: unknown name, or damaged weights.
        WeightsUnavailable: no weights on this machine and no hub.
    """
    import timm

    entry = ENCODERS[name]

    def build() -> nn.Module:
        return timm.create_model(
            entry.timm_name.split(".")[0], pretrained=False, num_classes=0, img_size=input_size
        )

    if weights.random_seed is not None:
        model = seeded(weights.random_seed, build)
        origin: dict[str, Any] = {"weights": "random", "seed": weights.random_seed}
    else:
        model = build()
        state = _find_state(name, entry, weights)
        from timm.models.vision_transformer import checkpoint_filter_fn

        try:
            model.load_state_dict(checkpoint_filter_fn(state, model))
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"the weights found for {name!r} do not fit {entry.timm_name}: {str(error).splitlines()[0]}",
                remedy=f"Bring the weights of {entry.hub_id} (timm format).",
            ) from error
        origin = {"weights": entry.hub_id}
    model = model.eval().requires_grad_(False)
    return model, {"name": name, "timm": entry.timm_name, **origin, "sha256": weights_sha256(model)}


def _find_state(name: str, entry: VisionEntry, weights: WeightsSource) -> dict[str, Tensor]:
    hub_id = entry.hub_id or ""
    if weights.weights_dir is not None:
        stems = (name, entry.timm_name, entry.timm_name.split(".")[0], hub_id.replace("/", "--"), hub_id)
        found = find_weights(weights.weights_dir, stems)
        if found is not None:
            return load_file(found)
    try:
        return load_file(hub_file(hub_id, ("model.safetensors", "pytorch_model.bin")))
    except HubUnreachable as error:
        raise unavailable(name, hub_id, str(error)) from error


class VisionEncoder:
    """Patch tokens of one vision transformer at one or more layers.

    Args:
        name: a key of :data:`ENCODERS`, or ``tiny``.
        layers: block indices counted from 0; empty means the entry's default (the final block).
        weights: where weights may come from.
        resolution: side of the pixels; the token grid is resolution / 16.
        final_norm: ``all`` applies the encoder's final norm to every cached layer, ``last`` only to the final block's
            output (DyA does not say which; default and choice are ours).
        device: where to run.

    Features:
        ``<name>@<layer>``: [T, width] float32, T = (R/16)^2 patch tokens row-major, no class or register tokens.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        weights: WeightsSource,
        *,
        resolution: int,
        final_norm: str = "all",
        device: str = "cpu",
    ) -> None:
        grid = resolution // 16
        if name == "tiny":
            from featcache.encoders.tiny import load_tiny_vit

            model: Any = load_tiny_vit()
            depth, width, input_size = len(model.blocks), model.embed_dim, resolution
            mean, std, default = (0.5,) * 3, (0.5,) * 3, (depth // 2 - 1, depth - 2, depth - 1)
            origin: dict[str, Any] = {"name": "tiny", "weights": "embedded", "sha256": weights_sha256(model)}
        else:
            entry = ENCODERS[name]
            depth, width = entry.depth, entry.width
            input_size = entry.input_per_256 * resolution // 256
            mean, std, default = entry.mean, entry.std, entry.default_layers or (depth - 1,)
            model, origin = None, {}
        self.layers = tuple(sorted(set(layers or default)))
        wrong = [i for i in self.layers if not 0 <= i < depth]
        if wrong:
            raise UserError(
                f"{name} has no layer {wrong[0]}: its {depth} blocks are counted from 0",
                remedy=f"Type for example --encoder {name}@{depth - 1}",
            )
        if model is None:
            model, origin = load_vision(name, weights, input_size=input_size)
        if final_norm not in ("all", "last"):
            raise UserError(f"unknown --final-norm {final_norm!r}", remedy="Type all or last.")
        self.name, self.module, self.input_size = name, model.to(device), input_size
        self._norm_all, self._last = final_norm == "all", depth - 1
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)
        self.shapes = {f"{name}@{i}": (grid * grid, width) for i in self.layers}
        self.provenance = {
            f"{name}@{i}": {
                **origin,
                "layer": i,
                "final_norm": self._norm_all or i == self._last,
                "input_size": input_size,
                "resize": "none" if input_size == resolution else "normalise, then bicubic, no antialiasing",
            }
            for i in self.layers
        }

    def prepare(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, R, R] => normalised float32 [B, 3, input, input] (METHODS: normalise, then resize)."""
        x = (pixels.float() / 255 - self._mean) / self._std
        if x.shape[-1] != self.input_size:
            x = F.interpolate(x, size=(self.input_size,) * 2, mode="bicubic", align_corners=False)
        return x

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, R, R] => ``name@layer`` -> float32 [B, T, width]."""
        x = self.prepare(pixels).to(next(self.module.parameters()).dtype)
        tokens = self.module.forward_intermediates(
            x, indices=list(self.layers), norm=self._norm_all, output_fmt="NLC", intermediates_only=True
        )
        if not self._norm_all and self.layers[-1] == self._last:
            tokens[-1] = self.module.norm(tokens[-1])
        return {f"{self.name}@{i}": t.float() for i, t in zip(self.layers, tokens)}
