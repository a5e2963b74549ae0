"""Images => activations: the networks that the metrics look through.

uint8 pixels enter, float32 activations leave; every resize and normalisation that belongs to a network happens here and
nowhere else, because FID differences of several tenths hide in them. Only a standard extractor with its real weights
may call its distances FID: all others carry a prefix in every name they produce.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from featcache.encoders.base import WeightsSource, find_weights, load_file, seeded, weights_sha256
from featcache.encoders.tiny import load_judge, load_tiny_vit
from featcache.errors import UserError, WeightsUnavailable, first_line
from trainer.evaluate.table import METRICS

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class Extractor(Protocol):
    """One frozen network.

    Attributes:
        name: as typed, e.g. `inception`.
        resolution: side in pixels that the network works at, or None if it takes images as they are.
        is_standard: its numbers may stand beside published ones: a published extractor with its real weights.
        metric_names: metrics it defines (keys of `METRICS`) -> names they are reported under.
        feature_dims: sizes of what `features` returns, `pool` always, `spatial` and `logits` where they exist.
        provenance: JSON-able record of weights and preprocessing, stored with reference statistics.
            Statistics can only be compared if their provenance is equal.
        device: where the network runs.
    """

    name: str
    resolution: int | None
    is_standard: bool
    metric_names: dict[str, str]
    feature_dims: dict[str, int]
    provenance: dict[str, Any]
    device: torch.device

    def features(self, images: Tensor) -> dict[str, Tensor | None]:
        """uint8 [B, 3, H, W] on any device => float32 on `device`.

        `pool` [B, D]; `spatial` [B, S] or None (sFID's); `logits` [B, K] or None (the Inception score's).
        """
        ...


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"an extractor takes uint8 images of shape [B, 3, H, W], got {images.dtype} of {tuple(images.shape)}",
            remedy="Convert the images to 8-bit RGB; scale [0, 1] or [-1, 1] floats to 0..255 first.",
        )


def _names(features: Container[str], prefix: str = "") -> dict[str, str]:
    """The metrics that these features define -> the names they are reported under."""
    return {name: f"{prefix}{metric.label}" for name, metric in METRICS.items() if metric.reads in features}


def _dinov2_names(features: Container[str]) -> dict[str, str]:
    """As Stein et al. 2023 call them."""
    short = {"FID": "FD", "KID": "KD"}
    return {name: f"{short.get(label, label)}-DINOv2" for name, label in _names(features).items()}


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
TORCH_FIDELITY_NAME = "inception-v3-adm"
SPATIAL_CHANNELS = 7


def inception_class() -> type[nn.Module]:
    """torch-fidelity's TensorFlow-compatible Inception v3 with sFID's activations as one more feature.

    Features: `spatial`, `2048` and `logits_unbiased` (ADM's evaluator multiplies pool_3 by the softmax weights and adds
    no bias), always all three. `spatial` is TensorFlow's `mixed_6/conv:0`, which is `Mixed_6d.branch1x1` after its ReLU
    here: the first 7 channels, flattened channels-last, [B, 17 * 17 * 7].

    The class is made on demand: torch-fidelity takes a second to import.
    """

    class InceptionV3ADM(FeatureExtractorInceptionV3):  # type: ignore[misc]  # torch-fidelity declares no types
        """See `inception_class`."""

        def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> object:
            """As usual; an empty dict means random weights that keep the scale (He et al. 2015)."""
            if state_dict:
                return super().load_state_dict(state_dict, strict=strict, assign=assign)
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            return None

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            """uint8 [B, 3, H, W] => float32 features in the order of `features_list`."""
            x = x.to(self.feature_extractor_internal_dtype)
            size = (self.INPUT_IMAGE_SIZE, self.INPUT_IMAGE_SIZE)
            x = interpolate_bilinear_2d_like_tensorflow1x(x, size=size, align_corners=False)
            x = (x - 128) / 128  # [B, 3, 299, 299]
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.MaxPool_1(x)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.MaxPool_2(x))))
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
            # Runs the 1x1 branch twice: 0.04 of the network's 5.7 GMACs, for a forward pass without hooks.
            spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS]  # [B, 7, 17, 17]
            x = self.Mixed_6e(self.Mixed_6d(x))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
            pool = self.AvgPool(x).flatten(1)  # [B, 2048]
            features = {
                "spatial": spatial.permute(0, 2, 3, 1).flatten(1),
                "2048": pool,
                "logits_unbiased": pool @ self.fc.weight.T,
            }
            return tuple(features[name].to(torch.float32) for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            """Names for `features_list`."""
            return "spatial", "2048", "logits_unbiased"

    return InceptionV3ADM


def register_with_torch_fidelity() -> str:
    """Make the extractor known to torch-fidelity's own functions and command line; returns its name there."""
    if TORCH_FIDELITY_NAME not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(TORCH_FIDELITY_NAME, inception_class())
    return TORCH_FIDELITY_NAME


