"""Official checkpoints of REG and ReDi in and out, against small replicas of their modules, loaded strictly."""

from __future__ import annotations

import argparse
import copy
import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from golden import position_table
from tiny_runs import Listener, settings
from torch import Tensor, nn
from typer.testing import CliRunner

from featcache.build.derive import DeriveRequest, derive
from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.cli import app as featcache_app
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from featcache.share.manage import remove_features
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.subject import Subject
from trainer.diffusion.guidance import Guidance
from trainer.models import ModelConfig, Transformer, build_model, load_weights
from trainer.models.config import StreamShape
from trainer.runs.exchange import export_checkpoint, import_checkpoint
from trainer.runs.folder import load_config
from trainer.runs.weights_io import Imported, export_official, import_official
from trainer.sampling.draw import SampleConfig, draw_streams, load_run
from trainer.training.loop import train

WIDTH, DEPTH, HEADS, GRID, CLASSES = 32, 2, 4, 4, 5


class Layer(nn.Module):
    """One block, with the names that timm gives its parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        B, N, D = x.shape
        m = self.adaLN_modulation(c)[:, None].split(D, dim=-1)
        qkv = self.attn["qkv"](F.layer_norm(x, (D,), eps=1e-6) * (1 + m[1]) + m[0])
        q, k, v = (part.reshape(B, N, HEADS, D // HEADS).transpose(1, 2) for part in qkv.split(D, dim=-1))
        mixed = (q @ k.mT / math.sqrt(D // HEADS)).softmax(-1) @ v
        x = x + m[2] * self.attn["proj"](mixed.transpose(1, 2).reshape(B, N, D))
        inner = self.mlp["fc1"](F.layer_norm(x, (D,), eps=1e-6) * (1 + m[4]) + m[3])
        return x + m[5] * self.mlp["fc2"](F.gelu(inner, approximate="tanh"))


def head(channels: int) -> nn.Sequential:
    """REPA's."""
    layers = [nn.Linear(WIDTH, 2048), nn.SiLU(), nn.Linear(2048, 2048), nn.SiLU(), nn.Linear(2048, channels)]
    return nn.Sequential(*layers)


class Official(nn.Module):
    """SiT as REG (`class_channels`) and ReDi (`channels` 12) have it, by their names: velocities of the image and, for REG,
    of the class token, which stands first, has a zero position and shares the final norm and its modulation."""

    def __init__(
        self, channels: int, class_channels: int | None = None, projectors: int | None = None, repa_loss: bool = False
    ) -> None:
        super().__init__()
        own = class_channels is not None
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID**2 + own, WIDTH), requires_grad=False)
        self.pos_embed.data[:, int(own) :] = torch.from_numpy(position_table(WIDTH, GRID))
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, WIDTH, 2, 2)})
        mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, WIDTH)})
        self.blocks = nn.ModuleList(Layer(WIDTH) for _ in range(DEPTH))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(WIDTH, 4 * channels)})
        self.final_layer["adaLN_modulation"] = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))
        if class_channels is not None:
            self.final_layer["linear_cls"] = nn.Linear(WIDTH, class_channels)
            self.cls_projectors2 = nn.Linear(class_channels, WIDTH)
            self.wg_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        if projectors is not None:
            self.projectors = nn.ModuleList([head(projectors)])
        if repa_loss:  # as ReDi's code calls it
            self.projector = head(768)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, token: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        h = self.x_embedder["proj"](x).flatten(2).mT
        if token is not None:
            h = torch.cat([self.wg_norm(self.cls_projectors2(token))[:, None], h], dim=1)
        h = h + self.pos_embed
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128).float() / 128)
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], 1).to(h.dtype))
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer["adaLN_modulation"](c)[:, None].chunk(2, dim=-1)
        h = F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale) + shift
        of_token = None if token is None else self.final_layer["linear_cls"](h[:, 0])
        patches = self.final_layer["linear"](h if token is None else h[:, 1:])
        B, channels = len(x), patches.shape[-1] // 4
        image = torch.einsum("bhwpqc->bchpwq", patches.reshape(B, GRID, GRID, 2, 2, channels))
        return image.reshape(B, channels, 2 * GRID, 2 * GRID), of_token


