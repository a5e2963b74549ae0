"""Vision encoders: raw pixels => patch tokens of chosen layers, and class tokens (`featcache.encoders.table` lists them).

A crop scaled to [0, 1] is normalised and resized to the encoder's input, in the order that the public code uses for
each encoder. Patch tokens leave row-major, without class or register tokens; the class token is a feature of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.encoders import TINY
from featcache.encoders.base import (
    Compute,
    WeightsSource,
    find_weights,
    load_file,
    seeded,
    unavailable,
    weights_sha256,
)
from featcache.encoders.hub import HubUnreachable, hub_file
from featcache.encoders.keys import to_timm
from featcache.encoders.table import ENCODERS, HALF, TOKEN_PX, VisionEntry
from featcache.encoders.tiny import load_tiny_vit
from featcache.errors import UserError, first_line
from featcache.feature_names import CLASS_TOKEN, LayerFeature

FINAL_NORMS = ("auto", "all", "last", "none")


def build_vision(entry: VisionEntry, *, input_px: int) -> nn.Module:
    """The architecture of `entry` for square inputs of `input_px`, weights as timm initialises them."""
    import timm  # late: it takes seconds to load

    return timm.create_model(
        entry.architecture, pretrained=False, num_classes=0, img_size=input_px, **dict(entry.options)
    )


def load_vision(name: str, weights: WeightsSource, *, input_px: int) -> tuple[nn.Module, dict[str, Any]]:
    """A frozen timm vision transformer for square inputs of `input_px`, and where its weights came from.

    Position tables are resampled to the input's grid by timm (bicubic, antialiased), as REPA does.

    Raises `UserError` for damaged weights, or weights of another network; `WeightsUnavailable` if the weights are
    neither on this machine nor on a hub.
    """
    entry = ENCODERS[name]
    if weights.random_seed is not None:
        model = seeded(weights.random_seed, lambda: build_vision(entry, input_px=input_px))
        origin: dict[str, Any] = {"weights": "random", "seed": weights.random_seed}
    else:
        model = build_vision(entry, input_px=input_px)
        state = to_timm(load_file(find_file(name, entry, weights)), entry.key_format)
        try:
            model.load_state_dict(_filtered(state, model))
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"the weights found for {name!r} do not fit {entry.timm_name}: {first_line(error)}",
                remedy=f"Bring the weights of {entry.hub_id or entry.weights_page}.",
            ) from error
        origin = {"weights": entry.hub_id or "file"}
    model = model.eval().requires_grad_(False)
    return model, {"name": name, "timm": entry.timm_name, **origin, "sha256": weights_sha256(model)}


def _filtered(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's conversion for the model's family: resampled position tables, other releases' names, no classifier."""
    filtered = sys.modules[type(model).__module__].checkpoint_filter_fn(state, model)
    return {key: value for key, value in filtered.items() if not key.startswith("head.")}


def find_file(name: str, entry: VisionEntry, weights: WeightsSource) -> Path:
    """The file of pretrained weights; raises `WeightsUnavailable`."""
    hub_id = entry.hub_id or ""
    if weights.weights_dir is not None:
        stems = (name, entry.timm_name, entry.architecture)
        found = find_weights(weights.weights_dir, (*stems, hub_id.replace("/", "--"), hub_id) if hub_id else stems)
        if found is not None:
            return found
    if not hub_id:
        raise unavailable(name, None, "", entry.weights_page)
    try:
        return hub_file(hub_id, ("model.safetensors", "pytorch_model.bin"))
    except HubUnreachable as error:
        raise unavailable(name, hub_id, str(error)) from error


def resized(x: Tensor, side: int, mode: str) -> Tensor:
    """[B, C, H, W] => [B, C, side, side] by PyTorch's interpolation without antialiasing; as is if it has that size."""
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode=mode, align_corners=False)


