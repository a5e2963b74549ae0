"""Diagnostics of real, tiny runs: gathering, files, pages, comparison, the command."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markupsafe import escape
from PIL import Image
from tiny_runs import Listener, add_nano, settings

from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.encoders import EncoderChoice
from featcache.errors import CacheError, UserError
from featcache.progress import Quiet
from tests.told import Told
from trainer.align.base import cosine_per_token
from trainer.analyze import DIAGNOSTICS, angle, cknna, codec, diagnostic
from trainer.analyze.angle import shared_gradients
from trainer.analyze.cknna import _above_one
from trainer.analyze.config import AnalyzeConfig
from trainer.analyze.gradients import gsnr
from trainer.analyze.gsnr import measure
from trainer.analyze.probes import OWN, own_loss, own_sample
from trainer.analyze.result import NotApplicable
from trainer.analyze.subject import MIXTURE, Subject
from trainer.models.config import SIZES
from trainer.report import analysis as report_pages
from trainer.report import page
from trainer.report.analyze import analyze_runs
from trainer.runs import checkpoint
from trainer.training.loop import train

METHODS = ("none", "ahpa", "dya", "sra", "sara", "ahpa+repa")


def options(**kw: Any) -> AnalyzeConfig:
    values: dict[str, Any] = {"device": "cpu", "gradient_samples": 6, "bins": 2, "times": (0.3, 0.7), "batch_size": 5}
    return AnalyzeConfig(**(values | {"probe_epochs": 2, "images": 2, "k": 3} | kw))


@pytest.fixture(scope="module")
def runs_root(shapes_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Four-step runs of several methods, checkpoints at steps 2 and 4; a DiT among them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    add_nano()
    root = tmp_path_factory.mktemp("analyze") / "runs"
    for method in METHODS:
        # Discriminator weights cannot be fetched here, which is what the warning says.
        config = settings(shapes_cache, method, name=method, steps=4, checkpoint_every=2)
        train(config, resume=False, watcher=Listener(), root=root)
    dit = settings(shapes_cache, "repa", name="dit", model="DiT-Nano/2", steps=2)
    train(dit, resume=False, watcher=Listener(), root=root)
    yield root
    SIZES.pop("Nano", None)
    torch.set_num_threads(threads)


def subject(run: Path, *, gradients: bool = True, **kw: Any) -> Subject:
    return Subject(run, options(**kw), device="cpu", gradients=gradients)


class _Page(HTMLParser):
    """Headings, captions and everything a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.captions = self.sections = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.captions += tag == "figcaption"
        self.sections += tag == "section"
        self.fetched += [v or "" for k, v in attrs if k == "src" or (tag == "link" and k == "href")]