def official(seed: int = 1, channels: int = 4, class_channels: int | None = None, **kw: Any) -> Official:
    """With weights in which no layer is left at zero, and time matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Official(channels, class_channels, **kw)
        for name, value in module.named_parameters():
            if name != "pos_embed":
                value.data.add_((0.5 if name.startswith("t_embedder") else 0.1) * torch.randn(value.shape))
    return module.eval()


def save(path: Path, module: Official, raw: Official | None = None, **args: Any) -> Path:
    """As the public training scripts do."""
    content: dict[str, Any] = {"ema": module.state_dict(), "model": (raw or module).state_dict()}
    content |= {"opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(model="SiT-XL/2", **args)}
    if "pca_rank" not in args:
        content["steps"] = 4_000_000
    torch.save(content, path)
    return path


def loaded(imported: Imported) -> Transformer:
    model = build_model(imported.config)
    load_weights(model, imported.state)
    return model.eval()


def exact(module: nn.Module) -> nn.Module:
    """In float64, so that what differs is no rounding."""
    return copy.deepcopy(module).double()


def inputs(channels: int = 4, class_channels: int = 768) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, channels, 2 * GRID, 2 * GRID, generator=generator)
    token = torch.randn(5, class_channels, generator=generator)
    return x.double(), torch.tensor([0.0, 0.1, 0.5, 0.77, 1.0]), torch.tensor([0, 1, 2, 4, 5]), token.double()


CLASS_TOKEN = StreamShape(name="dinov2-b@11.cls", channels=768, side=1, merged=False)
COMPONENTS = StreamShape(name="dinov2-b-reg@11.pca8", channels=8, side=GRID, merged=True)
CONFIG = ModelConfig(
    family="sit",
    depth=DEPTH,
    width=WIDTH,
    heads=HEADS,
    patch_size=2,
    latent_channels=4,
    latent_size=2 * GRID,
    num_classes=CLASSES,
)


def ours(stream: StreamShape, seed: int = 1) -> Transformer:
    """A model of ours in which no layer is left at zero."""
    model = build_model(replace(CONFIG, streams=(stream,)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_((0.5 if name.startswith("t_embedder") else 0.1) * torch.randn(value.shape, generator=generator))
    return model.eval()


# REG


@torch.no_grad()
@pytest.mark.parametrize(("choice", "seed"), [("ema", 1), ("model", 2)])
def test_a_reg_file_predicts_latent_and_class_token(tmp_path: Path, choice: Any, seed: int) -> None:
    both = [official(s, class_channels=768, projectors=768) for s in (1, 2)]
    file = save(tmp_path / "4000000.pt", *both, path_type="linear", prediction="v", cls=0.03)
    imported = import_official(file, weights=choice, heads=HEADS)
    assert (imported.convention, imported.config.streams, imported.step) == ("reg", (CLASS_TOKEN,), 4_000_000)
    assert imported.config == replace(CONFIG, streams=(CLASS_TOKEN,))
    assert len(imported.heads) == 6 and all(key.startswith("projectors.0.") for key in imported.heads)
    x, t, y, token = inputs()
    image, of_token = exact(both[seed - 1])(x, t, y, token)
    found = exact(loaded(imported))(x, t, y, streams=(token[..., None],))
    torch.testing.assert_close(found.prediction, image, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.streams[0][..., 0], of_token, rtol=1e-4, atol=1e-5)
    assert of_token.std() > 0.1 and image.std() > 0.1
    without = exact(both[seed - 1])(x, t, y, torch.zeros_like(token))[0]
    assert (without - image).abs().max() > 1e-3, "the latents' prediction depends on the class token"


@torch.no_grad()
def test_an_export_for_reg_is_loaded_strictly_and_predicts_the_same(tmp_path: Path) -> None:
    model = ours(CLASS_TOKEN)
    file = export_official(tmp_path / "o.pt", model.cfg, ema=model.state_dict(), step=9)
    content = torch.load(file, weights_only=True)
    assert content["args"]["path_type"] == "linear"
    theirs = official(3, class_channels=768, projectors=768)
    theirs.load_state_dict(content["ema"], strict=True)
    x, t, y, token = inputs()
    image, of_token = exact(theirs)(x, t, y, token)
    found = exact(model)(x, t, y, streams=(token[..., None],))
    torch.testing.assert_close(image, found.prediction, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_token, found.streams[0][..., 0], rtol=1e-4, atol=1e-5)
    table = content["ema"]["pos_embed"]
    assert table.shape == (1, GRID**2 + 1, WIDTH) and torch.count_nonzero(table[:, 0]) == 0
    back = import_official(file, heads=HEADS)
    assert (back.config, back.step) == (model.cfg, 9)
    for key, value in model.state_dict().items():
        assert torch.equal(back.state[key], value), key


def test_a_reg_file_survives_import_and_export_bit_for_bit(tmp_path: Path) -> None:
    module = official(class_channels=768, projectors=768)
    module.pos_embed.data[:, 1:] *= 1 - 1e-3  # averages drift
    imported = import_official(save(tmp_path / "a.pt", module), heads=HEADS)
    file = export_official(tmp_path / "b.pt", imported.config, ema=imported.state, heads=imported.heads)
    again, first = torch.load(file, weights_only=True)["ema"], module.state_dict()
    assert again.keys() == first.keys()
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_the_width_of_the_class_token_names_it(tmp_path: Path) -> None:
    for channels, name in ((1024, "dinov2-l@23.cls"), (1536, "dinov2-g@39.cls"), (48, "unknown@0.cls")):
        file = save(tmp_path / "c.pt", official(class_channels=channels))
        (stream,) = import_official(file, heads=HEADS).config.streams
        assert (stream.name, stream.channels) == (name, channels)


# ReDi


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_a_redi_file_runs_time_the_other_way(tmp_path: Path, named: bool) -> None:
    """Its velocity at its own time 1 - t is the negative of ours at t, on all channels; nothing is doubled."""
    module = official(channels=12)
    args: dict[str, Any] = {"pca_rank": 8, "dino_drop_prob": 0.2} if named else {}
    args |= {"path_type": "Linear", "prediction": "velocity"}
    imported = import_official(save(tmp_path / "3000000.pt", module, **args), heads=HEADS)
    assert (imported.convention, imported.path, imported.dropout) == ("redi", "linear", 0.2 if named else 0.0)
    assert imported.config == replace(CONFIG, streams=(COMPONENTS,))
    assert imported.config.in_channels == imported.config.out_channels == 12
    x, t, y, _ = inputs(12)
    theirs, _ = exact(module)(x, 1 - t, y)
    found = exact(loaded(imported))(x, t, y).prediction
    torch.testing.assert_close(found, -theirs, rtol=1e-4, atol=1e-5)
    at_t, _ = exact(module)(x, t, y)
    assert (found + at_t).abs().max() > 0.1


def test_a_redi_file_with_a_head_of_repa_s_is_redi_s_too(tmp_path: Path) -> None:
    """`--repa-loss` of its code: the head is called otherwise than REPA's and REG's."""
    module = official(channels=12, repa_loss=True)
    for args in ({}, {"pca_rank": 8, "repa_loss": True}):
        imported = import_official(save(tmp_path / "a.pt", module, **args), heads=HEADS)
        assert (imported.convention, imported.config) == ("redi", replace(CONFIG, streams=(COMPONENTS,)))
        assert len(imported.heads) == 6 and all(key.startswith("projector.") for key in imported.heads)
        alone = import_official(save(tmp_path / "b.pt", official(channels=12)), heads=HEADS)
        assert imported.state.keys() == alone.state.keys()


@pytest.mark.parametrize("said", [5.0, -0.1, float("nan"), "often", pytest.param(10**400, id="huge")])
def test_a_share_of_dropped_components_that_is_none_is_refused(tmp_path: Path, said: Any) -> None:
    file = save(tmp_path / "a.pt", official(channels=12), pca_rank=8, dino_drop_prob=said)
    with pytest.raises(UserError, match=r"a\.pt says that its dino_drop_prob is no share"):
        import_official(file, heads=HEADS)


@torch.no_grad()
def test_an_export_for_redi_is_loaded_strictly_and_predicts_the_same(tmp_path: Path) -> None:
    model, raw = ours(COMPONENTS), ours(COMPONENTS, 2)
    file = export_official(
        tmp_path / "o.pt", model.cfg, ema=model.state_dict(), model=raw.state_dict(), interpolant="cosine", dropout=0.2
    )
    content = torch.load(file, weights_only=True)
    args = {"model": None, "num_classes": CLASSES, "qk_norm": False, "path_type": "GVP", "feature": COMPONENTS.name}
    assert content["args"] == {**args, "pca_rank": 8, "dino_drop_prob": 0.2}
    theirs = official(3, channels=12)
    theirs.load_state_dict(content["ema"], strict=True)
    x, t, y, _ = inputs(12)
    torch.testing.assert_close(-exact(theirs)(x, 1 - t, y)[0], exact(model)(x, t, y).prediction, rtol=1e-4, atol=1e-5)
    for choice, original in (("ema", model), ("model", raw)):
        back = import_official(file, weights=choice, heads=HEADS)  # type: ignore[arg-type]
        assert (back.config, back.path, back.dropout) == (model.cfg, "cosine", 0.2)
        for key, value in original.state_dict().items():
            torch.testing.assert_close(back.state[key], value, rtol=0, atol=1e-6)  # time is turned round twice


def test_a_redi_file_survives_import_and_export(tmp_path: Path) -> None:
    module = official(channels=12)
    imported = import_official(save(tmp_path / "a.pt", module, pca_rank=8), heads=HEADS)
    file = export_official(tmp_path / "b.pt", imported.config, ema=imported.state)
    again, first = torch.load(file, weights_only=True)["ema"], module.state_dict()
    assert again.keys() == first.keys()
    for key, value in first.items():
        reversed_layer = key == "t_embedder.mlp.0.weight"  # the reflection rounds; signs do not
        torch.testing.assert_close(again[key], value, rtol=0, atol=1e-6 if reversed_layer else 0)


@pytest.mark.parametrize(("components", "args", "convention"), [(16, {"pca_rank": 16}, None), (4, {}, "redi")])
def test_other_numbers_of_components(tmp_path: Path, components: int, args: dict[str, Any], convention: Any) -> None:
    file = save(tmp_path / "a.pt", official(channels=4 + components), **args)
    imported = import_official(file, heads=HEADS, convention=convention)
    assert imported.config.streams == (
        replace(COMPONENTS, name=f"dinov2-b-reg@11.pca{components}", channels=components),
    )


def test_other_latents_of_many_channels_are_no_components(tmp_path: Path) -> None:
    for channels, convention in ((12, "repa"), (32, None)):
        file = save(tmp_path / "a.pt", official(channels=channels))
        imported = import_official(file, heads=HEADS, convention=convention)  # type: ignore[arg-type]
        assert (imported.convention, imported.config.latent_channels) == ("repa", channels)
        assert not imported.config.streams


# What is refused


@pytest.mark.parametrize(
    ("kw", "convention", "what"),
    [
        ({"class_channels": 768}, "repa", "with a class token beside the latents"),
        ({"class_channels": 768}, "redi", "which 'redi' checkpoints do not"),
        ({}, "reg", "holds SiT, which 'reg' checkpoints do not"),
        ({}, "redi", "has 4 channels in, and 'redi' checkpoints more than 4"),
    ],
)
def test_wrong_conventions_are_refused(tmp_path: Path, kw: dict[str, Any], convention: Any, what: str) -> None:
    with pytest.raises(UserError, match=what) as error:
        import_official(save(tmp_path / "a.pt", official(**kw)), heads=HEADS, convention=convention)
    assert error.value.remedy == "Leave --convention out."


def test_a_doubled_output_is_no_redi(tmp_path: Path) -> None:
    state = official(channels=12).state_dict()
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[key] = torch.cat([state[key], state[key]])
    torch.save({"ema": state}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="twice as many channels"):
        import_official(tmp_path / "a.pt", heads=HEADS, convention="redi")


def test_damaged_class_tokens_are_explained(tmp_path: Path) -> None:
    state = official(class_channels=768).state_dict()
    for change in ({"cls_projectors2.weight": torch.ones(3)}, {"wg_norm.weight": torch.ones(3)}):
        torch.save({"ema": state | change}, tmp_path / "a.pt")
        with pytest.raises(UserError):
            import_official(tmp_path / "a.pt", heads=HEADS)
    del state["final_layer.linear_cls.bias"]
    torch.save({"ema": state}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="missing"):
        import_official(tmp_path / "a.pt", heads=HEADS)


@pytest.mark.parametrize(
    ("change", "convention", "what", "remedy"),
    [
        ({"streams": (CLASS_TOKEN,)}, "repa", r"dinov2-b@11\.cls beside the latents\) weights cannot .* 'repa'", "reg"),
        ({"streams": (COMPONENTS,)}, "sit", "weights cannot be written as 'sit'", "redi"),
        ({"streams": (COMPONENTS,)}, "reg", "weights cannot be written as 'reg'", "redi"),
        ({"streams": (CLASS_TOKEN, COMPONENTS)}, None, "cannot be written for any public code", "trainer sample"),
        ({"streams": (replace(CLASS_TOKEN, side=2),)}, None, "cannot be written for any public code", "trainer sample"),
        ({"streams": (COMPONENTS,), "latent_channels": 16}, None, "for any public code", "trainer sample"),
        ({"streams": (COMPONENTS,), "family": "dit", "learn_sigma": True}, "dit", "for any public code", "sample"),
        ({"streams": (CLASS_TOKEN,), "norm": "rms", "mlp": "swiglu", "rope": True}, None, "for any public", "sample"),
        ({}, "reg", "SiT weights cannot be written as 'reg'", "repa, sra, sit"),
    ],
)
def test_exports_without_a_place_for_a_stream_are_refused(
    tmp_path: Path, change: dict[str, Any], convention: Any, what: str, remedy: str
) -> None:
    cfg = replace(CONFIG, **change)
    with pytest.raises(UserError, match=what) as error:
        export_official(tmp_path / "o.pt", cfg, ema=build_model(cfg).state_dict(), convention=convention)
    assert remedy in str(error.value.remedy)
    assert not (tmp_path / "o.pt").exists()


# Runs


@pytest.fixture(scope="module")
def streams_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images with tokens, class token and components of the tiny encoder."""
    path = tmp_path_factory.mktemp("cache") / "shapes"
    choice = EncoderChoice(name="tiny", layers=(5,), class_tokens=(5,))
    vae: dict[str, Any] = {"vae": "sd-ft-ema", "random_weights": 0}  # ReDi's code wants four channels
    build(BuildRequest(data="shapes", encoders=(choice,), limit=8, batch_size=8, out=path, **vae), Quiet())
    derive(DeriveRequest(cache=path, feature="tiny@5", components=8), Quiet())
    return path


