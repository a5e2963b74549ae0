"""Text encoders: captions => hidden states of all tokens, and one pooled vector per caption.

CLIP's text transformer as Stable Diffusion uses it: texts are cut or padded to 77 tokens, padding is the end token, the
attention is causal and knows no padding mask, and what is kept is the last hidden state after the final norm. The
pooled vector is CLIP's own text embedding: the hidden state at the first end token, projected, not normalised.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn

from featcache.encoders.base import Compute, WeightsSource, load_file, seeded, unavailable, upload, weights_sha256
from featcache.encoders.hub import HubUnreachable, hub_file
from featcache.encoders.table import TEXTS, TextEntry
from featcache.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import CLIPTextConfig, PreTrainedTokenizerFast

VOCABULARY_FILES = ("vocab.json", "merges.txt")
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
_BYTES = "bytes, without merges"


def build_text(entry: TextEntry) -> nn.Module:
    """The architecture of `entry`, weights as transformers initialises them."""
    # Late here and below: transformers takes seconds to load.
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(text_config(entry))


def text_config(entry: TextEntry) -> CLIPTextConfig:
    """The architecture of `entry` as transformers describes it."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=entry.vocabulary,
        hidden_size=entry.width,
        intermediate_size=entry.hidden,
        projection_dim=entry.projected,
        num_hidden_layers=entry.depth,
        num_attention_heads=entry.heads,
        max_position_embeddings=entry.tokens,
        hidden_act=entry.activation,
        bos_token_id=entry.vocabulary - 2,
        eos_token_id=entry.vocabulary - 1,
        pad_token_id=entry.vocabulary - 1,
    )


def byte_vocabulary(entry: TextEntry) -> dict[str, int]:
    """CLIP's vocabulary without its merges: 256 bytes, 256 bytes that end a word, and the two marks.

    The numbers are those of CLIP's own vocabulary, which begins with the bytes in this order.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {letter + "</w>": 256 + i for i, letter in enumerate(letters)}
    return vocabulary | {"<|startoftext|>": entry.vocabulary - 2, "<|endoftext|>": entry.vocabulary - 1}


def _byte_tokenizer(entry: TextEntry) -> PreTrainedTokenizerFast:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "vocab.json").write_text(json.dumps(byte_vocabulary(entry)), "utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
        return _tokenizer(folder)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """CLIP's tokenizer from `vocab.json` and `merges.txt` in `folder`."""
    import transformers

    # Before version 5 the plain name was a tokenizer in Python.
    kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
    try:
        tokenizer: PreTrainedTokenizerFast = kind.from_pretrained(str(folder), local_files_only=True)
        return tokenizer
    except Exception as error:  # the library raises bare Exceptions for damaged files
        raise UserError(
            f"the vocabulary in {str(folder)!r} cannot be read: {first_line(error)}",
            remedy=f"Bring {' and '.join(VOCABULARY_FILES)} again.",
        ) from error


def _folders(name: str, hub_id: str) -> tuple[str, ...]:
    return (f"text-{name}", hub_id.split("/")[1], hub_id.replace("/", "--"), hub_id)


def _brought(name: str, hub_id: str, weights: WeightsSource, files: Sequence[str]) -> Path | None:
    """The first of `files` in a folder of the encoder's inside `--weights-dir`."""
    if weights.weights_dir is None:
        return None
    for folder in _folders(name, hub_id):
        for file in files:
            if (weights.weights_dir / folder / file).is_file():
                return weights.weights_dir / folder / file
    return None


def needed_files() -> list[tuple[str, tuple[str, ...]]]:
    """What a pretrained text encoder needs: what it is, and names of files of which one will do."""
    return [("weights", tuple(WEIGHTS_FILES)), *((f"vocabulary ({file})", (file,)) for file in VOCABULARY_FILES)]


def find_file(name: str, hub_id: str, weights: WeightsSource, files: Sequence[str], what: str) -> Path:
    """The first of `files` that is brought or on the hub; raises `WeightsUnavailable`."""
    found = _brought(name, hub_id, weights, files)
    if found is not None:
        return found
    try:
        return hub_file(hub_id, tuple(files))
    except HubUnreachable as error:
        raise unavailable(name, hub_id, f"{what}: {error}") from error


