"""Many samples: the same bytes whatever the batch, the ranks or where the job was cut; the files that come out."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.errors import UserError
from featcache.progress import Quiet
from trainer.classes import Classes
from trainer.diffusion.ddpm import linear_schedule
from trainer.diffusion.guidance import Guidance
from trainer.interval import Interval
from trainer.models import model_config
from trainer.models.transformer import ModelOutput
from trainer.requests import SampleRequest
from trainer.runs.config import RunConfig
from trainer.sampling import run as sampling
from trainer.sampling.draw import (
    SampleConfig,
    check_sampler,
    class_grid,
    draw_latents,
    draw_units,
    load_decoder,
    load_run,
    sampling_times,
    to_uint8,
)
from trainer.sampling.grid import GAP, LINE, class_picture, first_of_classes, fitted, font
from trainer.sampling.inference import Arithmetic
from trainer.sampling.run import folder_name, sample_run
from trainer.training.loop import train


@pytest.fixture(scope="module")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache and two short runs, SiT and DiT."""
    root = tmp_path_factory.mktemp("sampling")
    cache = root / "caches/shapes"
    ask = BuildRequest(
        data="shapes", encoders=(EncoderChoice(name="tiny", layers=(5,)),), vae="tiny", limit=24, out=cache
    )
    build(replace(ask, resolution=32), Quiet())
    for name, model in (("sit", "SiT-Ti/2"), ("dit", "DiT-Ti/2")):
        config = RunConfig(
            model=model, cache=str(cache), name=name, steps=2, batch_size=4, device="cpu", sample_every=0, lr=1e-2
        )
        train(config, resume=False, watcher=Quiet(), root=root / "runs")
    return root / "runs"


def request(**kw: object) -> SampleRequest:
    return replace(SampleRequest(num=21, sampler="sde", steps=3, device="cpu", batch_size=8), **kw)  # type: ignore[arg-type]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 8)


@pytest.mark.usefixtures("small_blocks")
def test_batch_size_changes_no_byte(runs_root: Path, tmp_path: Path) -> None:
    one = sample_run(runs_root / "sit", request(out=tmp_path / "a", batch_size=8), Quiet()).images.read_bytes()
    two = sample_run(runs_root / "sit", request(out=tmp_path / "b", batch_size=32), Quiet()).images.read_bytes()
    assert one == two


@pytest.mark.usefixtures("small_blocks")
def test_fewer_samples_are_the_first_of_more(runs_root: Path, tmp_path: Path) -> None:
    few = np.load(sample_run(runs_root / "sit", request(num=5, out=tmp_path / "a"), Quiet()).images)
    more = np.load(sample_run(runs_root / "sit", request(num=21, out=tmp_path / "b"), Quiet()).images)
    assert few["arr_0"].shape == (5, 32, 32, 3)
    assert np.array_equal(few["arr_0"], more["arr_0"][:5])
    assert np.array_equal(more["arr_1"], np.arange(21) % 10)
    assert not np.array_equal(more["arr_0"][0], more["arr_0"][10])  # same class, other noise


