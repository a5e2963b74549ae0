"""Diagnostics of runs that diffuse features beside the latents: with tokens of their own, merged, or both kinds at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import Listener, add_nano, settings

from featcache.builder.derive import DeriveRequest, derive
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.progress import Quiet
from trainer.analyze import DIAGNOSTICS
from trainer.analyze.angle import shared_gradients
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.gradients import gsnr
from trainer.analyze.gsnr import measure
from trainer.analyze.probes import OWN, own_loss, own_sample
from trainer.analyze.subject import Subject
from trainer.models.config import SIZES
from trainer.report.analyze import analyze_runs
from trainer.training.loop import train

CLASS_TOKEN = "tiny@5.cls"
METHODS = ("reg", "redi", "reg+ahpa", "redi+repa", "reg+sra")


def options(**kw: Any) -> AnalyzeConfig:
    values: dict[str, Any] = {"device": "cpu", "gradient_samples": 6, "bins": 2, "times": (0.3, 0.7), "batch_size": 5}
    return AnalyzeConfig(**(values | {"probe_epochs": 2, "images": 1, "k": 3} | kw))


@pytest.fixture(scope="module")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three-step runs of each method, one of a stream of the user's own, and a LightningDiT (rotary positions)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    add_nano()
    folder = tmp_path_factory.mktemp("streams")
    cache, root = folder / "cache", folder / "runs"
    build(
        BuildRequest(
            data="shapes",
            encoders=(EncoderChoice(name="tiny", layers=(5,), class_tokens=(5,)),),
            limit=24,
            batch_size=8,
            shard_size=8,
            out=cache,
        ),
        Quiet(),
    )
    derive(DeriveRequest(cache=cache, feature="tiny@5", components=4))

    def run(name: str, **kw: Any) -> None:
        train(settings(cache, name=name, steps=3, **kw), resume=False, watcher=Listener(), root=root)

    for method in METHODS:
        run(method, method=method)
    run("own", streams={CLASS_TOKEN: {}})
    run("lightning", method="reg", model="LightningDiT-Nano/2")
    yield root
    SIZES.pop("Nano", None)
    torch.set_num_threads(threads)


def subject(run: Path, *, gradients: bool = True, **kw: Any) -> Subject:
    return Subject(run, options(**kw), device="cpu", gradients=gradients)


@pytest.mark.slow
def test_all_of_a_run(runs_root: Path) -> None:
    (page,) = analyze_runs([runs_root / "reg+ahpa"], list(DIAGNOSTICS), options(times=(0.5,)), Quiet())
    assert "is left out" not in page.read_text()
    rows = json.loads((page.parent / "codec.json").read_text())["rows"]
    own = [row for row in rows if row["target"] == OWN]
    assert {row["codec"] for row in own} > {"as cached", "int8"}
    assert all(0.5 < row["cosine_mean"] <= 1 + 1e-9 for row in own)


@pytest.mark.parametrize("method", ["redi", "own"])
def test_what_needs_no_alignment(runs_root: Path, method: str) -> None:
    asked = ["gsnr", "gradient-angle", "probe", "selfsim", "pca"]
    (page,) = analyze_runs([runs_root / method], asked, options(times=(0.5,)), Quiet())
    text = page.read_text()
    assert [what for what in asked if f"{what} is left out" in text] == ["gradient-angle"]


@pytest.mark.parametrize("wrt", ["hidden", "block"])
@pytest.mark.parametrize("name", ["reg", "lightning"])
def test_gsnr_of_the_own_loss_counts_the_tokens_of_streams(runs_root: Path, name: str, wrt: str) -> None:
    """Against one backward pass through the method itself for each sample."""
    at = subject(runs_root / name, wrt=wrt, batch_size=3)
    found = measure(at)
    assert at.alignment is not None
    block = at.model.blocks[at.block - 1]
    for index in range(2):
        gradients = []
        for i in range(6):
            rows = slice(i, i + 1)
            t = at.times_in_bin(rows, index, 2)
            state = at.state(rows, t, targets=True)
            of_token = state.stream_hidden[CLASS_TOKEN]
            assert isinstance(of_token, dict) and isinstance(state.hidden, dict)
            if wrt == "hidden":
                leaves = [of_token[at.block].requires_grad_(), state.hidden[at.block].requires_grad_()]
            else:
                block.requires_grad_(True)
                leaves = list(block.parameters())
                out = block(*at.block_input(rows, t))
                whole = torch.cat([of_token[at.block], state.hidden[at.block]], dim=1)
                torch.testing.assert_close(out.detach(), whole, rtol=1e-4, atol=1e-5)
                of_token[at.block], state.hidden[at.block] = out[:, :1], out[:, 1:]
            loss = torch.stack(list(at.alignment.terms(state).values())).sum()
            by_leaf = torch.autograd.grad(loss, leaves)
            if wrt == "hidden":
                assert by_leaf[0].abs().sum() > 0, "the class token's hidden state has a gradient of its own"
            gradients.append(torch.cat([g.flatten() for g in by_leaf]))
            block.requires_grad_(False)
        g = torch.stack(gradients).double()
        ratio = float(g.mean(0).square().sum() / g.var(0).sum())
        assert gsnr(found[OWN][index]) == pytest.approx(ratio, rel=1e-3)


@pytest.mark.parametrize("method", ["reg", "reg+ahpa", "redi+repa", "reg+sra"])
def test_own_losses_of_samples_average_to_that_of_the_batch(runs_root: Path, method: str) -> None:
    at = subject(runs_root / method)
    assert at.alignment is not None
    rows = slice(0, 4)
    state = at.state(rows, at.times_in_bin(rows, 0, 2), targets=True)
    batched = torch.func.vmap(own_loss(at))(at.tokens(state, at.alignment.taps), own_sample(at, state))
    torch.testing.assert_close(batched.mean(), torch.stack(list(at.alignment.terms(state).values())).sum())


def test_gradients_by_a_foreign_target_are_of_the_image_alone(runs_root: Path) -> None:
    """The same G-SNR whether the tokens of streams, whose gradients are zero, are counted or not."""
    at = subject(runs_root / "own")
    found = measure(at)
    assert OWN not in found and all(np.isfinite(gsnr(m)) for m in found["latent"])
    state = at.state(slice(0, 3), 0.5, (at.block,))
    tokens = at.tokens(state, (at.block,))
    assert tokens[at.block].shape[1] == at.cfg.tokens + 1
    hidden, of_streams = at.split_tokens(tokens)
    assert torch.equal(hidden[at.block], state.hidden[at.block])
    assert torch.equal(of_streams[CLASS_TOKEN][at.block], state.stream_hidden[CLASS_TOKEN][at.block])


@pytest.mark.parametrize("method", ["reg", "redi+repa", "own"])
def test_pictures_and_means_are_of_the_images_tokens(runs_root: Path, method: str) -> None:
    at = subject(runs_root / method, gradients=False)
    rows = slice(0, 3)
    hidden = at.hidden(rows, 0.5, (1, 2))
    assert all(h.shape == (3, at.cfg.tokens, at.cfg.width) for h in hidden.values())
    torch.testing.assert_close(at.pooled(0.5)[1, rows], hidden[2].mean(dim=1), rtol=1e-4, atol=1e-5)
    assert at.token_features == ["tiny@5"], "neither a class token nor components are drawn on the image's grid"


@pytest.mark.parametrize("method", ["reg", "redi"])
def test_streams_have_noise_of_their_own(runs_root: Path, method: str) -> None:
    """A function of the sample, as the latents' is, and another one."""
    at = subject(runs_root / method)
    (noise,) = at.stream_noise(slice(1, 4)).values()
    (later,) = at.stream_noise(slice(2, 4)).values()
    assert torch.equal(noise[1:], later)
    ours, theirs = noise.flatten(1), at.noise(slice(1, 4)).flatten(1)
    shared = min(ours.shape[1], theirs.shape[1])
    assert not (ours[:, :shared] == theirs[:, :shared]).any()


@pytest.mark.parametrize("method", ["reg", "redi+repa"])
def test_the_angle_is_of_the_denoising_loss_of_latents_and_streams(runs_root: Path, method: str) -> None:
    at = subject(runs_root / method, batch_size=6)
    at.model.requires_grad_(True)
    pair = shared_gradients(at, 1, 2, 6)
    assert all(torch.isfinite(g).all() for mean in pair.means for g in mean) and pair.parameters > 0
    assert pair.parameters == sum(p.numel() for block in at.model.blocks[: at.block] for p in block.parameters())
