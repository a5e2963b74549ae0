"""What an encoder is, where its weights come from, and how they are identified.

Pixels => features. Pixels arrive as uint8 [B, 3, R, R] on the encoder's device, one decoded and cropped image
shared by all encoders; each encoder does its own scaling, normalisation and resizing. Features leave as float32,
raw (unnormalised, unscaled).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from featcache.errors import UserError, WeightsUnavailable, first_line
from featcache.precision import PRECISIONS, tensor_float32


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """Where pretrained weights may come from.

    weights_dir: a folder of files or model folders the user brought; searched first. random_seed: build the
    architecture with seeded random weights instead (for tests and timing).
    """

    weights_dir: Path | None = None
    random_seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How encoders run: on which device, in which precision (a name of `featcache.precision.PRECISIONS`),
    compiled or not.

    fp32: no TF32 anywhere. tf32: matrix products and convolutions on tensor cores, 10 bits of mantissa. bf16: autocast,
    weights stay float32. Whatever the precision, pixels are prepared and features handed out in float32.
    """

    device: str = "cpu"
    precision: str = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(
                f"unknown precision {self.precision!r}", remedy=f"Type --precision with one of: {', '.join(PRECISIONS)}"
            )

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Where networks run: no gradients, TF32 on or off, bf16 autocast. Restores PyTorch's settings afterwards."""
        with (
            tensor_float32(self.precision == "tf32"),
            torch.inference_mode(),
            torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            yield


Batch = TypeVar("Batch", contravariant=True)


class Network(Protocol[Batch]):
    """One frozen network that yields one or more features per image, from `Batch`.

    title: what a build's stages call it. shapes: feature name -> per-sample shape. provenance: feature name ->
    JSON-able record for the manifest.
    """

    compute: Compute

    @property
    def title(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def provenance(self) -> Mapping[str, Mapping[str, Any]]: ...

    def __call__(self, given: Batch, /) -> dict[str, Tensor]:
        """Feature name -> float32 [B, *shape] of a batch of B images, on the encoder's device."""
        ...


class Encoder(Network[Tensor], Protocol):
    """A network that is given pixels, uint8 [B, 3, R, R]. grid: side of the token grid of its features."""

    grid: int


N = TypeVar("N", bound=Network[Any])


def synchronise(device: str) -> None:
    """Waits until the device has done all it was given; a CPU always has."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def upload(tensor: Tensor, device: str | torch.device) -> Tensor:
    """A tensor on `device`; from the host to a GPU through pinned memory, so that this thread does not wait for the copy."""
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def in_precision(encoder: N, precision: str) -> N:
    """The same encoder, weights shared, computing in another precision."""
    twin = copy.copy(encoder)
    twin.compute = replace(encoder.compute, precision=precision)
    return twin


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Runs `build()` under its own random state, so that the same seed gives the same weights anywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of all parameters and persistent buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def remedy_for_other_weights(origin: object) -> str:
    """What to do about a cache made with other weights than those found. origin: `weights` of its provenance."""
    if origin == "embedded":
        return (
            "The tiny encoders and their weights were others when this cache was made. Build it again, into a folder of its "
            "own: featcache build --out NEW; or install the version of featcache that built it."
        )
    return "Bring the same weights with --weights-dir."


def unavailable(name: str, hub_id: str | None, tried: str, page: str = "") -> WeightsUnavailable:
    """The one offline error. `page` says where weights are that no hub has."""
    if hub_id is None:
        what = f"weights of {name!r} are not on this machine, and no hub has them"
        bring = f"get {page}, name it {name}.pth"
    else:
        what = f"weights of {name!r} ({hub_id}) are not on this machine and could not be downloaded ({tried})"
        bring = f"download {hub_id} on a machine with internet"
    bring = bring[0].upper() + bring[1:]
    return WeightsUnavailable(what, remedy=f"{bring} and pass --weights-dir DIR (see docs/encoders.md).")


def load_file(path: Path) -> dict[str, Tensor]:
    """A state dict from `.safetensors`, or from `.pt`/`.pth`/`.bin` without unpickling arbitrary objects.

    Raises `UserError` if the file is damaged or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_safetensors(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"cannot read weights from {str(path)!r}: {type(error).__name__}: {first_line(error)}",
            remedy="Bring the file again, preferably as .safetensors.",
        ) from error
    for wrapper in ("state_dict", "model", "teacher", "encoder"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{str(path)!r} is not a plain state dict", remedy="Save the tensors alone as .safetensors.")
    return state


def find_weights(directory: Path, stems: tuple[str, ...], files: tuple[str, ...] = ()) -> Path | None:
    """First of `DIR/<stem>.<suffix>`, `DIR/<stem>/<usual file>` or a hub's own `files` in either place that exists."""
    suffixes = (".safetensors", ".pth", ".pt", ".bin", ".pth.tar")
    usual = (
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "pytorch_model.bin",
        "open_clip_model.safetensors",
    )
    for stem in stems:
        inside = [directory / stem / name for name in (*usual, *files)]
        for candidate in [directory / f"{stem}{s}" for s in suffixes] + inside:
            if candidate.is_file():
                return candidate
    return next((directory / name for name in files if (directory / name).is_file()), None)
