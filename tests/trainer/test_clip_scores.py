"""CLIP score and PickScore: preprocessing, networks and scores against transformers and against formulas in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache.encoders.base import WeightsSource
from featcache.encoders.clip_text import byte_vocabulary
from featcache.errors import UserError, WeightsUnavailable
from trainer.evaluate.clip_scores import CLIPS, MEAN, STD, ClipScorer, VisionEntry, build_clip, prepare_image

PROMPTS = ["a cat", "two red dogs, running", "", "a very long text " * 9]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("featcache.encoders.hub._hub_problem", lambda: "the model hub does not answer: test")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "nowhere"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both networks in miniature; what is published of them is their activation, their scale and their places."""
    for metric, entry in CLIPS.items():
        text = replace(entry.text, vocabulary=520, tokens=16, width=32, depth=2, heads=2, hidden=48, projected=24)
        vision = VisionEntry(width=40, depth=2, heads=2, hidden=56, patch=8, side=32)
        monkeypatch.setitem(CLIPS, metric, replace(entry, text=text, vision=vision))
    yield


def write_vocabulary(folder: Path, metric: str) -> None:
    entry = CLIPS[metric].text
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h"), ("th", "e</w>")]
    vocabulary = {k: v for k, v in byte_vocabulary(entry).items() if not k.startswith("<|")}
    vocabulary |= {a + b: 512 + i for i, (a, b) in enumerate(merges)}
    vocabulary |= {"<|startoftext|>": 518, "<|endoftext|>": 519}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")


def bring(weights: Path, metric: str, *, seed: int = 0) -> Any:
    """The miniature as the hub's repositories hold it, with biases and norms that are not the trivial ones."""
    torch.manual_seed(seed)
    theirs: Any = build_clip(CLIPS[metric]).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    theirs.save_pretrained(weights / str(CLIPS[metric].text.hub_id).split("/")[1])
    write_vocabulary(weights / CLIPS[metric].vocabulary.split("/")[1], metric)
    return theirs


def pictures(n: int, height: int = 48, width: int = 48, seed: int = 0) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


