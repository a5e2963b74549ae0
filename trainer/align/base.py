"""What an alignment method is: what it reads from the cache, which blocks it taps, and its loss.

The trainer knows methods only through this file. A method is an `nn.Module` with its own small heads; it is
trained with the backbone and dropped at inference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from featcache.read.statistics import LayerStatistics

# (t' [B], depth) -> hidden state [B, N, D] of the EMA model after block `depth` at time t', same image, same
# noise, same (already dropped) labels, no gradient; only blocks 1..depth are run.
Teacher = Callable[[Tensor, int], Tensor]

# Names of cached features -> statistics of their layers.
TakeStatistics = Callable[[Sequence[str]], "Mapping[str, LayerStatistics]"]


@dataclass(frozen=True, kw_only=True)
class BackboneInfo:
    """What a method may know of the backbone it is attached to, when it builds its heads.

    `latent_channels` and `latent_size` describe the latent (C, h, w with h = w = latent_size); the token
    grid is `grid` x `grid` with `grid = latent_size // patch_size`.
    """

    name: str  # "SiT-B/2"
    depth: int
    width: int
    patch_size: int
    latent_channels: int
    latent_size: int

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.latent_size // self.patch_size

    @property
    def scale(self) -> str:
        """Size letter of the model: `S`, `B`, `L`, `XL` (or another family member's)."""
        return self.name.split("-")[1].split("/")[0]


@dataclass(frozen=True, kw_only=True)
class AlignInputs:
    """Everything a loss may look at, for one (micro-)batch.

    hidden: depth (1-based, as the papers count) -> hidden state after that block, [B, N, D], autocast dtype.
    t: [B] float32, 0 = data, 1 = noise.
    targets: feature name -> decoded feature: tokens [B, N, C]; VAE groups [B, L, N, C]; float.
    time_embedding: [B, D], the backbone's embedding of t (before it is joined with the label's).
    latent: [B, C, h, w] clean, scaled latent drawn for this step.
    uniform: [B] uniform(0, 1) draws that belong to this batch's samples (for methods that need randomness).
    teacher: the EMA model, for methods that set `needs_teacher`.
    stream_hidden: feature that is diffused with tokens of its own -> depth -> their hidden state, [B, T, D].
    """

    hidden: Mapping[int, Tensor]
    t: Tensor
    targets: Mapping[str, Tensor]
    time_embedding: Tensor
    latent: Tensor
    uniform: Tensor
    teacher: Teacher | None = None
    stream_hidden: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """Shape of one cached feature as a method sees it: tokens (N, C) or a VAE group (L, N, C)."""

    shape: tuple[int, ...]


class MethodConfig(Protocol):
    """Options of one method: a frozen, keyword-only dataclass that is validated when made."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init__(self, **options: Any) -> None: ...

    def required(self) -> tuple[str, ...]:
        """Cached features the method will read; placeholders where the options leave the encoder open."""
        ...

    def resolve(self, available: Mapping[str, FeatureInfo]) -> tuple[str, ...]:
        """The concrete features, given those of a cache.

        Raises:
            CacheError: the cache lacks one.
            UserError: the options leave open which of several is meant, or a feature's shape is wrong.
        """
        ...


class Alignment(nn.Module):
    """Base of all methods. Subclasses set the attributes in `__init__` and implement `terms`.

    Attributes:
        reads: names of the cached features it wants, e.g. `("vae/G3", "vae/G4")`.
        taps: block depths (1-based) whose hidden states it wants.
        needs_teacher: whether the trainer must provide `AlignInputs.teacher`.
        adversary: a discriminator with its own optimiser, or None. The trainer never passes its parameters to
            the model's optimiser.
        adversary_every: the discriminator steps once for so many steps of the model.
    """

    reads: tuple[str, ...] = ()
    taps: tuple[int, ...] = ()
    needs_teacher: bool = False
    adversary: nn.Module | None = None
    adversary_every: int = 1

    def calibrate(self, take: TakeStatistics) -> None:
        """Takes from the cache's statistics what the method keeps in its buffers. Called once, when a run is set up."""

    def rate_factors(self) -> dict[str, float]:
        """Parts of the module (names as in `named_modules`) whose learning rate is this multiple of the run's."""
        return {}

    def terms(self, inputs: AlignInputs) -> dict[str, Tensor]:
        """Weighted scalar loss terms by name; their sum is added to the denoising loss.

        Raises:
            KeyError: a programmer's mistake: `reads` or `taps` do not cover what the loss uses.
        """
        raise TypeError(f"{type(self).__name__} does not define terms()")

    def metrics(self, inputs: AlignInputs) -> dict[str, Tensor]:
        """Unweighted scalars worth logging (e.g. mean cosine). Called at logging steps, without gradient."""
        return {}

    def active(self, *, step: int, seed: int) -> bool:
        """Whether alignment is computed in this step: a function of (seed, step), so all ranks agree."""
        return True

    def adversary_loss(self, inputs: AlignInputs) -> Tensor:
        """The adversary's loss on real targets and detached hidden states (only if `adversary` is set)."""
        raise TypeError(f"{type(self).__name__} has no adversary")


def cosine_per_token(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity over the channel axis in float32. [..., C], [..., C] -> [...]."""
    return torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)