def build_inception(state_dict: dict[str, Tensor] | None, *, seed: int = 0) -> nn.Module:
    """The registered extractor, float32, frozen, with the given weights or, if None, seeded random ones."""
    name = register_with_torch_fidelity()
    # torch-fidelity unpickles the file it is given without restriction. It therefore gets bytes written here,
    # from tensors that were loaded safely, never a file from elsewhere.
    buffer = io.BytesIO()
    torch.save(state_dict or {}, buffer)
    buffer.seek(0)
    return seeded(
        seed,
        lambda: create_feature_extractor(
            name,
            ["spatial", "2048", "logits_unbiased"],
            cuda=False,
            verbose=False,
            feature_extractor_weights_path=buffer,
        ),
    )


def _inception_weights(source: WeightsSource) -> dict[str, Tensor]:
    stem = Path(INCEPTION_FILE).stem
    tried = []
    if source.weights_dir is not None:
        path = find_weights(source.weights_dir, (stem, "inception"))
        if path is not None:
            return load_file(path)
        tried.append(f"{source.weights_dir} has neither {stem} nor inception with .safetensors or .pth")
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if cached.is_file():
        return load_file(cached)
    try:
        torch.hub.load_state_dict_from_url(URL_INCEPTION_V3, check_hash=True, weights_only=True)
    except (URLError, OSError, RuntimeError) as error:
        tried.append(f"download: {getattr(error, 'reason', error)}")
        raise WeightsUnavailable(
            f"the weights of Inception v3 ({INCEPTION_FILE}) are not on this machine and could not be"
            f" downloaded ({'; '.join(tried)})",
            remedy=f"Either fetch {URL_INCEPTION_V3}\non a machine with internet and pass the folder"
            f" that holds it as --weights-dir DIR (or put it into {cached.parent}),\n"
            "or pass --extractor embedded: it ships with the project and works offline, but its numbers"
            " are not FID.",
        ) from error
    return load_file(cached)


class InceptionExtractor:
    """FID's network: Inception v3 of 2015-12-05, TF1-style bilinear resize to 299, as in ADM's evaluator.

    Args:
        source: where the weights come from. `random_seed` builds the architecture with random weights, whose
            numbers are prefixed `random-inception`.

    Raises:
        WeightsUnavailable: no weights on this machine and no way to download them.
    """

    name = "inception"
    resolution: int | None = 299

    def __init__(self, *, source: WeightsSource, device: torch.device | str = "cpu") -> None:
        if source.random_seed is None:
            self._module = build_inception(_inception_weights(source))
        else:
            self._module = build_inception(None, seed=source.random_seed)
        self.is_standard = source.random_seed is None
        self.feature_dims = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": 1008}
        self.metric_names = _names(self.feature_dims, "" if self.is_standard else "random-inception-")
        self.provenance = {
            "extractor": self.name,
            "weights_sha256": weights_sha256(self._module),
            "random_seed": source.random_seed,
            "preprocessing": "uint8, TF1 bilinear to 299, (x - 128) / 128",
        }
        self.device = torch.device(device)
        self._module.to(self.device)

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[str, Tensor | None]:
        """See `Extractor.features`: `pool` [B, 2048], `spatial` [B, 2023], `logits` [B, 1008]."""
        _check_images(images)
        spatial, pool, logits = self._module(images.to(self.device))
        return {"pool": pool, "spatial": spatial, "logits": logits}


