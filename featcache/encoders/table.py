"""Every vision encoder and VAE that can be named on the command line, with its facts (imports no torch).

Preprocessing is that of REPA's code, and of iREPA's for encoders that REPA lacks; where we differ, the entry's note
says so. Pixels come as uint8 crops of R px; all encoders see an input of `patch * R / 16` px, which makes R / 16
tokens per side whatever the patch size (R = 256: input 224 at patch 14, 256 at patch 16; R = 512: 448 and 512).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
TOKEN_PX = 16

Resampling = Literal["bilinear", "average"]


@dataclass(frozen=True, kw_only=True)
class VisionEntry:
    """One selectable vision encoder, a timm vision transformer.

    timm_name: architecture and tag of weights. hub_id: repository with the weights; None if they are on no hub,
    and then weights_page says where they are. native_px: side of the input it was trained with. mean, std: of RGB
    in [0, 1]. resize_first: resize before normalising (else after). resize_mode: 'bicubic' or 'bilinear', always
    without antialiasing. final_norm: whether the public code applies the encoder's last norm to the final block's
    output. class_token: whether it has one. key_format: how the weights' file names its tensors (see `featcache.encoders.keys`). options: further
    arguments of timm.
    """

    timm_name: str
    hub_id: str | None
    licence: str
    paper: str
    patch: int
    depth: int
    width: int
    native_px: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resize_first: bool = False
    resize_mode: str = "bicubic"
    final_norm: bool = True
    class_token: bool = True
    key_format: str = "timm"
    weights_page: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    default_layers: tuple[int, ...] = ()
    note: str = ""

    @property
    def architecture(self) -> str:
        return self.timm_name.split(".")[0]

    @property
    def final_layer(self) -> int:
        return self.depth - 1

    def input_px(self, resolution: int) -> int:
        """Side of the input for crops of `resolution` px, which gives resolution / 16 tokens per side."""
        return self.patch * resolution // TOKEN_PX


def _timm(timm_name: str, depth: int, width: int, **facts: Any) -> VisionEntry:
    return VisionEntry(timm_name=timm_name, hub_id=f"timm/{timm_name}", depth=depth, width=width, **facts)


_DINOV2: dict[str, Any] = {
    "patch": 14,
    "native_px": 518,
    "licence": "Apache-2.0",
    "paper": "Oquab et al. 2023, arXiv:2304.07193",
}
_DINOV2_REG = {**_DINOV2, "paper": "Darcet et al. 2023, arXiv:2309.16588"}
_DINOV3: dict[str, Any] = {
    "patch": 16,
    "native_px": 256,
    "licence": "DINOv3 licence",
    "paper": "Simeoni et al. 2025, arXiv:2508.10104",
}
_MOCOV3: dict[str, Any] = {
    "patch": 16,
    "native_px": 224,
    "licence": "CC-BY-NC-4.0",
    "paper": "Chen et al. 2021, arXiv:2104.02057",
    "key_format": "mocov3",
}
_SIGLIP: dict[str, Any] = {
    "class_token": False,
    "mean": HALF,
    "std": HALF,
    "licence": "Apache-2.0",
    "note": "iREPA's code normalises by ImageNet's mean and deviation; ours uses those of SigLIP's training",
}
_SIGLIP1 = {**_SIGLIP, "paper": "Zhai et al. 2023, arXiv:2303.15343"}
_SIGLIP2 = {**_SIGLIP, "paper": "Tschannen et al. 2025, arXiv:2502.14786"}
_PE: dict[str, Any] = {
    "mean": HALF,
    "std": HALF,
    "resize_first": True,
    "resize_mode": "bilinear",
    "final_norm": False,
    "licence": "Apache-2.0",
    "paper": "Bolya et al. 2025, arXiv:2504.13181",
}

ENCODERS: Mapping[str, VisionEntry] = {
    "dinov2-s": _timm("vit_small_patch14_dinov2.lvd142m", 12, 384, **_DINOV2),
    "dinov2-b": _timm("vit_base_patch14_dinov2.lvd142m", 12, 768, **_DINOV2),
    "dinov2-l": _timm("vit_large_patch14_dinov2.lvd142m", 24, 1024, **_DINOV2),
    "dinov2-g": _timm("vit_giant_patch14_dinov2.lvd142m", 40, 1536, **_DINOV2),
    "dinov2-s-reg": _timm("vit_small_patch14_reg4_dinov2.lvd142m", 12, 384, **_DINOV2_REG),
    "dinov2-b-reg": _timm("vit_base_patch14_reg4_dinov2.lvd142m", 12, 768, **_DINOV2_REG),
    "dinov2-l-reg": _timm("vit_large_patch14_reg4_dinov2.lvd142m", 24, 1024, **_DINOV2_REG),
    "dinov2-g-reg": _timm("vit_giant_patch14_reg4_dinov2.lvd142m", 40, 1536, **_DINOV2_REG),
    "dinov3-s": _timm("vit_small_patch16_dinov3.lvd1689m", 12, 384, **_DINOV3),
    "dinov3-b": _timm("vit_base_patch16_dinov3.lvd1689m", 12, 768, **_DINOV3),
    "dinov3-l": _timm("vit_large_patch16_dinov3.lvd1689m", 24, 1024, **_DINOV3),
    "dinov3-h": _timm("vit_huge_plus_patch16_dinov3.lvd1689m", 32, 1280, **_DINOV3),
    "dino-b": _timm(
        "vit_base_patch16_224.dino",
        12,
        768,
        patch=16,
        native_px=224,
        licence="Apache-2.0",
        paper="Caron et al. 2021, arXiv:2104.14294",
    ),
    "mae-l": _timm(
        "vit_large_patch16_224.mae",
        24,
        1024,
        patch=16,
        native_px=224,
        final_norm=False,
        licence="CC-BY-NC-4.0",
        paper="He et al. 2021, arXiv:2111.06377",
    ),
    "mocov3-b": VisionEntry(
        timm_name="vit_base_patch16_224",
        hub_id=None,
        depth=12,
        width=768,
        weights_page="the file vit-b-300ep.pth.tar, linked from github.com/facebookresearch/moco-v3 (CONFIG.md)",
        **_MOCOV3,
    ),
    "mocov3-l": VisionEntry(
        timm_name="vit_large_patch16_224",
        hub_id=None,
        depth=24,
        width=1024,
        weights_page="the ViT-L file linked from the README of github.com/LTH14/rcg",
        **_MOCOV3,
    ),
    "ijepa-h": VisionEntry(
        timm_name="vit_huge_patch14_gap_224.in1k_ijepa",
        hub_id="facebook/ijepa_vith14_1k",
        depth=32,
        width=1280,
        patch=14,
        native_px=224,
        licence="CC-BY-NC-4.0",
        paper="Assran et al. 2023, arXiv:2301.08243",
        key_format="ijepa",
        class_token=False,
        options={"global_pool": ""},
    ),
    "clip-l": _timm(
        "vit_large_patch14_clip_quickgelu_224.openai",
        24,
        1024,
        patch=14,
        native_px=224,
        mean=CLIP_MEAN,
        std=CLIP_STD,
        resize_first=True,
        final_norm=False,
        licence="MIT",
        paper="Radford et al. 2021, arXiv:2103.00020",
    ),
    "siglip-b": _timm("vit_base_patch16_siglip_256.webli", 12, 768, patch=16, native_px=256, **_SIGLIP1),
    "siglip-l": _timm("vit_large_patch16_siglip_256.webli", 24, 1024, patch=16, native_px=256, **_SIGLIP1),
    "siglip-so400m": _timm("vit_so400m_patch14_siglip_224.webli", 27, 1152, patch=14, native_px=224, **_SIGLIP1),
    "siglip2-b": _timm("vit_base_patch16_siglip_256.v2_webli", 12, 768, patch=16, native_px=256, **_SIGLIP2),
    "siglip2-l": _timm("vit_large_patch16_siglip_256.v2_webli", 24, 1024, patch=16, native_px=256, **_SIGLIP2),
    "siglip2-so400m": _timm("vit_so400m_patch16_siglip_256.v2_webli", 27, 1152, patch=16, native_px=256, **_SIGLIP2),
    "pe-core-b": _timm("vit_pe_core_base_patch16_224.fb", 12, 768, patch=16, native_px=224, **_PE),
    "pe-core-l": _timm("vit_pe_core_large_patch14_336.fb", 24, 1024, patch=14, native_px=336, **_PE),
    "pe-spatial-b": _timm("vit_pe_spatial_base_patch16_512.fb", 12, 768, patch=16, native_px=512, **_PE),
    "pe-spatial-l": _timm("vit_pe_spatial_large_patch14_448.fb", 24, 1024, patch=14, native_px=448, **_PE),
}


DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


@dataclass(frozen=True, kw_only=True)
class VaeEntry:
    """One selectable VAE. model_class: of diffusers. config: its arguments; hub_id is None for the embedded one. files:
    names of the weights there, the first that is found.

    posterior: whether the encoder gives mean and log-variance; if not, the mean alone, and the cache holds a
    log-variance of -30, where diffusers clamps it (standard deviation 3e-7).
    """

    model_class: str
    hub_id: str | None
    config: Mapping[str, Any]
    licence: str
    downsampling: int
    latent_channels: int
    posterior: bool = True
    note: str = ""
    files: tuple[str, ...] = DIFFUSERS_FILES


_SD: dict[str, Any] = {
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


def _kl(hub_id: str, licence: str, note: str, **changes: Any) -> VaeEntry:
    return VaeEntry(
        model_class="AutoencoderKL",
        hub_id=hub_id,
        config={**_SD, **changes},
        licence=licence,
        downsampling=8,
        latent_channels=4,
        note=note,
    )


_F16D32: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": [*["DownEncoderBlock2D"] * 4, "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * 4],
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 32,
    "norm_num_groups": 32,
    "sample_size": 256,
    "scaling_factor": 1.0,
}


def _f16d32(hub_id: str, note: str, *files: str) -> VaeEntry:
    """latent-diffusion's KL autoencoder with attention at 16 x 16, as LightningDiT and REPA-E train it."""
    return VaeEntry(
        model_class="AutoencoderKL",
        hub_id=hub_id,
        config=_F16D32,
        licence="MIT",
        downsampling=16,
        latent_channels=32,
        note=f"{note}; normalise its latents by channel",
        files=(*files, *DIFFUSERS_FILES),
    )


