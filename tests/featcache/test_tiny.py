"""The committed tiny encoders and their judge do what their figures say."""

import hashlib
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer

from featcache.encoders import tiny
from featcache.encoders.vae import encoder_layers
from featcache.errors import UserError
from featcache.sources import shapes, shapes_text
from pipelines.embedded import captions, levels, measure, pictures, tables
from pipelines.embedded.classifiers import VIT_CONFIG
from pipelines.embedded.data import HELD_OUT_SET, draw_shapes, to_pixels
from pipelines.embedded.vae import psnr as psnr_of
from trainer.evaluate.obeyed import CaptionJudge

UNSEEN_SET = 5  # neither the training set of the script nor the one it measures on


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny.load_tiny_vae()


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return tiny.load_tiny_vit()


@pytest.fixture(scope="module")
def judge() -> ResNet:
    return tiny.load_judge()


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return json.loads((tiny.FOLDER / "figures.json").read_text())


def _pixels(indices, resolution=64):
    """RGB `[B, 3, H, W]` in [-1, 1] of unseen images, and labels `[B]`."""
    images, labels = shapes.render_batch(indices, seed=UNSEEN_SET, resolution=resolution)
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(labels)


def _psnr_db(reconstruction, images):
    error = ((reconstruction.clamp(-1, 1) - images) / 2).double()
    return -10 * torch.log10(error.square().mean(dim=(1, 2, 3)))


def _psnr_of_round_trip(vae, images):
    with torch.no_grad():
        return _psnr_db(vae.decode(vae.encode(images).latent_dist.mode()).sample, images)


def test_all_are_frozen_float32_and_in_eval_mode(vae, vit, judge):
    for module in (vae, vit, judge, tiny.load_caption_judge()):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in module.parameters())


def test_weights_are_half_precision_and_fit_in_eight_megabytes():
    from safetensors.torch import load_file

    paths = [tiny.weights_path(name) for name in tiny.NAMES]
    assert sum(path.stat().st_size for path in paths) <= 8_000_000
    for path in paths:
        tensors = load_file(path)
        assert {t.dtype for t in tensors.values()} <= {torch.float16, torch.int64}  # int64: batches a norm has counted
        assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_hash_is_that_of_the_file(name):
    assert tiny.weights_sha256(name) == hashlib.sha256(tiny.weights_path(name).read_bytes()).hexdigest()


def test_unknown_names_and_missing_weights_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="vae, vit, judge, caption-judge"):
        tiny.weights_sha256("clip")
    with pytest.raises(UserError, match="missing"):
        tiny.weights_path("vae", folder=tmp_path)


def test_vae_reconstructs_unseen_images_of_every_class(vae):
    images, labels = _pixels(range(50))
    psnr = _psnr_of_round_trip(vae, images)
    assert psnr.mean() >= 28
    for label, name in enumerate(shapes.CLASS_NAMES):
        assert psnr[labels == label].mean() >= 25, name


def test_vae_reconstructs_at_twice_its_main_resolution(vae):
    images, _ = _pixels(range(10), resolution=128)
    assert _psnr_of_round_trip(vae, images).mean() >= 28


def test_vae_reconstructs_photographs(vae):
    """Free photographs, 128 px: above 24 dB a person sees at once what they show (docs/embedded.md has the picture)."""
    pytest.importorskip("skimage")
    assert _psnr_of_round_trip(vae, to_pixels(pictures.photographs())).mean() >= 24


@pytest.fixture(scope="module")
def level_figures(vae) -> dict[str, dict[str, Any]]:
    """Per layer, on unseen shapes; the routed ones are those of G3 and G4."""
    return levels.table(vae, _pixels(range(64))[0], grid=8)


ROUTED = [
    "down2.res0", "down2.res1", "down2.downsample", "down3.res0",
    "down3.res1", "mid.res0", "mid.attn", "mid.res1",
]  # fmt: skip


def test_routed_levels_are_those_of_the_encoder(vae):
    assert [layer.name for layer in encoder_layers(vae) if layer.level in ("G3", "G4")] == ROUTED


@pytest.mark.parametrize("name", ROUTED)
def test_levels_are_a_hierarchy(level_figures, name):
    """What a router can choose between: no layer repeats the one before it, none is one direction or one constant, and
    the stream stays small enough for the branches to change it."""
    row = level_figures[name]
    assert row["cosine"] is None or row["cosine"] < 0.99
    assert row["rank"] > 8
    assert row["mean_share"] < 0.5
    assert row["rms"] < 50
    assert row["branch"] is None or row["branch"] > 0.1


