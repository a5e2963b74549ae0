"""VAE encoders: raw pixels => posterior moments and the activations of the encoder's layers, in one pass.

Moments are stored raw: mean, then log-variance, of the posterior for pixels in [-1, 1]. Drawing and scaling the latent
is the trainer's business. VAEs without a posterior (TAESD, DC-AE) give their latent as the mean and a log-variance of
-30, the value that diffusers clamps to.

Levels (AHPA, Sec. 4.2 and App. A): the outputs of the encoder's layers in order, grouped as for the SD-VAE's 15 layers

    conv_in, down0.res0, down0.res1, down0.downsample                 G1
    down1.res0, down1.res1, down1.downsample                          G2
    down2.res0, down2.res1, down2.downsample, down3.res0              G3
    down3.res1, mid.res0, mid.attn, mid.res1                          G4

each resampled to the token grid. The paper says "adaptive pooling" in Sec. 4.2 and "bilinear interpolation" in App. A,
so there are both: `bilinear` (default) with half-pixel centres and no antialiasing, which reads 4 cells a token however
many there are (of 64 x 64 cells a quarter), and `average`, adaptive average pooling, which reads all. From twice the
grid's side they are the same 2 x 2 mean. VAEs of another layout are grouped by stage: G4 is the last one with the middle
block, G3 the one before, and so on; stages before the last four belong to no level.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.encoders.base import (
    Compute,
    WeightsSource,
    find_weights,
    load_file,
    remedy_for_other_weights,
    seeded,
    unavailable,
    weights_sha256,
)
from featcache.encoders.hub import HubUnreachable, hub_file
from featcache.encoders.keys import from_compvis
from featcache.encoders.table import DIFFUSERS_FILES, VAES, Resampling, token_grid
from featcache.encoders.tiny import load_tiny_vae
from featcache.errors import UserError, first_line
from featcache.store.manifest import UNKNOWN

LEVELS = ("G1", "G2", "G3", "G4")
LOG_VARIANCE_OF_NONE = -30.0
# As manifests record them.
_RESAMPLING: dict[Resampling, str] = {
    "bilinear": "bilinear, half-pixel centres, no antialiasing",
    "average": "adaptive average pooling",
}
MODEL_CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC", "ConsistencyDecoderVAE")


def load_vae(name: str, weights: WeightsSource) -> tuple[nn.Module, dict[str, Any]]:
    """A frozen VAE of diffusers in eval mode, float32, and where its weights came from.

    Args:
        name: a key of `featcache.encoders.table.VAES`, or a folder as diffusers saves one (`config.json` and
            weights), also one inside `--weights-dir`.

    Raises `UserError` for an unknown name, a folder with another class of model, or damaged weights;
    `WeightsUnavailable` if the weights are neither on this machine nor on a hub.
    """
    entry = VAES.get(name)
    if entry is None:
        folder = _folder_of(name, weights)
        vae, origin = _from_folder(folder, weights)
    elif entry.hub_id is None:
        vae, origin = load_tiny_vae(), {"weights": "embedded"}
    elif weights.random_seed is not None:
        vae = seeded(weights.random_seed, lambda: build_vae(entry.model_class, entry.config))
        origin = {"weights": "random", "seed": weights.random_seed}
    else:
        state = load_file(find_file(name, weights))
        vae = _filled(build_vae(entry.model_class, entry.config), state, entry.hub_id)
        origin = {"weights": entry.hub_id}
    vae = vae.eval().requires_grad_(False)
    return vae, {"name": name, **origin, "sha256": weights_sha256(vae)}


def build_vae(model_class: str, config: Mapping[str, Any]) -> nn.Module:
    """An untrained VAE of one of `MODEL_CLASSES`."""
    import diffusers  # late: it takes seconds to load

    vae: nn.Module = getattr(diffusers, model_class).from_config(dict(config))
    return vae


def _folder_of(name: str, weights: WeightsSource) -> Path:
    places = [Path(name), *([weights.weights_dir / name] if weights.weights_dir is not None else [])]
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise UserError(
        f"unknown VAE {name!r}: neither a name nor a folder with a config.json",
        remedy=f"Type one of: --vae {' | '.join(VAES)}, or --vae FOLDER as diffusers saves one",
    )


def _from_folder(folder: Path, weights: WeightsSource) -> tuple[nn.Module, dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model_class = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is not the configuration of a diffusers model") from error
    if model_class not in MODEL_CLASSES:
        raise UserError(
            f"{folder} holds a model of class {model_class!r}", remedy=f"A VAE may be of {', '.join(MODEL_CLASSES)}."
        )
    if weights.random_seed is not None:
        vae = seeded(weights.random_seed, lambda: build_vae(model_class, config))
        return vae, {"weights": "random", "seed": weights.random_seed}
    found = next((folder / name for name in DIFFUSERS_FILES if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} holds no {DIFFUSERS_FILES[0]}", remedy="Bring the weights.")
    return _filled(build_vae(model_class, config), load_file(found), str(found)), {"weights": "folder"}


def _filled(vae: nn.Module, state: dict[str, Tensor], where: str) -> nn.Module:
    try:
        vae.load_state_dict(_modern_keys(from_compvis(state)))
    except RuntimeError as error:
        raise UserError(
            f"the weights of {where} do not fit a {type(vae).__name__} of its configuration: {first_line(error)}"
        ) from error
    return vae


def find_file(name: str, weights: WeightsSource) -> Path:
    """The file of pretrained weights of a key of `VAES` that has some; raises `WeightsUnavailable`."""
    hub_id, files = VAES[name].hub_id, VAES[name].files
    assert hub_id is not None, f"{name} is embedded"
    if weights.weights_dir is not None:
        stems = (name, hub_id.split("/")[1], hub_id.replace("/", "--"), hub_id)
        found = find_weights(weights.weights_dir, stems, tuple(f for f in files if f not in DIFFUSERS_FILES))
        if found is not None:
            return found
    try:
        return hub_file(hub_id, files)
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


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of a VAE's encoder whose output may be cached; level is None where it belongs to none."""

    level: str | None
    name: str
    module: nn.Module
    width: int