def test_all_of_a_run(runs_root: Path) -> None:
    (page,) = analyze_runs([runs_root / "ahpa"], list(DIAGNOSTICS), options(images=1), Quiet())
    folder = page.parent
    assert page == runs_root / "ahpa" / "analysis" / "index.html"
    text = page.read_text()
    parsed = _Page(text)
    assert all(source.startswith("data:") for source in parsed.fetched)
    assert parsed.sections == 1 + len(DIAGNOSTICS)
    assert "is left out" not in text
    drawn: list[str] = []
    for what in DIAGNOSTICS:
        assert f'id="{what}"' in text
        document = json.loads((folder / f"{what}.json").read_text())
        drawn += document["plots"]
        with (folder / f"{what}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(document["rows"]) > 0
        assert list(rows[0]) == list(document["rows"][0])
        assert document["run"] == {"name": "ahpa", "step": 4, "method": "ahpa", "model": "SiT-Nano/2"}
    assert sorted(drawn) == sorted(p.stem for p in folder.glob("*.svg")) == sorted(p.stem for p in folder.glob("*.png"))
    assert len(drawn) >= 15
    assert parsed.captions == len(drawn)  # every plot has its sentence
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert np.asarray(image.convert("L")).std() > 1, path  # something is drawn
    for stem in ("gsnr_own", "angle_over_t", "router_groups", "cknna_over_blocks", "probe_over_blocks", "codec_over_t"):
        svg = (folder / f"{stem}.svg").read_text()
        assert "timestep t" in svg or "block" in svg  # labelled axes, as text
    report = (runs_root / "ahpa" / "report.html").read_text()
    for what in DIAGNOSTICS:
        finding = json.loads((folder / f"{what}.json").read_text())["finding"]
        assert escape(finding) in text and escape(finding) in report
    assert 'href="analysis/index.html"' in report


def test_every_layer_of_the_vae_is_a_target(runs_root: Path) -> None:
    at = subject(runs_root / "ahpa")
    names = at.target_names()
    assert [n for n in names if n.startswith("vae/G3")] == ["vae/G3", *at.layers("vae/G3")]
    rows = slice(0, 3)
    state = at.state(rows, 0.5, (at.block,))
    layers = torch.stack([at.target(n, rows, state) for n in at.layers("vae/G3")])
    torch.testing.assert_close(layers.mean(dim=0), at.target("vae/G3", rows, state))
    torch.testing.assert_close(at.read(at.layers("vae/G3")[1], rows), at.read("vae/G3", rows)[:, 1])


def test_layers_are_ordered_by_number(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = subject(runs_root / "none")
    features = at.cache.manifest.features
    monkeypatch.setitem(features, "tiny@11", features["tiny@5"])
    assert at.token_features[-2:] == ["tiny@5", "tiny@11"]


def test_what_does_not_apply_is_left_out_or_refused(runs_root: Path) -> None:
    (page,) = analyze_runs([runs_root / "none"], ["gradient-angle", "router", "spectrum"], options(), Quiet())
    text = page.read_text()
    assert "gradient-angle is left out" in text and "router is left out" in text and 'id="spectrum"' in text
    with pytest.raises(NotApplicable, match="neither a router"):
        analyze_runs([runs_root / "none"], ["router"], options(), Quiet())


@pytest.mark.slow
def test_of_several_runs_those_without_a_router_are_skipped(runs_root: Path) -> None:
    told = Told()
    none, sra, ahpa, dya = (runs_root / name for name in ("none", "sra", "ahpa", "dya"))
    pages = analyze_runs([none, ahpa], ["router"], options(), told)
    assert pages == [ahpa / "analysis" / "index.html"]
    (note,) = told.notes
    assert str(none) in note and "neither a router" in note
    pages = analyze_runs([none, ahpa, dya], ["router"], options(), Quiet())
    assert pages == [
        run / "analysis" / name for run, name in ((ahpa, "comparison.html"), (ahpa, "index.html"), (dya, "index.html"))
    ]
    with pytest.raises(NotApplicable, match="neither a router"):
        analyze_runs([none, sra], ["router"], options(), Quiet())


def test_a_cache_without_features(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "token_features", property(lambda self: []))
    monkeypatch.setattr(Subject, "levels", property(lambda self: []))
    asked = ["gsnr", "cknna", "probe", "spectrum", "selfsim", "pca", "codec"]
    (page,) = analyze_runs([runs_root / "none"], asked, options(times=(0.5,), images=1), Quiet())
    text = page.read_text()
    assert "cknna is left out" in text and "codec is left out" in text
    assert all(f'id="{what}"' in text for what in ("gsnr", "probe", "spectrum", "selfsim", "pca"))


def test_a_second_call_replaces_its_own_and_keeps_the_rest(runs_root: Path) -> None:
    run = runs_root / "dya"
    cheap = {"times": (0.5,), "against": ("tiny@5",)}
    (page,) = analyze_runs([run], ["router", "pca"], options(images=2), Quiet())
    first = page.read_text()
    analyze_runs([run], ["cknna", "pca"], options(images=1, **cheap), Quiet())
    text = page.read_text()
    order = [text.index(f'<section id="{what}"') for what in ("router", "cknna", "pca")]
    assert order == sorted(order)
    assert text.count('<section id="pca"') == 1 and text.count('href="#pca"') == 1
    section = first[first.index('<section id="router"') :].split("</section>")[0]
    assert section in text
    # Two pictures were drawn at first, one now: the other is gone, the router's are not.
    stems = {p.stem for p in page.parent.glob("*.png")}
    assert "pca_0" in stems and "pca_1" not in stems and "router_xi" in stems
    # A diagnostic that stops to apply takes its section and files along.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Subject, "methods", property(lambda self: {}))
        analyze_runs([run], ["router", "cknna"], options(**cheap), Quiet())
    text = page.read_text()
    assert "router is left out" in text and '<section id="router"' not in text
    assert not list(page.parent.glob("router*"))


def test_two_calls_at_once_both_stay_on_the_page(
    runs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits (for a while) until the other is as far as itself, where it has read the page and not yet written it."""
    shutil.copytree(runs_root / "none", tmp_path / "run")
    run, meeting = tmp_path / "run", threading.Barrier(2)
    real = page.write_page

    def late(*args: Any, **values: Any) -> Path:
        with contextlib.suppress(threading.BrokenBarrierError):
            meeting.wait(timeout=1)
        return real(*args, **values)

    monkeypatch.setattr(report_pages, "write_page", late)
    failed: list[Exception] = []

    def call(what: str) -> None:
        try:
            analyze_runs([run], [what], options(images=1), Quiet())
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(what,)) for what in ("selfsim", "spectrum")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    text = (run / "analysis" / "index.html").read_text()
    assert all(f'<section id="{what}"' in text for what in ("selfsim", "spectrum"))
    assert not [p.name for p in (run / "analysis").iterdir() if p.name.startswith(".")], "locks come and go"


def test_diagnostics_follow_no_link_and_trust_no_file(runs_root: Path, tmp_path: Path) -> None:
    shutil.copytree(runs_root / "none", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "analysis", ignore_errors=True)
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.svg").write_text("a secret")
    (run / "analysis").symlink_to(outside)
    with pytest.raises(UserError, match="analysis is a symbolic link"):
        analyze_runs([run], ["selfsim"], options(images=1), Quiet())
    (run / "analysis").unlink()
    analyze_runs([run], ["selfsim"], options(images=1), Quiet())
    (drawn,) = json.loads((run / "analysis" / "selfsim.json").read_text())["plots"][:1]
    for content in (
        json.dumps({"plots": ["../../outside/secret"]}),
        json.dumps({"plots": ["x\0y", 7]}),
        json.dumps({"plots": {"a": 1}}),
        "[]",
        "{",
    ):
        (run / "analysis" / "selfsim.json").write_text(content)
        (run / "analysis" / f"{drawn}.svg").unlink()
        (run / "analysis" / f"{drawn}.svg").symlink_to(outside / "secret.svg")
        (run / "analysis" / "index.html").write_bytes(b"\xff")
        (run / "analysis" / f"old.png.{'0' * 16}.part").write_text("half")
        analyze_runs([run], ["selfsim"], options(images=1), Quiet())
        assert "<svg" in (run / "analysis" / f"{drawn}.svg").read_text()
        assert not list((run / "analysis").glob("*.part"))
    assert [p.read_text() for p in outside.iterdir()] == ["a secret"]


@pytest.mark.slow
def test_comparison_has_one_line_a_run(runs_root: Path) -> None:
    runs = [runs_root / "ahpa", runs_root / "none"]
    asked = options(times=(0.5,), against=("tiny@5", "vae/G4"), images=1)
    pages = analyze_runs(runs, ["cknna", "pca"], asked, Quiet())
    folder = runs[0] / "analysis"
    assert pages[0] == folder / "comparison.html" and len(pages) == 3
    text = pages[0].read_text()
    assert "ahpa: CKNNA" in text and "none: CKNNA" in text
    # One yardstick, whatever each run was aligned with.
    assert "With tiny@5" in text
    table = json.loads((folder / "comparison.json").read_text())["diagnostics"]
    (plot,) = (p for p in table["cknna"]["drawings"] if p["name"] == "comparison_cknna_over_blocks")
    lines = plot["drawing"]["series"]
    own = json.loads((runs[1] / "analysis" / "cknna.json").read_text())["rows"]
    assert lines[1]["y"] == [r["cknna"] for r in own if r["b"] == "tiny@5" and r["block"]]
    assert (folder / "comparison_pca_0.png").is_file()
    # Other diagnostics of the same runs are added; a line that only one run has is no comparison.
    again = analyze_runs(runs, ["gsnr"], asked, Quiet())[0].read_text()
    assert "With tiny@5" in again and "ahpa: latent" in again and "ahpa: own loss" not in again
    # Other runs make another comparison: nothing of the old one stays.
    runs[1] = runs_root / "dya"
    other = analyze_runs(runs, ["cknna"], asked, Quiet())[0].read_text()
    assert "none" not in json.loads((folder / "comparison.json").read_text())["compared"][1]
    assert 'id="gsnr"' not in other and "dya: CKNNA" in other
    assert not (folder / "comparison_gsnr_levels.png").exists() and not (folder / "comparison_pca_0.svg").exists()
    with pytest.raises(UserError, match="twice"):
        analyze_runs([runs[0], runs[0]], ["cknna"], options(), Quiet())


@pytest.mark.parametrize("wrt", ["hidden", "block"])
def test_gsnr_of_the_own_loss_is_that_of_single_backward_passes(runs_root: Path, wrt: str) -> None:
    at = subject(runs_root / "dya", wrt=wrt, batch_size=3)
    found = measure(at)
    assert OWN in found and MIXTURE not in found
    block = at.model.blocks[at.block - 1]
    for index in range(2):
        gradients = []
        for i in range(6):
            rows = slice(i, i + 1)
            t = at.times_in_bin(rows, index, 2)
            state = at.state(rows, t, targets=True)
            assert at.alignment is not None
            if wrt == "hidden":
                leaf = state.hidden[at.block].requires_grad_()
                sum(at.alignment.terms(state).values()).backward()  # type: ignore[union-attr]
                gradients.append(leaf.grad.flatten())  # type: ignore[union-attr]
            else:
                block.requires_grad_(True)
                block.zero_grad()
                out = block(*at.block_input(rows, t))
                torch.testing.assert_close(out.detach(), state.hidden[at.block], rtol=1e-4, atol=1e-5)
                state.hidden[at.block] = out  # type: ignore[index]
                sum(at.alignment.terms(state).values()).backward()  # type: ignore[union-attr]
                gradients.append(torch.cat([p.grad.flatten() for p in block.parameters()]))  # type: ignore[union-attr]
                block.requires_grad_(False)
        g = torch.stack(gradients).double().numpy()
        trace = sum(np.var(g[:, p], ddof=1) for p in range(g.shape[1]))
        assert gsnr(found[OWN][index]) == pytest.approx((g.mean(axis=0) ** 2).sum() / trace, rel=1e-3)


def test_batch_size_changes_no_number(runs_root: Path) -> None:
    one, two = (measure(subject(runs_root / "ahpa", batch_size=b)) for b in (2, 6))
    assert MIXTURE in one
    for name in one:
        for a, b in zip(one[name], two[name]):
            assert gsnr(a) == pytest.approx(gsnr(b), rel=1e-3), name


@pytest.mark.parametrize("method", ["sra", "sara", "ahpa+repa", "dit"])
def test_gsnr_works_for_every_kind_of_method(runs_root: Path, method: str) -> None:
    at = subject(runs_root / method)
    values = [gsnr(m) for m in measure(at)[OWN]]
    assert all(np.isfinite(values)) and min(values) > 0
    # The batched per-sample losses are the method's own: their mean is the loss of the batch.
    assert at.alignment is not None
    rows = slice(0, 4)
    state = at.state(rows, at.times_in_bin(rows, 0, 2), targets=True)
    batched = torch.func.vmap(own_loss(at))(dict(state.hidden), own_sample(at, state))
    torch.testing.assert_close(batched.mean(), torch.stack(list(at.alignment.terms(state).values())).sum())


def test_angle_is_that_of_one_backward_pass_over_all(runs_root: Path) -> None:
    at = subject(runs_root / "ahpa", batch_size=4)
    at.model.requires_grad_(True)
    pair = shared_gradients(at, 1, 2, 6)
    whole = subject(runs_root / "ahpa", batch_size=6)
    whole.model.requires_grad_(True)
    again = shared_gradients(whole, 1, 2, 6)
    assert pair.plugin == pytest.approx(again.plugin, rel=1e-3)
    # Both losses by hand, at block 1..tap.
    rows = slice(0, 6)
    t = whole.times_in_bin(rows, 1, 2)
    latent, noise = whole.latent(rows), whole.noise(rows)
    tap = whole.alignment.taps[0]  # type: ignore[union-attr]
    reads = {n: whole.read(n, rows) for n in whole.alignment.reads}  # type: ignore[union-attr]
    x = (1 - t[:, None, None, None]) * latent + t[:, None, None, None] * noise
    out = whole.model(x, t, whole.labels[rows], taps=(tap,))
    method: Any = whole.alignment
    weights = method.router(t)
    parts = [
        weights.inter[:, g, None, None] * (weights.intra[g][:, :, None, None] * y).sum(dim=1)
        for g, y in enumerate(reads.values())
    ]
    losses = [
        (out.prediction - (noise - latent)).square().mean(),
        -cosine_per_token(method.heads[0](out.hidden[tap]), torch.cat(parts, dim=-1)).mean(),
    ]
    parameters = [p for block in whole.model.blocks[:tap] for p in block.parameters()]
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    both = [(d, a) for d, a in zip(*found) if d is not None and a is not None]
    denoise, align = (torch.cat([pair[k].flatten() for pair in both]) for k in (0, 1))
    assert again.plugin == pytest.approx(torch.cosine_similarity(denoise, align, dim=0).item(), rel=1e-3)
    for mean, expected in zip(again.means, (denoise, align)):
        torch.testing.assert_close(torch.cat([g.flatten() for g in mean]), expected, rtol=1e-3, atol=1e-5)
    assert again.parameters == len(denoise)


def test_weights_are_what_was_asked_for_and_the_trained_ones_for_gradients(runs_root: Path) -> None:
    run = runs_root / "ahpa"
    _, path = checkpoint.find_checkpoint(run, None)
    held = {kind: checkpoint.load_tensors(path, kind) for kind in ("model", "ema")}
    name = next(n for n, value in held["model"].items() if not torch.equal(value, held["ema"][n]))
    for asked, kind in (("auto", "model"), ("model", "model"), ("ema", "ema")):
        taken = subject(run, weights=asked)
        assert taken.weights == kind and taken.labelled
        assert torch.equal(dict(taken.model.named_parameters())[name].data, held[kind][name])
    assert angle.run(subject(run, weights="ema", checkpoints=1)).settings["weights"] == "ema"


def test_representations_see_no_label(runs_root: Path) -> None:
    hidden = subject(runs_root / "none", gradients=False, weights="model")
    given = subject(runs_root / "none", gradients=False, weights="model", labels="given")
    rows = slice(0, 4)
    assert (hidden.conditioning(rows) == hidden.cfg.num_classes).all()
    assert (given.conditioning(rows) == given.labels[rows]).all()
    assert subject(runs_root / "none").labelled
    a, b = (s.hidden(rows, 0.5, (1,))[1] for s in (hidden, given))
    assert not torch.allclose(a, b)


def test_pooled_states_are_means_over_tokens(runs_root: Path) -> None:
    at = subject(runs_root / "dit", gradients=False, samples=11)
    pooled = at.pooled(0.3)
    assert pooled.shape == (4, 11, 48)
    rows = slice(5, 10)
    torch.testing.assert_close(pooled[2, rows], at.hidden(rows, 0.3, (3,))[3].mean(dim=1), rtol=1e-4, atol=1e-5)


def test_bad_input(runs_root: Path, tmp_path: Path) -> None:
    def run(path: Path, what: str, **kw: Any) -> None:
        analyze_runs([path], [what], options(**kw), Quiet())

    with pytest.raises(UserError, match="not a run"):
        run(tmp_path, "cknna")
    with pytest.raises(UserError, match="no checkpoint at step 3"):
        run(runs_root / "none", "cknna", step=3)
    with pytest.raises(UserError, match="4 blocks"):
        run(runs_root / "none", "cknna", block=9)
    with pytest.raises(UserError, match="neither a cached feature"):
        run(runs_root / "none", "cknna", against=("dinov2-b@11",))
    with pytest.raises(UserError, match="patch 99"):
        run(runs_root / "none", "selfsim", patch=99)
    summary = runs_root / "none" / "cache.json"
    saved = summary.read_text()
    summary.write_text(json.dumps(json.loads(saved) | {"path": str(tmp_path / "gone")}))
    try:
        with pytest.raises(CacheError, match="cannot be opened"):
            run(runs_root / "none", "cknna")
    finally:
        summary.write_text(saved)


def test_pairs_of_representations(runs_root: Path) -> None:
    asked = options(pairs=("block2:0.5,tiny@5", "vae/G3, vae/G4"), against=("tiny@5",))
    analyze_runs([runs_root / "dya"], ["cknna"], asked, Quiet())
    rows = json.loads((runs_root / "dya/analysis/cknna.json").read_text())["rows"]
    found = {(row["a"], row["b"]): row for row in rows}
    assert {("block2:0.5", "tiny@5"), ("vae/G3", "vae/G4"), ("block4:0.7", "tiny@5")} <= found.keys()
    assert 0 < found["vae/G3", "vae/G4"]["cka"] <= 1


def test_command(cli: Callable[..., subprocess.CompletedProcess[str]], shapes_cache: Path, tmp_path: Path) -> None:
    config = settings(shapes_cache, "none", name="typed", steps=2, model="SiT-Ti/8")
    train(config, resume=False, watcher=Listener(), root=tmp_path / "runs")
    words = ("trainer", "analyze", "runs/typed", "--what", "spectrum,router", "--samples", "8", "--set", "times=[0.5]")
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    assert "runs/typed/analysis/index.html" in done.stdout.replace("\n", "")
    assert (tmp_path / "runs/typed/analysis/spectrum.csv").is_file()
    wrong = cli("trainer", "analyze", "runs/typed", "--what", "spectra")
    assert wrong.returncode == 2
    assert "no diagnostic 'spectra'" in wrong.stderr + wrong.stdout and "Traceback" not in wrong.stderr


def test_values_above_one_and_distances_from_uniform_are_explained(runs_root: Path, tmp_path: Path) -> None:
    assert _above_one([{"cknna": 0.99}, {"cknna": float("nan")}], "unbiased", 20) == ""
    said = _above_one([{"cknna": 1.01}], "unbiased", 20)
    assert "above 1" in said and "as few as 20" in said and "--set cknna=paper" in said
    run = shutil.copytree(runs_root / "ahpa", tmp_path / "ahpa")
    analyze_runs([run], ["router"], options(), Quiet())
    finding = json.loads((run / "analysis/router.json").read_text())["finding"]
    assert "each of the 2 groups 50.0 %" in finding and "percentage points away" in finding


# What a user sees of it


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images, two in each of eight classes."""
    root = tmp_path_factory.mktemp("images") / "photographs"
    generator = np.random.default_rng(0)
    for i in range(16):
        folder = root / f"class{i % 8}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run_of_photographs(photographs: Path, runs_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("caches") / "photographs"
    encoders = (EncoderChoice(name="tiny", layers=(5,)),)
    build(BuildRequest(data=str(photographs), encoders=encoders, vae="tiny", resolution=64, out=cache), Quiet())
    config = settings(cache, "repa", name="photographs", steps=1)
    return train(config, resume=False, watcher=Listener(), root=runs_root)


@pytest.mark.parametrize(("known", "title"), [(True, "image"), (False, "decoded latent")])
def test_the_images_are_found_and_what_is_shown_is_named(
    run_of_photographs: Path, photographs: Path, monkeypatch: pytest.MonkeyPatch, known: bool, title: str
) -> None:
    monkeypatch.delenv("FEATCACHE_DATA", raising=False)
    if known:
        monkeypatch.setenv("FEATCACHE_DATA", str(photographs))
    monkeypatch.chdir(photographs)
    analyze_runs([run_of_photographs], ["pca", "selfsim"], options(), Quiet())
    for what in ("pca", "selfsim"):
        document = json.loads((run_of_photographs / "analysis" / f"{what}.json").read_text())
        assert {plot["drawing"]["columns"][0] for plot in document["drawings"]} == {title}


def test_other_images_are_not_taken_for_the_caches(
    run_of_photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a" / "1.png")
    monkeypatch.setenv("FEATCACHE_DATA", str(tmp_path))
    assert subject(run_of_photographs).source is None
    with pytest.raises(UserError, match="does not hold the images"):
        _ = subject(run_of_photographs, data=str(tmp_path)).source


@pytest.mark.parametrize(
    ("samples", "cached", "remedy"),
    [(10, 16, "--samples 16"), (None, 12, "It would take a cache of 16 images or more")],
)
def test_a_probe_of_single_images_is_refused_before_any_work(
    run_of_photographs: Path, monkeypatch: pytest.MonkeyPatch, samples: int | None, cached: int, remedy: str
) -> None:
    """It took twenty minutes to find an accuracy of zero."""
    at = subject(run_of_photographs, gradients=False, samples=samples)
    monkeypatch.setattr(at, "indices", at.indices[: min(len(at.indices), cached)])
    monkeypatch.setattr(at, "labels", torch.arange(len(at.indices)) % 8)
    monkeypatch.setattr(type(at.cache), "__len__", lambda _: cached)
    monkeypatch.setattr(at, "pooled", lambda *_: pytest.fail("it computed"))
    with pytest.raises(NotApplicable, match=r"of 8 classes: 1\.[25] of each, where it takes at least two") as refused:
        diagnostic("probe")(at)
    assert remedy in (refused.value.remedy or "")


def test_each_diagnostic_says_how_far_it_is(run_of_photographs: Path) -> None:
    told = Told()
    asked = ["gsnr", "router", "probe", "pca"]
    analyze_runs([run_of_photographs], asked, options(samples=16), told)
    assert [name for name, *_ in told.tasks] == [
        f"photographs: {what} ({i} of {len(asked)})" for i, what in enumerate(asked, start=1)
    ]
    assert sum(told.counts) >= 6 * 2 + 16 * 2  # gsnr: six samples in two bins; probe: all samples at both times
    assert "probing the blocks at t = 0.3" in told.texts and "probing tiny@5" in told.texts
    assert any(note.startswith("router is left out: ") for note in told.notes)


def test_the_block_named_is_the_one_where_the_target_was_aligned(runs_root: Path) -> None:
    """Not the block looked at, nor another method's; of a run that aligned with something else, none."""
    both = subject(runs_root / "ahpa+repa", gradients=False)
    taps = {name: method.taps for name, method in both.methods.items()}
    asked: dict[str, Any] = {"gradients": False, "samples": 12, "block": 1}
    said = cknna.run(subject(runs_root / "ahpa+repa", **asked)).finding
    assert f"(tiny@5 was aligned with after block {taps['repa'][0]})" in said
    assert "aligned" not in cknna.run(subject(runs_root / "none", **asked)).finding
    assert "aligned" not in cknna.run(subject(runs_root / "sra", **asked)).finding


def test_nothing_is_said_of_the_storage_where_exact_features_are_not_here(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded once, the same rounding changes nothing: 0 degrees of nothing."""
    assert "The cache stores" in codec.run(subject(runs_root / "ahpa")).finding
    monkeypatch.setattr(codec, "recompute", lambda *_: None)
    said = codec.run(subject(runs_root / "ahpa")).finding
    assert "The cache stores" not in said and "The coarsest codec" in said and "as the cache holds them" in said
