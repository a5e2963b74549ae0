"""T5's encoder as a text encoder: its formula, its tokenizer, its files, and what a build makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders.base import WeightsSource
from featcache.encoders.table import TEXTS
from featcache.encoders.text import TextEncoder, build_text
from featcache.errors import UserError, WeightsUnavailable
from featcache.inspect import find_captions
from featcache.progress import Quiet

SMALL = replace(TEXTS["t5-base"], vocabulary=300, tokens=12, width=32, depth=2, heads=2, hidden=48)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network in miniature under its name, and no hub."""
    monkeypatch.setitem(TEXTS, "t5-base", SMALL)
    monkeypatch.setattr("featcache.encoders.hub._hub_problem", lambda: "the model hub does not answer: test")


def test_at_full_size_it_is_the_published_network() -> None:
    with torch.device("meta"):
        model: Any = build_text(TEXTS["t5-base"])
        made = model(input_ids=torch.zeros(2, 77, dtype=torch.int64))
    assert made.last_hidden_state.shape == (2, 77, 768)
    # 32,128 tokens of 768; 12 blocks of 4 d^2, 2 d 3072 and two norms of d; 32 buckets of 12 heads; a norm.
    d = 768
    expected = 32128 * d + 12 * (4 * d * d + 2 * d * 3072 + 2 * d) + 32 * 12 + d
    assert sum(p.numel() for p in model.parameters()) == expected


def bucket(offset: int) -> int:
    """Raffel et al. 2020, Sec. 2.1: 16 buckets a side; eight single distances, then by the logarithm up to 128."""
    side, distance = (16 if offset > 0 else 0), abs(offset)
    if distance < 8:
        return side + distance
    return side + min(15, 8 + int(np.log(distance / 8) / np.log(128 / 8) * 8))


def t5_by_hand(state: dict[str, np.ndarray], ids: list[int], heads: int) -> np.ndarray:
    """Pre-norm blocks with RMS norms, no biases, scores that are not scaled, ReLU; float64. [T, width]."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * state[name]

    T = len(ids)
    x = state["shared.weight"][ids]
    d = x.shape[1] // heads
    table = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = np.array([[table[bucket(k - q)] for k in range(T)] for q in range(T)]).transpose(2, 0, 1)
    for block in range(SMALL.depth):
        at = f"encoder.block.{block}.layer"
        y = norm(x, f"{at}.0.layer_norm.weight")
        q, k, v = (
            (y @ state[f"{at}.0.SelfAttention.{part}.weight"].T).reshape(T, heads, d).transpose(1, 0, 2)
            for part in "qkv"
        )
        scores = q @ k.transpose(0, 2, 1) + bias
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + (weights @ v).transpose(1, 0, 2).reshape(T, -1) @ state[f"{at}.0.SelfAttention.o.weight"].T
        y = norm(x, f"{at}.1.layer_norm.weight") @ state[f"{at}.1.DenseReluDense.wi.weight"].T
        x = x + np.maximum(y, 0) @ state[f"{at}.1.DenseReluDense.wo.weight"].T
    return norm(x, "encoder.final_layer_norm.weight")


def test_features_equal_t5s_formula(small: None) -> None:
    encoder = TextEncoder("t5-base", WeightsSource(random_seed=1), captions=2)
    captions = [("a dog", "Ünd, a text that is longer than it may be"), (), ("",)]
    tokens = encoder.tokenise(captions)
    made = encoder(tokens)
    assert list(made) == ["text/t5-base"] and made["text/t5-base"].shape == (3, 2, 12, 32)
    state = {key: value.double().numpy() for key, value in encoder.module.state_dict().items()}
    for row, place in enumerate(tokens.places.tolist()):
        expected = t5_by_hand(state, tokens.ids[row].tolist(), SMALL.heads)
        found = made["text/t5-base"][place // 2, place % 2].numpy()
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert not made["text/t5-base"][1].any()
    assert np.allclose(encoder.empty()["text/t5-base"], made["text/t5-base"][2, 0].numpy(), atol=1e-6)


def test_no_captions_at_all(small: None) -> None:
    encoder = TextEncoder("t5-base", WeightsSource(random_seed=1), captions=2)
    for n in (0, 3):
        made = encoder(encoder.tokenise([()] * n))
        assert list(made) == ["text/t5-base"]
        assert made["text/t5-base"].shape == (n, 2, 12, 32) and not made["text/t5-base"].any()


def test_tokens_without_a_vocabulary_are_bytes(small: None) -> None:
    encoder = TextEncoder("t5-base", WeightsSource(random_seed=0), captions=1)
    found = encoder.tokenise([("ab a",), ("x" * 50,), ("",), ("</s>",)])
    a = found.ids[0, 0].item()
    assert found.ids[0].tolist() == [a, a + 1, found.ids[0, 2].item(), a, 1] + [0] * 7
    assert found.ids[1].tolist()[-2:] == [found.ids[1, 0].item(), 1] and found.ids[2].tolist() == [1] + [0] * 11
    assert found.lengths.flatten().tolist() == [5, 12, 1, 5] and int(found.ids.max()) < 259
    assert encoder.provenance["text/t5-base"]["tokenizer"] == "bytes"
    assert encoder.provenance["text/t5-base"]["weights"] == "random"


def vocabulary(file: Path, *, highest: int = 290, end: str = "</s>") -> Path:
    """A `tokenizer.json` of T5's kind: pieces of words by their likelihood, and the end mark."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), ("▁a", -1.0), ("▁dog", -1.5)]
    pieces += [(f"piece{i}", -20.0) for i in range(len(pieces), highest + 1)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}" if end else "$A", special_tokens=[("</s>", 1)] if end else []
    )
    tokenizer.save(str(file))
    return file


