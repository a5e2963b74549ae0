"""Runs on caches that are empty, tiny, exchanged or of tars, and outputs over what cannot be had again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import add_nano, settings

from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.console import run_app
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from featcache.settings import from_mapping, to_mapping
from featcache.share.convert import convert
from tests.told import Told
from trainer import cli
from trainer.analyze.config import AnalyzeConfig
from trainer.evaluate.extractors import build_extractor
from trainer.evaluate.images import open_images
from trainer.evaluate.references import write_statistics
from trainer.evaluate.run import evaluate_run
from trainer.report.analyze import analyze_runs
from trainer.report.run import write_run_report
from trainer.requests import EvalRequest, SampleRequest, SampleSettings
from trainer.runs.config import RunConfig
from trainer.runs.exchange import export_checkpoint
from trainer.sampling.run import sample_run
from trainer.training import loop


def remarks(told: Told) -> list[str]:
    """What a build mentions beside the images and the features that it writes."""
    return [note for note in told.notes if not note.startswith(("images: ", "features: "))]


def built(tmp_path: Path, pictures: dict[str, bool], *, skip: bool = False) -> tuple[Path, Told]:
    """A cache of these files (name -> whether it is an image)."""
    for name, sound in pictures.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if sound:
            Image.new("RGB", (80, 70), (len(name), 90, 10)).save(path)
        else:
            path.write_bytes(b"no image")
    heard = Told()
    request = BuildRequest(
        data=str(tmp_path / "data"),
        encoders=(EncoderChoice(name="tiny", layers=(2,)),),
        resolution=64,
        batch_size=4,
        workers=1,
        device="cpu",
        out=tmp_path / "c",
        on_bad_image="skip" if skip else "fail",
    )
    return build(request, heard).path, heard


@pytest.mark.usefixtures("nano")
def test_a_cache_without_a_readable_image(tmp_path: Path) -> None:
    """Training on one divided by zero."""
    cache, _ = built(tmp_path, {"a/x.png": False, "b/y.png": False}, skip=True)
    with pytest.raises(CacheError, match="holds no images: all 2 were skipped") as error:
        loop.train(settings(cache), resume=False, watcher=Quiet(), root=tmp_path / "runs")
    assert "featcache info" in str(error.value.remedy)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.usefixtures("nano")
def test_one_image_can_be_trained_on_but_not_analysed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diagnostics failed on a sum of no gradients, or divided by zero."""
    cache, _ = built(tmp_path, {"a/x.png": True})
    run = loop.train(settings(cache), resume=False, watcher=Quiet(), root=tmp_path / "runs")
    with pytest.raises(UserError, match="holds 1 images, and diagnostics need at least 8"):
        analyze_runs([run], ("gsnr",), AnalyzeConfig(device="cpu"), Quiet())


def test_images_outside_class_folders_are_mentioned(tmp_path: Path) -> None:
    """They were left out without a word."""
    _, heard = built(tmp_path, {"a/x.png": True, "stray.png": True, "other.jpg": True})
    assert any("2 images directly in" in remark and "left out" in remark for remark in remarks(heard))
    _, heard = built(tmp_path / "sound", {"a/x.png": True})
    assert not remarks(heard)


def test_methods_may_have_spaces_around_the_plus() -> None:
    """The check took them off, and the use did not."""
    assert RunConfig(method="ahpa + sra").methods == ("ahpa", "sra")


# Caches of runs