def on_grid(tokens: Tensor, grid: int) -> Tensor:
    """Tokens [B, T, D] of a square grid => [B, grid^2, D]: bilinear, antialiased when shrinking; as is if they fit."""
    B, T, D = tokens.shape
    side = round(T**0.5)
    if side * side != T:
        raise UserError(f"an encoder gave {T} tokens per image, which is not a square grid")
    if side == grid:
        return tokens
    maps = tokens.transpose(1, 2).reshape(B, D, side, side)
    maps = F.interpolate(maps.float(), size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
    return maps.flatten(2).transpose(1, 2)  # [B, grid^2, D]


class Preparation:
    """uint8 [B, 3, R, R] => normalised float32 [B, 3, input_px, input_px]."""

    def __init__(
        self,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        input_px: int,
        resize_first: bool = False,
        mode: str = "bicubic",
        device: str = "cpu",
    ) -> None:
        self.input_px, self.resize_first, self.mode = input_px, resize_first, mode
        self._mean = torch.tensor(tuple(mean), device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(tuple(std), device=device).view(1, 3, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        x = pixels.float() / 255
        if self.resize_first:
            return (resized(x, self.input_px, self.mode) - self._mean) / self._std
        return resized((x - self._mean) / self._std, self.input_px, self.mode)

    def record(self, resolution: int) -> dict[str, Any]:
        """For the manifest: input size and what was done to get there."""
        order = "resize, then normalise" if self.resize_first else "normalise, then resize"
        text = "none" if self.input_px == resolution else f"{order} ({self.mode}, no antialiasing)"
        return {"input_size": self.input_px, "resize": text}


class VisionEncoder:
    """Patch tokens and class tokens of one vision transformer at one or more layers, from one forward pass.

    Args:
        name: a key of `featcache.encoders.table.ENCODERS`, or `tiny`.
        layers: blocks, counted from 0, whose patch tokens are wanted; none, and no class tokens either, means the entry's
            default (the final block).
        class_tokens: blocks whose class token is wanted.
        weights: where weights may come from.
        resolution: side of the pixels.
        grid: side of the cached token grid; None means resolution / 16, the encoder's own.
        final_norm: which cached layers go through the encoder's final norm: `all`, `last` (only the final block's),
            `none`, or `auto`: none where the public code applies none, else all (DyA does not say what becomes of
            an inner layer; the default is ours).
        compute: device, precision, compilation. `device` alone is short for `Compute(device=device)`.

    Features:
        `<name>@<layer>`: [grid^2, width] float32, and `<name>@<layer>.cls`: [width] float32, through the final norm where
        the patch tokens of that block go through it.

    Raises `UserError` for a layer that it does not have, or class tokens of an encoder without.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        weights: WeightsSource,
        *,
        resolution: int,
        grid: int | None = None,
        final_norm: str = "auto",
        class_tokens: Sequence[int] = (),
        device: str = "cpu",
        compute: Compute | None = None,
    ) -> None:
        self.compute = compute or Compute(device=device)
        self.grid = grid or resolution // TOKEN_PX
        if final_norm not in FINAL_NORMS:
            raise UserError(f"unknown --final-norm {final_norm!r}", remedy=f"Type one of: {', '.join(FINAL_NORMS)}.")
        place = self.compute.device
        if name == "tiny":
            tiny = load_tiny_vit()
            model: nn.Module | None = tiny
            depth, width = len(tiny.blocks), tiny.embed_dim
            default: tuple[int, ...] = (depth // 2 - 1, depth - 2, depth - 1)
            self.prepare = Preparation(mean=HALF, std=HALF, input_px=resolution, device=place)
            origin: dict[str, Any] = {"name": "tiny", "weights": "embedded", "sha256": weights_sha256(tiny)}
            norm_by_default = True
        else:
            entry = ENCODERS[name]
            model, origin = None, {}
            depth, width, norm_by_default = entry.depth, entry.width, entry.final_norm
            default = entry.default_layers or (entry.final_layer,)
            self.prepare = Preparation(
                mean=entry.mean,
                std=entry.std,
                input_px=entry.input_px(resolution),
                resize_first=entry.resize_first,
                mode=entry.resize_mode,
                device=place,
            )
            if class_tokens and not entry.class_token:
                raise without_class_token(name)
        self.layers = tuple(sorted(set(layers or (() if class_tokens else default))))
        self.class_tokens = tuple(sorted(set(class_tokens)))
        self._taken = tuple(sorted({*self.layers, *self.class_tokens}))
        wrong = [i for i in self._taken if not 0 <= i < depth]
        if wrong:
            raise UserError(
                f"{name} has no layer {wrong[0]}: its {depth} blocks are counted from 0",
                remedy=f"Type for example --encoder {name}@{depth - 1}",
            )
        if model is None:
            model, origin = load_vision(name, weights, input_px=self.prepare.input_px)
        self.name = self.title = name
        self.module: Any = model.to(place)  # one of timm's families, which share methods but no class
        self._normed = _normed_layers(self._taken, depth, final_norm, norm_by_default)
        self._run = torch.compile(self._tokens, dynamic=False) if self.compute.compile else self._tokens
        record = {**origin, **self.prepare.record(resolution), "precision": self.compute.precision}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.provenance: dict[str, dict[str, Any]] = {}
        for feature in self._features():
            self.shapes[str(feature)] = (width,) if feature.is_class_token else (self.grid**2, width)
            normed = feature.layer in self._normed
            self.provenance[str(feature)] = {**record, "layer": feature.layer, "final_norm": normed}

    def _features(self) -> list[LayerFeature]:
        tokens = [LayerFeature(encoder=self.name, layer=i) for i in self.layers]
        return tokens + [LayerFeature(encoder=self.name, layer=i, part=CLASS_TOKEN) for i in self.class_tokens]

    def _tokens(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Patch tokens [B, T, width] of `self.layers`, and class tokens [B, width] of `self.class_tokens`."""
        taken = self.module.forward_intermediates(
            x,
            indices=list(self._taken),
            return_prefix_tokens=bool(self.class_tokens),
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )
        patches, classes = [], []
        for i, found in zip(self._taken, taken):
            norm = self.module.norm if i in self._normed else _as_it_is
            if i in self.layers:
                patches.append(norm(found[0] if self.class_tokens else found))
            if i in self.class_tokens:
                classes.append(norm(found[1][:, 0]))  # registers come after it
        return patches, classes

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, R, R] => `name@layer` -> float32 [B, grid^2, width], `name@layer.cls` -> float32 [B, width]."""
        with self.compute.scope():
            patches, classes = self._run(self.prepare(pixels))
        made = [on_grid(t.float(), self.grid) for t in patches] + [t.float() for t in classes]
        return {str(feature): tensor for feature, tensor in zip(self._features(), made, strict=True)}


def _as_it_is(x: Tensor) -> Tensor:
    return x


def without_class_token(name: str) -> UserError:
    """The error for class tokens of an encoder that has none, naming those that have."""
    having = ", ".join(key for key, entry in ENCODERS.items() if entry.class_token)
    return UserError(f"{name} has no class token", remedy=f"Encoders that have one: {having}, {TINY}.")


def _normed_layers(layers: Sequence[int], depth: int, final_norm: str, by_default: bool) -> frozenset[int]:
    if final_norm == "auto":
        final_norm = "all" if by_default else "none"
    return frozenset(i for i in layers if final_norm == "all" or (final_norm == "last" and i == depth - 1))
