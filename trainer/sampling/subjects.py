"""What samples are of, classes or prompts: what the model is told, and what stands beside the images in their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from trainer.sampling.grid import class_picture, first_of_classes, prompt_picture, prompts_shown

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.sampling.prompts import PromptEncoder, Prompts


class Subjects(Protocol):
    """What the samples of a run are of.

    null: the text rows of `''`, float32 [T, W], that stand for no prompt in guidance; None for classes, which have a
    label of their own for that.
    """

    @property
    def null(self) -> Tensor | None: ...

    def condition(self, indices: Sequence[int]) -> np.ndarray | Callable[[Sequence[int]], Tensor]:
        """What `trainer.sampling.draw.draw_units` takes for the samples `indices`."""
        ...

    def shown(self, num: int) -> list[int]:
        """The samples of the first `num` that the picture shows."""
        ...

    def picture(self, tiles: Mapping[int, np.ndarray], num: int) -> np.ndarray:
        """uint8 [H, W, 3] of `shown(num)`: sample => uint8 [R, R, 3]."""
        ...

    def arrays(self, num: int) -> dict[str, np.ndarray]:
        """What an npz holds beside the images."""
        ...

    def members(self, index: int) -> dict[str, Any]:
        """What a WebDataset shard holds beside an image."""
        ...

    def folder(self, index: int) -> str:
        """Where a PNG lies in the folder of all; empty for right there."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what the files of images cannot hold into the folder where they are."""
        ...


@dataclass(frozen=True, kw_only=True)
class OfClasses:
    """labels: int64, one for each sample there may be. names: of all classes."""

    labels: np.ndarray
    names: Sequence[str]
    null: None = None

    def condition(self, indices: Sequence[int]) -> np.ndarray:
        chosen: np.ndarray = self.labels[indices]
        return chosen

    def _shown(self, num: int) -> dict[int, np.ndarray]:
        return first_of_classes(self.labels[:num])

    def shown(self, num: int) -> list[int]:
        return [int(i) for of in self._shown(num).values() for i in of]

    def picture(self, tiles: Mapping[int, np.ndarray], num: int) -> np.ndarray:
        by_class = {label: np.stack([tiles[int(i)] for i in of]) for label, of in self._shown(num).items()}
        return class_picture(by_class, self.names)

    def arrays(self, num: int) -> dict[str, np.ndarray]:
        return {"arr_1": self.labels[:num].astype(np.int64)}

    def members(self, index: int) -> dict[str, Any]:
        return {"cls": str(self.labels[index]).encode()}

    def folder(self, index: int) -> str:
        return f"{self.labels[index]:04d}"

    def save(self, folder: Path) -> None:
        """The labels are in all of them."""


@dataclass(frozen=True, kw_only=True)
class OfPrompts:
    """encoder: what turns them into the rows that the model reads."""

    prompts: Prompts
    encoder: PromptEncoder
    null: Tensor

    def condition(self, indices: Sequence[int]) -> Callable[[Sequence[int]], Tensor]:
        """They are encoded as they are drawn: 77 x 768 numbers for each would fill the memory."""
        return lambda chosen: self.encoder(self.prompts.of(chosen))

    def shown(self, num: int) -> list[int]:
        return prompts_shown(num)

    def picture(self, tiles: Mapping[int, np.ndarray], num: int) -> np.ndarray:
        chosen = self.shown(num)
        return prompt_picture([tiles[i] for i in chosen], self.prompts.of(chosen))

    def arrays(self, num: int) -> dict[str, np.ndarray]:
        return {}

    def members(self, index: int) -> dict[str, Any]:
        return {"txt": self.prompts.of([index])[0].encode()}

    def folder(self, index: int) -> str:
        return ""

    def save(self, folder: Path) -> None:
        self.prompts.save(folder)
