"""CLIP's text transformer as Stable Diffusion uses it: texts are cut or padded to 77 tokens, padding is the end token, the
attention is causal and knows no padding mask, and what is kept is the last hidden state after the final norm. The pooled
vector is CLIP's own text embedding: the hidden state at the first end token, projected, not normalised.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor, nn

from featcache.encoders.table import TextEntry

if TYPE_CHECKING:
    from transformers import CLIPTextConfig

VOCABULARY_FILES = ("vocab.json", "merges.txt")
_START, _END = "<|startoftext|>", "<|endoftext|>"


def text_config(entry: TextEntry) -> CLIPTextConfig:
    """The architecture of `entry` as transformers describes it."""
    # Late here and below: transformers takes seconds to load.
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


def merges(words: str) -> list[tuple[str, str]]:
    """Those that make whole tokens of the words of a text, letter by letter from the left, the earlier words before the later."""
    found: dict[tuple[str, str], None] = {}
    for word in words.split():
        left = ""
        for part in (*word[:-1], f"{word[-1]}</w>"):
            if left:
                found[left, part] = None
            left += part
    return list(found)


def byte_vocabulary(entry: TextEntry) -> dict[str, int]:
    """CLIP's vocabulary without its merges: 256 bytes, 256 bytes that end a word, what `entry.words` are made of, and the two
    marks.

    The numbers are those of CLIP's own vocabulary, which begins with the bytes in this order.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges(entry.words))]
    return {token: i for i, token in enumerate(tokens)} | {_START: entry.vocabulary - 2, _END: entry.vocabulary - 1}


class ClipText:
    """See `featcache.encoders.text.TextNetwork`."""

    vocabulary_files = VOCABULARY_FILES
    marks = "both marks included"
    what: Mapping[str, str] = {
        "": "last hidden state after the final norm",
        ".pooled": "projected hidden state at the end token",
    }

    def build(self, entry: TextEntry) -> nn.Module:
        from transformers import CLIPTextModelWithProjection

        return CLIPTextModelWithProjection(text_config(entry))

    def keeps(self, key: str) -> bool:
        return key.startswith(("text_model.", "text_projection.")) and not key.endswith("position_ids")

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def tokenizer(self, folder: Path) -> Tokenizer:
        import transformers

        # Before version 5 the plain name was a tokenizer in Python.
        kind = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
        tokenizer: Tokenizer = kind.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
        return tokenizer

    def without_files(self, entry: TextEntry) -> str:
        return f"bytes, and {len(entry.words.split())} words" if entry.words else "bytes, without merges"

    def byte_tokenizer(self, entry: TextEntry) -> Tokenizer:
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            (folder / "vocab.json").write_text(json.dumps(byte_vocabulary(entry)), "utf-8")
            lines = ["#version: 0.2", *map(" ".join, merges(entry.words))]
            (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
            return self.tokenizer(folder)

    def problem(self, tokenizer: Tokenizer, entry: TextEntry) -> tuple[str, str] | None:
        ends, count = [tokenizer.token_to_id(mark) for mark in (_START, _END)], tokenizer.get_vocab_size()
        if count == entry.vocabulary and ends == [entry.vocabulary - 2, entry.vocabulary - 1]:
            return None
        return f"has {count} tokens and the marks {ends}", f"{entry.vocabulary}, the last two of them marks"

    def padding(self, entry: TextEntry) -> tuple[int, str]:
        return entry.vocabulary - 1, _END

    def read(self, module: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
        made = module(input_ids=ids)
        return made.last_hidden_state.float(), made.text_embeds.float()