def test_pooled_levels_tell_the_class_better_than_the_latent(vae):
    drawn = draw_shapes(600, image_set=HELD_OUT_SET)
    known = torch.from_numpy(drawn.labels)
    features = levels.pooled(vae, measure.batches(drawn.images), ("down3.res0", "mid.res1"))
    told = {name: levels.linear_probe(f[:300], known[:300], f[300:], known[300:]) for name, f in features.items()}
    latent = max(told["latent"], told["latent, pooled"])
    assert told["down3.res0"] > latent and told["mid.res1"] > latent
    assert told["mid.res1"] > 0.9


def test_no_channel_of_the_latent_is_dead(vae):
    """A channel that carries nothing has a posterior as wide as its means are apart."""
    with torch.no_grad():
        posterior = vae.encode(_pixels(range(64))[0]).latent_dist
    signal, noise = posterior.mean.std((0, 2, 3)), posterior.std.mean((0, 2, 3))
    assert (signal > 2 * noise).all()


def test_judge_tells_classes_apart_and_shares_nothing_with_the_vit(judge, vit):
    known, known_labels = _pixels(range(300))
    asked, labels = _pixels(range(300, 500))
    with torch.no_grad():
        assert judge(asked[:2]).shape == (2, judge.num_features)
        accuracy = _nearest_neighbour_accuracy(judge(known), known_labels, judge(asked), labels)
    assert accuracy > 0.95
    assert not {p.data_ptr() for p in judge.parameters()} & {p.data_ptr() for p in vit.parameters()}


def test_reconstructions_still_show_their_class(vae, vit):
    images, labels = _pixels(range(200, 250))
    known, known_labels = _mean_patch_tokens(vit, range(200))
    with torch.no_grad():
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        asked = vit.forward_features(decoded)[:, vit.num_prefix_tokens :].mean(1)
    assert _nearest_neighbour_accuracy(known, known_labels, asked, labels) > 0.95


def test_scaled_latents_have_unit_standard_deviation(vae):
    images, _ = _pixels(range(100))
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    scaled = (posterior.mean + posterior.std * noise) * vae.config["scaling_factor"]
    assert scaled.std().item() == pytest.approx(1, abs=0.05)


def test_vae_encoder_has_the_fifteen_layers_of_sd_vae(vae):
    """conv_in; four stages of two residual blocks, three with a downsampler; mid res0, attention, res1."""
    shapes_of: dict[str, tuple[int, ...]] = {}

    def record(name):
        return lambda module, inputs, output: shapes_of.__setitem__(name, tuple(output.shape[1:]))

    encoder = vae.encoder
    layers = {"conv_in": encoder.conv_in}
    for i, block in enumerate(encoder.down_blocks):
        layers |= {f"down{i}.res{j}": resnet for j, resnet in enumerate(block.resnets)}
        if block.downsamplers is not None:
            layers[f"down{i}.downsample"] = block.downsamplers[0]
    middle = encoder.mid_block
    layers |= {"mid.res0": middle.resnets[0], "mid.attn": middle.attentions[0], "mid.res1": middle.resnets[1]}
    hooks = [layer.register_forward_hook(record(name)) for name, layer in layers.items()]
    with torch.no_grad():
        moments = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.parameters
    for hook in hooks:
        hook.remove()

    assert len(shapes_of) == 15
    assert shapes_of["conv_in"][1:] == (64, 64)
    assert shapes_of["down2.res0"][1:] == (16, 16)
    assert shapes_of["down3.res1"][1:] == shapes_of["mid.attn"][1:] == (8, 8)
    # One width for the eight layers that AHPA fuses.
    assert shapes_of["down2.res0"][0] == shapes_of["down3.res0"][0] == shapes_of["mid.res1"][0]
    assert moments.shape == (1, 2 * vae.config["latent_channels"], 8, 8)
    assert 4 <= vae.config["latent_channels"] <= 16


def _mean_patch_tokens(vit, indices):
    images, labels = _pixels(indices)
    with torch.no_grad():
        return vit.forward_features(images)[:, vit.num_prefix_tokens :].mean(1), labels


def _nearest_neighbour_accuracy(known, known_labels, asked, labels):
    mean, std = known.mean(0), known.std(0)
    distance = torch.cdist((asked - mean) / std, (known - mean) / std)
    return (known_labels[distance.argmin(1)] == labels).float().mean().item()


