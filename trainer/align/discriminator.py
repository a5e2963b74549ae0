"""SARA's discriminator on token maps: the first two stages of a ResNet-18 (SARA Sec. 4.1)."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from featcache.encoders.hub import HubUnreachable, hub_file
from featcache.errors import UserError


def _imagenet_file() -> Path | None:
    """timm's ImageNet weights of ResNet-18, from the local Hugging Face cache or the hub; None elsewhere."""
    import timm

    entry = timm.get_pretrained_cfg("resnet18")
    if entry is None or not entry.hf_hub_id:
        return None
    try:
        return hub_file(str(entry.hf_hub_id), ("model.safetensors",))
    except HubUnreachable:
        return None


def resnet18_state(weights: str) -> dict[str, Tensor] | None:
    """State dict of timm's `resnet18`, or None for a random start.

    weights: `'random'`; `'auto'`, ImageNet weights where they can be had and else, with a warning,
        random; or the path of a `.safetensors` file.

    Raises:
        UserError: the file is missing or unreadable.
    """
    if weights == "random":
        return None

    if weights == "auto":
        path = _imagenet_file()
        if path is None:
            warnings.warn(
                "SARA's discriminator starts from random weights: ImageNet weights of ResNet-18 are neither "
                "on this machine nor downloadable. Name their file in discriminator_weights to use them.",
                stacklevel=2,
            )
            return None
        return load_file(path)
    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"sara: cannot read discriminator_weights={weights!r}: {error}",
            remedy="Give the .safetensors file of timm's resnet18, or 'auto', or 'random'.",
        ) from error


def _replace_norm(module: nn.Module, kind: str) -> None:
    """Replaces every BatchNorm by a layer without running statistics, keeping its scale and shift."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            C = child.num_features
            norm: nn.Module
            if kind == "group":
                norm = nn.GroupNorm(math.gcd(32, C), C)
            else:
                norm = nn.BatchNorm2d(C, track_running_stats=False)
            norm.load_state_dict({"weight": child.weight, "bias": child.bias})
            setattr(module, name, norm)
        else:
            _replace_norm(child, kind)


class TokenDiscriminator(nn.Module):
    """Token map -> one logit per image that it comes from the real encoder: [B, N, C] -> [B].

    A ResNet-18 whose first convolution is a 1x1 convolution from C channels and whose last two stages are
    gone. The paper leaves the output open; ours is global average pooling and one linear layer, for the
    adversary is to judge the global distribution.

    norm: `'group'` (ours) makes a sample's logit independent of the others in its micro-batch and on its
        rank, so that runs agree for any number of ranks; `'batch'` normalises by the statistics of the
        batch at hand. Neither keeps running statistics, which the model's own step would change.
    """

    def __init__(self, width: int, *, grid: int, norm: str, weights: str) -> None:
        super().__init__()
        import timm

        self.grid = grid
        resnet: Any = timm.create_model("resnet18", pretrained=False)
        state = resnet18_state(weights)
        if state is not None:
            try:
                resnet.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(
                    f"sara: discriminator_weights={weights!r} does not fit timm's resnet18",
                    remedy="Give the .safetensors file of timm's resnet18, or 'auto', or 'random'.",
                ) from error
        _replace_norm(resnet, norm)
        self.conv1 = nn.Conv2d(width, resnet.conv1.out_channels, 1, bias=False)
        self.bn1, self.act1, self.maxpool = resnet.bn1, resnet.act1, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.fc = nn.Linear(resnet.layer2[-1].conv2.out_channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        B, _, C = tokens.shape
        x = tokens.reshape(B, self.grid, self.grid, C).permute(0, 3, 1, 2)  # channels-last memory order, no copy
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))[:, 0].float()
        return logits


def frozen(discriminator: nn.Module, tokens: Tensor) -> Tensor:
    """The discriminator's logits with its parameters as constants: gradients reach `tokens` alone."""
    constants = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}
    logits: Tensor = torch.func.functional_call(discriminator, constants, (tokens,))
    return logits
