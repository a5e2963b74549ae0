"""The training of the embedded encoders: its images, its parts, and a run that is killed and goes on."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from featcache.encoders import tiny
from featcache.errors import UserError
from featcache.sources import shapes
from pipelines.embedded import __main__ as script
from pipelines.embedded import captions, classifiers, data, levels, loop, start, tables, vae


def _zip(path: Path, classes: int, each: int) -> Path:
    rng = np.random.default_rng(classes)
    with zipfile.ZipFile(path, "w") as archive:
        for c in range(classes):
            for i in range(each):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
                archive.writestr(f"n{c:04}/{i}.jpeg", buffer.getvalue())
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name, each in (("train-0", 6), ("train-1", 6), ("val", 8)):
        _zip(folder / f"{name}.zip", 3, each)
    return folder


@pytest.fixture(scope="module")
def material(photographs: Path) -> data.Material:
    return data.Material(
        shapes=data.draw_shapes(40, image_set=1),
        large_shapes=data.draw_shapes(10, image_set=1, resolution=128),
        photographs=data.read_photographs(data.split_of(photographs, "train")),
    )


def test_photographs_are_read_with_their_classes_and_bad_folders_refused(photographs: Path, tmp_path: Path) -> None:
    read = data.read_photographs(data.split_of(photographs, "train"))
    assert read.images.shape == (36, 64, 64, 3) and read.classes == ("n0000", "n0001", "n0002")
    assert np.bincount(read.labels).tolist() == [12, 12, 12]
    with pytest.raises(UserError, match="holds no train"):
        data.split_of(tmp_path, "train")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32)).save(buffer, "JPEG")
        archive.writestr("a/1.jpeg", buffer.getvalue())
    with pytest.raises(UserError, match="not of 64 x 64"):
        data.read_photographs([tmp_path / "train.zip"])


def test_batches_are_functions_of_their_step_and_mix_resolutions(material: data.Material) -> None:
    first, again, other = (vae.batch(material, step, 8, seed=0) for step in (3, 3, 4))
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, other.pixels)
    assert first.pixels.shape == (8, 3, 64, 64) and first.pixels.min() >= -1 and first.pixels.max() <= 1
    assert {kind: len(known) for kind, (_, known) in first.labels.items()} == {"shapes": 2, "photographs": 6}
    large = vae.batch(material, data.LARGE_EVERY - 1, 8, seed=0)
    assert large.pixels.shape == (2, 3, 128, 128) and set(large.labels) == {"shapes"}
    labelled = classifiers.labelled_batch(material, 0, 8, seed=0, purpose=3)
    assert labelled.pixels.shape == (8, 3, 64, 64) and labelled.coverage.shape == (2, 1, 64, 64)
    assert classifiers.labelled_batch(material, data.LARGE_EVERY - 1, 8, seed=0, purpose=3).pixels.shape[-1] == 128


def test_mosaics_hold_four_images(material: data.Material) -> None:
    assert material.photographs is not None
    images = material.photographs.images[:8]
    made = data.mosaic(images)
    assert made.shape == (2, 128, 128, 3)
    assert np.array_equal(made[1, 64:, :64], images[6]) and np.array_equal(made[0, :64, 64:], images[1])


def test_dense_targets_are_patch_means() -> None:
    drawn = data.draw_shapes(3, image_set=5)
    images, coverage = data.to_pixels(drawn.images), torch.from_numpy(drawn.coverage).float()[:, None] / 255
    targets = classifiers.patch_means(images, coverage, 16)  # [3, 16, 4]
    row, column = 2, 1
    patch = np.s_[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    token = targets[:, 4 * row + column]
    assert torch.allclose(token[:, :1], coverage[patch].mean(dim=(2, 3)), atol=1e-5)
    assert torch.allclose(token[:, 1:], images[patch].mean(dim=(2, 3)), atol=1e-5)


def test_reconstruction_loss_and_divergence_match_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    images, decoded = (torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    e = (decoded - images).numpy()
    edges = (np.abs(e[..., 1:] - e[..., :-1]).mean() + np.abs(e[..., 1:, :] - e[..., :-1, :]).mean()) / 2
    expected = vae.SQUARED_WEIGHT * (e**2).mean() + vae.ABSOLUTE_WEIGHT * np.abs(e).mean() + vae.EDGE_WEIGHT * edges
    assert vae.reconstruction_loss(images, decoded).item() == pytest.approx(expected, rel=1e-12)
    mean, log_variance = (torch.randn(2, 8, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    known = torch.distributions.kl_divergence(posterior, prior).mean().item()
    assert vae.divergence(mean, log_variance).item() == pytest.approx(known, rel=1e-12)


def test_components_are_uncorrelated_and_half_whitened() -> None:
    pixels = data.to_pixels(data.draw_shapes(30, image_set=5).images)
    found = start.components(pixels, window=4, stride=4, count=8)
    assert found.shape == (30, 8, 16, 16)
    rows = found.transpose(0, 1).flatten(1).double()
    covariance = rows @ rows.T / rows.shape[1]
    assert covariance.diagonal().mean().item() == pytest.approx(1, abs=1e-4)
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 1e-3
    blocks = F.unfold(pixels, 4, stride=4).transpose(1, 2).flatten(0, 1).double()
    variances = torch.linalg.eigvalsh(torch.cov(blocks.T)).flip(0)[:8]
    assert torch.allclose(covariance.diagonal() / covariance[0, 0], (variances / variances[0]).sqrt(), rtol=1e-3)


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_a_fitted_convolution_is_the_one_that_made_its_targets(stride: int, padding: int) -> None:
    torch.manual_seed(0)
    known, found = (nn.Conv2d(5, 4, 3, stride=stride, padding=padding) for _ in range(2))
    untouched = found.weight[3].clone()
    inputs = torch.randn(20, 5, 17, 17)
    with torch.no_grad():
        start.fit(found, inputs, known(inputs)[:, :3])
    assert torch.allclose(found.weight[:3], known.weight[:3], atol=1e-3)
    assert found.bias is not None and known.bias is not None
    assert torch.allclose(found.bias[:3], known.bias[:3], atol=1e-3)
    assert torch.equal(found.weight[3], untouched)


def test_the_encoder_starts_with_diverse_levels_and_a_narrow_posterior() -> None:
    torch.manual_seed(0)
    network = AutoencoderKL(**vae.CONFIG)
    start.solve_encoder(network, data.to_pixels(data.draw_shapes(24, image_set=5).images))
    unseen = data.to_pixels(data.draw_shapes(16, image_set=6).images)
    found = levels.table(network, unseen, grid=8)
    for name in ("down2.downsample", "down3.res1", "mid.res1"):
        assert found[name]["rank"] > 16 and found[name]["mean_share"] < 0.3 and 0.1 < found[name]["rms"] < 5
    with torch.no_grad():
        posterior = network.encode(unseen).latent_dist
    assert posterior.std.max() == pytest.approx(np.exp(start.POSTERIOR / 2), rel=1e-3)
    # The latent leads back to the pixels by one linear map, as coefficients of a transform do.
    blocks = F.unfold(unseen, 8, stride=8).transpose(1, 2).flatten(0, 1)
    codes = F.pad(posterior.mean.flatten(2).transpose(1, 2).flatten(0, 1), (0, 1), value=1.0)
    missing = blocks - codes @ torch.linalg.lstsq(codes, blocks).solution
    assert missing.square().sum() < 0.1 * (blocks - blocks.mean(0)).square().sum()


def test_the_decoder_starts_as_a_resampler() -> None:
    torch.manual_seed(0)
    network = AutoencoderKL(**vae.CONFIG)
    vae.start_decoder(network)
    x = torch.randn(1, 88, 8, 8)
    with torch.no_grad():
        assert torch.equal(network.decoder.mid_block(x), x)
        assert torch.equal(network.decoder.up_blocks[0].resnets[0](x, None), x)
        doubled = network.decoder.up_blocks[0].upsamplers[0](x)
        assert (doubled - F.interpolate(x, scale_factor=2.0)).std() < 0.03 * (9 * 88) ** 0.5


def test_muon_moves_the_convolutions_themselves_and_leaves_the_encoders_stream_to_adamw() -> None:
    torch.manual_seed(0)
    network = AutoencoderKL(**vae.CONFIG)
    muon, adam = vae.optimizers(network, nn.Linear(2, 2))
    elsewhere = {p.data_ptr() for group in adam.param_groups for p in group["params"]}
    mine = {p.data_ptr() for group in muon.param_groups for p in group["params"]}
    assert not elsewhere & mine and len(elsewhere | mine) == len(list(network.parameters())) + 2
    stream = [network.encoder.conv_in, network.encoder.down_blocks[0].downsamplers[0].conv]
    stream += [network.encoder.down_blocks[1].resnets[0].conv_shortcut, network.encoder.conv_out, network.quant_conv]
    assert all(layer.weight.data_ptr() in elsewhere for layer in stream)
    weight = network.encoder.down_blocks[0].resnets[0].conv1.weight
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight)
    muon.step()
    assert not torch.equal(weight, before)


def test_the_rate_rises_then_falls() -> None:
    rates = [loop.rate(step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.05, abs=0.01) and max(rates) > 0.99
    assert rates.index(max(rates)) < 25 and rates[-1] < 0.02


class _Killed(Exception):
    pass


def _line(out: Path, *, steps: int, seed: int = 0, kill_at: int | None = None) -> Tensor:
    """A training of one weight by AdamW on numbers that follow from the step alone."""
    torch.manual_seed(seed)
    network, heads = nn.Linear(3, 1), nn.Linear(1, 1)
    optimizer = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=0.1)
    parts = loop.Parts(network=network, average=loop.averaged(network), heads=heads, optimizers=(optimizer,))

    def update(step: int) -> dict[str, Tensor]:
        if step == kill_at:
            raise _Killed
        x = torch.from_numpy(data.numbers(seed, 9, step).normal(size=(4, 3))).float()
        loss = (heads(network(x)) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss}

    loop.run("line", parts, update, steps=steps, settings={"seed": seed, "steps": steps}, out=out)
    return torch.cat([p.flatten() for p in (*network.parameters(), *parts.average.parameters())]).detach()


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0.0)
    (tmp_path / "whole").mkdir()
    whole = _line(tmp_path / "whole", steps=20)
    with pytest.raises(_Killed):
        _line(tmp_path, steps=20, kill_at=11)
    assert torch.load(tmp_path / "line-state.pt", weights_only=True)["step"] == 11
    assert torch.equal(_line(tmp_path, steps=20), whole)
    with pytest.raises(UserError, match="other settings"):
        _line(tmp_path, steps=20, seed=1)


def test_progress_says_how_far_how_fast_and_how_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAY_EVERY_S", 0.0)
    _line(tmp_path, steps=4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and " line | 2/4, " in lines[1] and "steps/s, " in lines[1] and " left; loss " in lines[1]


def test_pictures_of_the_caption_judge_are_functions_of_their_step_and_show_all_combinations() -> None:
    decoded = captions.draw(12, np.random.default_rng(1))
    first, again, other = (captions.batch(decoded, step, 10, seed=0) for step in (3, 3, 4))
    assert first[0].shape == (10, 3, 64, 64) and first[1].shape == (10, 4)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]) and not torch.equal(first[0], other[0])
    values = {tuple(row) for row in captions.draw(6000, np.random.default_rng(2)).values.tolist()}
    assert values == set(captions.EVERYTHING)  # each is missed with a probability of 2e-4


def test_values_of_drawn_pictures_are_those_of_their_attributes() -> None:
    """A plain square has the colour in its middle, and the ground at its rim, that its numbers say."""
    drawn = captions.draw(600, np.random.default_rng(3))
    dark, light = (drawn.images[drawn.values[:, 3] == at][:, 0].mean() for at in (0, 2))
    red, blue = (drawn.images[drawn.values[:, 2] == at].mean((0, 1, 2)) for at in (0, 4))
    assert dark < 80 < 200 < light and red[0] - red[2] > 20 and blue[2] - blue[0] > 20


def test_the_loss_of_captions_is_the_negative_logarithm_of_each_attribute() -> None:
    logits, values = (
        torch.randn(5, 23, generator=torch.Generator().manual_seed(0)).double(),
        torch.tensor([[9, 3, 5, 2]] * 5),
    )
    told = captions.loss_of(logits, values)
    for name, (start_at, stop, value) in zip(told, [(0, 10, 9), (10, 14, 3), (14, 20, 5), (20, 23, 2)], strict=True):
        head = logits[:, start_at:stop]
        expected = -(head[:, value].exp() / head.exp().sum(1)).log().mean()
        assert told[name].item() == pytest.approx(expected.item(), abs=1e-12)


def test_noise_on_latents_changes_what_comes_through_the_vae() -> None:
    images, small = captions.draw(4, np.random.default_rng(4)).images, tiny.load_tiny_vae()
    clean, again, noisy = (captions.through(small, images, noise=noise) for noise in (0.0, 0.0, 0.3))
    assert np.array_equal(clean, again) and clean.dtype == np.uint8
    error, with_noise = (np.abs(x.astype(float) - images).mean() for x in (clean, noisy))
    assert error < 6 and with_noise > error


@pytest.mark.slow
@pytest.mark.parametrize("with_photographs", [True, False])
def test_the_command_trains_and_measures_all_four(
    tmp_path: Path, photographs: Path, with_photographs: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    script.main(out=tmp_path, data=photographs if with_photographs else None, large=None, quick=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures) == {"vae", "vit", "judge", "caption-judge"}
    assert figures["vae"]["psnr_db"]["shapes, 64 px"]["mean"] > 10
    assert ("photographs, 64 px" in figures["vae"]["psnr_db"]) is with_photographs
    assert figures["vit"]["training_photographs"] == (36 if with_photographs else 0)
    assert tiny.load_tiny_vae(folder=tmp_path).config["scaling_factor"] == figures["vae"]["scaling_factor"]
    assert tiny.load_caption_judge(folder=tmp_path)(torch.zeros(1, 3, 64, 64)).shape == (1, 23)
    assert tables.page_tables(figures).count("caption judge") == 1
    assert tiny.load_judge(folder=tmp_path)(torch.zeros(1, 3, 64, 64)).shape == (1, 128)
    said = capfd.readouterr().out
    assert ("no photographs" in said) is not with_photographs
    assert len(shapes.CLASS_NAMES) == figures["judge"]["shapes"]["classes"]
