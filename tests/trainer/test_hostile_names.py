"""Names that try to write on the terminal or into the pages: of classes, files, caches and runs, through every command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import Listener, settings

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.progress import Quiet
from trainer.training.loop import train

MARKUP = "[red]x[bold]"
TITLE = "\x1b]0;pwn\x07"
REVERSED = "\u202egpj.exe"
SCRIPT = "<script>alert(1)<img src=x onerror=alert(2)>"
MATHS = "$\\frac{"
CLASSES = (MARKUP, TITLE, REVERSED, SCRIPT.replace("/", ""), MATHS, "[")
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a cache ``caches/[/]`` and two runs, all with hostile names."""
    from tiny_runs import add_nano

    root = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for name in CLASSES:
        for number in range(2):
            path = root / "data" / name / f"{number}{MARKUP}{TITLE}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    cache = root / "caches" / "[" / "]"
    request = BuildRequest(
        data=str(root / "data"),
        encoders=(EncoderChoice(name="tiny", layers=(1,)),),
        vae="tiny",
        resolution=64,
        batch_size=6,
        shard_size=6,
        out=cache,
        device="cpu",
    )
    build(request, Quiet())
    add_nano()
    for name in (f"{MARKUP}{SCRIPT.replace('/', '')}", MATHS):
        run = train(settings(cache, "repa", name=name, steps=3), resume=False, watcher=Listener(), root=root / "runs")
        with (run / "log.jsonl").open("a") as file:
            hostile = {f"align/{SCRIPT}": 1.0, f"metric/{MATHS}": 2.0, f"metric/{TITLE}": 3.0}
            file.write(json.dumps({"step": 4, "time_s": 9.0, **hostile}) + "\n")
    return root


@pytest.fixture
def typed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs a command as typed in that folder; its exit code and what it printed."""
    from featcache import cli as featcache_cli
    from featcache.console import run_app
    from trainer import cli as trainer_cli

    monkeypatch.chdir(place)

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", list(words))
        code = run_app(featcache_cli.app if words[0] == "featcache" else trainer_cli.app)
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


CACHE = "caches/[/]"
QUICK = ("--device", "cpu", "--set", "batch_size=4", "--set", "images=2")
COMMANDS = [
    (0, "featcache", "info", CACHE),
    (0, "featcache", "ls", "caches/["),
    (0, "featcache", "verify", CACHE),
    (0, "featcache", "gc", CACHE, "--dry-run"),
    (0, "featcache", "inspect", CACHE, "--count", "2", "--data", "data", "--out", "[red].png"),
    (0, "featcache", "plan", "--data", "data", "--encoder", "tiny@1", "--vae", "tiny", "--out", "caches/[/]"),
    (0, "featcache", "convert", CACHE, "caches/[/other", "--to", "wds"),
    (2, "featcache", "info", f"caches/{MARKUP}{TITLE}"),
    (2, "featcache", "ls", f"{MARKUP}{REVERSED}"),
    (2, "trainer", "run", "--recipe", f"[/]{TITLE}"),
    (2, "trainer", "run", "--method", f"[/]{TITLE}"),
    (2, "trainer", "run", "--model", f"[/]{TITLE}", "--cache", CACHE),
    (2, "trainer", "run", "--name", f"[/]{TITLE}", "--cache", CACHE, "--model", "SiT-S/2"),
    (2, "trainer", "run", "--set", f"[/]{TITLE}"),
    (2, "trainer", "run", "--resume", "--name", f"[/]{MARKUP}"),
    (2, "trainer", "sample", f"runs/{TITLE}"),
    (2, "trainer", "sample", f"runs/{MATHS}", "--classes", f"[/]{TITLE}", "--device", "cpu"),
    (2, "trainer", "eval", "--samples", f"[/]{TITLE}", "--reference", "x", "--extractor", "embedded"),
    (0, "trainer", "recipes"),
    (2, "trainer", "recipes", f"[/]{TITLE}"),
    (0, "trainer", "report", f"runs/{MATHS}"),
    (0, "trainer", "report", f"runs/{MARKUP}{SCRIPT}"),
    (0, "trainer", "compare", f"runs/{MATHS}", f"runs/{MARKUP}{SCRIPT}", "--out", "[/].html"),
    (0, "trainer", "export", f"runs/{MATHS}", "[red]weights.pt"),
    (2, "trainer", "analyze", f"runs/{TITLE}", "--what", "selfsim"),
    (2, "trainer", "analyze", f"runs/{MATHS}", "--what", f"[/]{TITLE}"),
    (0, "trainer", "analyze", f"runs/{MATHS}", "--what", "selfsim", *QUICK),
]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(map(ascii, words[1:4])))
def test_no_name_writes_on_the_terminal(words: tuple[int, str], typed: Callable[..., tuple[int, str]]) -> None:
    expected, *command = words
    code, said = typed(*command)
    assert code == expected, said
    assert said and FORBIDDEN.search(said) is None
    assert "MarkupError" not in said and "unforeseen" not in said


@pytest.mark.usefixtures("nano")
def test_names_are_shown_as_they_are(typed: Callable[..., tuple[int, str]]) -> None:
    assert "caches/[/]" in typed("featcache", "info", CACHE)[1]
    assert f"runs/{MARKUP}" in typed("trainer", "report", f"runs/{MARKUP}{SCRIPT}")[1]


@pytest.mark.usefixtures("nano")
def test_damage_is_reported_with_the_name_as_it_is(place: Path, typed: Callable[..., tuple[int, str]]) -> None:
    shard = place / "caches" / "[" / "]" / "label" / "c.0"
    data = shard.read_bytes()
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    code, said = typed("featcache", "verify", CACHE)
    shard.write_bytes(data)
    assert code == 1 and "caches/[/]" in said and FORBIDDEN.search(said) is None


@pytest.mark.usefixtures("nano")
def test_pages_hold_names_as_text(place: Path, typed: Callable[..., tuple[int, str]]) -> None:
    """Nothing of a name becomes an element, and the page forbids scripts and requests whatever it holds."""
    run = place / "runs" / f"{MARKUP}{SCRIPT}"
    (run / "metrics.json").write_text(
        json.dumps([{"step": 3, "metrics": {f"{SCRIPT}FID": 1.0}, "warnings": [SCRIPT], "sampler": {SCRIPT: SCRIPT}}])
    )
    both = (str(run), f"runs/{MATHS}")
    code, said = typed("trainer", "analyze", *both, "--what", "selfsim,spectrum", *QUICK)
    assert code == 0, said
    typed("trainer", "report", str(run))
    typed("trainer", "compare", *both, "--out", "page.html")
    analysis = run / "analysis"
    for page in (run / "report.html", place / "page.html", analysis / "index.html", analysis / "comparison.html"):
        text = page.read_text()
        assert "alert(1)" in text, "the names are on the page"
        assert re.search(r"<script|<img(?! (class=\"small\" )?width)", text) is None
        policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text)
        assert policy is not None and "default-src 'none'" in policy[1] and "script" not in policy[1]
