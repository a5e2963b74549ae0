"""`featcache.build`: the same cache as the command's, from the same words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from PIL import Image

import featcache
from featcache.errors import UserError
from featcache.progress import Quiet
from featcache.sources.remembered import recall


class Seen(Quiet):
    def __init__(self) -> None:
        self.count = 0

    def update(self, count: int, text: str = "") -> None:
        self.count += count


def test_it_builds_what_the_command_builds(cli: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    words = [
        "--encoder",
        "tiny@2,5,5.cls",
        "--vae-levels",
        "G3,G4",
        "--vae",
        "tiny",
        "--limit",
        "8",
        "--resolution",
        "32",
    ]
    done = cli("featcache", "build", "--data", "shapes", *words, "--tokens-codec", "fp16", "--out", "typed")
    assert done.returncode == 0, done.stderr
    seen = Seen()
    cache = featcache.build(
        data="shapes", encoder="tiny@2,5,5.cls", vae_levels=["G3", "G4"], vae="tiny", limit=8, resolution=32,
        tokens_codec="fp16", out=tmp_path / "called", captions=None, progress=seen,
    )  # fmt: skip
    assert len(cache) == 8 == seen.count
    root = {name: (tmp_path / name / "zarr.json").read_bytes() for name in ("typed", "called")}
    assert root["typed"] == root["called"]
    again = featcache.build(into=cache.path, encoder=["tiny@1"])
    assert set(again.features) - set(cache.features) == {"tiny@1"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"encoders": "tiny"}, "no option 'encoders'.*Did you mean 'encoder'"),
        ({"data": "shapes", "batch_size": 0}, "--batch-size"),
        ({"data": "shapes", "encoder": "dinov9"}, "dinov9"),
        ({"data": "shapes", "resolution": "64x64"}, "crops are square"),
        ({"data": "shapes", "flip": 1}, "flip"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        featcache.build(**{"out": tmp_path / "c", **options})  # type: ignore[arg-type]
    import re

    assert re.search(said, str(error.value) + str(error.value.remedy), re.DOTALL)


@pytest.mark.parametrize("remember", [True, False])
def test_where_the_images_lie_is_noted_as_the_command_does(
    remember: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEATCACHE_PLACES", str(tmp_path / "places"))
    (tmp_path / "photos" / "a").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "a" / "1.png")
    cache = featcache.build(
        data=tmp_path / "photos", encoder="tiny", vae="tiny", resolution=32, out=tmp_path / "c", remember=remember
    )
    assert recall(cache.manifest.dataset.fingerprint) == (str(tmp_path / "photos") if remember else None)
