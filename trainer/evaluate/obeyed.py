"""Whether pictures show what their captions of the embedded set say: `featcache.sources.shapes_text`.

A caption names a shape, a texture, a colour and a background. A small network that has learned to read these four from
pictures, drawn ones and ones that went through the tiny VAE, says which a picture shows; the picture obeys its caption if
all four agree. The network has seen every combination, those that `shapes-text` holds out too, so it does not take a rare
one for a common one. How often it errs itself stands in docs/embedded.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from featcache.encoders import tiny
from featcache.errors import UserError
from featcache.sources.shapes_text import ATTRIBUTES, WORDINGS, Attributes, caption, parse_caption
from trainer.evaluate.references import full_precision

NAME = "prompts_obeyed"
SIDE = 64  # pixels: what the network was trained on
_EXAMPLE = caption(Attributes("triangle", "striped", "red", "dark"), WORDINGS[0])


def can_judge(prompts: Sequence[str]) -> bool:
    """Whether there are prompts and each of them is a caption of the embedded set."""
    return bool(prompts) and all(parse_caption(prompt) is not None for prompt in prompts)


def parsed(prompts: Sequence[str]) -> list[Attributes]:
    """The attributes that each prompt names. Raises `UserError` with the first prompt that is no caption of the set."""
    found = []
    for number, prompt in enumerate(prompts, 1):
        attributes = parse_caption(prompt)
        if attributes is None:
            raise UserError(
                f"prompt {number}, {prompt[:200]!r}, does not name one shape, one texture, one colour and one background "
                "of the embedded set, so nobody can say whether a picture obeys it",
                remedy=f"Use prompts such as {_EXAMPLE!r}, or another metric.",
            )
        found.append(attributes)
    return found


class CaptionJudge:
    """The network with its weights on a device.

    Attributes:
        provenance: JSON-able: name and SHA-256 of the weights, and what is done to pixels first.
    """

    def __init__(
        self, *, device: torch.device | str = "cpu", batch_size: int = 256, folder: Path = tiny.FOLDER
    ) -> None:
        """folder: of the weights. Raises `UserError` if they are missing."""
        self.device, self.batch_size = torch.device(device), batch_size
        self.provenance = {
            "judge": "caption-judge",
            "weights_sha256": tiny.weights_sha256("caption-judge", folder=folder),
            "preprocessing": f"uint8, resized to {SIDE} px (bilinear, antialiased), (x / 255 - 0.5) / 0.5",
        }
        self._network = tiny.load_caption_judge(folder=folder).to(self.device)

    @torch.inference_mode()
    def read(self, images: NDArray[np.uint8]) -> list[Attributes]:
        """What each picture shows most probably.

        Args:
            images: RGB uint8 [n, R, R, 3].

        Raises `UserError` for other arrays.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"the caption judge takes uint8 images [n, R, R, 3], got {images.dtype} {list(images.shape)}",
                remedy="Convert the images to 8-bit RGB.",
            )
        found: list[Attributes] = []
        with full_precision():
            for first in range(0, len(images), self.batch_size):
                logits = self._network(self._pixels(images[first : first + self.batch_size]))
                chosen = [
                    head.argmax(1).tolist() for head in logits.split([len(v) for v in ATTRIBUTES.values()], dim=1)
                ]
                names = (
                    [values[i] for i in column] for values, column in zip(ATTRIBUTES.values(), chosen, strict=True)
                )
                found += [Attributes(*row) for row in zip(*names, strict=True)]
        return found

    def right(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> NDArray[np.bool_]:
        """For each picture and its prompt, which attributes agree: [n, 4] in the order of `ATTRIBUTES`.

        Raises `UserError` for other arrays, for prompts of another number, and for the first that is no caption of the set.
        """
        asked = parsed(prompts)
        if len(asked) != len(images):
            raise UserError(
                f"{len(images)} images cannot obey {len(asked)} prompts", remedy="Pass one prompt an image."
            )
        shown = self.read(images)
        pairs = [(astuple(a), astuple(b)) for a, b in zip(asked, shown, strict=True)]
        return np.array([[x == y for x, y in zip(a, b, strict=True)] for a, b in pairs], bool).reshape(-1, 4)

    def obeyed(self, images: NDArray[np.uint8], prompts: Sequence[str]) -> dict[str, float]:
        """Shares in [0, 1]: `prompts_obeyed`, of pictures that show all four, and `prompts_obeyed/<attribute>` of each.

        Args:
            images: RGB uint8 [n, R, R, 3], n >= 1.
            prompts: one an image.

        Raises `UserError` as `right` does, and for no images.
        """
        if not len(images):
            raise UserError("there are no images to judge", remedy="Draw at least one.")
        return shares(self.right(images, prompts))

    def _pixels(self, images: NDArray[np.uint8]) -> Tensor:
        """uint8 [B, R, R, 3] => [B, 3, 64, 64] in [-1, 1] on the device."""
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(self.device, torch.float32)
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)
        return (x / 255 - 0.5) / 0.5


def shares(right: NDArray[np.bool_]) -> dict[str, float]:
    """`CaptionJudge.right` of some pictures => the numbers of `CaptionJudge.obeyed`."""
    each = {f"{NAME}/{name}": float(column.mean()) for name, column in zip(ATTRIBUTES, right.T, strict=True)}
    return {NAME: float(right.all(1).mean()), **each}


def obeyed(
    images: NDArray[np.uint8], prompts: Sequence[str], *, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """`CaptionJudge.obeyed` with the embedded weights."""
    return CaptionJudge(device=device).obeyed(images, prompts)