def _state(path: Path) -> dict[str, Tensor]:
    """The text half of a CLIP file: the image half, four fifths of it, is not read where the format allows that."""

    def wanted(key: str) -> bool:
        return key.startswith(("text_model.", "text_projection.")) and not key.endswith("position_ids")

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys() if wanted(key)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"cannot read weights from {str(path)!r}: {first_line(error)}", remedy="Bring the file again."
            ) from error
    return {key: value for key, value in load_file(path).items() if wanted(key)}


def load_text(name: str, weights: WeightsSource) -> tuple[nn.Module, PreTrainedTokenizerFast, dict[str, Any]]:
    """A frozen text encoder, its tokenizer, and where both came from.

    With random weights the vocabulary is the one brought, else the bytes alone: texts then take more tokens.

    Raises `UserError` for damaged weights or vocabulary, or those of another network; `WeightsUnavailable` if weights
    or vocabulary are not on this machine and no hub answers.
    """
    entry = TEXTS[name]
    seed = 0 if entry.hub_id is None else weights.random_seed
    if seed is not None:
        model = seeded(seed, lambda: build_text(entry))
        origin: dict[str, Any] = {"weights": "random", "seed": seed}
    else:
        assert entry.hub_id is not None
        state = _state(find_file(name, entry.hub_id, weights, WEIGHTS_FILES, "weights"))
        model = build_text(entry)
        try:
            model.load_state_dict({key: value.float() for key, value in state.items()})
        except RuntimeError as error:
            raise UserError(
                f"the weights found for --text {name} do not fit: {first_line(error)}",
                remedy=f"Bring the weights of {entry.hub_id}.",
            ) from error
        origin = {"weights": entry.hub_id}
    tokenizer, vocabulary = load_tokenizer(name, entry, weights, needed=seed is None)
    model = model.eval().requires_grad_(False)
    return model, tokenizer, {"name": name, **origin, "sha256": weights_sha256(model), "tokenizer": vocabulary}