def _dc_ae(name: str, *, channels: int, scaling_factor: float, deep: int) -> VaeEntry:
    """DC-AE trained on ImageNet; `deep` is the number of stages after the four of ResBlocks and 512 channels."""
    stages = 3 + deep
    widths = [128, 256, 512, 512, 1024, 1024, 2048][:stages]
    blocks = ["ResBlock"] * 3 + ["EfficientViTBlock"] * deep
    config = {
        "latent_channels": channels,
        "encoder_block_types": blocks,
        "decoder_block_types": blocks,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": [0, 4, 8] + [2] * deep,
        "decoder_layers_per_block": [0, 5, 10] + [2] * deep,
        "encoder_qkv_multiscales": [[]] * stages,
        "decoder_qkv_multiscales": [[]] * stages,
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * deep,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * deep,
        "scaling_factor": scaling_factor,
    }
    return VaeEntry(
        model_class="AutoencoderDC",
        hub_id=f"mit-han-lab/{name}-diffusers",
        config=config,
        licence="Apache-2.0",
        downsampling=2 ** (stages - 1),
        latent_channels=channels,
        posterior=False,
        note="Deep compression autoencoder trained on ImageNet (Chen et al. 2024, arXiv:2410.10733)",
    )


VAES: Mapping[str, VaeEntry] = {
    "sd-ft-ema": _kl("stabilityai/sd-vae-ft-ema", "MIT", "Stable Diffusion VAE, the papers' default"),
    "sd-ft-mse": _kl("stabilityai/sd-vae-ft-mse", "MIT", "Stable Diffusion VAE, smoother decoder"),
    "sdxl": _kl("stabilityai/sdxl-vae", "MIT", "Stable Diffusion XL", scaling_factor=0.13025, sample_size=1024),
    "taesd": VaeEntry(
        model_class="AutoencoderTiny",
        hub_id="madebyollin/taesd",
        config={"latent_channels": 4, "scaling_factor": 1.0},
        licence="MIT",
        downsampling=8,
        latent_channels=4,
        posterior=False,
        note="distilled from the SD VAE; its latents are scaled already",
    ),
    "consistency": VaeEntry(
        model_class="ConsistencyDecoderVAE",
        hub_id="openai/consistency-decoder",
        config={},
        licence="MIT",
        downsampling=8,
        latent_channels=4,
        note="SD VAE encoder with DALL-E 3's consistency decoder; decoding is random",
    ),
    "va-vae": _f16d32(
        "hustvl/vavae-imagenet256-f16d32-dinov2",
        "LightningDiT's, aligned with DINOv2 (Yao et al. 2025, arXiv:2501.01423)",
        "vavae-imagenet256-f16d32-dinov2.pt",
    ),
    "in-vae": _f16d32("REPA-E/invae", "REPA-E's, trained on ImageNet (Leng et al. 2025, arXiv:2504.10483)"),
    "e2e-va-vae": _f16d32("REPA-E/e2e-vavae", "VA-VAE tuned end to end by REPA-E", "e2e-vavae-400k.pt"),
    "e2e-in-vae": _f16d32("REPA-E/e2e-invae", "IN-VAE tuned end to end by REPA-E", "e2e-invae-400k.pt"),
    "dc-ae-f32c32": _dc_ae("dc-ae-f32c32-in-1.0", channels=32, scaling_factor=0.3189, deep=3),
    "dc-ae-f64c128": _dc_ae("dc-ae-f64c128-in-1.0", channels=128, scaling_factor=0.2889, deep=4),
    "tiny": VaeEntry(
        model_class="AutoencoderKL",
        hub_id=None,
        config={},
        licence="Apache-2.0",
        downsampling=8,
        latent_channels=16,
        note="embedded, trained on the shapes set and on photographs of 64 px",
    ),
}


