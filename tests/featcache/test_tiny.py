"""The committed tiny encoders do what their figures say, and so do the parts of their training script."""

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from timm.models.vision_transformer import VisionTransformer

from featcache.encoders import tiny
from featcache.encoders.tiny import train
from featcache.errors import UserError
from featcache.sources import shapes

UNSEEN_SET = 5  # neither the training set of the script nor the one it measures on


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny.load_tiny_vae()


@pytest.fixture(scope="module")
def vit() -> VisionTransformer:
    return tiny.load_tiny_vit()


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


def test_both_encoders_are_frozen_float32_and_in_eval_mode(vae, vit):
    for module in (vae, vit):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in module.parameters())


def test_weights_are_half_precision_and_fit_in_four_megabytes():
    from safetensors.torch import load_file

    paths = [tiny.weights_path(name) for name in tiny.NAMES]
    assert sum(path.stat().st_size for path in paths) <= 4_000_000
    for path in paths:
        tensors = load_file(path)
        assert {t.dtype for t in tensors.values()} == {torch.float16}
        assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("name", tiny.NAMES)
def test_weights_hash_is_that_of_the_file(name):
    assert tiny.weights_sha256(name) == hashlib.sha256(tiny.weights_path(name).read_bytes()).hexdigest()


def test_unknown_names_and_missing_weights_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="vae, vit"):
        tiny.weights_sha256("clip")
    with pytest.raises(UserError, match="missing"):
        tiny.weights_path("vae", folder=tmp_path)


def test_vae_reconstructs_unseen_images_of_every_class(vae):
    images, labels = _pixels(range(50))
    psnr = _psnr_of_round_trip(vae, images)
    assert psnr.mean() >= 24
    for label, name in enumerate(shapes.CLASS_NAMES):
        assert psnr[labels == label].mean() >= 22, name


def test_vae_reconstructs_at_twice_its_main_resolution(vae):
    images, _ = _pixels(range(10), resolution=128)
    assert _psnr_of_round_trip(vae, images).mean() >= 24


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
    untrained = VisionTransformer(**train.VIT_CONFIG).eval()
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


def test_recorded_figures_belong_to_the_committed_weights(vae):
    figures = json.loads((tiny.FOLDER / "figures.json").read_text())
    assert set(figures) == {"vae", "vit"}
    for name, figure in figures.items():
        assert figure["command"].startswith("python -m featcache.encoders.tiny.train --out")
        assert figure["parameters"] * 2 < tiny.weights_path(name).stat().st_size
    # A sample of the recorded images: their mean lies within four standard errors of the mean over all.
    psnr = train.reconstruction_psnr(vae, resolution=64, n=64)
    standard_error = psnr.std().item() / math.sqrt(len(psnr))
    assert psnr.mean().item() == pytest.approx(figures["vae"]["psnr_64px_db"], abs=4 * standard_error)
    assert psnr.min().item() >= figures["vae"]["psnr_64px_lowest_db"] - 0.02


@pytest.mark.slow
def test_recorded_psnr_is_measured_again_exactly(vae):
    figures = json.loads((tiny.FOLDER / "figures.json").read_text())["vae"]
    psnr = train.reconstruction_psnr(vae, resolution=64, n=figures["psnr_64px_images"])
    assert psnr.mean().item() == pytest.approx(figures["psnr_64px_db"], abs=0.02)


def test_training_batches_are_deterministic_and_mix_resolutions():
    first, again = (train._batch(3, 4, seed=0)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (4, 3, 64, 64)
    assert train._batch(train.LARGE_EVERY - 1, 8, seed=0)[0].shape == (2, 3, 128, 128)
    assert first.min() >= -1 and first.max() <= 1


def test_dense_targets_are_patch_means():
    images, coverage, _ = train._images(range(3), image_set=UNSEEN_SET, resolution=64)
    targets = train.patch_means(images, coverage, 16)  # [3, 16, 4]
    row, column = 2, 1
    patch = np.s_[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    token = targets[:, 4 * row + column]
    assert torch.allclose(token[:, :1], coverage[patch].mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(token[:, 1:], images[patch].mean(dim=(2, 3)), atol=1e-5)


def test_vae_loss_matches_its_formula():
    generator = torch.Generator().manual_seed(0)
    images, decoded = (torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    mean, log_variance = (torch.randn(2, 8, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    e = (decoded - images).numpy()
    edges = (np.abs(e[..., 1:] - e[..., :-1]).mean() + np.abs(e[..., 1:, :] - e[..., :-1, :]).mean()) / 2
    blurred = sum((e.reshape(2, 3, 16 // s, s, 16 // s, s).mean(axis=(3, 5)) ** 2).mean() for s in (4, 8))
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    kl = torch.distributions.kl_divergence(posterior, prior).mean().item()
    expected = np.abs(e).mean() + train.EDGE_WEIGHT * edges + train.BLUR_WEIGHT * blurred + train.KL_WEIGHT * kl
    assert train.vae_loss(images, decoded, mean, log_variance).item() == pytest.approx(expected, rel=1e-12)


def test_vae_starts_as_a_resampler():
    torch.manual_seed(0)
    vae = AutoencoderKL(**train.VAE_CONFIG).eval()
    train.start_as_resampler(vae)
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        down = vae.encoder.down_blocks[2].downsamplers[0]
        averaged = x.reshape(1, 64, 4, 2, 4, 2).mean(dim=(3, 5))
        # The symmetry-breaking noise adds about 0.02 * sqrt(9 * 64) = 0.5 per output.
        assert (down(x) - averaged).std() < 0.6
        down.conv.weight[:, :, 2] = down.conv.weight[:, :, :, 2] = 0
        down.conv.weight.copy_(torch.where(down.conv.weight > 0.15, 0.25, 0.0))
        assert torch.allclose(down(x), averaged, atol=1e-6)
        assert torch.equal(vae.encoder.down_blocks[3].resnets[1](x, None), x)
        assert torch.equal(vae.encoder.mid_block(x), x)
        assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.std.max() < 0.2


@pytest.mark.slow
def test_the_script_trains_both_from_scratch(tmp_path):
    train.main(out=tmp_path, vae_steps=60, vit_steps=60)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["vae"]["psnr_64px_db"] > 15
    assert figures["vit"]["trained_64px"]["knn_accuracy"] > figures["vit"]["untrained_64px"]["knn_accuracy"] + 0.1
    assert tiny.load_tiny_vae(folder=tmp_path).config["scaling_factor"] == figures["vae"]["scaling_factor"]
