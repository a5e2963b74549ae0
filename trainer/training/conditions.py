"""What a backbone is conditioned on, from stored bytes, and what stands in for it where it is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from featcache.codecs import FeatureCodec
from featcache.errors import UserError
from featcache.read.captions import COUNT, one_caption
from trainer.runs import empty_text
from trainer.runs import folder as runs

if TYPE_CHECKING:
    import numpy as np

    from featcache import Cache
    from trainer.models import ModelConfig


class Condition(nn.Module):
    """Base of both. reads: names of the cached features that it is made of."""

    reads: tuple[str, ...]

    def forward(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        """What the backbone takes as `y`; the null condition where `dropped`, bool [B]."""
        raise NotImplementedError


class Labels(Condition):
    """Class labels, int64 [B]; the null label is the number of classes."""

    reads = ("label",)

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._null = num_classes

    def forward(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        return torch.where(dropped, self._null, batch["label"])


class TextRows(Condition):
    """A text encoder's hidden states of one caption, float32 [B, T, W].

    The null condition is what the encoder says of the text '', all of it (REPA App. K); images without a caption have it
    always.

    Args:
        codec: of one caption's row. empty: float32 [T, W].
    """

    empty: Tensor

    def __init__(self, name: str, codec: FeatureCodec, empty: Tensor) -> None:
        super().__init__()
        self.reads = (name, COUNT)
        self.codec = codec
        self.register_buffer("empty", empty, persistent=False)

    def forward(self, batch: Mapping[str, Tensor], dropped: Tensor) -> Tensor:
        rows = self.codec.decode(batch, torch.float32)
        without = dropped | (batch[COUNT] == 0)
        return torch.where(without[:, None, None], self.empty, rows)


def build_condition(cfg: ModelConfig, cache: Cache) -> Condition:
    """What a backbone of this configuration takes from a cache.

    Raises:
        CacheError: the cache has no text of ''.
    """
    if cfg.text is None:
        return Labels(cfg.num_classes)
    spec = cache.manifest.features[cfg.text.name]
    return TextRows(cfg.text.name, FeatureCodec(one_caption(spec)), torch.from_numpy(spec.empty_text()))


def settle_empty_text(condition: Condition, cfg: ModelConfig, run: Path) -> None:
    """Checks the copy of a run that has begun against the cache; a new one has none yet (`keep_empty_text`).

    Raises:
        UserError: it is missing, damaged, or not what the cache holds.
    """
    if not isinstance(condition, TextRows) or cfg.text is None or not runs.is_run(run):
        return
    if not torch.equal(empty_text.of_run(run, cfg.text), condition.empty.cpu()):
        raise UserError(
            f"the text of '' in {run / empty_text.FILE} is not that of {cfg.text.name} in the cache",
            remedy="Bring back the cache that the run was started with, or start another run with --name.",
        )


def keep_empty_text(condition: Condition, run: Path) -> None:
    """Writes the copy of a run that begins, where its condition is text."""
    if isinstance(condition, TextRows):
        empty_text.keep(condition.empty, run)


@torch.no_grad()
def cached_conditions(condition: Condition, cache: Cache, indices: np.ndarray) -> Tensor:
    """The conditions of the samples `indices` [n], of text each one's first caption: on the CPU, as `Condition` gives them."""
    with cache.reader(list(condition.reads), single_view=True, single_caption=True) as reader:
        out = reader.allocate(len(indices))
        reader.read(indices, out)
    batch = {name: torch.from_numpy(array) for name, array in out.items()}
    found: Tensor = condition(batch, torch.zeros(len(indices), dtype=torch.bool))
    return found
