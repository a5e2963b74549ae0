"""Text features: the tokenizer and the transformer against formulas, captions from every place, builds end to end."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders.base import Compute, WeightsSource, upload
from featcache.encoders.clip_text import ClipText, byte_vocabulary
from featcache.encoders.table import TEXTS
from featcache.encoders.text import TextEncoder, build_text
from featcache.errors import CacheError, UserError
from featcache.inspect import read_feature
from featcache.progress import Quiet
from featcache.sources import shapes
from featcache.sources.captions import open_captions, read_table
from featcache.sources.open import open_source
from featcache.sources.shapes_text import WORDINGS, Part, caption, combinations
from tests.told import Told

TINY = TEXTS["tiny"]


@pytest.fixture(autouse=True)
def own_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATCACHE_INDEX", str(tmp_path / "index"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.encoders.hub._hub_problem", lambda: "the model hub does not answer: test")


@pytest.fixture(scope="module")
def tiny() -> TextEncoder:
    return TextEncoder("tiny", WeightsSource(), captions=3, batch_size=2)


def read(encoder: TextEncoder, *captions: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in encoder(encoder.tokenise(captions)).items()}


def test_clip_l_at_full_size_is_the_published_network() -> None:
    with torch.device("meta"):
        model: Any = build_text(TEXTS["clip-l"])
        made = model(input_ids=torch.zeros(2, 77, dtype=torch.int64))
    assert made.last_hidden_state.shape == (2, 77, 768)
    assert made.text_embeds.shape == (2, 768)
    # 49,408 tokens and 77 positions of 768; 12 blocks of 12 d^2 + 13 d; a norm; a projection.
    d = 768
    expected = (49408 + 77) * d + 12 * (12 * d * d + 13 * d) + 2 * d + d * d
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.config.hidden_act == "quick_gelu"


def test_bytes_are_numbered_as_in_clips_vocabulary() -> None:
    vocabulary = byte_vocabulary(TEXTS["clip-l"])
    # Numbers of the published vocabulary: its first letters, and "a" as a word, which is token 320.
    assert [vocabulary[c] for c in "!a~"] == [0, 64, 93]
    assert vocabulary["a</w>"] == 320
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)
    assert len(byte_vocabulary(TINY)) == TINY.vocabulary == len(set(byte_vocabulary(TINY).values()))


def test_embedded_captions_are_read_whole_a_token_a_word() -> None:
    """By the embedded encoder: what it cuts off, no model can obey."""
    tokenizer = ClipText().byte_tokenizer(TINY)
    texts = {*shapes.CLASS_NAMES}
    texts |= {
        caption(attributes, wording) for part in Part for attributes in combinations(part) for wording in WORDINGS
    }
    assert len(texts) > 5000
    for text in texts:
        found = [token.removesuffix("</w>") for token in tokenizer.encode(text, add_special_tokens=False).tokens]
        assert found == re.findall(r"[a-z]+|,", text) and len(found) + 2 <= TINY.tokens


def test_tokens_are_lower_case_bytes_between_marks(tiny: TextEncoder) -> None:
    start, end = TINY.vocabulary - 2, TINY.vocabulary - 1
    got = tiny.tokenise([("A Cat", "x" * 100), (), ("",)])
    a_cat = [start, 64 + 256, 66, 64, 83 + 256, end]
    assert got.ids[0].tolist() == a_cat + [end] * 10
    assert got.ids[1].tolist() == [start] + [87] * 14 + [end]
    assert got.ids[2].tolist() == [start] + [end] * 15
    assert got.places.tolist() == [0, 1, 6]
    assert got.lengths.tolist() == [[6, 16, 0], [0, 0, 0], [2, 0, 0]]


def clip_by_hand(state: dict[str, np.ndarray], ids: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Radford et al. 2021: pre-norm blocks, causal attention, x * sigmoid(1.702 x); float64. ids [T]."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    T = len(ids)
    x = state["text_model.embeddings.token_embedding.weight"][ids]
    x = x + state["text_model.embeddings.position_embedding.weight"][:T]
    d = x.shape[1] // heads
    hidden = np.triu(np.full((T, T), -np.inf), 1)
    for block in range(TINY.depth):
        at = f"text_model.encoder.layers.{block}"
        y = norm(x, f"{at}.layer_norm1")
        q, k, v = (
            linear(y, f"{at}.self_attn.{part}_proj").reshape(T, heads, d).transpose(1, 0, 2) for part in ("q", "k", "v")
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(d) + hidden
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + linear((weights @ v).transpose(1, 0, 2).reshape(T, -1), f"{at}.self_attn.out_proj")
        y = linear(norm(x, f"{at}.layer_norm2"), f"{at}.mlp.fc1")
        x = x + linear(y / (1 + np.exp(-1.702 * y)), f"{at}.mlp.fc2")
    x = norm(x, "text_model.final_layer_norm")
    return x, x[list(ids).index(TINY.vocabulary - 1)] @ state["text_projection.weight"].T


def test_no_captions_at_all(tiny: TextEncoder) -> None:
    """Of no image, and of images that have none: of the shapes they would have, and zero."""
    compiled = TextEncoder("tiny", WeightsSource(), captions=3, batch_size=2)
    compiled.compute = replace(compiled.compute, compile=True)  # the same function, filled up as for a compiled one
    for encoder in (tiny, compiled):
        for n in (0, 2):
            tokens = encoder.tokenise([()] * n)
            assert tokens.ids.shape == (0, TINY.tokens) and tokens.lengths.shape == (n, 3)
            made = encoder(tokens)
            assert {name: tuple(value.shape) for name, value in made.items()} == {
                "text/tiny": (n, 3, TINY.tokens, TINY.width),
                "text/tiny.pooled": (n, 3, TINY.projected),
            }
            assert not any(value.any() for value in (*made.values(), tokens.lengths))


def test_features_equal_clips_formula(tiny: TextEncoder) -> None:
    state = {key: value.double().numpy() for key, value in tiny.module.state_dict().items()}
    features = read(tiny, ("a dog on a hill", "RED"), (), ("one, two", "three", "four"))
    ids = tiny.tokenise([("a dog on a hill", "RED"), (), ("one, two", "three", "four")])
    assert features["text/tiny"].shape == (3, 3, 16, 64)
    assert features["text/tiny.pooled"].shape == (3, 3, 32)
    for row, place in enumerate(ids.places.tolist()):
        hidden, pooled = clip_by_hand(state, ids.ids[row].numpy(), TINY.heads)
        i, j = divmod(place, 3)
        assert np.abs(features["text/tiny"][i, j] - hidden).max() < 1e-4
        assert np.abs(features["text/tiny.pooled"][i, j] - pooled).max() < 1e-4
    for i, j in ((0, 2), (1, 0), (1, 1), (1, 2)):
        assert not features["text/tiny"][i, j].any()
        assert not features["text/tiny.pooled"][i, j].any()


@pytest.fixture
def small_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A CLIP of both halves as the hub keeps it, in miniature, brought under ``--weights-dir``."""
    from transformers import CLIPConfig, CLIPModel

    entry = replace(TINY, words="", hub_id="openai/clip-vit-large-patch14", vocabulary=520, tokens=16)
    monkeypatch.setitem(TEXTS, "clip-l", entry)
    torch.manual_seed(0)
    text = build_text(entry).config.to_dict()  # type: ignore[union-attr, operator]
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16, "projection_dim": entry.projected or 0}
    theirs = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=entry.projected)).eval()
    folder = tmp_path / "weights/clip-vit-large-patch14"
    theirs.save_pretrained(folder)
    # Six merges on top of the bytes: "ca", "cat</w>", and so on.
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("t", "h"), ("th", "e</w>")]
    vocabulary = {k: v for k, v in byte_vocabulary(entry).items() if not k.startswith("<|")}
    vocabulary |= {a + b: 512 + i for i, (a, b) in enumerate(merges)}
    vocabulary |= {"<|startoftext|>": 518, "<|endoftext|>": 519}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    return theirs, folder