def encoder_layers(vae: nn.Module) -> list[Layer]:
    """The encoder's layers in order of computation with their levels (see the module docstring)."""
    found = {
        "AutoencoderKL": _kl_layers,
        "ConsistencyDecoderVAE": _kl_layers,
        "AutoencoderTiny": _tiny_layers,
        "AutoencoderDC": _dc_layers,
    }[type(vae).__name__](vae.encoder, vae.config)
    last = max(stage for stage, *_ in found)
    return [
        Layer(level=LEVELS[i] if (i := stage - last + len(LEVELS) - 1) >= 0 else None, name=name, module=m, width=width)
        for stage, name, m, width in found
    ]


_Staged = list[tuple[int, str, nn.Module, int]]  # stage, name, module, width


# `encoder` and `config` are `Any` below: torch knows no types of a module's submodules, diffusers none of a config.


def _kl_layers(encoder: Any, config: Any) -> _Staged:
    """A stage ends with its downsampling. In SD's layout (four stages, the last two equally wide) the last stage's
    first layer counts with the stage before, as the paper groups them.
    """
    widths = list(config.block_out_channels)
    last = len(widths) - 1
    transition = last == 3 and widths[2] == widths[3]
    layers: _Staged = [(0, "conv_in", encoder.conv_in, widths[0])]
    for i, stage in enumerate(encoder.down_blocks):
        for j, resnet in enumerate(stage.resnets):
            layers.append((i - (transition and i == last and j == 0), f"down{i}.res{j}", resnet, widths[i]))
            if getattr(stage, "attentions", None):
                layers.append((i, f"down{i}.attn{j}", stage.attentions[j], widths[i]))
        for sampler in stage.downsamplers or ():
            layers.append((i, f"down{i}.downsample", sampler, widths[i]))
    middle = encoder.mid_block
    layers.append((last, "mid.res0", middle.resnets[0], widths[last]))
    for j, resnet in enumerate(middle.resnets[1:]):
        if middle.attentions[j] is not None:
            layers.append((last, "mid.attn" + (str(j) if j else ""), middle.attentions[j], widths[last]))
        layers.append((last, f"mid.res{j + 1}", resnet, widths[last]))
    return layers