def token_grid(resolution: int, downsampling: int) -> int:
    """Side of the token grid: latents in patches of 2 at 8x downsampling (R / 16), of 4 at 4x, of 1 from 16x on.

    So a transformer over the latents sees R / 16 tokens per side as long as the VAE leaves that many (the choice is
    ours; the papers use 8x and patch 2).
    """
    latent = resolution // downsampling
    return latent // max(1, TOKEN_PX // downsampling)


@dataclass(frozen=True, kw_only=True)
class TextEntry:
    """One selectable text encoder, a text transformer of transformers.

    hub_id: repository with weights and vocabulary; None for the embedded one. vocabulary: number of tokens (CLIP's last
    two are the start and the end of a text). tokens: length that every text is cut or padded to. width: of the hidden
    states. projected: of the pooled vector, None where the network has none. network: a key of
    `featcache.encoders.text.NETWORKS`. words: that are tokens of their own where no vocabulary is
    published, with spaces between.
    """

    hub_id: str | None
    licence: str
    paper: str
    vocabulary: int
    tokens: int
    width: int
    depth: int
    heads: int
    hidden: int
    projected: int | None
    activation: str = "quick_gelu"
    network: Literal["clip", "t5"] = "clip"
    words: str = ""
    note: str = ""


# Of the captions of `shapes-text` and the class names of `shapes`; in an order in which no pair of letters within one word
# is taken by another before.
_WORDS = (
    "checked hexagon striped heart dark background coloured crescent triangle against picture spotted circle ground orange "
    "purple square yellow arrow cross green light plain blue grey ring star with and red the an in is of on a"
)

TEXTS: Mapping[str, TextEntry] = {
    "clip-l": TextEntry(
        hub_id="openai/clip-vit-large-patch14",
        licence="MIT",
        paper="Radford et al. 2021, arXiv:2103.00020",
        vocabulary=49408,
        tokens=77,
        width=768,
        depth=12,
        heads=12,
        hidden=3072,
        projected=768,
        note="text encoder of Stable Diffusion 1",
    ),
    "t5-base": TextEntry(
        network="t5",
        hub_id="google-t5/t5-base",
        licence="Apache-2.0",
        paper="Raffel et al. 2020, arXiv:1910.10683",
        vocabulary=32128,
        tokens=77,
        width=768,
        depth=12,
        heads=12,
        hidden=3072,
        projected=None,
        activation="relu",
        note="T5's encoder, its texts cut and padded as Stable Diffusion 3 does with a larger one",
    ),
    "tiny": TextEntry(
        hub_id=None,
        licence="Apache-2.0",
        paper="-",
        vocabulary=657,
        tokens=16,
        width=64,
        depth=2,
        heads=2,
        hidden=128,
        projected=32,
        words=_WORDS,
        note="untrained (seed 0), reads the words of embedded captions and the bytes of all others: to try things out",
    ),
}
