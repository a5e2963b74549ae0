"""VAE encoders: raw pixels => posterior moments and the activations of the encoder's layers, in one pass.

Moments are stored raw: mean, then log-variance, of the posterior for pixels in [-1, 1]. Drawing and scaling the latent
is the trainer's business.

Levels (AHPA, Sec. 4.2 and App. A): the outputs of the encoder's layers in order, grouped as for the SD-VAE's 15 layers

    conv_in, down0.res0, down0.res1, down0.downsample                 G1
    down1.res0, down1.res1, down1.downsample                          G2
    down2.res0, down2.res1, down2.downsample, down3.res0              G3
    down3.res1, mid.res0, mid.attn, mid.res1                          G4

each resampled to the token grid by bilinear interpolation (half-pixel centres, no antialiasing; the paper names the
method only, so the variant is ours).
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

LEVELS = ("G1", "G2", "G3", "G4")

_SD_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


@dataclass(frozen=True, kw_only=True)
class VaeEntry:
    """One selectable VAE. ``hub_id`` is None for the embedded one."""

    hub_id: str | None
    config: Mapping[str, Any] | None
    note: str


VAES: Mapping[str, VaeEntry] = {
    "sd-ft-ema": VaeEntry(
        hub_id="stabilityai/sd-vae-ft-ema",
        config=_SD_CONFIG,
        note="Stable Diffusion VAE, the papers' default",
    ),
    "sd-ft-mse": VaeEntry(
        hub_id="stabilityai/sd-vae-ft-mse", config=_SD_CONFIG, note="Stable Diffusion VAE, smoother decoder"
    ),
    "tiny": VaeEntry(hub_id=None, config=None, note="embedded, trained on the shapes set"),
}


def load_vae(name: str, weights: WeightsSource) -> tuple[nn.Module, dict[str, Any]]:
    """A frozen ``diffusers.AutoencoderKL`` in eval mode, float32, and where its weights came from.

    Raises:
        UserError: unknown name, or damaged weights.
        WeightsUnavailable: no weights on this machine and no hub.
    """
    if name not in VAES:
        raise UserError(f"unknown VAE {name!r}", remedy=f"Type one of: --vae {' | '.join(VAES)}")
    entry = VAES[name]
    if entry.hub_id is None:
        from featcache.encoders.tiny import load_tiny_vae

        vae, origin = load_tiny_vae(), {"weights": "embedded"}
    elif weights.random_seed is not None:
        vae = seeded(weights.random_seed, lambda: _build(entry.config))
        origin = {"weights": "random", "seed": weights.random_seed}
    else:
        vae = _build(entry.config)
        vae.load_state_dict(_modern_keys(_find_state(name, entry.hub_id, weights)))
        origin = {"weights": entry.hub_id}
    vae = vae.eval().requires_grad_(False)
    return vae, {"name": name, **origin, "sha256": weights_sha256(vae)}


def _build(config: Mapping[str, Any] | None) -> nn.Module:
    from diffusers import AutoencoderKL

    assert config is not None
    return AutoencoderKL.from_config(dict(config))


def _find_state(name: str, hub_id: str, weights: WeightsSource) -> dict[str, Tensor]:
    if weights.weights_dir is not None:
        found = find_weights(
            weights.weights_dir, (name, hub_id.split("/")[1], hub_id.replace("/", "--"), hub_id)
        )
        if found is not None:
            return load_file(found)
    try:
        files = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
        return load_file(hub_file(hub_id, files))
    except HubUnreachable as error:
        raise unavailable(name, hub_id, str(error)) from error


def _modern_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention weights under diffusers' present names; the SD-VAE files were written with the former ones."""
    former = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for key, value in state.items():
        for old, new in former.items():
            if "attentions" in key:
                key = key.replace(old, new)
        renamed[key] = value
    return renamed