def load_tokenizer(
    name: str, entry: TextEntry, weights: WeightsSource, *, needed: bool
) -> tuple[PreTrainedTokenizerFast, str]:
    """The tokenizer, and what the manifest says of it: the SHA-256 of both files, or that it knows bytes only.

    needed: whether the vocabulary must be there; else, where none was brought, the one of bytes is taken. Raises as
    `load_text`.
    """
    if entry.hub_id is None or not (needed or _brought(name, entry.hub_id, weights, VOCABULARY_FILES[:1])):
        return _byte_tokenizer(entry), _BYTES
    files = [find_file(name, entry.hub_id, weights, (file,), f"vocabulary ({file})") for file in VOCABULARY_FILES]
    if files[0].parent != files[1].parent:
        raise UserError(
            f"{files[0]} and {files[1]} are of different places", remedy=f"Bring both {' and '.join(VOCABULARY_FILES)}."
        )
    tokenizer = _tokenizer(files[0].parent)
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if len(tokenizer) != entry.vocabulary or ends != [entry.vocabulary - 2, entry.vocabulary - 1]:
        raise UserError(
            f"the vocabulary in {str(files[0].parent)!r} has {len(tokenizer)} tokens and the marks {ends}, "
            f"but {name} reads {entry.vocabulary}, the last two of them marks",
            remedy=f"Bring {' and '.join(VOCABULARY_FILES)} of {entry.hub_id}.",
        )
    return tokenizer, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fixed_length(tokenizer: PreTrainedTokenizerFast, entry: TextEntry) -> Tokenizer:
    """The tokenizer proper; every text is cut, or padded with the end token, to as many tokens as `entry` takes."""
    inner: Tokenizer = tokenizer.backend_tokenizer
    inner.enable_truncation(entry.tokens)
    inner.enable_padding(length=entry.tokens, pad_id=entry.vocabulary - 1, pad_token=tokenizer.eos_token)
    return inner


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenised captions of a batch of n images. ids: int64 [m, T], of all captions that there are, one after another.
    places: int64 [m], each one's row among n * C. lengths: int32 [n, C], tokens with both marks, 0 where there is none.
    """

    ids: Tensor
    places: Tensor
    lengths: Tensor


class TextEncoder:
    """Hidden states and pooled vectors of up to `captions` captions per image.

    Args:
        name: a key of `featcache.encoders.table.TEXTS`.
        weights: where weights and vocabulary may come from.
        captions: how many captions an image may have; missing ones are zeros.
        compute: device, precision, compilation.

    Features:
        `text/<name>`: [captions, tokens, width] float32. `text/<name>.pooled`: [captions, projected] float32.
        `text/<name>.length`: [captions] int32, tokens with both marks; 0 for captions that an image lacks.
    """

    def __init__(
        self, name: str, weights: WeightsSource, *, captions: int, compute: Compute | None = None, batch_size: int = 16
    ) -> None:
        if name not in TEXTS:
            raise UserError(f"unknown text encoder {name!r}", remedy=f"Type --text with one of: {', '.join(TEXTS)}.")
        self.compute = compute or Compute()
        self.captions, self.batch_size = captions, batch_size
        entry = TEXTS[name]
        model, tokenizer, origin = load_text(name, weights)
        self.entry, self.name, self.title = entry, name, f"text {name}"
        self.module = model.to(self.compute.device)
        # The settings live in the tokenizer itself: made once here, so that threads only read it.
        self._tokenizer = fixed_length(tokenizer, entry)
        self._run = torch.compile(self._features, dynamic=False) if self.compute.compile else self._features
        self.lengths = f"text/{name}.length"
        self.shapes = {
            f"text/{name}": (captions, entry.tokens, entry.width),
            f"text/{name}.pooled": (captions, entry.projected),
        }
        record = {**origin, "tokens": entry.tokens, "precision": self.compute.precision}
        self.provenance = {
            f"text/{name}": {**record, "what": "last hidden state after the final norm"},
            f"text/{name}.pooled": {**record, "what": "projected hidden state at the end token"},
            self.lengths: {**record, "what": "tokens of each caption, both marks included"},
        }

    def tokenise(self, captions: Sequence[Sequence[str]]) -> Tokens:
        """The first captions of each image, as many as are kept. Runs in any thread."""
        n, C, T = len(captions), self.captions, self.entry.tokens
        kept = [list(texts[:C]) for texts in captions]
        flat = [text for texts in kept for text in texts]
        lengths = torch.zeros(n, C, dtype=torch.int32)
        places = torch.tensor([i * C + j for i, texts in enumerate(kept) for j in range(len(texts))], dtype=torch.int64)
        if not flat:
            return Tokens(ids=torch.zeros(0, T, dtype=torch.int64), places=places, lengths=lengths)
        read = self._tokenizer.encode_batch(flat)
        lengths.view(-1)[places] = torch.tensor([sum(text.attention_mask) for text in read], dtype=torch.int32)
        return Tokens(ids=torch.tensor([text.ids for text in read], dtype=torch.int64), places=places, lengths=lengths)

    def _features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        made = self.module(input_ids=ids)
        return made.last_hidden_state.float(), made.text_embeds.float()

    def empty(self) -> dict[str, np.ndarray]:
        """What it says of the text '': `text/<name>` [T, width] and `.pooled` [projected], float32.

        Always alone in its batch and not compiled: the same bits whatever the size of a build's batches.
        """
        ids = upload(self.tokenise([("",)]).ids, self.compute.device)
        with self.compute.scope():
            made = self._features(ids)
        return {name: value[0].cpu().numpy() for name, value in zip(self.shapes, made)}

    def __call__(self, tokens: Tokens) -> dict[str, Tensor]:
        """Captions of n images => `text/<name>` [n, C, T, width] and `.pooled` [n, C, projected], float32.

        They run in batches of `batch_size`, filled up with empty ones where the network is compiled for that size.
        """
        n, C = tokens.lengths.shape
        device = self.compute.device
        made = [torch.zeros(n * C, *shape[1:], device=device) for shape in self.shapes.values()]
        blank = -len(tokens.ids) % self.batch_size if self.compute.compile else 0
        ids = nn.functional.pad(tokens.ids, (0, 0, 0, blank), value=self.entry.vocabulary - 1)
        ids, places = upload(ids, device), upload(tokens.places, device)
        for first in range(0, len(places), self.batch_size):
            rows = places[first : first + self.batch_size]
            with self.compute.scope():
                for target, value in zip(made, self._run(ids[first : first + self.batch_size])):
                    target[rows] = value[: len(rows)]
        return {name: value.unflatten(0, (n, C)) for name, value in zip(self.shapes, made)}
