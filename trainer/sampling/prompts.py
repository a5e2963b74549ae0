"""Prompts that samples are drawn of: where they are from, and the rows of text that a model is given for them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.errors import UserError
from featcache.paths import typed
from featcache.redact import redact
from featcache.sources.opening import Unreadable, read_file
from featcache.store import files
from featcache.store.remote import is_remote
from trainer.classes import Classes
from trainer.runs import folder as runs
from trainer.runs import schemas
from trainer.runs.records import run_model_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from featcache.encoders.text import TextEncoder
    from trainer.requests import SampleSettings
    from trainer.runs.config import RunConfig

FILE = "prompts.json"  # beside samples
MAX_TEXT_BYTES = 64 << 20  # as JSON, escaped, they are still read back
MAX_PROMPTS = 10_000_000
MAX_CHARACTERS = 1 << 16  # of one prompt: a text encoder reads a few hundred
_LONGEST_NAME = 255  # bytes, of file systems
_TABLES = (".csv", ".tsv", ".jsonl")
FORMS = "a text file with one prompt a line, COCO's captions_*.json, or data with captions of its own (shapes-text); a prompt itself is --prompt TEXT"
_PICKS = 0xCA9710  # the stream of random numbers that picks captions


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Texts in order, at least one. Image i is of text i modulo their number.

    source: what they are from: a name, no path. remark: for the user, of what was passed over.
    """

    texts: tuple[str, ...]
    source: str
    remark: str | None = None

    def of(self, indices: Iterable[int]) -> list[str]:
        """The prompts of the images `indices`."""
        return [self.texts[int(i) % len(self.texts)] for i in indices]

    @cached_property
    def sha256(self) -> str:
        """Of the texts as JSON: equal for the same prompts in the same order, wherever they are from."""
        return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

    def record(self) -> dict[str, object]:
        """What is kept of them beside samples and numbers."""
        return {"source": self.source, "count": len(self.texts), "sha256": self.sha256}

    def save(self, folder: Path) -> None:
        """Writes `prompts.json`: the record, and all texts under `prompts`."""
        content = json.dumps({**self.record(), "prompts": self.texts}, indent=0, ensure_ascii=False)
        runs.write_text(folder / FILE, content)


def load_prompts(folder: Path, *, sha256: object = None) -> Prompts | None:
    """What `Prompts.save` wrote beside samples; None where there is nothing.

    sha256: what the prompts of the samples have, where it is known.

    Raises:
        UserError: it is damaged, or holds other texts than it says or is to hold.
    """
    path = files.inside(folder, FILE)
    remedy = (
        "Draw the same samples again (trainer sample, or trainer eval): what is there is kept, and this file made anew."
    )
    content = runs.read_json(path, {}, remedy=remedy)
    if not content:
        return None
    held = schemas.check(content, schemas.SampledPrompts, path, remedy=remedy)
    prompts = _checked(held["prompts"], source=held["source"], where=str(path))
    if prompts.sha256 != held["sha256"]:
        raise UserError(f"{path} holds other prompts than it says (their checksum differs)", remedy=remedy)
    if sha256 is not None and prompts.sha256 != sha256:
        raise UserError(f"{path} holds other prompts than the samples beside it are of", remedy=remedy)
    return prompts


def restore_prompts(prompts: Prompts, folder: Path) -> None:
    """Writes `prompts.json` beside finished samples, where it is missing, damaged or of others."""
    with contextlib.suppress(UserError):
        if load_prompts(folder, sha256=prompts.sha256) is not None:
            return
    prompts.save(folder)


def of_settings(asked: SampleSettings) -> Prompts | None:
    """The prompts that `--prompt` or `--prompts` names; None where neither was given.

    Raises:
        UserError: both were given, or as `open_prompts`.
    """
    if asked.prompt and asked.prompts is not None:
        raise UserError("--prompt and --prompts were both given", remedy="Leave one of them out.")
    if asked.prompts is not None:
        return open_prompts(asked.prompts, seed=asked.seed)
    if not asked.prompt:
        return None
    return _checked(asked.prompt, source="--prompt", where="--prompt")