class EmbeddedExtractor:
    """The judge that ships with the project: pooled features of a small residual network, [B, 128].

    Works offline, in seconds, and is trained on the embedded images and on photographs, so that its distances say
    something about them; no method aligns with it. They are not FID and cannot be compared with anything published: every
    name carries the prefix `embedded`. It has no classifier, so the Inception score is not defined, and no counterpart of
    sFID's layer.

    Args:
        source: `random_seed` replaces the trained weights by random ones (prefix `random-embedded`).
    """

    name = "embedded"
    resolution: int | None = None
    is_standard = False
    multiple = 32  # the sides that the network takes without cutting anything off

    def __init__(self, *, source: WeightsSource, device: torch.device | str = "cpu") -> None:
        self._module = self._load()
        if source.random_seed is not None:
            seeded(source.random_seed, lambda: _reinitialised(self._module))
        prefix = self.name if source.random_seed is None else f"random-{self.name}"
        self.feature_dims = {"pool": int(self._module.num_features)}
        self.metric_names = _names(self.feature_dims, f"{prefix}-")
        self.provenance = {
            "extractor": self.name,
            "weights_sha256": weights_sha256(self._module),
            "random_seed": source.random_seed,
            "preprocessing": "uint8, (x / 255 - 0.5) / 0.5, no resize",
        }
        self.device = torch.device(device)
        self._module.to(self.device)

    def _load(self) -> Any:  # a network of timm, whose modules have no types
        return load_judge()

    def _pool(self, pixels: Tensor) -> Tensor:
        pooled: Tensor = self._module(pixels)
        return pooled

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[str, Tensor | None]:
        """See `Extractor.features`.

        Raises:
            UserError: sides that are not multiples of `multiple`.
        """
        _check_images(images)
        _, _, H, W = images.shape
        if H % self.multiple or W % self.multiple:
            raise UserError(
                f"the {self.name} extractor works in steps of {self.multiple} pixels; {W} x {H} does not divide",
                remedy=f"Use images whose sides are multiples of {self.multiple}, or --extractor inception.",
            )
        x = (images.to(self.device, torch.float32) / 255 - 0.5) / 0.5
        return {"pool": self._pool(x), "spatial": None, "logits": None}


