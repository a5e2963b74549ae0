"""How well images fit their prompts, by two published CLIP networks: the CLIP score and PickScore.

CLIP score: the cosine of an image's and its prompt's embeddings under CLIP ViT-L/14 (Radford et al. 2021; Hessel et al.
2021 multiply by 2.5 and cut off at 0, which is left out here). PickScore (Kirstain et al. 2023): the same of a ViT-H/14
that was tuned on people's choices, times its learned `exp(logit_scale)`; values about 20.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from featcache.encoders.base import WeightsSource, load_file, seeded, weights_sha256
from featcache.encoders.clip_text import text_config
from featcache.encoders.table import TEXTS, TextEntry
from featcache.encoders.text import WEIGHTS_FILES, find_file, fixed_length, load_tokenizer
from featcache.errors import UserError, WeightsUnavailable, first_line
from featcache.precision import tensor_float32

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPVisionConfig

RESOLUTION = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RESIZE_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class VisionEntry:
    """CLIP's vision transformer. side: of the images in pixels; patch: of a patch. Sizes as in `TextEntry`."""

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int = 14
    side: int = RESOLUTION


@dataclass(frozen=True, kw_only=True)
class ClipEntry:
    """A published CLIP and how it scores.

    name: of the folder under `--weights-dir` (`text-<name>`; the hub's own names will do, too). text.hub_id: where the
    weights are. vocabulary: where the tokenizer is. scaled: whether cosines are multiplied by `exp(logit_scale)`.
    """

    name: str
    text: TextEntry
    vision: VisionEntry
    vocabulary: str
    scaled: bool


CLIPS: Mapping[str, ClipEntry] = {
    "clip_score": ClipEntry(
        name="clip-l",
        text=TEXTS["clip-l"],
        vision=VisionEntry(width=1024, depth=24, heads=16, hidden=4096),
        vocabulary="openai/clip-vit-large-patch14",
        scaled=False,
    ),
    "pick_score": ClipEntry(
        name="pick-score",
        text=TextEntry(
            hub_id="yuvalkirstain/PickScore_v1",
            licence="MIT",
            paper="Kirstain et al. 2023, arXiv:2305.01569",
            vocabulary=49408,
            tokens=77,
            width=1024,
            depth=24,
            heads=16,
            hidden=4096,
            projected=1024,
            activation="gelu",
        ),
        vision=VisionEntry(width=1280, depth=32, heads=16, hidden=5120),
        vocabulary="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        scaled=True,
    ),
}


def prepare_image(pixels: np.ndarray, side: int = RESOLUTION) -> np.ndarray:
    """uint8 [H, W, 3] => uint8 [side, side, 3] as CLIP's image processor: the shortest edge is brought to `side` by PIL's
    bicubic resize, then the centre is cut out."""
    image = Image.fromarray(pixels)
    width, height = image.size
    short = min(width, height)
    if short != side:
        # The longer side is cut off, not rounded, as transformers does.
        image = image.resize((width * side // short, height * side // short), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))


def build_clip(entry: ClipEntry) -> CLIPModel:
    """The architecture of `entry`, both halves, weights as transformers initialises them."""
    from transformers import CLIPConfig, CLIPModel

    text, vision = text_config(entry.text), _vision_config(entry)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=entry.text.projected)
    )


def _vision_config(entry: ClipEntry) -> CLIPVisionConfig:
    from transformers import CLIPVisionConfig

    vision = entry.vision
    assert entry.text.projected is not None, "CLIP projects"
    return CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.hidden,
        projection_dim=entry.text.projected,
        num_hidden_layers=vision.depth,
        num_attention_heads=vision.heads,
        image_size=vision.side,
        patch_size=vision.patch,
        hidden_act=entry.text.activation,
    )


def _load(metric: str, entry: ClipEntry, source: WeightsSource) -> tuple[Any, dict[str, Any]]:
    """The frozen network, and where it came from."""
    if source.random_seed is not None:
        module = seeded(source.random_seed, lambda: build_clip(entry))
        return module.eval().requires_grad_(False), {"weights": "random", "seed": source.random_seed}
    hub_id = entry.text.hub_id
    assert hub_id is not None, "no network of ours scores prompts"
    state = load_file(find_file(entry.name, hub_id, source, WEIGHTS_FILES, "weights"))
    kept = {key: value.float() for key, value in state.items() if not key.endswith("position_ids")}
    network: nn.Module = build_clip(entry)
    try:
        network.load_state_dict(kept, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"the weights found for the metric {metric} do not fit: {first_line(error)}",
            remedy=f"Bring the weights of {hub_id}, both halves, image and text.",
        ) from error
    return network.eval().requires_grad_(False), {"weights": hub_id}