def prompts_for(run: Path, config: RunConfig, asked: SampleSettings) -> Prompts | None:
    """What samples of a run are to be drawn of; None where its model takes classes.

    Raises:
        UserError: no prompts for a model that takes text, prompts for one that takes classes, or classes beside prompts;
            or as `open_prompts`.
    """
    flag = "--prompt" if asked.prompt else "--prompts" if asked.prompts is not None else None
    if run_model_config(run, config).text is None:
        if flag is not None:
            raise UserError(
                f"{flag} is for models that take text, and {config.name} takes classes",
                remedy=f"Leave {flag} out; --classes says which classes to draw.",
            )
        return None
    if asked.classes not in (None, Classes()):
        raise UserError(
            f"--classes is for models that take classes, and {config.name} takes text",
            remedy="Leave --classes out; --prompt says what to draw.",
        )
    prompts = of_settings(asked)
    if prompts is None:
        raise UserError(
            f"{config.name} takes text, and it was not said what to draw",
            remedy=f"Type for example: {sample_command(run, text=True)}; or add --prompts FILE, a text file with one prompt a "
            "line",
        )
    return prompts


def sample_command(run: Path, *, text: bool) -> str:
    """The line that draws from a run; text: whether its model takes a prompt, which is to be filled in."""
    return f"trainer sample {typed(run)}" + (' --prompt "what to draw"' if text else "")


def open_prompts(source: str, *, seed: int) -> Prompts:
    """The prompts of a text file, of COCO's captions, or of data with captions of its own, in their order.

    A text file (UTF-8) holds a prompt a line; blank lines are passed over. Of an image with several captions one is
    picked by the image's number, all with equal chance and the same for the same seed; images without any are passed
    over.

    Args:
        source: a path, or what `--data` takes.
        seed: of the picks.

    Raises:
        UserError: there is no such thing, it cannot be read, or it holds no prompts.
    """
    path = Path(source)
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise UserError(f"there is nothing at --prompts {source:.80}...", remedy=f"Pass {FORMS}.")
    if path.suffix.lower() == ".json":
        return _from_annotations(path, seed)
    if path.suffix.lower() in _TABLES and path.is_file():
        raise UserError(f"--prompts {path} is a table, whose lines are no prompts", remedy=f"Pass {FORMS}.")
    if path.suffix.lower() == ".txt" or (path.is_file() and not _is_data(path)):
        return _from_text(path)
    return _from_data(source, seed)


def _is_data(path: Path) -> bool:
    from featcache.sources.open import FILES

    return path.suffix.lower() in FILES


def _checked(texts: Sequence[str], *, source: str, where: str, remark: str | None = None) -> Prompts:
    """Raises `UserError` for no texts, too many or too long ones."""
    if not texts:
        raise UserError(f"{where} holds no prompts", remedy=f"Pass {FORMS}.")
    if len(texts) > MAX_PROMPTS:
        raise UserError(f"{where} holds more than {MAX_PROMPTS:,} prompts", remedy="Pass fewer.")
    for number, text in enumerate(texts, start=1):
        if (wrong := _fault(text)) is not None:
            raise UserError(f"{where}: prompt {number} {wrong}", remedy="Pass text, one prompt a line.")
    return Prompts(texts=tuple(texts), source=source, remark=remark)


def _fault(text: str) -> str | None:
    if len(text) > MAX_CHARACTERS:
        return f"has more than {MAX_CHARACTERS:,} characters"
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds bytes that are no text in UTF-8"
    return None