class EmbeddedVitExtractor(EmbeddedExtractor):
    """The tiny ViT: mean patch token, [B, 128], under the prefix `embedded-vit`.

    It is the encoder that methods align with on the embedded set, so its distances favour them; `embedded` does not.
    """

    name = "embedded-vit"
    multiple = 16

    def _load(self) -> Any:
        return load_tiny_vit()

    def _pool(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self._module.forward_features(pixels)  # [B, prefix + N, D]
        return tokens[:, self._module.num_prefix_tokens :].mean(1)


def _reinitialised(network: Any) -> Any:
    network.init_weights()
    return network


DINOV2_MODEL = "vit_large_patch14_dinov2.lvd142m"


class DinoV2Extractor:
    """FD-DINOv2 (Stein et al. 2023): class token of DINOv2 ViT-L/14 at 224 pixels, [B, 1024].

    Images are scaled to [0, 1], resized by antialiased bicubic interpolation and normalised with ImageNet's mean and
    std. The network comes from timm, which resamples the position table from 37 x 37 to 16 x 16 with antialiasing
    where the original code does so without: distances move in the third digit at most (our choice; not measured
    against the original code).

    Args:
        source: where the weights come from. `random_seed` builds random weights (prefix `random-dinov2`).

    Raises:
        WeightsUnavailable: no weights on this machine and no way to download them.
    """

    name = "dinov2"
    resolution: int | None = 224

    def __init__(self, *, source: WeightsSource, device: torch.device | str = "cpu") -> None:
        import timm

        module = _dinov2_module(source, lambda **kw: timm.create_model(DINOV2_MODEL, img_size=224, **kw))
        self._module = cast("VisionTransformer", module)
        self.is_standard = source.random_seed is None
        self.feature_dims = {"pool": 1024}
        self.metric_names = (
            _dinov2_names(self.feature_dims) if self.is_standard else _names(self.feature_dims, "random-dinov2-")
        )
        self.provenance = {
            "extractor": self.name,
            "weights_sha256": weights_sha256(self._module),
            "random_seed": source.random_seed,
            "preprocessing": "uint8 / 255, antialiased bicubic to 224, ImageNet mean and std",
        }
        self.device = torch.device(device)
        self._module.to(self.device)
        self._mean = torch.tensor([0.485, 0.456, 0.406], device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor([0.229, 0.224, 0.225], device=self.device).view(1, 3, 1, 1)

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[str, Tensor | None]:
        """See `Extractor.features`."""
        _check_images(images)
        x = images.to(self.device, torch.float32) / 255
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        tokens = self._module.forward_features((x - self._mean) / self._std)  # [B, 1 + 256, 1024], normed
        return {"pool": tokens[:, 0], "spatial": None, "logits": None}


def _dinov2_module(source: WeightsSource, create: Callable[..., nn.Module]) -> nn.Module:
    if source.random_seed is not None:
        module = seeded(source.random_seed, lambda: create(pretrained=False))
        return module.eval().requires_grad_(False)
    tried = ""
    if source.weights_dir is not None:
        path = find_weights(source.weights_dir, (DINOV2_MODEL, "dinov2-l", "dinov2_vitl14_pretrain"))
        if path is not None:
            try:
                module = create(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
            except (RuntimeError, KeyError) as error:
                raise UserError(
                    f"{path} does not hold the weights of {DINOV2_MODEL}: {first_line(error)}",
                    remedy="Bring DINOv2 ViT-L/14 without registers, from timm or from its authors.",
                ) from error
            return module.eval().requires_grad_(False)
        tried = f"{source.weights_dir} has no {DINOV2_MODEL}; "
    try:
        module = create(pretrained=True)
    except Exception as error:  # the hub client raises a dozen different types when offline
        raise WeightsUnavailable(
            f"the weights of {DINOV2_MODEL} are not on this machine and could not be downloaded"
            f" ({tried}{type(error).__name__})",
            remedy=f"Either fetch timm/{DINOV2_MODEL} on a machine with internet and pass the folder"
            f" that holds it, as {DINOV2_MODEL}.safetensors, with --weights-dir DIR,\n"
            "or pass --extractor embedded: it ships with the project and works offline, but its numbers"
            " are not FD-DINOv2.",
        ) from error
    return module.eval().requires_grad_(False)


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "inception": InceptionExtractor,
    "embedded": EmbeddedExtractor,
    "embedded-vit": EmbeddedVitExtractor,
    "dinov2": DinoV2Extractor,
}


def build_extractor(
    name: str,
    *,
    weights_dir: Path | None = None,
    random_weights: int | None = None,
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor that `--extractor` names.

    Args:
        weights_dir: a folder searched for weights first.
        random_weights: seed of random weights instead of real ones, for tests and timing; renames every metric.

    Raises:
        UserError: an unknown name.
        WeightsUnavailable: no weights on this machine and no way to download them.
    """
    if name not in EXTRACTORS:
        raise UserError(f"there is no extractor {name!r}", remedy=f"Choose one of: {', '.join(EXTRACTORS)}")
    source = WeightsSource(weights_dir=weights_dir, random_seed=random_weights)
    return EXTRACTORS[name](source=source, device=device)
