"""Samples by prompt: what is drawn, the files that come out, the same bytes whatever is cut, and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from featcache.encoders.base import WeightsSource
from featcache.encoders.text import TextEncoder
from featcache.errors import UserError
from featcache.progress import Quiet
from tests.trainer.text_runs import make_runs
from trainer.classes import Classes
from trainer.cli import app
from trainer.diffusion.guidance import Guidance
from trainer.requests import SampleRequest
from trainer.sampling import run as sampling
from trainer.sampling.draw import SampleConfig, decode_pixels, draw_latents, load_run
from trainer.sampling.grid import PROMPT_SIDE
from trainer.sampling.prompts import Prompts
from trainer.sampling.run import sample_run

PROMPTS = ("a red striped triangle on a dark background", "a cat", "")


@pytest.fixture(scope="module")
def runs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short runs: `text`, of captions, and `labels`."""
    return make_runs(tmp_path_factory.mktemp("text-sampling"))


def request(**kw: object) -> SampleRequest:
    base = SampleRequest(num=21, sampler="ode", steps=3, guidance=2.0, device="cpu", batch_size=8, prompt=PROMPTS)
    return replace(base, **kw)  # type: ignore[arg-type]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 8)


def test_samples_are_of_the_prompts_text_guided_against_that_of_nothing(runs_root: Path, tmp_path: Path) -> None:
    """Drawn once more by hand: rows of the encoder, the text of '' from the run's folder, image i of prompt i modulo 3."""
    made = np.load(sample_run(runs_root / "text", request(num=10, out=tmp_path), Quiet()).images)
    loaded = load_run(runs_root / "text")
    encoder = TextEncoder("tiny", WeightsSource(), captions=1)
    texts = [PROMPTS[i % 3] for i in range(8)]
    rows = encoder(encoder.tokenise([[text] for text in texts]))["text/tiny"][:, 0]
    null = load_file(runs_root / "text/empty_text.safetensors")["text"]
    config = SampleConfig(sampler="ode", steps=3, guidance=Guidance(scale=2.0))
    latents = draw_latents(loaded.model, rows, range(8), config, transport=loaded.transport, null=null)
    with torch.inference_mode():
        assert np.array_equal(made["arr_0"][:8], decode_pixels(loaded.decoder(None), latents).numpy())
    # Neither the text nor the guidance is without effect; `''` guided against itself is `''`.
    other = np.load(
        sample_run(runs_root / "text", request(num=3, prompt=("a dog",), out=tmp_path / "o"), Quiet()).images
    )
    assert not np.array_equal(other["arr_0"][0], made["arr_0"][0])
    plain = np.load(sample_run(runs_root / "text", request(num=3, guidance=1.0, out=tmp_path / "p"), Quiet()).images)
    assert not np.array_equal(plain["arr_0"][0], made["arr_0"][0])
    assert np.abs(plain["arr_0"][2].astype(int) - made["arr_0"][2].astype(int)).max() <= 1


@pytest.mark.parametrize("damage", ["missing", "damaged", "others"])
def test_prompts_beside_finished_samples_are_written_anew(runs_root: Path, tmp_path: Path, damage: str) -> None:
    asked = request(num=2, steps=1, out=tmp_path / "o")
    made = sample_run(runs_root / "text", asked, Quiet())
    path, pixels = tmp_path / "o/prompts.json", made.images.read_bytes()
    kept = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(kept[:20])
    else:
        Prompts(texts=("others",), source="x").save(path.parent)
    sample_run(runs_root / "text", asked, Quiet())
    assert path.read_bytes() == kept and made.images.read_bytes() == pixels