def test_weights_and_vocabulary_of_a_whole_clip(small_clip: Any, offline: None) -> None:
    theirs, folder = small_clip
    encoder = TextEncoder("clip-l", WeightsSource(weights_dir=folder.parent), captions=1)
    ids = encoder.tokenise([("The cat",), ("dog.",)]).ids
    assert ids[0].tolist()[:4] == [518, 517, 513, 519]
    assert ids[1].tolist()[:4] == [518, 515, 13 + 256, 519]
    features = read(encoder, ("The cat",), ("dog.",))
    with torch.no_grad():
        expected = theirs.text_projection(theirs.text_model(input_ids=ids).pooler_output)
    assert np.allclose(features["text/clip-l.pooled"][:, 0], expected.numpy(), atol=1e-5)
    origin = encoder.provenance["text/clip-l"]
    assert origin["weights"] == "openai/clip-vit-large-patch14"
    assert len(origin["tokenizer"]) == 64


@pytest.mark.parametrize("missing", ["model.safetensors", "vocab.json", "merges.txt"])
def test_offline_errors_name_what_is_missing(
    small_clip: Any, offline: None, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = small_clip
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "nowhere"))
    (folder / missing).unlink()
    with pytest.raises(UserError, match="weights" if missing.startswith("model") else missing) as caught:
        TextEncoder("clip-l", WeightsSource(weights_dir=folder.parent), captions=1)
    assert "--weights-dir" in str(caught.value)
    random = TextEncoder("clip-l", WeightsSource(random_seed=3), captions=1)
    assert random.provenance["text/clip-l"]["weights"] == "random"
    assert random.provenance["text/clip-l"]["tokenizer"] == "bytes, without merges"