@pytest.mark.usefixtures("small_blocks")
def test_a_cut_job_goes_on_where_it_stopped(runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample_run(runs_root / "sit", request(out=tmp_path / "whole"), Quiet()).images.read_bytes()
    saved, calls = sampling._save_block, []

    def dies(path: Path, pixels: np.ndarray) -> None:
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        saved(path, pixels)

    monkeypatch.setattr(sampling, "_save_block", dies)
    with pytest.raises(KeyboardInterrupt):
        sample_run(runs_root / "sit", request(out=tmp_path / "cut"), Quiet())
    again = sample_run(runs_root / "sit", request(out=tmp_path / "cut"), Quiet())
    assert calls == ["000000.npy", "000001.npy", "000001.npy", "000002.npy"]
    assert again.images.read_bytes() == whole


def test_two_ranks_and_a_killed_job_give_the_same_bytes(runs_root: Path, tmp_path: Path) -> None:
    """One rank, two ranks over gloo, and a job killed while it writes its second block and started again."""
    script = Path(__file__).with_name("sample_two_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(runs_root / "sit"), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    assert statuses == {"one": [0], "two": [0, 0], "killed": [-signal.SIGKILL], "left": ["000000.npy"], "again": [0]}
    bytes_of = [(tmp_path / name / "samples_21.npz").read_bytes() for name in ("one", "two", "killed")]
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]


@pytest.mark.usefixtures("small_blocks")
def test_threads_change_no_byte(runs_root: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        made = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(
                sample_run(runs_root / "sit", request(out=tmp_path / str(threads)), Quiet()).images.read_bytes()
            )
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert made[0] == made[1]


def saved_blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the blocks that are saved from now on."""
    saved: list[str] = []
    real = sampling._save_block

    def save(path: Path, pixels: np.ndarray) -> None:
        saved.append(path.name)
        real(path, pixels)

    monkeypatch.setattr(sampling, "_save_block", save)
    return saved


@pytest.mark.usefixtures("small_blocks")
def test_a_block_of_a_smaller_request_is_drawn_again_only_where_it_is_short(
    runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample_run(runs_root / "sit", request(out=tmp_path / "whole"), Quiet()).images.read_bytes()
    with monkeypatch.context() as patch:  # cut before the files are put together
        patch.setattr(sampling, "_write_npz", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sample_run(runs_root / "sit", request(num=12, out=tmp_path / "grown"), Quiet())
    calls = saved_blocks(monkeypatch)
    again = sample_run(runs_root / "sit", request(out=tmp_path / "grown"), Quiet())
    assert calls == ["000001.npy", "000002.npy"]
    assert again.images.read_bytes() == whole


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_units_on_a_gpu_divide_a_block_whatever_the_batch_size() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [sampling._unit(gpu, n) for n in (1, 8, 33, 64, 100, 256, 10_000)] == [8, 8, 32, 64, 64, 256, 256]
    assert {sampling._unit(cpu, n) for n in (1, 64)} == {8}


def test_samples_of_other_settings_are_not_passed_off_as_those_asked_for(runs_root: Path, tmp_path: Path) -> None:
    first = sample_run(runs_root / "sit", request(num=3, out=tmp_path / "x"), Quiet())
    before = first.images.stat().st_mtime_ns
    assert (
        sample_run(runs_root / "sit", request(num=3, out=tmp_path / "x"), Quiet()).images.stat().st_mtime_ns == before
    )
    for change in ({"seed": 1}, {"guidance": 2.0}, {"precision": "bf16"}, {"classes": Classes("random")}):
        with pytest.raises(UserError, match=r"other settings \([^{]+: .+ there, .+ here\)"):
            sample_run(runs_root / "sit", request(num=3, out=tmp_path / "x", **change), Quiet())
    with pytest.raises(UserError, match="run: sit there, dit here"):
        sample_run(runs_root / "dit", request(num=3, sampler=None, out=tmp_path / "x"), Quiet())


@pytest.mark.usefixtures("small_blocks")
def test_without_guidance_its_interval_and_channels_are_no_settings(runs_root: Path) -> None:
    first = sample_run(runs_root / "sit", request(num=8, seed=9), Quiet())
    again = sample_run(runs_root / "sit", request(num=8, seed=9, interval=Interval(0, 0.5), guided_channels=3), Quiet())
    assert again.images == first.images and again.settings == first.settings


def test_dopri5_depends_on_no_number_of_samples(runs_root: Path, tmp_path: Path) -> None:
    """Its steps follow the error of a whole unit, so the last one must be filled with the samples that would follow."""
    few, more = (
        np.load(sample_run(runs_root / "sit", request(num=n, sampler="dopri5", out=tmp_path / str(n)), Quiet()).images)
        for n in (5, 8)
    )
    assert np.array_equal(few["arr_0"], more["arr_0"][:5])


def test_grids_hold_a_class_a_row_and_the_same_noise_down_a_column(runs_root: Path) -> None:
    loaded = load_run(runs_root / "sit")
    vae = load_decoder(loaded.summary["dataset"]["vae"], loaded.summary["features"]["vae/moments"], None)
    config = SampleConfig(sampler="ode", steps=32, seed=5)
    grid = class_grid(loaded.model, vae, columns=3, seed=5)
    assert grid.shape == (10 * 32, 3 * 32, 3)
    (lone,) = draw_units(loaded.model, vae, np.array([7]), [2], config, unit=1)
    tile = grid[7 * 32 : 8 * 32, 2 * 32 :]
    assert np.abs(tile.astype(int) - lone[0]).max() <= 1  # another batch rounds otherwise


def test_formats_hold_the_same_pixels(runs_root: Path, tmp_path: Path) -> None:
    # What lies under a temporary name is neither written through nor waited for.
    (tmp_path / "own.txt").write_bytes(b"mine")
    (tmp_path / "npz").mkdir()
    (tmp_path / "npz" / ".samples_5.npz.partial").symlink_to(tmp_path / "own.txt")
    (tmp_path / "wds").mkdir()
    os.mkfifo(tmp_path / "wds" / ".samples_5.tar.partial")
    made = {
        f: sample_run(runs_root / "sit", request(num=5, out=tmp_path / f, format=f), Quiet())
        for f in ("npz", "wds", "png")
    }
    assert (tmp_path / "own.txt").read_bytes() == b"mine"
    arrays = np.load(made["npz"].images, allow_pickle=False)
    with tarfile.open(made["wds"].images) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    for i in range(5):
        pixels = arrays["arr_0"][i]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(members[f"{i:06d}.png"]))), pixels)
        assert int(members[f"{i:06d}.cls"]) == arrays["arr_1"][i]
        with Image.open(made["png"].images / f"{i:04d}" / f"{i:06d}.png") as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert all(result.grid.is_file() for result in made.values())


def test_the_grid_is_made_of_the_samples_asked_for_and_no_other_is_drawn(
    runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def counted(*args: Any, **kw: Any) -> Any:
        drawn.extend(args[3])
        return draw_units(*args, **kw)

    monkeypatch.setattr(sampling, "draw_units", counted)
    asked = request(num=12, classes=Classes.parse("1,7"), out=tmp_path)
    result = sample_run(runs_root / "sit", asked, Quiet())
    assert sorted(set(drawn)) == list(range(16))  # units of eight
    with np.load(result.images) as arrays:
        pixels, labels = arrays["arr_0"], arrays["arr_1"]
    picture = np.asarray(Image.open(result.grid))
    names = load_run(runs_root / "sit").class_names
    assert np.array_equal(picture, class_picture({c: pixels[labels == c] for c in (1, 7)}, names))
    assert picture.shape == (2 * (LINE + 96 + GAP) - GAP, 6 * (96 + GAP) - GAP, 3)
    few = sample_run(runs_root / "sit", replace(asked, num=3), Quiet())
    assert few.grid != result.grid, "each has its own"
    before = result.grid.read_bytes()
    result.grid.unlink()
    drawn.clear()
    assert sample_run(runs_root / "sit", asked, Quiet()).grid.read_bytes() == before


def test_a_picture_of_finished_samples_by_an_earlier_version_stays_theirs(runs_root: Path, tmp_path: Path) -> None:
    result = sample_run(runs_root / "sit", request(num=4, out=tmp_path), Quiet())
    earlier = result.grid.rename(tmp_path / "grid.png")
    assert sample_run(runs_root / "sit", request(num=4, out=tmp_path), Quiet()).grid == earlier
    assert sample_run(runs_root / "sit", request(num=2, out=tmp_path), Quiet()).grid.name == "grid_2.png"


def test_raw_weights_draw_other_images_into_a_folder_of_their_own(runs_root: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs_root / "sit", tmp_path / "run")
    checkpoint = max((run / "checkpoints").iterdir())
    averaged, raw = (sample_run(run, request(num=2, weights=w), Quiet()) for w in ("ema", "raw"))
    assert averaged.images.parent.name + "-raw" == raw.images.parent.name
    assert "weights" not in averaged.settings and raw.settings["weights"] == "raw"
    (checkpoint / "ema.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    same = sample_run(run, request(num=2, out=tmp_path / "same"), Quiet())
    pixels = [np.load(found.images)["arr_0"] for found in (averaged, raw, same)]
    assert not np.array_equal(pixels[0], pixels[1]) and np.array_equal(pixels[1], pixels[2])
    with pytest.raises(UserError, match="weights: ema there, raw here"):
        sample_run(run, request(num=2, weights="raw", out=tmp_path / "same"), Quiet())
    (checkpoint / "model.safetensors").unlink()  # as in an imported run
    with pytest.raises(UserError, match="holds no raw weights") as error:
        sample_run(run, request(num=2, weights="raw", out=tmp_path / "none"), Quiet())
    assert "--weights ema" in str(error.value.remedy)


def test_what_is_shown_of_many_samples() -> None:
    one_each = first_of_classes(np.arange(1000), columns=8, rows=2)
    assert len(one_each) == 16 and (min(one_each), max(one_each)) == (0, 999)
    assert all(len(found) == 1 for found in one_each.values())
    balanced = first_of_classes(np.arange(100) % 20, columns=8, rows=16)  # five each do not fit twice into a row
    assert len(balanced) == 16 and all(len(found) == 5 for found in balanced.values())
    assert [len(f) for f in first_of_classes(np.arange(64) % 2, columns=8, rows=16).values()] == [32, 32]
    assert [f.tolist() for f in first_of_classes(np.array([7, 1, 7]), columns=8, rows=1).values()] == [[1], [0, 2]]


def test_classes_share_lines_of_a_picture_and_long_names_are_cut() -> None:
    tiles = {label: np.full((2, 96, 96, 3), 10 * label, np.uint8) for label in range(5)}
    picture = class_picture(tiles, ["a", "щука", "c" * 200, "", "e"])
    assert picture.shape == (2 * (LINE + 96 + GAP) - GAP, 8 * (96 + GAP) - GAP, 3)  # four classes, then one
    for label in range(5):
        y, x = (LINE + 40) + (label // 4) * (LINE + 96 + GAP), (label % 4) * 2 * (96 + GAP) + 40
        assert (picture[y, x] == 10 * label).all()
    dark = np.asarray((picture[:LINE] < 128).all(axis=-1).any(axis=0))
    assert dark[200:240].any(), "Cyrillic letters"
    assert not dark[595:600].any(), "a cut name keeps off the next"
    assert font().getmask("щ").getbbox() and bytes(font().getmask("щ")) != bytes(font().getmask("\uffff"))
    assert fitted("short name", 300) == "short name" and fitted("c" * 200, 100).endswith("c…")
    long = class_picture({0: np.zeros((17, 96, 96, 3), np.uint8)}, ["a"])
    assert long.shape[0] == LINE + 3 * (96 + GAP) - GAP


def test_dit_samples_with_ddpm_and_ddim_and_refuses_an_ode(runs_root: Path, tmp_path: Path) -> None:
    for sampler in ("ddpm", "ddim"):
        result = sample_run(
            runs_root / "dit", request(num=3, sampler=sampler, guidance=2.0, out=tmp_path / sampler), Quiet()
        )
        assert np.load(result.images)["arr_0"].shape == (3, 32, 32, 3)
    with pytest.raises(UserError, match="DiT"):
        sample_run(runs_root / "dit", request(sampler="ode"), Quiet())
    assert check_sampler("dit", None) == "ddpm"
    assert check_sampler("sit", None) == "sde"


def test_no_guidance_equals_scale_one_and_guidance_changes_samples(runs_root: Path) -> None:
    model = load_run(runs_root / "sit").model
    labels = torch.tensor([1, 2])
    plain = SampleConfig(sampler="ode", steps=3)
    strong = replace(plain, guidance=Guidance(scale=4.0))
    outside = replace(plain, guidance=Guidance(scale=4.0, interval=Interval(0, 0)))
    a, b, c = (draw_latents(model, labels, [0, 1], config) for config in (plain, strong, outside))
    assert not torch.equal(a, b)
    assert torch.equal(a, c)


def test_pixel_rules_are_the_public_ones() -> None:
    # A quarter grey level above level k of ADM's rule is a quarter below level k of REPA's.
    levels = torch.arange(-3, 259, dtype=torch.float64)
    values = ((levels + 0.25 - 128) / 127.5).float().reshape(1, 1, 1, -1).expand(1, 3, 1, -1)
    expected = levels.clamp(0, 255).numpy().astype(np.uint8)
    assert np.array_equal(to_uint8(values, "round")[0, 0, :, 1].numpy(), expected)
    below = (levels - 1).clamp(0, 255).numpy().astype(np.uint8)
    assert np.array_equal(to_uint8(values, "truncate")[0, 0, :, 2].numpy(), below)


def test_labels() -> None:
    assert Classes.parse("balanced").labels(12, 5, seed=0).tolist() == [0, 1, 2, 3, 4] * 2 + [0, 1]
    assert Classes.parse(" 03, 1").labels(5, 5, seed=0).tolist() == [3, 1, 3, 1, 3]
    assert [str(Classes.parse(text)) for text in ("balanced", " random", " 03, 1")] == ["balanced", "random", "3,1"]
    random = Classes.parse("random").labels(5000, 5, seed=0)
    assert np.array_equal(random, Classes.parse("random").labels(5000, 5, seed=0))
    assert not np.array_equal(random, Classes.parse("random").labels(5000, 5, seed=1))
    assert np.abs(np.bincount(random, minlength=5) - 1000).max() < 5 * np.sqrt(5000 * 0.2 * 0.8)
    for wrong in ("7", "x", "-1"):
        with pytest.raises(UserError):
            Classes.parse(wrong).labels(3, 5, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": Classes.parse("3,99")},
        {"format": "gif"},
        {"pixels": "x"},
        {"checkpoint": 99},
        {"sampler": "magic"},
        {"precision": "fp8"},
        {"precision": "tf32"},
        {"sampler": "sde", "steps": 1},
    ],
)
def test_wrong_settings_are_explained(runs_root: Path, change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        sample_run(runs_root / "sit", request(out=tmp_path / "x", **change), Quiet())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("sampler", "steps"), [(s, n) for s in ("ddim", "ddpm") for n in (1, 2, 7, 10, 150, 1000)])
def test_any_number_of_dit_steps(sampler: str, steps: int) -> None:
    """DDIM takes whole strides of 1000 steps from 0 on where there are such; else both go from the first to the last."""
    stride = math.ceil(1000 / steps)
    kept = sampling_times(sampler, steps).steps.tolist()  # type: ignore[union-attr]
    assert len(kept) == steps
    assert all(a < b for a, b in pairwise(kept))
    if steps == 1:
        assert kept == [999]
    elif sampler == "ddim" and math.ceil(1000 / stride) == steps:  # all but 150
        assert kept == list(range(0, 1000, stride))
    else:
        assert (kept[0], kept[-1]) == (0, 999)


class _OfAGaussian(torch.nn.Module):
    """The exact noise prediction for data that are normal with mean 3 and standard deviation 0.5 in every entry."""

    cfg = replace(model_config("DiT-Ti/2", latent_channels=4, latent_size=16, num_classes=2), learn_sigma=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> ModelOutput:
        alpha_bar = torch.from_numpy(linear_schedule().alpha_bar)[t.long()].float().reshape(-1, 1, 1, 1)
        noise = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * 3) / (alpha_bar * 0.25 + 1 - alpha_bar)
        return ModelOutput(prediction=noise, hidden={}, time_embedding=t)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 7, 150])
def test_few_dit_steps_land_at_the_data(sampler: str, steps: int) -> None:
    """One step gives the mean of the data given noise, their mean; many give their spread too. 8,192 entries."""
    model: Any = _OfAGaussian()
    drawn = draw_latents(model, torch.zeros(8, dtype=torch.long), range(8), SampleConfig(sampler=sampler, steps=steps))
    assert drawn.mean().item() == pytest.approx(3, abs=0.05)
    if steps == 1:
        assert drawn.std().item() < 0.01
    elif steps == 150:
        assert drawn.std().item() == pytest.approx(0.5, rel=0.1)


def typed(run: Path, *words: str) -> Path:
    """The image file that `trainer sample` with these words ends up with, four samples of two steps."""
    from typer.testing import CliRunner

    from trainer.cli import app

    common = ["--num", "4", "--steps", "2", "--sampler", "ode", "--device", "cpu"]
    before = {path: path.stat().st_mtime_ns for path in (run / "samples").glob("*/*.npz")}
    done = CliRunner().invoke(app, ["sample", str(run), *common, *words])
    assert done.exit_code == 0, done.exception
    changed = [path for path in (run / "samples").glob("*/*.npz") if before.get(path) != path.stat().st_mtime_ns]
    assert len(changed) <= 1
    return changed[0] if changed else Path()


def test_equal_settings_are_drawn_once_however_they_are_typed(runs_root: Path) -> None:
    run = runs_root / "sit"
    for first, same in (
        (["--guidance", "1.5", "--interval", "0,1"], ["--guidance", "1.50", "--interval", "0.0,1.0"]),
        (["--guidance", "1.5", "--interval", "0,.7"], ["--guidance", "1.5", "--interval", " 0, 7e-1"]),
        (["--seed", "2", "--classes", "3,4"], ["--seed", "2", "--classes", "03, 4"]),
    ):
        assert typed(run, *first).name == "samples_4.npz"
        assert typed(run, *same) == Path()
    other = typed(run, "--guidance", "1.5", "--interval", "0,0.7000001")
    assert other.parent.name.endswith("cfg1.5-0,0.7000001")


def test_what_is_no_list_of_classes_is_quoted_in_short() -> None:
    for text in ("9" * 5000, "1,two," * 1000):
        with pytest.raises(UserError, match="is not a list of classes") as caught:
            Classes.parse(text)
        assert len(str(caught.value)) < 400


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("old", ["cfg1.5-0.0,0.60", "cfg1.5- 0,.6"])
def test_samples_under_an_interval_as_once_typed_are_found_and_continued(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch, old: str
) -> None:
    ask = request(num=12, steps=2, sampler="ode", guidance=1.5, interval=Interval(0, 0.6))
    saved = saved_blocks(monkeypatch)
    with monkeypatch.context() as patch:  # cut after its blocks
        patch.setattr(sampling, "_write_npz", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sample_run(runs_root / "sit", ask, Quiet())
    samples = runs_root / "sit/samples"
    (now,) = samples.glob("*cfg1.5-0,0.6")
    then = now.rename(samples / now.name.replace("cfg1.5-0,0.6", old))
    (then / "blocks/000001.npy").unlink()
    assert sample_run(runs_root / "sit", ask, Quiet()).images.parent == then
    assert saved == ["000000.npy", "000001.npy", "000001.npy"]
    again = sample_run(runs_root / "sit", ask, Quiet())
    assert again.images.parent == then and len(saved) == 3 and not now.exists()
    otherwise = replace(ask, num=3, interval=Interval(0, 0.61))
    assert sample_run(runs_root / "sit", otherwise, Quiet()).images.parent not in (now, then)
    shutil.rmtree(then)


def test_long_lists_of_classes_have_folders_of_their_own() -> None:
    arithmetic = Arithmetic()
    one, two = (
        folder_name(request(classes=Classes("chosen", (*range(100, 130), last))), 1, "ode", arithmetic)
        for last in (1, 2)
    )
    assert one != two and len(one) < 80


def test_command_line(
    runs_root: Path,
    cli: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    from typer.testing import CliRunner

    from trainer.cli import app

    words = ["sample", str(runs_root / "sit"), "--num", "2", "--steps", "1", "--sampler", "ode", "--device", "cpu"]
    words += ["--precision", "bf16", "--no-compile", "--guidance", "1.5", "--interval", "0,0.7", "--classes", "3,4"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "x")])
    assert done.exit_code == 0, done.exception
    record = json.loads((tmp_path / "x/settings.json").read_text())
    assert record["precision"] == "bf16" and record["compile"] is False
    assert record["guidance"] == {"scale": 1.5, "low": 0.0, "high": 0.7, "channels": None}
    assert np.load(tmp_path / "x/samples_2.npz")["arr_1"].tolist() == [3, 4]
    bad = cli("trainer", "sample", str(runs_root / "nothing"))
    assert bad.returncode == 2
    assert "nothing" in bad.stderr
    assert "Traceback" not in bad.stderr