def _from_text(path: Path) -> Prompts:
    try:
        text = read_file(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except (Unreadable, UnicodeDecodeError) as error:
        what = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UserError(f"--prompts {path} cannot be read: {what}", remedy=f"Pass {FORMS}.") from error
    # Not splitlines, which ends a line at a form feed and at separators that a prompt may hold.
    lines = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    return _checked([line for line in lines if line], source=f"text {path.name}", where=f"--prompts {path}")


def _from_annotations(path: Path, seed: int) -> Prompts:
    from featcache.sources.coco import read_annotations

    captions = read_annotations(path, option="--prompts").of_images()
    return _picked(captions, seed=seed, source=f"COCO's captions {path.name}", where=f"--prompts {path}")


def _from_data(data: str, seed: int) -> Prompts:
    from featcache.sources.captions import open_captions
    from featcache.sources.open import open_source

    if not is_remote(data) and ("/" in data or "." in data) and not _is_pattern(data) and not Path(data).exists():
        raise UserError(f"there is nothing at --prompts {data}", remedy=f"Pass {FORMS}.")
    try:
        images = open_source(data, resolution=_ANY_RESOLUTION)
        captions = open_captions(images, table=None, key=None)
    except UserError as error:
        raise UserError(f"--prompts {redact(data)}: {error.what}", remedy=f"Pass {FORMS}.") from error
    return _picked(
        (captions.of(i) for i in range(len(images))),
        seed=seed,
        source=f"captions of {images.description}",
        where=f"--prompts {redact(data)}",
    )


_ANY_RESOLUTION = 32  # no image is loaded


def _is_pattern(text: str) -> bool:
    return any(c in text for c in "{*")


def _picked(captions: Iterable[Sequence[str]], *, seed: int, source: str, where: str) -> Prompts:
    """One caption of each image that has any."""
    chances = np.random.Generator(np.random.Philox(key=[seed, _PICKS]))
    texts, without = [], 0
    for found in captions:
        chance = chances.random()  # drawn for images without captions, too: an image's pick depends on its number alone
        if found:
            texts.append(found[int(chance * len(found))])
        else:
            without += 1
        if len(texts) > MAX_PROMPTS:
            break
    remark = f"{where}: {without:,} images without captions are passed over" if without else None
    return _checked(texts, source=source, where=where, remark=remark)


class PromptEncoder:
    """Prompts => rows of text, by the very encoder that the run's cache was made with.

    Args:
        feature: name of the cache's feature, `text/<encoder>`.
        record: what `cache.json` says of it.
        weights_dir: folder with pretrained weights, searched before the hub.
        device: where it runs, in the precision of the cache.

    Raises:
        UserError: `cache.json` does not say which encoder it was, or the one found has other weights or another
            vocabulary.
        WeightsUnavailable: its weights are not to be had.
    """

    def __init__(
        self, feature: str, record: Mapping[str, Any], *, weights_dir: str | None, device: torch.device | str
    ) -> None:
        self.feature = feature
        self._encoder = _encoder_of(feature, record, weights_dir, str(device))

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """n prompts => float32 [n, T, W] on the encoder's device; computed in one batch."""
        encoder = self._encoder
        rows = encoder(encoder.tokenise([[text] for text in texts]))[self.feature]  # [n, 1, T, W]
        return rows[:, 0]


def _encoder_of(feature: str, record: Mapping[str, Any], weights_dir: str | None, device: str) -> TextEncoder:
    from featcache.encoders.base import Compute, WeightsSource, remedy_for_other_weights
    from featcache.encoders.table import TEXTS
    from featcache.encoders.text import TextEncoder
    from featcache.precision import PRECISIONS

    name, seed, precision = record.get("name"), record.get("seed"), record.get("precision", "fp32")
    if feature != f"text/{name}" or name not in TEXTS or precision not in PRECISIONS:
        raise UserError(
            f"the run's cache.json does not say which text encoder {feature} is from (name {name!r:.80}, precision "
            f"{precision!r:.80})",
            remedy=f"Restore the file. Known are: {', '.join(TEXTS)}.",
        )
    if record.get("weights") == "random" and not (
        isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 63
    ):
        raise UserError(
            f"the run's cache.json says that {feature} is of random weights, and not of which",
            remedy="Restore the file.",
        )
    source = WeightsSource(
        weights_dir=None if weights_dir is None else Path(weights_dir),
        random_seed=seed if record.get("weights") == "random" else None,
    )
    if precision == "tf32" and not device.startswith("cuda"):
        precision = "fp32"  # no such products there; float32 is the nearer to what was stored
    # One batch of any size: what is computed at once is the caller's to say.
    encoder = TextEncoder(
        str(name), source, captions=1, compute=Compute(device=device, precision=precision), batch_size=MAX_PROMPTS
    )
    found = encoder.provenance[feature]
    for key, what in (("sha256", "weights"), ("tokenizer", "vocabulary")):
        if record.get(key) != found[key]:
            raise UserError(
                f"the run was trained on texts encoded with other {what} of {name} ({key} {record.get(key)!s:.12}) than "
                f"those found ({found[key]!s:.12})",
                remedy=remedy_for_other_weights(record.get("weights")),
            )
    return encoder