COMMON: dict[str, Any] = {"weights": "ema", "convention": None}


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("method", "feature", "embed"), [("reg", "tiny@5.cls", "own"), ("redi", "tiny@5.pca8", "merged")]
)
def test_a_run_goes_out_and_comes_back_drawable(
    streams_cache: Path, tmp_path: Path, method: str, feature: str, embed: str
) -> None:
    given = {"reg": {"head_width": 24}} if method == "reg" else {"redi": {"dropout": 0.25}}
    run = train(
        replace(settings(streams_cache, steps=2), method=method, align=given),
        resume=False,
        watcher=Listener(),
        root=tmp_path,
    )
    file = export_checkpoint(run, tmp_path / "weights.pt", convention=None, step=None)
    with pytest.raises(UserError, match="cannot be written as 'repa'"):
        export_checkpoint(run, tmp_path / "other.pt", convention="repa", step=None)
    for name, cache in (("alone", None), ("beside", str(streams_cache))):
        back = import_checkpoint(file, name=name, cache=cache, root=tmp_path, **COMMON)
        written = yaml.safe_load((back / "config.yaml").read_text())["streams"]
        dropout = 0.0 if method == "reg" else 0.25
        weight = 0.03 if method == "reg" else 1.0
        options = {"weight": weight, "normalization": "none", "statistics": None, "embed": embed, "dropout": dropout}
        assert written == {feature: options}
        summary = json.loads((back / "cache.json").read_text())
        original = json.loads((run / "cache.json").read_text())
        shape, expected = summary["features"][feature]["shape"], original["features"][feature]["shape"]
        assert shape[-1] == expected[-1] and len(shape) == len(expected)
        if cache is not None:
            assert summary["features"] == original["features"]
        first, second = load_run(run), load_run(back)
        labels, indices = torch.tensor([0, 1]), [0, 1]
        for drawn in (
            Guidance(scale=2.0, streams=1.5),
            Guidance(representation=1.5) if method == "redi" else Guidance(),
        ):
            config = SampleConfig(sampler="ode", steps=3, guidance=drawn)
            one = draw_streams(first.model, labels, indices, config, transport=first.transport)
            two = draw_streams(second.model, labels, indices, config, transport=second.transport)
            for a, b in zip(one, two, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        again = export_checkpoint(back, tmp_path / f"{name}.pt", convention=method, step=None)
        states = [torch.load(path, weights_only=True)["ema"] for path in (file, again)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            turned = method == "redi" and key == "t_embedder.mlp.0.weight"
            torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-6 if turned else 0)


@pytest.mark.usefixtures("nano")
def test_a_normalised_stream_has_no_place_in_a_file(streams_cache: Path, tmp_path: Path) -> None:
    config = replace(settings(streams_cache, steps=1), streams={"tiny@5.cls": {}})
    run = train(config, resume=False, watcher=Listener(), root=tmp_path)
    with pytest.raises(UserError, match=r"diffuses tiny@5\.cls normalised by channel") as error:
        export_checkpoint(run, tmp_path / "o.pt", convention=None, step=None)
    assert "trainer sample" in str(error.value.remedy)
    assert not (tmp_path / "o.pt").exists()


@pytest.mark.usefixtures("nano")
def test_a_public_file_takes_the_feature_of_the_cache_that_fits(streams_cache: Path, tmp_path: Path) -> None:
    """A file that does not name its feature, of an encoder that no width stands for."""
    config = replace(settings(streams_cache, steps=1), method="reg", align={"reg": {"head_width": 24}})
    run = train(config, resume=False, watcher=Listener(), root=tmp_path)
    content = torch.load(export_checkpoint(run, tmp_path / "a.pt", convention=None, step=None), weights_only=True)
    torch.save({"ema": content["ema"]}, tmp_path / "b.pt")
    alone = import_checkpoint(tmp_path / "b.pt", name="alone", root=tmp_path, **COMMON)
    beside = import_checkpoint(tmp_path / "b.pt", name="beside", cache=str(streams_cache), root=tmp_path, **COMMON)
    assert [list(load_config(run).streams) for run in (alone, beside)] == [["unknown@0.cls"], ["tiny@5.cls"]]
    assert load_run(alone).model.cfg.streams[0].channels == load_run(beside).model.cfg.streams[0].channels


@pytest.mark.usefixtures("nano")
def test_an_imported_run_whose_cache_lacks_the_stream_is_not_analysed(
    streams_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is drawn from, as without a cache; what the error says to type makes it fit for diagnostics, too."""
    monkeypatch.chdir(tmp_path)
    less = tmp_path / "less"
    shutil.copytree(streams_cache, less)
    remove_features(less, ["tiny@5.cls"])
    config = replace(settings(streams_cache, steps=1), method="reg", align={"reg": {"head_width": 24}})
    run = train(config, resume=False, watcher=Listener(), root=tmp_path)
    file = export_checkpoint(run, tmp_path / "a.pt", convention=None, step=None)
    back = import_checkpoint(file, name="back", cache=str(less), root=tmp_path, **COMMON)
    assert load_run(back).model.cfg.streams[0].name == "tiny@5.cls"
    options = AnalyzeConfig(device="cpu", weights="ema")
    with pytest.raises(CacheError, match=r"less does not hold tiny@5\.cls, which is diffused") as error:
        Subject(back, options, device="cpu", gradients=False)
    (line,) = str(error.value.remedy).splitlines()[1:]
    result = CliRunner().invoke(featcache_app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.exception
    assert Subject(back, options, device="cpu", gradients=False).stream_noise(slice(0, 2)).keys() == {"tiny@5.cls"}

    content = torch.load(file, weights_only=True)
    torch.save({"ema": content["ema"]}, tmp_path / "b.pt")  # nor does it name its feature
    remove_features(less, ["tiny@5.cls"])
    nameless = import_checkpoint(tmp_path / "b.pt", name="nameless", cache=str(less), root=tmp_path, **COMMON)
    with pytest.raises(CacheError, match=r"does not hold unknown@0\.cls") as error:
        Subject(nameless, options, device="cpu", gradients=False)
    assert "Import the checkpoint again with --cache" in str(error.value.remedy)