@pytest.fixture
def whole(small: None, tmp_path: Path) -> Path:
    """T5 with both halves as the hub keeps it, in miniature, under a folder for `--weights-dir`."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    folder = tmp_path / "weights/t5-base"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    vocabulary(folder / "tokenizer.json")
    return folder


def test_weights_and_vocabulary_of_a_whole_t5(whole: Path) -> None:
    from transformers import T5ForConditionalGeneration

    encoder = TextEncoder("t5-base", WeightsSource(weights_dir=whole.parent), captions=1)
    tokens = encoder.tokenise([("a dog",)])
    assert tokens.ids[0].tolist() == [4, 5, 1] + [0] * 9
    theirs: Any = T5ForConditionalGeneration.from_pretrained(whole).eval()
    with torch.no_grad():
        expected = theirs.encoder(input_ids=tokens.ids).last_hidden_state
    assert torch.allclose(encoder(tokens)["text/t5-base"][:, 0], expected, atol=1e-5)
    origin = encoder.provenance["text/t5-base"]
    assert origin["weights"] == "google-t5/t5-base" and len(origin["tokenizer"]) == 64
    assert "end mark" in encoder.provenance["text/t5-base.length"]["what"]


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_what_is_missing_is_named(whole: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(whole / "nowhere"))
    (whole / missing).unlink()
    ask = BuildRequest(data="shapes", vae="tiny", texts=("t5-base",), weights_dir=whole.parent, limit=8)
    with pytest.raises(WeightsUnavailable, match="weights" if missing.startswith("model") else missing) as caught:
        build(ask, Quiet())
    assert "--weights-dir" in str(caught.value) and "--random-weights" in str(caught.value)


def test_damaged_or_foreign_files_are_explained(whole: Path) -> None:
    weights = WeightsSource(weights_dir=whole.parent)
    file = whole / "tokenizer.json"
    for change in ({"highest": 305}, {"end": ""}):
        vocabulary(file, **change)
        with pytest.raises(UserError, match="but t5-base reads fewer than 300") as caught:
            TextEncoder("t5-base", weights, captions=1)
        assert caught.value.remedy == "Bring tokenizer.json of google-t5/t5-base."
    text = vocabulary(file).read_text()
    for broken in (text[:200], "{}", json.dumps({**json.loads(text), "model": {"type": "Unknown"}})):
        file.write_text(broken)
        with pytest.raises(UserError, match="cannot be read"):
            TextEncoder("t5-base", weights, captions=1)
    vocabulary(file)
    (whole / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot read weights"):
        TextEncoder("t5-base", weights, captions=1)


def test_weights_of_another_network_do_not_fit(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXTS, "t5-base", replace(SMALL, hidden=64))
    with pytest.raises(UserError, match="do not fit"):
        TextEncoder("t5-base", WeightsSource(weights_dir=whole.parent), captions=1)


def test_a_cache_of_two_text_encoders(small: None, tmp_path: Path) -> None:
    ask = BuildRequest(
        data="shapes-text",
        vae="tiny",
        texts=("tiny", "t5-base"),
        random_weights=0,
        limit=8,
        out=tmp_path / "c",
        device="cpu",
    )
    build(ask, Quiet())
    cache = featcache.open(tmp_path / "c")
    features = cache.features
    texts = {name: spec.shape for name, spec in features.items() if name.startswith("text/t5")}
    found = find_captions(cache, [0])
    assert found is not None
    (captions,), count = found, len(found[0])
    assert texts == {"text/t5-base": (count, 12, 32), "text/t5-base.length": (count,)} and count > 1
    assert features["text/t5-base"].empty_text().shape == (12, 32)
    sample = cache[0]
    assert all(row.any() for row in sample["text/t5-base"])
    assert sample["text/t5-base.length"].tolist() == [min(12, len(text) + 1) for text in captions], "a token a byte"