@pytest.mark.usefixtures("small_blocks")
def test_batch_size_and_number_change_no_byte(runs_root: Path, tmp_path: Path) -> None:
    whole = sample_run(runs_root / "text", request(out=tmp_path / "a"), Quiet()).images
    assert (
        whole.read_bytes()
        == sample_run(runs_root / "text", request(out=tmp_path / "b", batch_size=32), Quiet()).images.read_bytes()
    )
    few = np.load(sample_run(runs_root / "text", request(num=5, out=tmp_path / "c"), Quiet()).images)
    assert np.array_equal(few["arr_0"], np.load(whole)["arr_0"][:5])


@pytest.mark.slow
def test_two_ranks_and_a_killed_job_give_the_same_bytes(runs_root: Path, tmp_path: Path) -> None:
    """One rank, two ranks over gloo, and a job killed with -9 while it writes its second block and started again."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"picture number {i}" for i in range(17)))
    script = Path(__file__).with_name("sample_two_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), str(runs_root / "text"), str(tmp_path), str(prompts)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    assert statuses == {"one": [0], "two": [0, 0], "killed": [-signal.SIGKILL], "left": ["000000.npy"], "again": [0]}
    for file in ("samples_21.npz", "prompts.json", "settings.json", "grid_21.png"):
        one, two, killed = ((tmp_path / name / file).read_bytes() for name in ("one", "two", "killed"))
        assert one == two == killed, file
    assert json.loads((tmp_path / "killed/prompts.json").read_text())["source"] == "text prompts.txt"


def test_an_npz_and_what_lies_beside_it(runs_root: Path, tmp_path: Path) -> None:
    result = sample_run(runs_root / "text", request(num=4, out=tmp_path), Quiet())
    with np.load(result.images) as archive:
        assert archive.files == ["arr_0"], "there are no classes"
    record = json.loads((tmp_path / "settings.json").read_text())
    held = json.loads((tmp_path / "prompts.json").read_text())
    assert held["prompts"] == list(PROMPTS) and held["source"] == "--prompt"
    assert record["prompts"] == held["sha256"] and held["count"] == 3 and "classes" not in record
    assert record["guidance"]["scale"] == 2
    assert Image.open(result.grid).width == 4 * (192 + 4) - 4
    assert PROMPT_SIDE <= 192


def test_a_webdataset_shard_holds_the_prompts(runs_root: Path, tmp_path: Path) -> None:
    images = sample_run(runs_root / "text", request(num=4, format="wds", out=tmp_path), Quiet()).images
    with tarfile.open(images) as tar:
        held = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]
    assert sorted(held) == [f"{i:06d}.{kind}" for i in range(4) for kind in ("png", "txt")]
    assert [held[f"{i:06d}.txt"].decode() for i in range(4)] == [*PROMPTS, PROMPTS[0]]


def test_pngs_lie_side_by_side(runs_root: Path, tmp_path: Path) -> None:
    folder = sample_run(runs_root / "text", request(num=4, format="png", out=tmp_path), Quiet()).images
    assert sorted(p.name for p in folder.iterdir()) == [f"{i:06d}.png" for i in range(4)]
    npz = np.load(sample_run(runs_root / "text", request(num=4, out=tmp_path / "n"), Quiet()).images)["arr_0"]
    assert np.array_equal(np.asarray(Image.open(folder / "000003.png")), npz[3])


def test_other_prompts_are_other_samples(runs_root: Path, tmp_path: Path) -> None:
    first = sample_run(runs_root / "text", request(num=3), Quiet())
    again = sample_run(runs_root / "text", request(num=3, prompt=(*PROMPTS[:2], "a dog")), Quiet())
    assert first.images.parent != again.images.parent
    sample_run(runs_root / "text", request(num=3, out=tmp_path), Quiet())
    with pytest.raises(UserError, match=r"other settings \(prompts: .* there, .* here\)"):
        sample_run(runs_root / "text", request(num=3, prompt=("a dog",), out=tmp_path), Quiet())
    # The same prompts from elsewhere are the same samples: nothing is drawn.
    file = tmp_path / "same.txt"
    file.write_text("a cat\na dog\n")
    typed = sample_run(runs_root / "text", request(num=2, prompt=("a cat", "a dog")), Quiet())
    before = typed.images.stat().st_mtime_ns
    read = sample_run(runs_root / "text", request(num=2, prompt=(), prompts=str(file)), Quiet())
    assert read.images == typed.images and read.images.stat().st_mtime_ns == before


def change(**values: object) -> Callable[[dict[str, dict[str, object]]], None]:
    return lambda features: features["text/tiny"].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(sha256="0" * 64), "other weights of tiny"),
        (change(tokenizer="x"), "other vocabulary"),
        (lambda features: features["text/tiny"].pop("name"), "does not say which text encoder"),
    ],
)
def test_another_encoder_than_the_runs_is_refused(
    runs_root: Path, tmp_path: Path, damage: Callable[[dict[str, dict[str, object]]], None], message: str
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(runs_root / "text", run)
    summary = json.loads((run / "cache.json").read_text())
    damage(summary["features"])
    (run / "cache.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=message):
        sample_run(run, request(num=2), Quiet())


def test_what_does_not_fit_the_model_is_refused(runs_root: Path, tmp_path: Path) -> None:
    text, labels = runs_root / "text", runs_root / "labels"
    with pytest.raises(UserError, match="takes text, and it was not said") as caught:
        sample_run(text, request(prompt=()), Quiet())
    assert "--prompt" in str(caught.value.remedy)
    with pytest.raises(UserError, match="--classes is for models that take classes"):
        sample_run(text, request(classes=Classes("random")), Quiet())
    for given, flag in (({}, "--prompt "), ({"prompt": (), "prompts": "x.txt"}, "--prompts ")):
        with pytest.raises(UserError, match=f"{flag}is for models that take text") as caught:
            sample_run(labels, request(**given), Quiet())
        assert "--classes" in str(caught.value.remedy)
    assert not list(tmp_path.iterdir())


def test_as_typed(runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(runs_root / "text")

    def typed(*words: str) -> str:
        done = CliRunner().invoke(app, ["sample", run, "--steps", "2", "--device", "cpu", "--out", *words])
        assert done.exit_code == 0, done.output
        return done.output

    typed("two", "--prompt", "a cat", "--prompt", "a red triangle, large")
    assert np.load("two/samples_2.npz")["arr_0"].shape == (2, 32, 32, 3), "one each"
    assert json.loads(Path("two/prompts.json").read_text())["prompts"] == ["a cat", "a red triangle, large"]
    typed("five", "--prompt", "a cat", "--prompt", "a dog", "--num", "5")
    assert len(np.load("five/samples_5.npz")["arr_0"]) == 5
    Path("p.txt").write_text("one\ntwo\n\nthree\n")
    typed("file", "--prompts", "p.txt")
    assert Path("file/samples_3.npz").is_file() and Path("file/grid_3.png").is_file()
    typed("first", "--prompts", "p.txt", "--num", "2")
    assert Path("first/samples_2.npz").is_file()
    annotations = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}, {"id": 9, "file_name": "c.jpg"}],
        "annotations": [{"id": i, "image_id": of, "caption": f"{of} {i}"} for i, of in enumerate([3, 7, 3, 7, 7])],
    }
    Path("captions_val.json").write_text(json.dumps(annotations))
    said = typed("coco", "--prompts", "captions_val.json", "--seed", "4")
    held = json.loads(Path("coco/prompts.json").read_text())
    assert [text.split()[0] for text in held["prompts"]] == ["7", "3"] and held[
        "source"
    ] == "COCO's captions captions_val.json"
    assert "1 images without captions are passed over" in " ".join(said.split())


@pytest.mark.parametrize("words", [[], ["--prompt", "a", "--prompts", "p.txt"], ["--prompts", "nowhere.txt"]])
def test_errors_as_typed(runs_root: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, ["sample", str(runs_root / "text"), *words])
    assert done.exit_code != 0 and isinstance(done.exception, UserError)
