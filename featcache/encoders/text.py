"""Text encoders: captions => hidden states of all tokens, and with some networks one pooled vector per caption."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from featcache.encoders.base import Compute, WeightsSource, load_file, seeded, unavailable, upload, weights_sha256
from featcache.encoders.clip_text import ClipText
from featcache.encoders.hub import HubUnreachable, hub_file
from featcache.encoders.t5_text import T5Text
from featcache.encoders.table import TEXTS, TextEntry
from featcache.errors import UserError, first_line

WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")


class TextNetwork(Protocol):
    """A kind of network that reads texts: what differs between them.

    vocabulary_files: that its tokenizer is made of. marks: what is
    counted with the tokens of a text. what: suffix of a feature's name -> what it is, in the order of `read`.
    """

    vocabulary_files: tuple[str, ...]
    marks: str
    what: Mapping[str, str]

    def build(self, entry: TextEntry) -> nn.Module:
        """The architecture, weights as transformers initialises them."""
        ...

    def keeps(self, key: str) -> bool:
        """Whether the network has a tensor that a file holds."""
        ...

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the tensors that files leave out since they are others of theirs."""
        ...

    def tokenizer(self, folder: Path) -> Tokenizer:
        """That of the vocabulary files in a folder. Raises anything over damaged ones."""
        ...

    def without_files(self, entry: TextEntry) -> str:
        """What a manifest says of the tokenizer without any."""
        ...

    def byte_tokenizer(self, entry: TextEntry) -> Tokenizer:
        """That without any: texts take more tokens."""
        ...

    def problem(self, tokenizer: Tokenizer, entry: TextEntry) -> tuple[str, str] | None:
        """What a vocabulary has and what the network reads, where they do not fit."""
        ...

    def padding(self, entry: TextEntry) -> tuple[int, str]:
        """Number and text of the token that fills up."""
        ...

    def read(self, module: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
        """int64 [n, T] => hidden states float32 [n, T, width], and pooled vectors [n, projected] where there are any."""
        ...


NETWORKS: Mapping[str, TextNetwork] = {"clip": ClipText(), "t5": T5Text()}


def build_text(entry: TextEntry) -> nn.Module:
    """The architecture of `entry`, weights as transformers initialises them."""
    return NETWORKS[entry.network].build(entry)


def _tokenizer(network: TextNetwork, folder: Path) -> Tokenizer:
    try:
        return network.tokenizer(folder)
    except Exception as error:  # the libraries raise bare Exceptions for damaged files
        raise UserError(
            f"the vocabulary in {str(folder)!r} cannot be read: {first_line(error)}",
            remedy=f"Bring {' and '.join(network.vocabulary_files)} again.",
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


def needed_files(entry: TextEntry) -> list[tuple[str, tuple[str, ...]]]:
    """What a pretrained text encoder needs: what it is, and names of files of which one will do."""
    vocabulary = NETWORKS[entry.network].vocabulary_files
    return [("weights", tuple(WEIGHTS_FILES)), *((f"vocabulary ({file})", (file,)) for file in vocabulary)]


def find_file(name: str, hub_id: str, weights: WeightsSource, files: Sequence[str], what: str) -> Path:
    """The first of `files` that is brought or on the hub; raises `WeightsUnavailable`."""
    found = _brought(name, hub_id, weights, files)
    if found is not None:
        return found
    try:
        return hub_file(hub_id, tuple(files))
    except HubUnreachable as error:
        raise unavailable(name, hub_id, f"{what}: {error}") from error


def _state(path: Path, network: TextNetwork) -> dict[str, Tensor]:
    """The network's part of a file: the rest of it (CLIP's image half, T5's decoder) is not read where the format allows
    that."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys() if network.keeps(key)}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"cannot read weights from {str(path)!r}: {first_line(error)}", remedy="Bring the file again."
            ) from error
    else:
        state = {key: value for key, value in load_file(path).items() if network.keeps(key)}
    return network.completed(state)


def load_text(name: str, weights: WeightsSource) -> tuple[nn.Module, Tokenizer, dict[str, Any]]:
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
        state = _state(find_file(name, entry.hub_id, weights, WEIGHTS_FILES, "weights"), NETWORKS[entry.network])
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


def load_tokenizer(name: str, entry: TextEntry, weights: WeightsSource, *, needed: bool) -> tuple[Tokenizer, str]:
    """The tokenizer, and what the manifest says of it: the SHA-256 of its files, or what it knows without.

    needed: whether the vocabulary must be there; else, where none was brought, the one of bytes is taken. Raises as
    `load_text`.
    """
    network = NETWORKS[entry.network]
    wanted = network.vocabulary_files
    if entry.hub_id is None or not (needed or _brought(name, entry.hub_id, weights, wanted[:1])):
        return network.byte_tokenizer(entry), network.without_files(entry)
    files = [find_file(name, entry.hub_id, weights, (file,), f"vocabulary ({file})") for file in wanted]
    if len({file.parent for file in files}) > 1:
        raise UserError(
            f"{' and '.join(map(str, files))} are of different places", remedy=f"Bring both {' and '.join(wanted)}."
        )
    tokenizer = _tokenizer(network, files[0].parent)
    found = network.problem(tokenizer, entry)
    if found is not None:
        raise UserError(
            f"the vocabulary in {str(files[0].parent)!r} {found[0]}, but {name} reads {found[1]}",
            remedy=f"Bring {' and '.join(wanted)} of {entry.hub_id}.",
        )
    return tokenizer, hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def fixed_length(tokenizer: Tokenizer, entry: TextEntry) -> Tokenizer:
    """The tokenizer, by which every text is cut, or filled up, to as many tokens as `entry` takes."""
    number, text = NETWORKS[entry.network].padding(entry)
    tokenizer.enable_truncation(entry.tokens)
    tokenizer.enable_padding(length=entry.tokens, pad_id=number, pad_token=text)
    return tokenizer


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenised captions of a batch of n images. ids: int64 [m, T], of all captions that there are, one after another.
    places: int64 [m], each one's row among n * C. lengths: int32 [n, C], tokens with marks, 0 where there is none.
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
        `text/<name>`: [captions, tokens, width] float32. `text/<name>.pooled`: [captions, projected] float32, where the
        network has one. `text/<name>.length`: [captions] int32, tokens with marks; 0 for captions that an image lacks.
    """

    def __init__(
        self, name: str, weights: WeightsSource, *, captions: int, compute: Compute | None = None, batch_size: int = 16
    ) -> None:
        if name not in TEXTS:
            raise UserError(f"unknown text encoder {name!r}", remedy=f"Type --text with one of: {', '.join(TEXTS)}.")
        self.compute = compute or Compute()
        self.captions, self.batch_size = captions, batch_size
        entry = TEXTS[name]
        self._network = NETWORKS[entry.network]
        model, tokenizer, origin = load_text(name, weights)
        self.entry, self.name, self.title = entry, name, f"text {name}"
        self.module = model.to(self.compute.device)
        # The settings live in the tokenizer itself: made once here, so that threads only read it.
        self._tokenizer = fixed_length(tokenizer, entry)
        self._run = torch.compile(self._features, dynamic=False) if self.compute.compile else self._features
        self.lengths = f"text/{name}.length"
        shapes = {"": (captions, entry.tokens, entry.width), ".pooled": (captions, entry.projected or 0)}
        what = self._network.what
        self.shapes = {f"text/{name}{suffix}": shapes[suffix] for suffix in what}
        record = {**origin, "tokens": entry.tokens, "precision": self.compute.precision}
        self.provenance = {
            **{f"text/{name}{suffix}": {**record, "what": said} for suffix, said in what.items()},
            self.lengths: {**record, "what": f"tokens of each caption, {self._network.marks}"},
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

    def _features(self, ids: Tensor) -> tuple[Tensor, ...]:
        return self._network.read(self.module, ids)

    def empty(self) -> dict[str, np.ndarray]:
        """What it says of the text '': `text/<name>` [T, width] and any `.pooled` [projected], float32.

        Always alone in its batch and not compiled: the same bits whatever the size of a build's batches.
        """
        ids = upload(self.tokenise([("",)]).ids, self.compute.device)
        with self.compute.scope():
            made = self._features(ids)
        return {name: value[0].cpu().numpy() for name, value in zip(self.shapes, made)}

    def __call__(self, tokens: Tokens) -> dict[str, Tensor]:
        """Captions of n images => `text/<name>` [n, C, T, width] and any `.pooled` [n, C, projected], float32.

        They run in batches of `batch_size`, filled up with empty ones where the network is compiled for that size.
        """
        n, C = tokens.lengths.shape
        device = self.compute.device
        made = [torch.zeros(n * C, *shape[1:], device=device) for shape in self.shapes.values()]
        blank = -len(tokens.ids) % self.batch_size if self.compute.compile else 0
        ids = nn.functional.pad(tokens.ids, (0, 0, 0, blank), value=self._network.padding(self.entry)[0])
        ids, places = upload(ids, device), upload(tokens.places, device)
        for first in range(0, len(places), self.batch_size):
            rows = places[first : first + self.batch_size]
            with self.compute.scope():
                for target, value in zip(made, self._run(ids[first : first + self.batch_size])):
                    target[rows] = value[: len(rows)]
        return {name: value.unflatten(0, (n, C)) for name, value in zip(self.shapes, made)}