def _tiny_layers(encoder: Any, config: Any) -> _Staged:
    """A stage begins with its strided convolution; the last convolution makes the latent and is no layer."""
    layers: _Staged = []
    stage = 0
    for i, module in enumerate(list(encoder.layers)[:-1]):
        if isinstance(module, nn.Conv2d) and module.stride != (1, 1):
            stage += 1
        layers.append((stage, f"layer{i}", module, config.encoder_block_out_channels[stage]))
    return layers


def _dc_layers(encoder: Any, config: Any) -> _Staged:
    """A stage begins with the downsampling that leads to it, which has its width."""
    widths = config.encoder_block_out_channels
    first = 0 if config.encoder_layers_per_block[0] else 1
    layers: _Staged = [(first, "conv_in", encoder.conv_in, widths[first])]
    for i, blocks in enumerate(encoder.down_blocks):
        depth = config.encoder_layers_per_block[i]
        for j, module in enumerate(blocks):
            if j < depth:
                layers.append((i, f"down{i}.block{j}", module, widths[i]))
            else:
                layers.append((i + 1, f"down{i}.downsample", module, widths[i + 1]))
    return layers


def downsampling_of(vae: nn.Module) -> int:
    """Pixels a latent cell spans along one axis."""
    config: Any = vae.config
    # Classes whose decoder may have other stages say which are the encoder's.
    stages = getattr(config, "encoder_block_out_channels", None) or config.block_out_channels
    return 1 << (len(stages) - 1)


