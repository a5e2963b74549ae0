"""Encoders that a user brings: `--encoder path/to/file.py:name` (see docs/adding-an-encoder.md).

`name` is a function of the resolution (px) that returns a `CustomEncoder`: a network and how to prepare its
input. The network maps float32 [B, 3, S, S] to tokens [B, T, D] of a square grid, or to several such tensors, which
become layers 0, 1, ... of the feature. Where it says that it has a class token, that is the first of [B, 1 + T, D].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from featcache.encoders.base import Compute, weights_sha256
from featcache.encoders.table import IMAGENET_MEAN, IMAGENET_STD, TOKEN_PX
from featcache.encoders.vision import Preparation, on_grid
from featcache.errors import UserError
from featcache.feature_names import CLASS_TOKEN, LayerFeature, layer_feature


@dataclass(frozen=True, kw_only=True)
class CustomEncoder:
    """What a user's function returns.

    module: float32 [B, 3, input_px, input_px] => tokens [B, T, D], or a list of them. input_px: None means the crop's
    size. mean, std: of RGB in [0, 1]. resize_first: resize before normalising. weights: said in the manifest, beside
    the SHA-256 of the module's tensors. class_token: the first token of each tensor is a class token, cached by `@0.cls`.
    """

    module: nn.Module
    input_px: int | None = None
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    resize_first: bool = False
    resize_mode: str = "bicubic"
    weights: str = "user"
    class_token: bool = False


def is_custom(name: str) -> bool:
    """Whether an encoder's name is a Python file and a function in it."""
    return ".py:" in name


def load_custom(name: str, *, resolution: int) -> tuple[str, CustomEncoder]:
    """Runs the user's file and its function. Returns the function's name, which names the features, and the encoder.

    Raises `UserError` if there is no such file or function, or it returns something else.
    """
    path_text, _, function = name.rpartition(":")
    path = Path(path_text)
    if not path.is_file():
        raise UserError(f"--encoder {name}: there is no file {path_text}", remedy="Type --encoder path/to/file.py:name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise UserError(f"--encoder {name}: {path_text} defines no function {function!r}")
    made = make(resolution)
    if not isinstance(made, CustomEncoder):
        raise UserError(
            f"--encoder {name}: {function}({resolution}) returned a {type(made).__name__}",
            remedy="Return a featcache.encoders.custom.CustomEncoder (docs/adding-an-encoder.md).",
        )
    return function, made


class UserEncoder:
    """A user's network as an encoder; tokens are resampled to the cache's grid where theirs differs.

    Features: `<function>@<layer>`: [grid^2, D] float32; all outputs of the network, or the chosen layers. And
    `<function>@<layer>.cls`: [D] float32, of the chosen ones alone.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[int],
        *,
        resolution: int,
        grid: int | None = None,
        class_tokens: Sequence[int] = (),
        compute: Compute | None = None,
    ) -> None:
        self.compute = compute or Compute()
        self.grid = grid or resolution // TOKEN_PX
        self.name, made = load_custom(name, resolution=resolution)
        self.title = self.name
        if class_tokens and not made.class_token:
            raise UserError(
                f"{self.name} has no class token",
                remedy="If its first token is one, say so: CustomEncoder(..., class_token=True).",
            )
        self._class_token = made.class_token
        self.module = made.module.eval().requires_grad_(False).to(self.compute.device)
        self.prepare = Preparation(
            mean=made.mean,
            std=made.std,
            input_px=made.input_px or resolution,
            resize_first=made.resize_first,
            mode=made.resize_mode,
            device=self.compute.device,
        )
        self._run = torch.compile(self.module, dynamic=False) if self.compute.compile else self.module
        blank = torch.zeros(1, 3, resolution, resolution, dtype=torch.uint8, device=self.compute.device)
        seen = self._outputs(self.module, blank)
        wrong = [i for i in (*layers, *class_tokens) if not 0 <= i < len(seen)]
        if wrong:
            raise UserError(f"{self.name} has no layer {wrong[0]}: it gives {len(seen)}, counted from 0")
        self.layers = tuple(sorted(set(layers or (() if class_tokens else range(len(seen))))))
        self.class_tokens = tuple(sorted(set(class_tokens)))
        record = {
            "name": self.name,
            "weights": made.weights,
            "sha256": weights_sha256(self.module),
            **self.prepare.record(resolution),
            "precision": self.compute.precision,
        }
        taken = self._chosen(seen)
        self.shapes = {name: tuple(tensor.shape[1:]) for name, tensor in taken.items()}
        self.provenance = {name: {**record, "layer": parts.layer} for name in taken if (parts := layer_feature(name))}

    def _chosen(self, outputs: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
        """The wanted features of the network's outputs, by name."""
        found = {str(LayerFeature(encoder=self.name, layer=i)): outputs[i][0] for i in self.layers}
        for i in self.class_tokens:
            token = outputs[i][1]
            assert token is not None  # the encoder has them, or these had been refused
            found[str(LayerFeature(encoder=self.name, layer=i, part=CLASS_TOKEN))] = token
        return found

    def _outputs(self, run: Callable[[Tensor], object], pixels: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Of each layer the patch tokens [B, grid^2, D] and the class token [B, D], if there is one; float32."""
        with self.compute.scope():
            made = run(self.prepare(pixels))
        outputs: list[tuple[Tensor, Tensor | None]] = []
        for tensor in [made] if isinstance(made, Tensor) or not isinstance(made, Iterable) else made:
            if not isinstance(tensor, Tensor) or tensor.ndim != 3 or len(tensor) != len(pixels):
                what = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise UserError(f"{self.name} must give tokens [B, T, D], but gave {what}")
            tokens = tensor.float()
            first = tokens[:, 0] if self._class_token else None
            outputs.append((on_grid(tokens[:, 1:] if self._class_token else tokens, self.grid), first))
        return outputs

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, R, R] => `name@layer` -> float32 [B, grid^2, D], `name@layer.cls` -> float32 [B, D]."""
        return self._chosen(self._outputs(self._run, pixels))