class ClipScorer:
    """Scores of images, each with its own prompt.

    Args:
        metric: a key of `CLIPS`.
        source: where weights and vocabulary may come from. `random_seed` builds the architecture with random weights,
            whose scores are named `random-<metric>`.
        device: where the network runs, in float32 without TF32.

    Attributes:
        names: under which the scores are reported.
        provenance: JSON-able record of network, weights, vocabulary and preprocessing.

    Raises:
        UserError: damaged weights or vocabulary, or those of another network.
        WeightsUnavailable: weights or vocabulary are not on this machine and no hub answers.
    """

    def __init__(self, metric: str, *, source: WeightsSource, device: torch.device | str = "cpu") -> None:
        entry = CLIPS[metric]
        with _as_of(metric):
            module, origin = _load(metric, entry, source)
            tokenizer, vocabulary = load_tokenizer(
                entry.name, replace(entry.text, hub_id=entry.vocabulary), source, needed=source.random_seed is None
            )
        self.names = (metric if source.random_seed is None else f"random-{metric}",)
        self.device = torch.device(device)
        self.provenance = {
            "model": entry.text.hub_id,
            **origin,
            "sha256": weights_sha256(module),
            "tokenizer": vocabulary,
            "preprocessing": f"PIL bicubic to {entry.vision.side}, CLIP's mean and std",
            "score": "exp(logit_scale) * cosine" if entry.scaled else "cosine",
        }
        self._entry, self._module = entry, module.to(self.device)
        self._tokenizer = fixed_length(tokenizer, entry.text)
        self._mean = torch.tensor(MEAN, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(STD, device=self.device).view(1, 3, 1, 1)

    def check(self, prompts: Sequence[str]) -> None:
        """Any text will do; what is longer than the network reads is cut off, as in the published codes."""

    @torch.inference_mode()
    def image_embeddings(self, images: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] => float32 [n, D], not normalised."""
        side = self._entry.vision.side
        with ThreadPoolExecutor(RESIZE_THREADS) as pool:
            ready = np.stack(list(pool.map(lambda image: prepare_image(image, side), images)))
        x = torch.from_numpy(ready).to(self.device).permute(0, 3, 1, 2).float() / 255
        with tensor_float32(False):
            seen = self._module.vision_model(pixel_values=(x - self._mean) / self._std)
            embedded: Tensor = self._module.visual_projection(seen.pooler_output)
        return embedded

    @torch.inference_mode()
    def text_embeddings(self, prompts: Sequence[str]) -> Tensor:
        """n prompts => float32 [n, D], not normalised."""
        ids = torch.tensor([text.ids for text in self._tokenizer.encode_batch(list(prompts))], device=self.device)
        with tensor_float32(False):
            read = self._module.text_model(input_ids=ids)
            embedded: Tensor = self._module.text_projection(read.pooler_output)
        return embedded

    @torch.inference_mode()
    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """uint8 [n, H, W, 3] and n prompts => the scores by name, float64 [n]."""
        a, b = self.image_embeddings(images).double(), self.text_embeddings(prompts).double()
        cosine = (F.normalize(a, dim=1) * F.normalize(b, dim=1)).sum(1)
        scale = self._module.logit_scale.double().exp() if self._entry.scaled else 1.0
        return {self.names[0]: (scale * cosine).cpu().numpy()}


@contextmanager
def _as_of(metric: str) -> Iterator[None]:
    """Weights that are missing: which metric lacks them, and what to do."""
    entry = CLIPS[metric]
    try:
        yield
    except WeightsUnavailable as error:
        needed = dict.fromkeys((str(entry.text.hub_id), entry.vocabulary))
        bring = " and ".join(f"{hub_id} (as DIR/{Path(hub_id).name})" for hub_id in needed)
        raise WeightsUnavailable(
            f"the metric {metric} cannot be measured: {error.what}",
            remedy=f"Download {bring} on a machine with internet and pass --weights-dir DIR, or leave {metric} out of "
            "--metrics.",
        ) from error