class VaeEncoder:
    """Posterior moments and, on request, the levels G1..G4 of one VAE.

    Args:
        name: a key of `featcache.encoders.table.VAES`, or a folder (see `load_vae`).
        weights: where weights may come from.
        resolution: side of the pixels, a multiple of the VAE's downsampling.
        levels: groups to keep, e.g. `("G3", "G4")`.
        compute: device, precision, compilation. `device` alone is short for `Compute(device=device)`.
        resampling: how the levels come to the token grid (see the module docstring).

    Features:
        `vae/moments`: [2C, h, w] float32.
        `vae/Gk`: [L, T, channels] float32, T = grid^2 tokens row-major, one entry per layer in order.
    """

    def __init__(
        self,
        name: str,
        weights: WeightsSource,
        *,
        resolution: int,
        levels: Sequence[str] = (),
        device: str = "cpu",
        compute: Compute | None = None,
        resampling: Resampling = "bilinear",
    ) -> None:
        unknown = [level for level in levels if level not in LEVELS]
        if unknown:
            raise UserError(
                f"unknown VAE level {unknown[0]!r}",
                remedy=f"Type --vae-levels with any of: {','.join(LEVELS)}",
            )
        self.compute = compute or Compute(device=device)
        vae, origin = load_vae(name, weights)
        config: Any = vae.config
        self.downsampling = downsampling_of(vae)
        if resolution % self.downsampling:
            raise UserError(
                f"--resolution {resolution} is not a multiple of {self.downsampling}, VAE {name!r}'s downsampling",
                remedy=f"Type a multiple of {self.downsampling}.",
            )
        latent_size = resolution // self.downsampling
        self.grid = token_grid(resolution, self.downsampling)
        self.levels = tuple(level for level in LEVELS if level in levels)
        self.title = f"vae {name}"
        self.info = {
            "name": name,
            "sha256": origin["sha256"],
            "latent_channels": int(config.latent_channels),
            "scaling_factor": float(config.scaling_factor),
            "shift_factor": float(getattr(config, "shift_factor", None) or 0.0),
            "downsampling": self.downsampling,
        }
        # The decoder is not needed and can be the larger part.
        self._quantise = getattr(vae, "quant_conv", None)
        parts = [vae.encoder] + ([self._quantise] if self._quantise is not None else [])
        # channels_last: the layout that convolution kernels want, on CPUs and on tensor cores alike.
        self.module = nn.ModuleList(parts).to(self.compute.device).to(memory_format=torch.channels_last)
        self._posterior = type(vae).__name__ in ("AutoencoderKL", "ConsistencyDecoderVAE")
        record = {**origin, "precision": self.compute.precision}
        self.shapes: dict[str, tuple[int, ...]] = {
            "vae/moments": (2 * config.latent_channels, latent_size, latent_size)
        }
        self.provenance: dict[str, dict[str, Any]] = {
            "vae/moments": {**record, "pixels": "[-1, 1]", "posterior": self._posterior}
        }
        self._resampling = resampling
        self._kept: dict[str, list[Tensor]] = {level: [] for level in self.levels}
        self._describe_levels(name, encoder_layers(vae) if self.levels else [], record)
        self._run = torch.compile(self._features, dynamic=False) if self.compute.compile else self._features

    def _describe_levels(self, name: str, layers: Sequence[Layer], record: Mapping[str, Any]) -> None:
        for level in self.levels:
            members = [layer for layer in layers if layer.level == level]
            if not members:
                have = sorted({layer.level for layer in layers if layer.level})
                raise UserError(f"VAE {name!r} has no level {level}", remedy=f"It has {', '.join(have)}.")
            widths = {layer.width for layer in members}
            if len(widths) > 1:
                raise UserError(
                    f"the layers of {level} in VAE {name!r} differ in width {sorted(widths)}: no array can hold them",
                    remedy=f"Leave {level} out of --vae-levels.",
                )
            for layer in members:
                layer.module.register_forward_hook(self._keep(level))
            self.shapes[f"vae/{level}"] = (len(members), self.grid**2, widths.pop())
            self.provenance[f"vae/{level}"] = {
                **record,
                "layers": [layer.name for layer in members],
                "resampling": _RESAMPLING[self._resampling],
            }

    def _keep(self, level: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            grid = resampled(output.float(), self.grid, self._resampling)
            self._kept[level].append(grid.flatten(2).transpose(1, 2))  # [B, T, channels]

        return hook

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        for kept in self._kept.values():
            kept.clear()
        x = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        hidden = self.module[0](x)
        if self._quantise is not None:
            hidden = self._quantise(hidden)
        hidden = hidden.float()
        if not self._posterior:
            hidden = torch.cat([hidden, torch.full_like(hidden, LOG_VARIANCE_OF_NONE)], dim=1)
        levels = {f"vae/{level}": torch.stack(kept, dim=1) for level, kept in self._kept.items()}
        return {"vae/moments": hidden, **levels}

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 [B, 3, R, R] => `vae/moments` [B, 2C, h, w] and the levels [B, L, T, channels], float32."""
        with self.compute.scope():
            features = self._run(pixels)
        for kept in self._kept.values():
            kept.clear()
        return features


def recorded_resampling(provenances: Mapping[str, Mapping[str, Any]]) -> Resampling | None:
    """How a cache's levels were resampled; None if it holds none. provenances: by name of feature."""
    for name, provenance in provenances.items():
        if name.removeprefix("vae/") in LEVELS:
            found = provenance.get("resampling")
            return next((kind for kind, words in _RESAMPLING.items() if words == found), "bilinear")
    return None


def resampled(maps: Tensor, side: int, resampling: Resampling) -> Tensor:
    """[B, C, h, w] => [B, C, side, side] (see the module docstring)."""
    if resampling == "average":
        return F.adaptive_avg_pool2d(maps, side)
    return F.interpolate(maps, size=(side, side), mode="bilinear", align_corners=False)


def load_recorded_vae(
    record: Mapping[str, Any], moments: Mapping[str, Any], weights_dir: Path | None = None
) -> nn.Module:
    """The VAE that a manifest names, as recorded: pretrained, embedded, or random with the recorded seed.

    Where latents were imported and nobody recorded the weights, those of the VAE's name are taken.

    Args:
        record: the manifest's `dataset.vae`. moments: provenance of `vae/moments`.

    Raises:
        UserError: nobody recorded a name, random weights are recorded without their seed, or the weights found are not those
            that the cache was made with.
        WeightsUnavailable: they are not on this machine and there is no hub.
    """
    if record["name"] == UNKNOWN:
        raise UserError(
            "the cache does not say which VAE its latents are of, so nothing can be decoded",
            remedy="Import the latents again with --vae NAME, or --vae FOLDER as diffusers saves one, and train on that cache.",
        )
    random_seed = _random_seed(moments)
    module, origin = load_vae(record["name"], WeightsSource(weights_dir=weights_dir, random_seed=random_seed))
    if record.get("sha256") not in (None, UNKNOWN, origin["sha256"]):
        raise UserError(
            f"the VAE {record['name']!r} found here ({origin['sha256'][:12]}) is not the one the cache was made with "
            f"({record['sha256'][:12]})",
            remedy=remedy_for_other_weights(origin["weights"]),
        )
    return module


def _random_seed(moments: Mapping[str, Any]) -> int | None:
    """The seed of random weights, None of any others. A run's record of its cache may come from anybody."""
    if moments.get("weights") != "random":
        return None
    seed = moments.get("seed")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise UserError(
            f"vae/moments are recorded to be of a VAE with random weights, and of no seed that could be theirs ({seed!r:.80})",
            remedy="Restore the record: cache.json of a run, or the cache's manifest.",
        )
    return seed


class LatentDecoder(nn.Module):
    """Scaled latents [B, C, h, w] => pixels in [-1, 1], float32 [B, 3, R, R], as a cache's latents were made and scaled.

    Undoes `z = (sample - shift) * scale` with the numbers that training used, and then decodes.

    Args:
        vae: of diffusers, with `decode`.
        record: a manifest's `dataset.vae`: `scaling_factor` and `shift_factor` (default: the VAE's own), `pixel_range`
            of what the VAE was given (default: [-1, 1]; [0, 1] in EDM2's layout), which is what it gives back.
        scale, shift: that training used instead, numbers or tensors that broadcast to [C, h, w].
    """

    def __init__(
        self,
        vae: nn.Module,
        record: Mapping[str, Any],
        *,
        scale: float | Tensor | None = None,
        shift: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        config: Any = vae.config
        self.vae = vae
        self.scale: float | Tensor
        self.shift: float | Tensor
        own_shift = getattr(config, "shift_factor", None)
        chosen = {
            "scale": float(record.get("scaling_factor") or config.scaling_factor) if scale is None else scale,
            "shift": float(record.get("shift_factor", own_shift) or 0.0) if shift is None else shift,
        }
        for name, value in chosen.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, float(value))
        self.low, self.high = (float(bound) for bound in record.get("pixel_range") or (-1.0, 1.0))

    @torch.inference_mode()
    def forward(self, latents: Tensor) -> Tensor:
        decode: Any = self.vae.decode
        raw = latents.to(next(self.vae.parameters()).dtype) / self.scale + self.shift
        pixels: Tensor = decode(raw).sample.float()
        if (self.low, self.high) == (-1.0, 1.0):
            return pixels
        return (pixels - self.low) * (2 / (self.high - self.low)) - 1