def test_vit_tokens_tell_classes_apart_where_untrained_ones_do_not(vit):
    torch.manual_seed(0)
    untrained = VisionTransformer(**VIT_CONFIG).eval()
    accuracy = {}
    for name, model in (("trained", vit), ("untrained", untrained)):
        known, known_labels = _mean_patch_tokens(model, range(300))
        asked, labels = _mean_patch_tokens(model, range(300, 500))
        accuracy[name] = _nearest_neighbour_accuracy(known, known_labels, asked, labels)
    assert accuracy["trained"] > 0.95
    assert accuracy["trained"] > accuracy["untrained"] + 0.3


def test_vit_patch_tokens_know_what_their_own_patch_shows(vit):
    """Linear regression from tokens to patch coverage, on other images than it was fitted on."""

    def tokens_and_coverage(indices):
        layers = [shapes.render_layers(i, seed=UNSEEN_SET) for i in indices]
        images = torch.from_numpy(np.stack([image for image, _, _ in layers])).permute(0, 3, 1, 2) * 2 - 1
        coverage = np.stack([cover for _, cover, _ in layers]).reshape(-1, 4, 16, 4, 16).mean(axis=(2, 4))
        with torch.no_grad():
            tokens = vit.forward_features(images)[:, vit.num_prefix_tokens :]
        return tokens.reshape(-1, vit.embed_dim).double(), torch.from_numpy(coverage).reshape(-1).double()

    def with_constant(tokens):
        return torch.cat([tokens, torch.ones(len(tokens), 1, dtype=tokens.dtype)], dim=1)

    known, known_coverage = tokens_and_coverage(range(200))
    asked, coverage = tokens_and_coverage(range(200, 300))
    weights = torch.linalg.lstsq(with_constant(known), known_coverage[:, None]).solution
    residual = (with_constant(asked) @ weights)[:, 0] - coverage
    assert 1 - residual.square().sum() / (coverage - coverage.mean()).square().sum() > 0.9


def test_vit_takes_other_resolutions(vit):
    images, _ = _pixels(range(2), resolution=128)
    with torch.no_grad():
        assert vit.forward_features(images).shape == (2, 1 + 8 * 8, vit.embed_dim)


def test_recorded_figures_belong_to_the_committed_weights(vae, figures):
    assert set(figures) == set(tiny.NAMES)
    for name, figure in figures.items():
        assert figure["command"].startswith("python -m pipelines.embedded")
        assert figure["parameters"] * 2 < tiny.weights_path(name).stat().st_size
    # A sample of the recorded images: their mean lies within four standard errors of the mean over all.
    recorded = figures["vae"]["psnr_db"]["shapes, 64 px"]
    psnr = psnr_of(vae, measure.batches(draw_shapes(64, image_set=HELD_OUT_SET).images))
    standard_error = psnr.std().item() / math.sqrt(len(psnr))
    assert psnr.mean().item() == pytest.approx(recorded["mean"], abs=4 * standard_error)
    assert psnr.min().item() >= recorded["lowest"] - 0.02
    assert figures["vae"]["scaling_factor"] == vae.config["scaling_factor"]


def test_the_caption_judge_answers_for_every_value():
    logits = tiny.load_caption_judge()(torch.zeros(2, 3, 64, 64))
    assert logits.shape == (2, sum(map(len, shapes_text.ATTRIBUTES.values())))


def test_the_caption_judge_was_nearly_always_right(figures):
    """tests/trainer/test_obeyed.py relies on it; that captions of others are told is what makes the judge one."""
    for kind, found in figures["caption-judge"]["obeyed"].items():
        assert (found["prompts_obeyed"] < 0.01) if "others" in kind else (found["prompts_obeyed"] >= 0.99), kind


@pytest.mark.slow
def test_recorded_shares_of_the_caption_judge_are_measured_again(vae, figures):
    again = captions.figures(CaptionJudge(), vae, count=figures["caption-judge"]["pictures"])["obeyed"]
    for kind, recorded in figures["caption-judge"]["obeyed"].items():
        assert again[kind] == pytest.approx(recorded, abs=0.002), kind


def test_the_page_gives_the_recorded_figures(figures):
    page = (tiny.FOLDER.parents[2] / "docs" / "embedded.md").read_text()
    assert tables.page_tables(figures) in page


@pytest.mark.slow
def test_recorded_psnr_is_measured_again_exactly(vae, figures):
    recorded = figures["vae"]["psnr_db"]["shapes, 64 px"]
    psnr = psnr_of(vae, measure.batches(draw_shapes(recorded["images"], image_set=HELD_OUT_SET).images))
    assert psnr.mean().item() == pytest.approx(recorded["mean"], abs=0.02)