@pytest.mark.usefixtures("nano")
def test_a_run_is_judged_by_its_own_cache(shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another cache at the same path was taken for the run's, and its images for the reference."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shapes_cache, "c")
    run = loop.train(settings("c"), resume=False, watcher=Quiet(), root=Path("runs"))
    ask = EvalRequest(settings=SampleSettings(num=4, steps=2, device="cpu"), extractor="embedded", metrics=("fid",))
    evaluate_run(run, ask, Quiet())
    shutil.rmtree("c")
    other = BuildRequest(data="shapes:7", encoders=(EncoderChoice(name="tiny"),), limit=8, batch_size=8, out=Path("c"))
    build(other, Told())
    with pytest.raises(CacheError, match=r"is not the cache that runs/.* was trained on"):
        evaluate_run(run, ask, Quiet())


@pytest.mark.usefixtures("nano")
def test_webdataset_caches_are_caches(shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They were "no longer there" for eval, no images for stats, and not found below ./caches."""
    monkeypatch.chdir(tmp_path)
    convert(shapes_cache, "caches/w", to="wds")
    run = loop.train(
        from_mapping(RunConfig, to_mapping(settings("")) | {"cache": None}),
        resume=False,
        watcher=Quiet(),
        root=Path("runs"),
    )
    ask = EvalRequest(settings=SampleSettings(num=4, steps=2, device="cpu"), extractor="embedded", metrics=("fid",))
    result = evaluate_run(run, ask, Quiet())
    assert result is not None and "embedded-FID" in result.metrics
    assert open_images("caches/w").count == 24


@pytest.mark.usefixtures("nano")
def test_checkpoints_of_other_runs_and_steps_are_refused(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples were drawn from them under this run's name, or under another step's."""
    monkeypatch.chdir(tmp_path)
    every = {"steps": 2, "checkpoint_every": 1}
    own = loop.train(settings(shapes_cache, name="own", **every), resume=False, watcher=Quiet(), root=Path("runs"))
    brought = settings(shapes_cache, "sra", name="other", **every)
    other = loop.train(brought, resume=False, watcher=Quiet(), root=Path("runs"))
    ask = SampleRequest(num=2, steps=2, device="cpu")
    last = own / "checkpoints/step_0000002"
    shutil.copytree(own, "sound")
    shutil.rmtree(last)
    shutil.copytree(other / "checkpoints/step_0000002", last)
    again = settings(shapes_cache, name="own", **every | {"steps": 3})
    for use in (
        lambda: sample_run(own, ask, Quiet()),
        lambda: export_checkpoint(own, Path("w.pt"), convention=None, step=None),
        lambda: loop.train(again, resume=True, watcher=Quiet(), root=Path("runs")),
    ):
        with pytest.raises(
            UserError, match="was saved by a run of sra on SiT-Nano/2, and this one is of none"
        ) as error:
            use()
        assert error.value.remedy
    (Path("sound") / "checkpoints/step_0000001").rename(Path("sound") / "checkpoints/step_0000009")
    with pytest.raises(UserError, match="is of step 1, unlike its folder"):
        sample_run(Path("sound"), ask, Quiet())


@pytest.mark.usefixtures("nano")
def test_no_run_inside_another(shapes_cache: Path, tmp_path: Path) -> None:
    run = loop.train(settings(shapes_cache, steps=1), resume=False, watcher=Quiet(), root=tmp_path / "runs")
    for name in ("run/inner", "run/checkpoints/step_0000009"):
        with pytest.raises(UserError, match="lies inside the run"):
            loop.train(settings(shapes_cache, name=name), resume=False, watcher=Quiet(), root=tmp_path / "runs")
    assert not (run / "inner").exists()
    beside = settings(shapes_cache, name="group/inner", steps=1)
    loop.train(beside, resume=False, watcher=Quiet(), root=tmp_path / "runs")


# What ends a run


@pytest.mark.usefixtures("nano")
def test_a_run_that_ends_before_it_begins_is_not_to_be_resumed(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said `trainer run --resume --name ...` of a folder that it then removed."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.runs.folder.open_folder", full)
    with pytest.raises(UserError, match="nothing is saved yet") as error:
        loop.train(settings(shapes_cache), resume=False, watcher=Quiet(), root=tmp_path / "runs")
    assert "--resume" not in str(error.value.remedy) and "the same command" in str(error.value.remedy)


# Outputs


def test_a_checkpoint_does_not_replace_a_configuration(
    shapes_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trainer export RUN RUN/config.yaml` did, and `trainer report --out` with a page."""
    monkeypatch.chdir(tmp_path)
    add_nano()
    run = loop.train(settings(shapes_cache), resume=False, watcher=Quiet(), root=Path("runs"))
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="does not end in"):
        export_checkpoint(run, run / "config.yaml", convention=None, step=None)
    with pytest.raises(UserError, match="does not end in"):
        write_run_report([run], run / "config.yaml")
    with pytest.raises(UserError, match="is a folder"):
        write_statistics("nothing", tmp_path, build_extractor("embedded", weights_dir=None, device="cpu"))
    assert (run / "config.yaml").read_bytes() == before
    assert export_checkpoint(run, tmp_path / "w.pt", convention=None, step=None).is_file()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, "RANK is 'x', not a whole number"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2" * 5000, "RANK": "0"}, "WORLD_SIZE is '222"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2 is not one of 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not set"),
    ],
)
def test_half_an_environment_of_torchrun(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They were faults of the program."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["trainer", "run", "--device", "cpu", "--cache", "nowhere"])
    assert run_app(cli.app) == 2
    said = capsys.readouterr().err
    assert words in said and "torchrun" in said
