"""Caches of no image, of one, of a few: what cannot be done with them is said, not stumbled over."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import settings

from featcache.build.request import BuildRequest
from featcache.build.run import build
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from trainer.analyze.config import AnalyzeConfig
from trainer.report.analyze import analyze_runs
from trainer.runs.config import RunConfig
from trainer.training import loop


class Heard:
    """What a build says while it goes on."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def start(self, *, total: int, done: int, note: str) -> None: ...

    def advance(self, images: int) -> None: ...

    def warn(self, text: str) -> None:
        self.remarks.append(text)


def built(tmp_path: Path, pictures: dict[str, bool], *, skip: bool = False) -> tuple[Path, Heard]:
    """A cache of these files (name -> whether it is an image)."""
    for name, sound in pictures.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if sound:
            Image.new("RGB", (80, 70), (len(name), 90, 10)).save(path)
        else:
            path.write_bytes(b"no image")
    heard = Heard()
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
        loop.train(settings(cache), resume=False, watcher=loop.Silent(), root=tmp_path / "runs")
    assert "featcache info" in str(error.value.remedy)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.usefixtures("nano")
def test_one_image_can_be_trained_on_but_not_analysed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diagnostics failed on a sum of no gradients, or divided by zero."""
    cache, _ = built(tmp_path, {"a/x.png": True})
    run = loop.train(settings(cache), resume=False, watcher=loop.Silent(), root=tmp_path / "runs")
    with pytest.raises(UserError, match="holds 1 images, and diagnostics need at least 8"):
        analyze_runs([run], ("gsnr",), AnalyzeConfig(device="cpu"), _Bar())


class _Bar:
    def begin(self, name: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int) -> None: ...

    def note(self, text: str) -> None: ...


def test_images_outside_class_folders_are_mentioned(tmp_path: Path) -> None:
    """They were left out without a word."""
    _, heard = built(tmp_path, {"a/x.png": True, "stray.png": True, "other.jpg": True})
    assert any("2 images directly in" in remark and "left out" in remark for remark in heard.remarks)
    _, heard = built(tmp_path / "sound", {"a/x.png": True})
    assert not heard.remarks


def test_methods_may_have_spaces_around_the_plus() -> None:
    """The check took them off, and the use did not."""
    assert RunConfig(method="ahpa + sra").methods == ("ahpa", "sra")
