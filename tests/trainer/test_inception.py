"""The Inception port: our path from uint8 to activations against torch-fidelity's own and direct slices."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from featcache.encoders.base import WeightsSource
from featcache.errors import UserError, WeightsUnavailable
from trainer.evaluate.extractors import (
    INCEPTION_FILE,
    SPATIAL_CHANNELS,
    InceptionExtractor,
    build_extractor,
    register_with_torch_fidelity,
)
from trainer.evaluate.metrics import frechet_distance, moments_of


@pytest.fixture(scope="module")
def extractor() -> InceptionExtractor:
    """Seeded random weights, with batch norm statistics that are not the trivial ones."""
    built = InceptionExtractor(source=WeightsSource(random_seed=3))
    generator = torch.Generator().manual_seed(3)
    for module in built._module.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return built


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [2, 3, 72, 96]: smooth, not square, neither side a divisor of 299."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 9, 12, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(72, 96), mode="bilinear")
    return (fine * 255).to(torch.uint8)


def tf1_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """TF1's resize_bilinear without aligned corners, pixel by pixel: [C, H, W] => [C, size, size]."""
    C, H, W = image.shape
    out = np.empty((C, size, size))
    for i in range(size):
        y = i * H / size
        top, bottom = int(y), min(int(y) + 1, H - 1)
        for j in range(size):
            x = j * W / size
            left, right = int(x), min(int(x) + 1, W - 1)
            a, b = y - top, x - left
            out[:, i, j] = (1 - a) * ((1 - b) * image[:, top, left] + b * image[:, top, right]) + a * (
                (1 - b) * image[:, bottom, left] + b * image[:, bottom, right]
            )
    return out


def test_path_equals_torch_fidelitys_own_extractor(extractor: InceptionExtractor, images: Tensor) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    buffer = io.BytesIO()
    torch.save(extractor._module.state_dict(), buffer)
    buffer.seek(0)
    names = ["768", "2048", "logits_unbiased"]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=buffer)
    _, pool, logits = theirs(images)
    mine = extractor.features(images)
    assert pool.std() > 0.05
    torch.testing.assert_close(mine["pool"], pool, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine["logits"], logits, rtol=1e-5, atol=1e-6)


def test_resize_is_tensorflow_1s(extractor: InceptionExtractor, images: Tensor) -> None:
    """The network's first convolution must see the TF1 resize of the pixels, scaled by (x - 128) / 128."""
    seen: list[Tensor] = []
    network: Any = extractor._module
    handle = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    extractor.features(images[:1])
    handle.remove()
    expected = (tf1_bilinear(images[0].numpy().astype(np.float64), 299) - 128) / 128
    np.testing.assert_allclose(seen[0][0].numpy(), expected, atol=2e-6)


def test_spatial_features_are_the_slice_of_the_modules_branch(extractor: InceptionExtractor, images: Tensor) -> None:
    """mixed_6/conv is the 1x1 branch of the block torchvision calls Mixed_6d; 7 channels, channels last."""
    seen: list[Tensor] = []
    network: Any = extractor._module
    handle = network.Mixed_6d.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    spatial = extractor.features(images)["spatial"]
    handle.remove()
    with torch.inference_mode():
        branch = network.Mixed_6d.branch1x1(seen[0])
    assert spatial is not None and spatial.shape == (2, 17 * 17 * 7)
    by_hand = [
        branch[b, c, row, column]
        for b in range(2)
        for row in range(17)
        for column in range(17)
        for c in range(SPATIAL_CHANNELS)
    ]
    assert torch.equal(spatial.flatten(), torch.stack(by_hand))
    assert spatial.std() > 0.05


def test_logits_carry_no_bias(extractor: InceptionExtractor, images: Tensor) -> None:
    out = extractor.features(images)
    assert out["pool"] is not None and out["logits"] is not None
    network: Any = extractor._module
    torch.testing.assert_close(out["logits"], out["pool"] @ network.fc.weight.T)
    assert network.fc.bias.abs().max() > 0


def test_random_weights_are_seeded_and_never_called_fid() -> None:
    first, again, other = (build_extractor("inception", random_weights=s) for s in (0, 0, 1))
    assert first.provenance == again.provenance
    assert first.provenance["weights_sha256"] != other.provenance["weights_sha256"]
    assert not first.is_standard
    assert all(name.startswith("random-inception-") for name in first.metric_names.values())


def test_weights_come_from_a_folder_or_the_torch_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extractor: InceptionExtractor, images: Tensor
) -> None:
    state = extractor._module.state_dict()
    (tmp_path / "mine").mkdir()
    save_file(state, tmp_path / "mine" / "inception.safetensors")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / INCEPTION_FILE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for source in (tmp_path / "mine", None):
        loaded = build_extractor("inception", weights_dir=source)
        assert loaded.is_standard and loaded.metric_names["fid"] == "FID"
        assert torch.equal(loaded.features(images)["pool"], extractor.features(images)["pool"])  # type: ignore[arg-type]


def test_without_weights_the_error_names_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from urllib.error import URLError

    def offline(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "empty"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsUnavailable, match=r"--weights-dir") as caught:
        build_extractor("inception", weights_dir=tmp_path)
    assert "no network" in caught.value.what and str(tmp_path) in caught.value.what
    assert caught.value.remedy is not None and "--extractor embedded" in caught.value.remedy


def test_weights_files_are_never_unpickled(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "executed",))  # type: ignore[return-value]

    torch.save({"fc.weight": Payload()}, tmp_path / "inception.pth")
    with pytest.raises(UserError, match="cannot read weights"):
        build_extractor("inception", weights_dir=tmp_path)
    assert not (tmp_path / "executed").exists()


class Pixels(torch.utils.data.Dataset[Tensor]):
    """uint8 images [N, 3, R, R], one at a time."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.mark.slow  # torch-fidelity takes the square root of a 2048 x 2048 matrix
def test_torch_fidelity_itself_reaches_the_same_fid_through_the_registered_name(
    tmp_path: Path, extractor: InceptionExtractor
) -> None:
    import torch_fidelity

    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(12, 3, 4, 4, generator=generator)
    pixels = (torch.nn.functional.interpolate(coarse, size=32) * 255).to(torch.uint8)
    pixels[6:] //= 2
    weights = tmp_path / "weights.pth"
    torch.save(extractor._module.state_dict(), weights)
    theirs = torch_fidelity.calculate_metrics(
        input1=Pixels(pixels[:6]),
        input2=Pixels(pixels[6:]),
        fid=True,
        feature_extractor=register_with_torch_fidelity(),
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        save_cpu_ram=True,  # no loader processes
        batch_size=6,
        verbose=False,
    )["frechet_inception_distance"]
    pool = extractor.features(pixels)["pool"]
    assert pool is not None
    assert frechet_distance(*moments_of(pool[:6]), *moments_of(pool[6:])) == pytest.approx(theirs, rel=1e-4)


def test_registering_twice_is_harmless() -> None:
    assert register_with_torch_fidelity() == register_with_torch_fidelity() == "inception-v3-adm"


@pytest.mark.parametrize("bad", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.uint8)])
def test_images_of_another_type_or_layout_are_refused(extractor: InceptionExtractor, bad: Tensor) -> None:
    with pytest.raises(UserError, match="uint8 images of shape"):
        extractor.features(bad)
