"""What a build is asked for: each setting of `featcache build` and `featcache plan` is declared here, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, get_args

from featcache.encoders import EncoderChoice, parse_encoders, parse_levels
from featcache.encoders.table import Resampling
from featcache.errors import UserError
from featcache.settings import Count, FilePath, Index, Names, Option, is_number, settings

Codec = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
ClassTokenCodec = Literal["fp32", "fp16", "bf16"]
CLASS_TOKEN_CODECS = get_args(ClassTokenCodec)
_CODECS = "fp32, fp16, bf16, int8, fp8 or int4."
_DATA = (
    "Images: a folder (one folder per class; with --text and --captions a flat one), a .tar or .zip, webdataset shards, "
    "parquet files, s3:// or hf:// shards, or an embedded set: 'shapes', or 'shapes-text' with captions. [default: "
    "$FEATCACHE_DATA, else ./data/imagenet]"
)


def parse_names(texts: Sequence[str]) -> tuple[str, ...]:
    """`["clip-l,tiny"]` or `["clip-l", "tiny"]` => names, each once. Raises `UserError` if there are none."""
    names = tuple(dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"--text {','.join(texts)!r} names no encoder", remedy="Type for example --text clip-l")
    return names


def parse_resolution(text: str) -> int:
    """`"256"` => 256. Raises `UserError` for anything but a number, rectangles among them."""
    if not (is_number(text) and int(text)):
        shape = "crops are square, so it is one number" if "x" in text else "it must be a number of pixels"
        raise UserError(f"--resolution {text:.40}: {shape}", remedy="Type --resolution 256 (or 64, 128, 512).")
    return int(text)


@settings
class BuildRequest:
    """Everything that a build is asked for, parsed.

    data: folder, archive, shards or embedded set. out: where the cache goes (None: `./caches/<derived name>`); into:
    an existing cache to add features to. captions: a table of captions, None takes the source's own. crop: a key of
    `featcache.sources.pixels.CROPS`.
    """

    data: Annotated[str, Option(_DATA)]
    encoders: Annotated[
        tuple[EncoderChoice, ...],
        Option(
            "Encoder, with layers after @ (9.cls: that layer's class token): dinov2-b, dinov2-b@9,11, dinov2-b@11,11.cls, "
            "tiny, my.py:name. Repeatable. [default: none, the VAE alone]",
            flag="--encoder",
            typed=list[str],
            parse=parse_encoders,
        ),
    ] = ()
    vae: Annotated[str | None, Option("VAE or folder of one. [default: sd-ft-ema; tiny with --encoder tiny]")] = None
    levels: Annotated[
        tuple[str, ...],
        Option(
            "VAE encoder groups to keep, e.g. G3,G4 for AHPA. [default: none; all with --encoder tiny and --vae tiny]",
            flag="--vae-levels",
            typed=str,
            parse=parse_levels,
        ),
    ] = ()
    vae_resampling: Annotated[
        Resampling | None,
        Option(
            "How VAE layers come to the token grid: bilinear, or average over each token's area. [default: bilinear]"
        ),
    ] = None
    texts: Annotated[
        Names,
        Option(
            "Text encoder over captions: clip-l, t5-base, tiny (docs/encoders.md). Repeatable. [default: none]",
            flag="--text",
            typed=list[str],
            parse=parse_names,
        ),
    ] = ()
    captions: Annotated[
        FilePath | None,
        Option(
            "CSV with columns key and captions, or COCO's annotations in JSON. "
            "[default: webdataset's .txt or .json, shapes' own]"
        ),
    ] = None
    caption_key: Annotated[
        str | None, Option("Key of the captions in webdataset's .json. [default: .txt, caption, ...]")
    ] = None
    captions_per_image: Annotated[
        Count | None, Option("How many captions to keep. [default: as many as the image with the most]")
    ] = None
    resolution: Annotated[
        int | None,
        Option("Side of the square crop in pixels. [default: 256; 64 for shapes]", typed=str, parse=parse_resolution),
    ] = None
    crop: Annotated[
        Literal["adm", "lanczos-square"] | None,
        Option(
            "adm, or lanczos-square (the centred square first: U-ViT's crop of COCO; docs/sources.md). "
            "[default: adm; with --into, the cache's]"
        ),
    ] = None
    limit: Annotated[
        Count | None, Option("Encode only so many images, a seeded random choice. [default: all; of shapes 2,000]")
    ] = None
    out: Annotated[
        FilePath | None, Option("Folder of the new cache. [default: ./caches/<name from what is built>]")
    ] = None
    into: Annotated[FilePath | None, Option("Existing cache to add features to. [default: none, a new cache]")] = None
    batch_size: Annotated[Count, Option("Images an encoder sees at once.")] = 16
    device: Annotated[str, Option("cpu, cuda, cuda:N or auto.")] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16"],
        Option("fp32, tf32 or bf16; auto is fp32 on the CPU and tf32 on a GPU."),
    ] = "auto"
    compile: Annotated[bool | None, Option("Compile the encoders. [default: on a GPU]")] = None
    weights_dir: Annotated[
        FilePath | None, Option("Folder with pretrained weights, searched before the hub. [default: the hub alone]")
    ] = None
    random_weights: Annotated[
        Index | None,
        Option("Seed of random encoder weights, to try things out without pretrained ones. [default: pretrained]"),
    ] = None
    on_bad_image: Annotated[Literal["fail", "skip"], Option("fail, or skip (recorded in the manifest).")] = "fail"
    final_norm: Annotated[
        Literal["auto", "all", "last", "none"],
        Option("Encoder's final norm on: all cached layers, last, none, auto (docs/encoders.md)."),
    ] = "auto"
    moments_codec: Annotated[Literal["fp32", "fp16"], Option("fp32 or fp16.")] = "fp16"
    levels_codec: Annotated[Codec, Option(_CODECS)] = "int8"
    tokens_codec: Annotated[Codec, Option(_CODECS)] = "int8"
    cls_codec: Annotated[
        ClassTokenCodec, Option("Of class tokens, which are diffused and so not quantised: fp32, fp16 or bf16.")
    ] = "fp16"
    levels_basis: Annotated[
        Count | None,
        Option(
            "Store each VAE group's tokens as so many principal components of all its layers together (docs/codecs.md). "
            "[default: all channels]"
        ),
    ] = None
    tokens_basis: Annotated[
        Count | None,
        Option(
            "Store each encoder token as so many of its principal components (docs/codecs.md). [default: all channels]"
        ),
    ] = None
    text_codec: Annotated[Codec, Option(_CODECS)] = "fp16"
    flip: Annotated[bool, Option("Also cache mirrored copies, as a second view.")] = False
    shard_size: Annotated[Count | None, Option("Samples per shard. [default: by size]")] = None
    format: Annotated[Literal["zarr", "wds"], Option("zarr, or wds (webdataset tars).")] = "zarr"
    compressor: Annotated[Literal["zstd", "blosc"] | None, Option("zstd or blosc, for zarr. [default: none]")] = None
    seed: Annotated[Index, Option("Seed of the samples' order.")] = 0
    workers: Annotated[Count | None, Option("Decoding threads. [default: one per core]")] = None
    decode: Annotated[
        str | None, Option("pil (exact) or turbo (faster; docs/sources.md). [default: pil; with --into, the cache's]")
    ] = None
    engine: Annotated[Literal["local", "ray"], Option("local (also under torchrun), or ray (docs/clusters.md).")] = (
        "local"
    )
    schedule: Annotated[
        Literal["dynamic", "static"],
        Option("How torchrun's ranks share shards: dynamic (the next free one) or static."),
    ] = "dynamic"
    ray_workers: Annotated[Count | None, Option("Ray actors. [default: one per GPU of the cluster, or per core]")] = (
        None
    )

    def __post_init__(self) -> None:
        if self.into is not None and self.out is not None:
            raise UserError(
                "--into and --out exclude each other", remedy="--into adds to a cache, --out makes a new one."
            )

    @property
    def bases(self) -> Mapping[str, int | None]:
        """Kind of feature ("levels", "tokens") -> components that its tokens are stored as, None: all channels."""
        return {"levels": self.levels_basis, "tokens": self.tokens_basis}

    @property
    def codecs(self) -> Mapping[str, str]:
        """Kind of feature ("moments", "levels", "tokens", "cls", "text") -> storage codec."""
        return {kind: getattr(self, f"{kind}_codec") for kind in ("moments", "levels", "tokens", "cls", "text")}