def test_damaged_or_foreign_files_are_explained(small_clip: Any, offline: None) -> None:
    _, folder = small_clip
    weights = WeightsSource(weights_dir=folder.parent)
    whole = (folder / "vocab.json").read_text()
    (folder / "vocab.json").write_text(json.dumps({**json.loads(whole), "more": 520}))
    with pytest.raises(UserError, match="521 tokens"):
        TextEncoder("clip-l", weights, captions=1)
    (folder / "vocab.json").write_text(whole[:100])
    with pytest.raises(UserError, match="cannot be read"):
        TextEncoder("clip-l", weights, captions=1)
    (folder / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot read weights"):
        TextEncoder("clip-l", weights, captions=1)
    with pytest.raises(UserError, match="clip-l"):
        TextEncoder("clip-h", weights, captions=1)


def test_a_compiled_network_sees_one_batch_size(tiny: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def recorded(function: Any, **_: Any) -> Any:
        def call(ids: Any) -> Any:
            sizes.append(len(ids))
            return function(ids)

        return call

    monkeypatch.setattr("torch.compile", recorded)
    encoder = TextEncoder("tiny", WeightsSource(), captions=3, batch_size=2, compute=Compute(compile=True))
    captions = (("a", "b", "c"), (), ("d", "e"))
    for name, expected in read(tiny, *captions).items():
        assert np.allclose(read(encoder, *captions)[name], expected, atol=1e-5)
    assert sizes == [2] * 6
    assert not read(encoder, (), ())["text/tiny"].any()
    assert sizes == [2] * 6, "nothing to encode, nothing run"


def test_copies_to_a_gpu_are_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append("pin")
        return tensor

    def copy(tensor: torch.Tensor, *to: Any, **how: Any) -> torch.Tensor:
        calls.append((*to, how))
        return tensor

    monkeypatch.setattr("torch.Tensor.pin_memory", pin)
    monkeypatch.setattr("torch.Tensor.to", copy)
    for device in ("cuda:1", "cpu"):
        upload(torch.zeros(2), device)
    assert calls == ["pin", ("cuda:1", {"non_blocking": True}), ("cpu", {})]


def test_token_ids_are_copied_once_a_call(tiny: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def send(x: torch.Tensor, device: str) -> torch.Tensor:
        sent.append(len(x))
        return x.to(device)

    monkeypatch.setattr("featcache.encoders.text.upload", send)
    read(tiny, ("a", "b", "c"), (), ("d", "e"))
    assert sent == [5, 5], "ids and places, however many batches"


def image_bytes(seed: int) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(6):
        place = tmp_path / "images" / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(image_bytes(i))
    return tmp_path / "images"


def captions_of(data: Path | str, **how: Any) -> dict[str, tuple[str, ...]]:
    source = open_source(str(data), resolution=32)
    captions = open_captions(source, table=how.get("table"), key=how.get("key"))
    found = {source.key(i): captions.of(i) for i in range(len(source))}
    assert captions.most(range(len(source))) == max(map(len, found.values()))
    return found


def test_a_table_of_captions_in_columns_and_rows(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    rows = 'caption_1,path,caption_2\nfirst,a/0.png,"second, with a comma"\nother,b/1,\nétoile,a/0.png,\n,a/2.png,\n'
    table.write_text(rows + "stray,c/9.png,x\n", "utf-8")
    assert captions_of(folder, table=table) == {
        "a/0.png": ("first", "second, with a comma", "étoile"),
        "b/1.png": ("other",),
        "a/2.png": (),
        "b/3.png": (),
        "a/4.png": (),
        "b/5.png": (),
    }
    for text, message in (
        ("caption,score\nx,y\n", "column named key"),
        ("key\na/0.png\n", "column named key"),
        ("key,caption\nnothing.png,x\n", "names none"),
    ):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            captions_of(folder, table=table)
    table.write_bytes(b"key,caption\na/0.png,\xff\xfe\n")
    with pytest.raises(UserError, match="UTF-8"):
        captions_of(folder, table=table)
    with pytest.raises(UserError, match="No such file"):
        captions_of(folder, table=tmp_path / "absent.csv")
    with pytest.raises(UserError, match=r"--captions FILE\.csv"):
        captions_of(folder)


def test_rows_of_a_table_name_one_image_each_or_are_told_of(tmp_path: Path) -> None:
    keys = ("a.b/0.png", "a.b/0.jpg", "a.b/1.png", "a.b/2", "plain/000001")

    class Keyed:
        description = "five images"

        def __len__(self) -> int:
            return len(keys)

        def key(self, index: int) -> str:
            return keys[index]

    def table(text: str) -> Any:
        (tmp_path / "t.csv").write_text("key,caption\n" + text)
        return read_table(tmp_path / "t.csv", Keyed())  # type: ignore[arg-type]

    got = table(" a.b/1 ,x\na.b/0.jpg , y\n,nobody\n\na,nobody\nplain/000001,z\n")
    assert [got.of(i) for i in range(5)] == [(), ("y",), ("x",), (), ("z",)]
    assert got.remark == f"2 of 5 rows of {tmp_path / 't.csv'} name no image of five images, such as ''"
    assert table("a.b/2,x\n").remark is None
    with pytest.raises(UserError, match=r"'a.b/0' may be 'a.b/0.png' or 'a.b/0.jpg'"):
        table("a.b/1,x\na.b/0,y\n")
    with pytest.raises(UserError, match="names none"):
        table(",x\na,y\n")
    bare = table("a.b/2, \n")
    assert bare.most(range(5)) == 0, "an image without captions, not a row without an image"
    assert bare.of(3) == ()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_captions_beside_the_images_of_webdataset_shards(tmp_path: Path) -> None:
    many = json.dumps({"label": 1, "caption": ["x", " y "], "alt": "z"}).encode()
    path = shard(
        tmp_path / "a.tar",
        {
            "0.png": image_bytes(0),
            "0.cls": b"0",
            "0.txt": b"one\n\n two \n",
            "0.json": many,
            "1.txt": b"before its image",
            "1.png": image_bytes(1),
            "1.cls": b"1",
            "2.png": image_bytes(2),
            "2.json": many,
            "3.png": image_bytes(3),
            "3.cls": b"1",
        },
    )
    assert captions_of(path) == {
        "0.png": ("one", "two"),
        "1.png": ("before its image",),
        "2.png": ("x", "y"),
        "3.png": (),
    }
    assert captions_of(path, key="alt") == {"0.png": ("z",), "1.png": (), "2.png": ("z",), "3.png": ()}
    assert [open_source(str(path), resolution=32).label(i) for i in range(4)] == [0, 1, 1, 1]
    with pytest.raises(UserError, match="'label'"):
        captions_of(path, key="label")
    for value, name in ((7, "text"), ([7], "caption")):
        odd = {"0.png": image_bytes(0), "0.json": json.dumps({"label": 0, name: value}).encode()}
        with pytest.raises(UserError, match=f"under '{name}'"):
            captions_of(shard(tmp_path / f"odd-{name}.tar", odd))
    bare = shard(tmp_path / "bare.tar", {"0.png": image_bytes(0), "0.cls": b"0"})
    with pytest.raises(UserError, match=r"no \.txt or \.json"):
        captions_of(bare)


def test_captions_are_counted_in_few_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task an image would hold a future an image: gigabytes for millions."""
    members: dict[str, bytes] = {}
    for i in range(7):
        members |= {f"{i}.png": image_bytes(i), f"{i}.txt": b"a text\n" * (i + 1)}
    source = open_source(str(shard(tmp_path / "a.tar", members)), resolution=32)
    tasks = []
    submit = ThreadPoolExecutor.submit

    def counted(*args: Any) -> Any:
        tasks.append(args)
        return submit(*args)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counted)
    monkeypatch.setattr("featcache.sources.captions.COUNT_AT_ONCE", 3)
    captions = open_captions(source, table=None, key=None)
    assert captions.most(np.arange(7)) == 7
    assert len(tasks) == 3
    assert captions.most([]) == 0


def test_captions_under_another_key_are_other_captions(tmp_path: Path) -> None:
    both = json.dumps({"label": 0, "short": "x", "long": "longer"}).encode()
    path = shard(tmp_path / "a.tar", {"0.png": image_bytes(0), "0.json": both, "1.png": image_bytes(1), "1.json": both})
    ask = request(tmp_path / "c", data=str(path), limit=None, caption_key="short")
    build(ask, Quiet())
    entry = replace(TINY, width=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TEXTS, "second", entry)
        more = replace(ask, out=None, into=tmp_path / "c", vae=None, texts=("second",))
        with pytest.raises(CacheError, match=r"under 'short', 1 per image, against .* under 'long'"):
            build(replace(more, caption_key="long"), Quiet())
        build(more, Quiet())
    assert "text/second" in featcache.open(tmp_path / "c").manifest.features


def test_shards_of_captioned_images_need_no_labels(tmp_path: Path) -> None:
    members = {f"{i}.{kind}": data for i in range(3) for kind, data in (("png", image_bytes(i)), ("txt", b"a text"))}
    source = open_source(str(shard(tmp_path / "a.tar", members)), resolution=32)
    assert [source.label(i) for i in range(3)] == [0, 0, 0]
    members["9.png"] = image_bytes(9)
    with pytest.raises(UserError, match="sample '9'"):
        open_source(str(shard(tmp_path / "b.tar", members)), resolution=32)


def request(out: Path | None, **changes: Any) -> BuildRequest:
    base = BuildRequest(
        data="shapes",
        vae="tiny",
        texts=("tiny",),
        resolution=32,
        limit=10,
        batch_size=4,
        shard_size=5,
        out=out,
        workers=2,
    )
    return replace(base, **changes)


def test_a_build_with_text_is_what_the_encoder_gives(tmp_path: Path, tiny: TextEncoder) -> None:
    build(request(tmp_path / "c", flip=True), Quiet())
    cache = featcache.open(tmp_path / "c")
    names = cache.manifest.dataset.class_names
    expected = read(
        TextEncoder("tiny", WeightsSource(), captions=2),
        *((f"a {names[label]}", f"a picture of a {names[label]}") for label in cache.labels()),
    )
    for name in ("text/tiny", "text/tiny.pooled"):
        got = read_feature(cache, name, range(10))
        assert got.shape == expected[name].shape
        assert np.abs(got - expected[name]).max() <= np.abs(expected[name]).max() * 2**-11 + 1e-6  # fp16
        assert cache.manifest.features[name].views == 1
    with cache.reader(["text/count", "text/tiny.length"]) as reader:
        out = reader.allocate(10)
        reader.read(range(10), out)
    assert out["text/count"].tolist() == [2] * 10
    assert out["text/tiny.length"].tolist() == [[4, 7]] * 10, "marks and words: a circle, a picture of a circle"


def test_text_joins_a_cache_without_reading_an_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("key,caption,another\na/0.png,x,y\nb/1.png,z,\nb/1.png,w,v\nb/7.png,stray,\n")
    ask = request(tmp_path / "c", data=str(folder), limit=None)
    build(replace(ask, texts=()), Quiet())
    with monkeypatch.context() as patch:
        patch.setattr("featcache.sources.folder.FolderSource.read", lambda *_: pytest.fail("an image was read"))
        adding = replace(ask, out=None, into=tmp_path / "c", vae=None, captions=table, text_codec="int8")
        progress = Told()
        build(adding, progress)
    assert any("4 of 6 images have no caption" in text for text in progress.notes)
    assert any("1 of 4 rows" in text and "'b/7.png'" in text for text in progress.notes)
    cache = featcache.open(tmp_path / "c")
    with cache.reader(["text/count", "text/tiny.length"]) as reader:
        out = reader.allocate(6)
        reader.read(range(6), out)
    counts = dict(zip(cache.keys(), out["text/count"].tolist()))
    assert counts == {"a/0.png": 2, "b/1.png": 3, "a/2.png": 0, "b/3.png": 0, "a/4.png": 0, "b/5.png": 0}
    assert cache.manifest.features["text/tiny"].shape == (3, 16, 64)
    assert cache.manifest.features["text/tiny"].codec == "int8"
    assert not read_feature(cache, "text/tiny", [cache.keys().index("a/2.png")]).any()
    # Other captions, or another number of them, are of no use beside these.
    monkeypatch.setitem(TEXTS, "second", replace(TINY, width=32))
    second = replace(adding, texts=("second",))
    with pytest.raises(CacheError, match="number of captions"):
        build(replace(second, captions_per_image=2), Quiet())
    changed = tmp_path / "changed.csv"
    changed.write_text(table.read_text().replace("x", "changed"))
    with pytest.raises(CacheError, match="other captions"):
        build(replace(second, captions=changed), Quiet())
    build(second, Quiet())
    assert featcache.open(tmp_path / "c").manifest.features["text/second"].shape == (3, 16, 32)


def test_bad_images_have_no_captions_and_only_so_many_are_kept(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(4):
        members |= {f"{i}.png": image_bytes(i) if i != 2 else b"no image", f"{i}.txt": b"one\ntwo\nthree"}
    path = shard(tmp_path / "a.tar", members)
    ask = request(tmp_path / "c", data=str(path), limit=None, captions_per_image=2, on_bad_image="skip")
    build(ask, Quiet())
    cache = featcache.open(tmp_path / "c")
    assert [entry.key for entry in cache.manifest.skipped] == ["2.png"]
    with cache.reader(["text/count", "text/tiny.length", "text/tiny"], slots=True) as reader:
        out = reader.allocate(4)
        reader.read(range(4), out)
    slot = cache.manifest.skipped[0].slot
    assert [count for i, count in enumerate(out["text/count"].tolist()) if i != slot] == [2, 2, 2]
    assert out["text/count"][slot] == 0
    assert not out["text/tiny.length"][slot].any()
    assert not out["text/tiny"][slot].any()


def test_damaged_text_shards_are_made_again(tmp_path: Path) -> None:
    from featcache.builder.repair import repair_shards
    from featcache.share.verify import verify

    path = tmp_path / "c"
    build(request(path), Quiet())
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    victims = [path / "text/tiny/c.1.0.0.0", path / "text/count/c.0"]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:-9] + b"damaged!!")
    damaged = verify(path).damaged
    assert set(damaged) == {"text/tiny", "text/count"}
    repair_shards(path, damaged, data=None, weights_dir=None, device="cpu", progress=Quiet())
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_precision_and_compilation_keep_shapes(tiny: TextEncoder) -> None:
    rough = TextEncoder("tiny", WeightsSource(), captions=3, batch_size=2, compute=Compute(precision="bf16"))
    a, b = read(tiny, ("a cat", "x"))["text/tiny"], read(rough, ("a cat", "x"))["text/tiny"]
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.05


def test_as_typed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.cli import app
    from featcache.console import run_app

    table = tmp_path / "captions.csv"
    table.write_text("key,caption\na/0.png,a cat\nb/1.png,a dog\n")
    words = ["build", "--data", str(folder), "--vae", "tiny", "--resolution", "32", "--text", "tiny"]
    words += ["--captions", str(table), "--text-codec", "fp32", "--out", str(tmp_path / "c"), "--profile"]
    for command, expected in (
        (words, ("encode text tiny", "tokenise", "4 of 6 images have no caption")),
        (
            ["info", str(tmp_path / "c")],
            ("captions: table captions.csv; up to 1 per image", "1x16x64", "RANDOM, seed 0"),
        ),
        (["verify", str(tmp_path / "c")], ("sound",)),
    ):
        monkeypatch.setattr("sys.argv", ["featcache", *command])
        assert run_app(app) == 0
        text = capsys.readouterr().out
        for part in expected:
            assert part in text
    for extra, message in ((["--text", "clip-z"], "clip-l, t5-base, tiny"), (["--captions", "x.csv"], "--text clip-l")):
        monkeypatch.setattr("sys.argv", ["featcache", "build", "--data", "shapes", "--vae", "tiny", *extra])
        assert run_app(app) == 2
        assert message in capsys.readouterr().err