@given(st.integers(20, 300), st.integers(20, 300), st.sampled_from([32, 224]))
def test_images_are_prepared_as_transformers_does(height: int, width: int, side: int) -> None:
    from transformers.models.clip import CLIPImageProcessorPil

    image = pictures(1, height, width)[0]
    theirs = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]  # [3, side, side]
    mine = prepare_image(image, side).transpose(2, 0, 1) / 255
    found = (mine - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    np.testing.assert_allclose(found, expected, atol=2e-6)


# ---- the networks, once more, in float64 ------------------------------------------------------------------------------


def norm(x: np.ndarray, p: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def gelu(x: np.ndarray, kind: str) -> np.ndarray:
    if kind == "quick_gelu":
        return x / (1 + np.exp(-1.702 * x))
    return x * np.vectorize(lambda v: 0.5 * (1 + torch.special.erf(torch.tensor(v / np.sqrt(2))).item()))(x)


def blocks(x: np.ndarray, p: dict[str, np.ndarray], at: str, heads: int, kind: str, *, causal: bool) -> np.ndarray:
    T, D = x.shape
    for block in range(2):
        name = f"{at}.encoder.layers.{block}"

        def line(h: np.ndarray, part: str, name: str = name) -> np.ndarray:
            return h @ p[f"{name}.{part}.weight"].T + p[f"{name}.{part}.bias"]

        h = norm(x, p, f"{name}.layer_norm1")
        q, k, v = (line(h, f"self_attn.{c}_proj").reshape(T, heads, D // heads) for c in "qkv")
        logits = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(D // heads)
        if causal:
            logits = np.where(np.tril(np.ones((T, T))) > 0, logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + line(np.einsum("hij,jhd->ihd", weights, v).reshape(T, D), "self_attn.out_proj")
        h = norm(x, p, f"{name}.layer_norm2")
        x = x + line(gelu(line(h, "mlp.fc1"), kind), "mlp.fc2")
    return x


def text_vector(ids: list[int], p: dict[str, np.ndarray], kind: str) -> np.ndarray:
    x = p["text_model.embeddings.token_embedding.weight"][ids]
    x = x + p["text_model.embeddings.position_embedding.weight"][: len(ids)]
    x = norm(blocks(x, p, "text_model", 2, kind, causal=True), p, "text_model.final_layer_norm")
    return np.asarray(x[ids.index(519)] @ p["text_projection.weight"].T)


def image_vector(pixels: np.ndarray, p: dict[str, np.ndarray], kind: str) -> np.ndarray:
    """pixels: float64 [32, 32, 3], normalised. Patches of 8, row by row."""
    kernel = p["vision_model.embeddings.patch_embedding.weight"]  # [D, 3, 8, 8]
    patches = [
        np.einsum("dcij,ijc->d", kernel, pixels[y : y + 8, x : x + 8]) for y in range(0, 32, 8) for x in range(0, 32, 8)
    ]
    x = np.stack([p["vision_model.embeddings.class_embedding"], *patches])
    x = norm(x + p["vision_model.embeddings.position_embedding.weight"], p, "vision_model.pre_layrnorm")
    x = blocks(x, p, "vision_model", 2, kind, causal=False)
    return np.asarray(norm(x[0], p, "vision_model.post_layernorm") @ p["visual_projection.weight"].T)


@pytest.mark.parametrize(("metric", "kind"), [("clip_score", "quick_gelu"), ("pick_score", "gelu")])
def test_scores_are_the_formulas(small: None, tmp_path: Path, metric: str, kind: str) -> None:
    theirs = bring(tmp_path, metric)
    scorer = ClipScorer(metric, source=WeightsSource(weights_dir=tmp_path))
    p = {name: value.double().numpy() for name, value in theirs.state_dict().items()}
    images = pictures(4)
    ids = [e.ids for e in scorer._tokenizer.encode_batch(PROMPTS)]
    assert ids[0][:4] == [518, 256 + 64, 513, 519], "the start, a, cat, the end"
    assert len(ids[3]) == 16 and ids[3][-1] == 519, "cut to what the network reads"
    expected = []
    for image, tokens in zip(images, ids):
        pixels = (prepare_image(image, 32) / 255 - np.array(MEAN)) / np.array(STD)
        a, b = image_vector(pixels, p, kind), text_vector(tokens, p, kind)
        expected.append(a @ b / np.sqrt((a @ a) * (b @ b)))
    scaled = np.exp(float(p["logit_scale"])) if metric == "pick_score" else 1.0
    found = scorer(images, PROMPTS)
    assert list(found) == [metric]
    assert found[metric].dtype == np.float64 and np.ptp(expected) > 0.01
    np.testing.assert_allclose(found[metric], scaled * np.array(expected), rtol=2e-4, atol=2e-6 * scaled)


def test_a_score_is_of_the_image_and_its_own_prompt(small: None, tmp_path: Path) -> None:
    bring(tmp_path, "clip_score")
    scorer = ClipScorer("clip_score", source=WeightsSource(weights_dir=tmp_path))
    images = pictures(4)
    together = scorer(images, PROMPTS)["clip_score"]
    alone = [scorer(images[i : i + 1], [PROMPTS[i]])["clip_score"][0] for i in range(4)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    other = scorer(images, PROMPTS[::-1])["clip_score"]
    assert np.abs(together - other).max() > 1e-3


def test_what_a_score_is_of_is_recorded(small: None, tmp_path: Path) -> None:
    bring(tmp_path, "pick_score")
    scorer = ClipScorer("pick_score", source=WeightsSource(weights_dir=tmp_path))
    record = scorer.provenance
    assert record["model"] == record["weights"] == "yuvalkirstain/PickScore_v1"
    assert len(record["sha256"]) == len(record["tokenizer"]) == 64
    assert json.loads(json.dumps(record)) == record
    random = ClipScorer("pick_score", source=WeightsSource(random_seed=3))
    assert random.names == ("random-pick_score",)
    assert (random.provenance["weights"], random.provenance["seed"]) == ("random", 3)


@pytest.mark.parametrize("metric", CLIPS)
def test_missing_weights_say_what_to_bring(small: None, tmp_path: Path, metric: str) -> None:
    with pytest.raises(WeightsUnavailable, match=metric) as caught:
        ClipScorer(metric, source=WeightsSource(weights_dir=tmp_path))
    for hub_id in (str(CLIPS[metric].text.hub_id), CLIPS[metric].vocabulary):
        assert hub_id in str(caught.value)
    assert "--weights-dir" in str(caught.value)
    bring(tmp_path, metric)
    (tmp_path / CLIPS[metric].vocabulary.split("/")[1] / "merges.txt").unlink()
    with pytest.raises(WeightsUnavailable, match=r"merges\.txt"):
        ClipScorer(metric, source=WeightsSource(weights_dir=tmp_path))


def test_foreign_and_hostile_files_are_refused(small: None, tmp_path: Path) -> None:
    theirs = bring(tmp_path, "clip_score")
    folder = tmp_path / "clip-vit-large-patch14"
    source = WeightsSource(weights_dir=tmp_path)
    (folder / "model.safetensors").unlink()
    # The text half alone, which is what --text needs.
    text = {k: v for k, v in theirs.state_dict().items() if k.startswith("text_")}
    torch.save(text, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="do not fit") as caught:
        ClipScorer("clip_score", source=source)
    assert "both halves" in str(caught.value)
    torch.save({"x": Path("/")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot read weights"):
        ClipScorer("clip_score", source=source)
    # A whole one, pickled as the hub's older files are, with the positions that they hold.
    old = dict(theirs.state_dict()) | {"text_model.embeddings.position_ids": torch.arange(16)[None]}
    torch.save(old, folder / "pytorch_model.bin")
    assert ClipScorer("clip_score", source=source)(pictures(1), ["a"])["clip_score"].shape == (1,)


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "parameters"), [("clip_score", 427_616_513), ("pick_score", 986_109_441)])
def test_at_full_size_with_random_weights(metric: str, parameters: int) -> None:
    scorer = ClipScorer(metric, source=WeightsSource(random_seed=0))
    assert sum(p.numel() for p in scorer._module.parameters()) == parameters
    found = scorer(pictures(2, 256, 256), ["a red square", ""])
    scores = found[f"random-{metric}"]
    assert scores.shape == (2,) and np.isfinite(scores).all()
    assert np.abs(scores).max() <= (100.0 if metric == "pick_score" else 1.0)
