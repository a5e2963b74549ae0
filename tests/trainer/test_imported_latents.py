"""Latents that others made are trained on, sampled and decoded as they were made."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import Listener, log_of, settings
from torch import Tensor, nn

import featcache
from featcache.encoders.tiny import load_tiny_vae
from featcache.encoders.vae import LatentDecoder
from featcache.errors import UserError
from featcache.inspect import images_of
from featcache.progress import Quiet
from featcache.share.importers import ImportRequest, import_latents
from featcache.sources.open import open_source
from trainer.requests import SampleRequest
from trainer.sampling.draw import to_uint8
from trainer.sampling.run import sample_run
from trainer.training import grids
from trainer.training.loop import train

SIDE, COUNT = 32, 8


class Echo(nn.Module):
    """A VAE whose decoder gives back the first three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(scaling_factor=3.0, shift_factor=0.25)

    def decode(self, raw: Tensor) -> Any:
        return SimpleNamespace(sample=raw[:, :3])


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, lambda z: z / 3 + 0.25),
        ({"scaling_factor": 0.5, "shift_factor": 0.0}, lambda z: z / 0.5),
        ({"scaling_factor": 2.0, "shift_factor": -1.0, "pixel_range": [-1, 1]}, lambda z: z / 2 - 1),
        ({"scaling_factor": 2.0, "shift_factor": 0.0, "pixel_range": [0, 1]}, lambda z: 2 * (z / 2) - 1),
        ({"scaling_factor": 1.0, "shift_factor": 0.0, "pixel_range": [0, 255]}, lambda z: z / 127.5 - 1),
    ],
)
def test_decoding_undoes_what_the_cache_records_and_not_what_the_vae_would(record: Any, expected: Any) -> None:
    z = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(LatentDecoder(Echo(), record)(z), expected(z)[:, :3])


def pixels() -> np.ndarray:
    source = open_source("shapes", resolution=SIDE, limit=COUNT)
    return np.stack([source.load(i, SIDE)[0] for i in range(COUNT)])


def imported(folder: Path, layout: str) -> tuple[Path, np.ndarray]:
    """A cache imported from latents that the tiny VAE made of `pixels()`, as EDM2 or REPA store them, and the images
    uint8 that it makes of them again."""
    low = 0.0 if layout == "edm2" else -1.0
    images = torch.from_numpy(pixels()).permute(0, 3, 1, 2).float() / 255 * (1 - low) + low
    vae = load_tiny_vae()
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        back = (vae.decode(posterior.mean).sample - low) / (1 - low)
    values = torch.cat([posterior.mean, posterior.std], dim=1).numpy()
    files, listed = folder / "files", []
    for i, value in enumerate(values):
        name = f"00000/img-mean-std-{i:08d}.npy"
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(files / name, value)
        listed.append([name, i % 2])
    (files / "dataset.json").write_text(json.dumps({"labels": listed}))
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for file in sorted(files.rglob("*.*")):
            archive.write(file, file.relative_to(files).as_posix())
    import_latents(ImportRequest(source=folder / "data.zip", out=folder / "cache", layout=layout, vae="tiny"))
    return folder / "cache", (255 * back).clamp(0, 255).permute(0, 2, 3, 1).numpy()


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("layout", ["repa", "edm2"])
def test_imported_latents_are_trained_sampled_and_seen_as_they_were(layout: str, tmp_path: Path) -> None:
    cache, back = imported(tmp_path, layout)
    opened = featcache.open(cache)
    keys = opened.keys()
    order = [int(key[-12:-4]) for key in keys]
    difference = np.abs(images_of(opened, None, range(COUNT)) - back[order])
    assert difference.mean() < 1, "rounding; another range of pixels is off by 68 in the mean"

    listener = Listener()
    run = train(settings(cache, steps=2, sample_every=1), resume=False, watcher=listener, root=tmp_path / "runs")
    assert not [note for note in listener.warnings if "no sample grid" in note]
    assert len(list((run / "samples").glob("step_*.png"))) == 2
    drawn = sample_run(run, SampleRequest(num=2, sampler="ode", steps=2, device="cpu", batch_size=2), Quiet())
    assert np.load(drawn.images)["arr_0"].shape == (2, SIDE, SIDE, 3)


@pytest.mark.usefixtures("nano")
def test_latents_of_a_vae_that_nobody_names_are_trained_on_and_not_decoded(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    (tmp_path / "files").mkdir()
    latents = {name: torch.randn(COUNT, 4, 4, 4, generator=rng) for name in ("latents", "latents_flip")}
    save_file(latents | {"labels": torch.arange(COUNT) % 2}, tmp_path / "files" / "latents_rank00_shard000.safetensors")
    cache = tmp_path / "cache"
    import_latents(ImportRequest(source=tmp_path / "files", out=cache, layout="lightningdit"))
    listener = Listener()
    run = train(settings(cache, steps=2, sample_every=1), resume=False, watcher=listener, root=tmp_path / "runs")
    assert len(log_of(run)) == 2
    assert [note for note in listener.warnings if "does not say which VAE" in note]
    with pytest.raises(UserError, match="does not say which VAE") as error:
        sample_run(run, SampleRequest(num=1, steps=2, device="cpu"), Quiet())
    assert error.value.remedy is not None and "--vae" in error.value.remedy


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("place", ["load_decoder", "class_grid"])
@pytest.mark.parametrize("fault", [RuntimeError("out of memory"), MemoryError(), UserError("not the same weights")])
def test_no_fault_of_a_grid_ends_the_run(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, fault: Exception
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(grids, place, fails)
    listener = Listener()
    run = train(settings(shapes_cache, steps=3, sample_every=1), resume=False, watcher=listener, root=tmp_path)
    assert [record["step"] for record in log_of(run)] == [1, 2, 3]
    told = [note for note in listener.warnings if note.startswith("no sample grid")]
    assert len(told) == (1 if place == "load_decoder" else 3)


def test_ranges_of_pixels_meet_the_same_grey_levels() -> None:
    grey = torch.full((1, 4, 2, 2), 0.75)
    record = {"scaling_factor": 1.0, "shift_factor": 0.0, "pixel_range": [0, 1]}
    assert to_uint8(LatentDecoder(Echo(), record)(grey)).unique().tolist() == [191]
