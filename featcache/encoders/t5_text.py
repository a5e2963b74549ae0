"""The encoder half of T5 (Raffel et al. 2020, arXiv:1910.10683): the last hidden state after the final norm.

As Stable Diffusion 3 uses its T5: texts end with the end mark, are cut or padded to 77 tokens and encoded without a padding
mask. There is no pooled vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from featcache.encoders.table import TextEntry

_MARKS = {"<pad>": 0, "</s>": 1, "<unk>": 2}
_SHARED, _EMBEDDING = (
    "shared.weight",
    "encoder.embed_tokens.weight",
)  # one tensor, of which files hold either name or both


class T5Text:
    """See `featcache.encoders.text.TextNetwork`."""

    vocabulary_files = ("tokenizer.json",)
    marks = "end mark included"
    what: Mapping[str, str] = {"": "last hidden state after the final norm"}

    def build(self, entry: TextEntry) -> nn.Module:
        from transformers import T5Config, T5EncoderModel  # late: it takes seconds to load

        config = T5Config(
            vocab_size=entry.vocabulary,
            d_model=entry.width,
            d_kv=entry.width // entry.heads,
            d_ff=entry.hidden,
            num_layers=entry.depth,
            num_heads=entry.heads,
            feed_forward_proj=entry.activation,
        )
        return T5EncoderModel(config)

    def keeps(self, key: str) -> bool:
        return key == _SHARED or key.startswith("encoder.")

    def completed(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        tied = state.get(_SHARED, state.get(_EMBEDDING))
        return state if tied is None else {_SHARED: tied, _EMBEDDING: tied, **state}

    def tokenizer(self, folder: Path) -> Tokenizer:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))

    def without_files(self, entry: TextEntry) -> str:
        return "bytes"

    def byte_tokenizer(self, entry: TextEntry) -> Tokenizer:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = _MARKS | {letter: len(_MARKS) + i for i, letter in enumerate(letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", _MARKS["</s>"])]
        )
        return tokenizer

    def problem(self, tokenizer: Tokenizer, entry: TextEntry) -> tuple[str, str] | None:
        highest = max(tokenizer.get_vocab().values(), default=0)
        marks = {mark: tokenizer.token_to_id(mark) for mark in _MARKS}
        ends = tokenizer.encode("").ids[:1]
        if highest < entry.vocabulary and marks == _MARKS and ends == [_MARKS["</s>"]]:
            return None
        return f"has tokens up to {highest}, the marks {marks} and reads '' as {ends}", f"fewer than {entry.vocabulary}"

    def padding(self, entry: TextEntry) -> tuple[int, str]:
        return _MARKS["<pad>"], "<pad>"

    def read(self, module: nn.Module, ids: Tensor) -> tuple[Tensor, ...]:
        return (module(input_ids=ids).last_hidden_state.float(),)