def encoder_layers(encoder: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """The encoder's layers in order of computation, as (group, layer name, module).

    A diffusers ``Encoder`` of the SD-VAE's layout gives the 15 layers of the module docstring. Other depths follow the
    rule behind it: a stage's output counts until its downsampling; the last stage's first layer still belongs to the
    group before (it is the transition), the rest of it and the middle block to the last group.
    """
    stages: Sequence[Any] = encoder.down_blocks
    if len(stages) != len(LEVELS):
        raise UserError(
            f"this VAE has {len(stages)} stages; G1..G4 are defined for four",
            remedy="Leave --vae-levels out.",
        )
    layers: list[tuple[str, str, nn.Module]] = [(LEVELS[0], "conv_in", encoder.conv_in)]
    for i, stage in enumerate(stages):
        for j, resnet in enumerate(stage.resnets):
            group = LEVELS[i - 1] if i == len(stages) - 1 and j == 0 else LEVELS[i]
            layers.append((group, f"down{i}.res{j}", resnet))
        for sampler in stage.downsamplers or ():
            layers.append((LEVELS[i], f"down{i}.downsample", sampler))
    middle: Any = encoder.mid_block
    layers.append((LEVELS[-1], "mid.res0", middle.resnets[0]))
    for j, resnet in enumerate(middle.resnets[1:]):
        if middle.attentions[j] is not None:
            layers.append((LEVELS[-1], "mid.attn", middle.attentions[j]))
        layers.append((LEVELS[-1], f"mid.res{j + 1}", resnet))
    return layers


class VaeEncoder:
    """Posterior moments and, on request, the levels G1..G4 of one VAE.

    Args:
        name: a key of :data:`VAES`.
        weights: where weights may come from.
        resolution: side of the pixels, a multiple of 16.
        levels: groups to keep, e.g. ``("G3", "G4")``.
        device: where to run.

    Features:
        ``vae/moments``: [2C, R/8, R/8] float32.
        ``vae/Gk``: [L, T, channels] float32, T = (R/16)^2 tokens row-major, one entry a layer in order.
    """

    def __init__(
        self,
        name: str,
        weights: WeightsSource,
        *,
        resolution: int,
        levels: Sequence[str] = (),
        device: str = "cpu",
    ) -> None:
        unknown = [level for level in levels if level not in LEVELS]
        if unknown:
            raise UserError(
                f"unknown VAE level {unknown[0]!r}",
                remedy=f"Type --vae-levels with any of: {','.join(LEVELS)}",
            )
        vae, origin = load_vae(name, weights)
        # channels_last: the layout that convolution kernels want, on CPUs and on tensor cores alike.
        self.module = vae.to(device, memory_format=torch.channels_last)
        config: Any = vae.config
        self.downsampling = 2 ** (len(config.block_out_channels) - 1)
        self.grid = resolution // self.downsampling // 2
        self.levels = tuple(level for level in LEVELS if level in levels)
        latent_size = resolution // self.downsampling
        self.info = {
            "name": name,
            "sha256": origin["sha256"],
            "latent_channels": int(config.latent_channels),
            "scaling_factor": float(config.scaling_factor),
            "shift_factor": float(config.shift_factor or 0.0),
            "downsampling": self.downsampling,
        }
        self._kept: dict[str, list[tuple[str, nn.Module]]] = {level: [] for level in self.levels}
        for group, layer, module in encoder_layers(vae.encoder) if self.levels else []:
            if group in self._kept:
                self._kept[group].append((layer, module))
        self.shapes: dict[str, tuple[int, ...]] = {
            "vae/moments": (2 * config.latent_channels, latent_size, latent_size)
        }
        self.provenance: dict[str, dict[str, Any]] = {"vae/moments": {**origin, "pixels": "[-1, 1]"}}
        widths = self._layer_widths(resolution)
        for level, layers in self._kept.items():
            channels = {widths[layer] for layer, _ in layers}
            if len(channels) > 1:
                raise UserError(
                    f"the layers of {level} in VAE {name!r} have different widths {sorted(channels)} and cannot share an array",
                    remedy=f"Leave {level} out of --vae-levels.",
                )
            self.shapes[f"vae/{level}"] = (len(layers), self.grid**2, channels.pop())
            self.provenance[f"vae/{level}"] = {
                **origin,
                "layers": [layer for layer, _ in layers],
                "resampling": "bilinear, half-pixel centres, no antialiasing",
            }

    def _layer_widths(self, resolution: int) -> dict[str, int]:
        widths: dict[str, int] = {}
        for layers in self._kept.values():
            for layer, module in layers:
                for conv in reversed([m for m in module.modules() if isinstance(m, nn.Conv2d)]):
                    # The last convolution of a resnet may be its 1x1 shortcut: same width.
                    widths[layer] = conv.out_channels
                    break
                else:
                    widths[layer] = next(m for m in module.modules() if isinstance(m, nn.Linear)).out_features
        return widths

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, R, R] => ``vae/moments`` [B, 2C, h, w] and the levels [B, L, T, channels], float32."""
        pooled: dict[str, list[Tensor]] = {level: [] for level in self.levels}

        def keep(level: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                grid = F.interpolate(
                    output.float(), size=(self.grid, self.grid), mode="bilinear", align_corners=False
                )
                pooled[level].append(grid.flatten(2).transpose(1, 2))  # [B, T, channels]

            return hook

        handles = [
            m.register_forward_hook(keep(level)) for level, layers in self._kept.items() for _, m in layers
        ]
        try:
            x = (pixels.to(next(self.module.parameters()).dtype) / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            hidden = self.module.encoder(x)
            moments = self.module.quant_conv(hidden) if self.module.quant_conv is not None else hidden
        finally:
            for handle in handles:
                handle.remove()
        return {"vae/moments": moments.float()} | {
            f"vae/{k}": torch.stack(v, dim=1) for k, v in pooled.items()
        }


@torch.inference_mode()
def decode_latents(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents [B, C, h, w] => pixels in [-1, 1], float32 [B, 3, R, R]; undoes scale and shift of the VAE."""
    config: Any = vae.config
    raw = latents.to(next(vae.parameters()).dtype) / config.scaling_factor + (config.shift_factor or 0.0)
    return vae.decode(raw).sample.float()
