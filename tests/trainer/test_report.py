"""Reports from made-up run directories: what is read, what is written, and how a browser shows it."""

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from featcache.errors import UserError
from trainer.evaluate.table import higher_is_better
from trainer.plots import Chart, Series
from trainer.report import (
    Figure,
    PublishedFigure,
    RunData,
    load_run,
    router_chart,
    write_comparison,
    write_report,
)
from trainer.report.charts import render_svg, smooth, smoothed_series
from trainer.report.data import read_columns
from trainer.report.report import _evaluated, _step_charts, _time_charts
from trainer.report.table import measure_words
from trainer.typeset import measure, number

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def grid(seed: int, *, tiles: int = 4, side: int = 32) -> np.ndarray:
    """A picture of coloured discs, one a tile: uint8 [tiles * side, tiles * side, 3]."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:side, :side] / side - 0.5
    rows = []
    for _ in range(tiles):
        row = []
        for _ in range(tiles):
            inside = (xx**2 + yy**2 < rng.uniform(0.04, 0.2))[..., None]
            row.append(np.where(inside, rng.integers(0, 256, 3), rng.integers(0, 256, 3)))
        rows.append(np.concatenate(row, 1))
    return np.concatenate(rows, 0).astype(np.uint8)


def make_run(
    path: Path, *, method: str = "ahpa", level: float = 0.8, points: int = 200, seconds_a_step: float = 0.5
) -> Path:
    """Write a run directory as the trainer does, with made-up contents."""
    path.mkdir(parents=True)
    config = {"name": path.name, "method": {"name": method}, "model": "SiT-Ti/2", "seed": 0, "steps": 10 * points}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    dataset = {"name": "shapes", "preprocessing": {"resolution": 32}}
    (path / "cache.json").write_text(
        json.dumps({"path": "caches/shapes", "fingerprint": "0f" * 32, "dataset": dataset})
    )
    rng = np.random.default_rng(len(path.name))
    lines = []
    for step in range(10, 10 * points + 1, 10):
        denoise = level + 1.2 * math.exp(-step / 300) + rng.normal() * 0.05
        cosine = -0.6 * (1 - math.exp(-step / 500)) + rng.normal() * 0.02
        entry = {
            "step": step,
            "time_s": step * seconds_a_step,
            "images_per_s": 100 + rng.normal(),
            "loss": denoise + (cosine if method != "none" else 0),
            "denoise": denoise,
            "lr": 1e-4,
            "grad_norm": abs(rng.normal()) + 0.3,
        }
        if method != "none":
            entry["align/cosine"] = cosine
        lines.append(json.dumps(entry))
    (path / "log.jsonl").write_text("\n".join(lines) + "\n")
    evaluations = []
    (path / "samples").mkdir()
    for index, step in enumerate((500, 1000, 1500, 2000)):
        Image.fromarray(grid(index)).save(path / "samples" / f"step_{step:07d}.png")
        value = level * 100 / (index + 1)
        evaluations.append(
            {
                "step": step,
                "metrics": {"embedded-FID": value, "embedded-Precision": 0.5 + 0.1 * index},
                "intervals": {"embedded-FID": [value - 1, value + 1]},
                "settings": {"extractor": {"extractor": "embedded"}, "sample_count": 500},
                "sampler": {"name": "sde-euler-maruyama", "steps": 50, "guidance": 1.5, "interval": [0, 0.7]},
                "warnings": ["500 samples: FID is biased upwards below 50,000."],
            }
        )
    (path / "metrics.json").write_text(json.dumps(evaluations))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunData]:
    root = tmp_path_factory.mktemp("runs")
    return [
        load_run(make_run(root / "demo-ahpa")),
        load_run(make_run(root / "demo-none", method="none", level=0.9, seconds_a_step=0.45)),
    ]


def demo_report(out: Path, runs: list[RunData]) -> Path:
    """A page with everything a report can hold."""
    t = np.linspace(0, 1, 50)
    levels = {
        f"{g} {name}": (1 + np.sin(3 * t + i)) / 8
        for i, (g, name) in enumerate(
            [
                ("G3", "down2.res0"),
                ("G3", "down2.res1"),
                ("G3", "down2.downsample"),
                ("G3", "down3.res0"),
                ("G4", "down3.res1"),
                ("G4", "mid.res0"),
                ("G4", "mid.attn"),
                ("G4", "mid.res1"),
            ]
        )
    }
    return write_report(
        out,
        runs,
        title="AHPA against no alignment",
        lead="SiT-Ti/2 on 2,000 embedded shapes at 32 pixels, 2,000 steps each, same seed.",
        images=[
            Figure(image=grid(99), title="Real images.", caption="Drawn from the cache.", alt="Grid of real images"),
            Figure(
                image=np.concatenate([grid(i) for i in range(6)], 1),
                title="Cached features.",
                caption="First three principal components as colours: G3, G4, tokens.",
                alt="Features as colours",
                section="features",
                wide=True,
            ),
        ],
        charts=[
            router_chart(
                t, {"G3": 1 / (1 + np.exp(5 * t - 2)), "G4": 1 - 1 / (1 + np.exp(5 * t - 2))}, title="Router: groups"
            ),
            router_chart(t, levels, title="Router: layers"),
        ],
        published=[PublishedFigure(metric="FID", value=8.1, source="AHPA, Table 3", run=runs[0].name)],
    )


class Page(HTMLParser):
    """Collects what tests ask about: texts, pictures, links, and whether tags nest."""

    VOID = ("meta", "link", "img", "br", "path", "use", "rect")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.scripts = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.pictures.append(values)
        self.scripts += tag == "script" or any(name.startswith("on") for name in values)
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)


def read(path: Path) -> tuple[Page, str]:
    page = Page(path.read_text(encoding="utf-8"))
    return page, re.sub(r"[ \n]+", " ", " ".join(page.texts))


def test_report_is_one_self_contained_file_without_scripts(tmp_path: Path, runs: list[RunData]) -> None:
    out = demo_report(tmp_path / "deep" / "report.html", runs)
    page, text = read(out)
    assert page.open == []
    assert page.scripts == 0
    assert all(r.startswith(("data:", "#")) for r in page.references)
    assert "url(http" not in out.read_text() and "@import" not in out.read_text()
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    assert len(page.pictures) == 4 and all(p["alt"] for p in page.pictures)
    for phrase in ("AHPA against no alignment", "demo-ahpa, step 2\u202f000.", "Alignment: cosine", "Router: layers"):
        assert phrase in text
    assert text.index("Samples") < text.index("Curves") < text.index("Numbers") < text.index("Settings to reproduce")


def test_numbers_stand_with_their_names_intervals_and_published_figures(tmp_path: Path, runs: list[RunData]) -> None:
    _, text = read(demo_report(tmp_path / "report.html", runs))
    assert "embedded-FID ↓ 20.00 95 %: 19.00 to 21.00 22.50" in text
    assert "embedded-Precision ↑ 0.800" in text
    assert "demo-none Published AHPA, Table 3" in text  # one source for all figures stands once, at the top
    assert "FID ↓ not measured not measured 8.10 (demo-ahpa)" in text
    assert "they are not FID" in text
    assert "500 samples: FID is biased upwards below 50,000." in text
    judged = "sde-euler-maruyama, steps 50, guidance 1.5, interval 0 to 0.7."
    assert f"Judged samples of demo-ahpa and demo-none: {judged}" in text
    assert "Method ahpa none" in text
    expected = np.median(runs[0].log["images_per_s"].values)
    assert f"Images/s (median) {measure(float(expected))}" in text


def test_figures_of_several_sources_name_them_each(tmp_path: Path, runs: list[RunData]) -> None:
    published = [
        PublishedFigure(metric="FID", value=8.1, source="AHPA, Table 3"),
        PublishedFigure(metric="FID", value=7.9, source="REPA, Table 3"),
    ]
    _, text = read(write_report(tmp_path / "report.html", runs[:1], title="t", published=published))
    assert "FID ↓ not measured 8.10 AHPA, Table 3 7.90 REPA, Table 3" in text


def test_curves_join_only_evaluations_done_alike(tmp_path: Path, runs: list[RunData]) -> None:
    def entry(step: int, count: int, steps: int, value: float) -> dict[str, object]:
        return {
            "step": step,
            "metrics": {"FID": value},
            "settings": {"sample_count": count},
            "sampler": {"steps": steps},
        }

    alike = [entry(100, 50_000, 250, 30.0), entry(200, 50_000, 250, 20.0)]
    other = [entry(150, 1_000, 250, 90.0), entry(160, 50_000, 32, 80.0)]
    for evaluations, drawn in ((alike[:1] + other + alike[1:], True), (other + alike[1:], False)):
        run = replace(runs[0], evaluations=evaluations)
        _, text = read(write_report(tmp_path / "r.html", [run], title="t"))
        assert ("FID (lower is better)" in text) is drawn
        assert "FID ↓ 20.00" in text
        if drawn:
            assert list(_evaluated(run, "FID", None).steps) == [100, 200]


def test_better_values_are_marked(tmp_path: Path, runs: list[RunData]) -> None:
    html = demo_report(tmp_path / "report.html", runs).read_text(encoding="utf-8")
    assert html.count('class="best"') == 1  # equal precisions: neither is better
    assert 'class="best">20.00' in html
    assert higher_is_better("IS") and higher_is_better("embedded-Recall") and higher_is_better("Precision-DINOv2")
    assert not higher_is_better("FID") and not higher_is_better("sFID") and not higher_is_better("KD-DINOv2")


def test_comparison_shows_equal_steps_equal_time_and_strips(tmp_path: Path, runs: list[RunData]) -> None:
    page, text = read(write_comparison(tmp_path / "compare.html", runs))
    assert "At equal steps" in text and "At equal time" in text
    by_step, by_time = text[text.index("At equal steps") :].split("At equal time")
    assert by_step.count("training step") == 7  # speed among them
    assert by_time.count("training time (min)") == 2  # the denoising loss and FID
    assert "Denoising term" in by_time and "embedded-FID (lower is better)" in by_time
    assert "from the same noise" in text
    strips = [p for p in page.pictures if p["width"] == "32"]
    assert len(strips) == 3 * 2 * 4  # tiles, runs, steps
    other = RunData(name="other", config={"seed": 1}, samples=runs[0].samples)
    assert "different seeds" in read(write_comparison(tmp_path / "seeds.html", [runs[0], other]))[1]


def test_a_comparison_says_which_run_was_not_judged(tmp_path: Path, runs: list[RunData]) -> None:
    def row(shown: list[RunData]) -> str:
        _, text = read(write_comparison(tmp_path / "c.html", shown))
        return text.partition("Evaluated at step")[2][:60]

    assert "not judged" in row([runs[0], replace(runs[1], evaluations=[])])
    assert "not judged" not in row(runs)


def test_texts_are_escaped(tmp_path: Path) -> None:
    nasty = "<script>alert('x')</script>&"
    run = RunData(
        name=nasty,
        config={"method": nasty, "model": nasty},
        config_text=nasty,
        evaluations=[{"step": 1, "metrics": {nasty: 1.0}, "sampler": {nasty: nasty}, "warnings": [nasty]}],
    )
    page, text = read(write_report(tmp_path / "r.html", [run], title=nasty, lead=nasty))
    assert page.scripts == 0 and page.open == []
    assert nasty in text


def test_a_run_that_has_only_begun_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("method: none\n")
    (tmp_path / "new/samples").mkdir()
    (tmp_path / "new/samples/step_².png").write_text("a file of somebody else's")
    run = load_run(tmp_path / "new")
    assert run.steps is None and run.last("loss") is None
    _, text = read(write_report(tmp_path / "r.html", [run], title="new"))
    assert "Settings to reproduce" in text and "Curves" not in text


def test_log_survives_a_torn_line_and_a_resume(tmp_path: Path) -> None:
    lines = [{"step": s, "time_s": s / 2, "loss": 10.0 - s, "align/cos": -0.1 * s} for s in (1, 2, 3, 4)]
    lines += [{"step": 3, "time_s": 2.0, "loss": 70.0}]  # resumed from step 2
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"step": 4, "lo'
    (tmp_path / "log.jsonl").write_text(text)
    log = read_columns(tmp_path / "log.jsonl")
    assert log["loss"].steps.tolist() == [1, 2, 3] and log["loss"].values.tolist() == [9, 8, 70]
    assert log["loss"].time_s.tolist() == [0.5, 1, 2]
    (tmp_path / "log.jsonl").write_text(text.replace('{"step": 2', '{"stop": 2'))
    with pytest.raises(UserError, match="line 2 of"):
        read_columns(tmp_path / "log.jsonl")


def test_evaluations_during_training_that_were_measured_otherwise_make_no_curve(tmp_path: Path) -> None:
    """A resumed run may judge more samples: a line from few to many would look like progress."""
    key, few, many = "eval/embedded-FID", "64 samples compared with a", "256 samples compared with a"
    run, other = make_run(tmp_path / "long"), make_run(tmp_path / "other")

    def write(path: Path, measured: list[tuple[int, str, float]]) -> None:
        lines = [{"step": at, "loss": 1.0, key: fid, **({"eval_of": how} if how else {})} for at, how, fid in measured]
        (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write(run, [(100, few, 90.0), (200, few, 80.0), (300, many, 40.0), (400, many, 35.0)])
    column = read_columns(run / "log.jsonl")[key]
    assert column.steps.tolist() == [300, 400] and (column.conditions, column.others) == (many, 2)
    _, text = read(write_report(tmp_path / "r.html", [load_run(run)], title="r"))
    assert f"Measured of {many}. long: left out are earlier evaluations (2) that were measured otherwise" in text

    write(other, [(100, "", 90.0), (200, "", 80.0)])  # by a version that did not say how
    column = read_columns(other / "log.jsonl")[key]
    assert column.steps.tolist() == [100, 200] and (column.conditions, column.others) == ("", 0)
    write(other, [(100, "", 90.0), (200, few, 80.0)])
    column = read_columns(other / "log.jsonl")[key]
    assert column.steps.tolist() == [200] and (column.conditions, column.others) == (few, 1)
    _, text = read(write_comparison(tmp_path / "c.html", [load_run(run), load_run(other)], title="c"))
    assert f"Measured of {many} (long); of {few} (other). So these curves cannot be compared." in text

    (run / "log.jsonl").write_text(json.dumps({"step": 1, "eval_of": few, key: 2.0, "eval/prompts_obeyed": 0.5}) + "\n")
    with (run / "log.jsonl").open("a") as file:  # prompts are no longer asked for: what was obeyed before stays a curve
        file.write(json.dumps({"step": 2, "eval_of": many, key: 1.0}) + "\n")
    kept = read_columns(run / "log.jsonl")
    assert kept["eval/prompts_obeyed"].values.tolist() == [0.5] and kept[key].values.tolist() == [1.0]


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run at"):
        load_run(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.yaml"):
        load_run(tmp_path)
    path = make_run(tmp_path / "run", points=10)
    (path / "metrics.json").write_text("[{")
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        load_run(path)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", points=10)
    broken = path / "samples" / "step_0002000.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(UserError, match=r"step_0002000\.png is not an image"):
        write_report(tmp_path / "r.html", [load_run(path)], title="t")


def test_smoothing_is_neither_early_nor_late() -> None:
    line = np.linspace(3.0, 1.0, 41)
    assert smooth(line, span=11)[:36] == pytest.approx(line[:36])
    assert smooth(np.full(9, 3.0), span=5) == pytest.approx(np.full(9, 3.0))
    noisy = np.random.default_rng(0).normal(size=400)
    assert smooth(noisy, span=21)[200] == pytest.approx(noisy[190:211].mean())
    assert smooth(noisy, span=21)[-1] == pytest.approx(noisy[-21:].mean())
    assert len(smooth(np.empty(0), span=5)) == 0


def test_values_before_a_jump_are_not_averaged_with_those_after_it() -> None:
    x = np.arange(2.0, 202, 2)
    y = np.where(x <= 80, 0.0, 1.0)
    blurred = smoothed_series("a", x, y, colour=0)
    cut = smoothed_series("a", x, y, colour=0, breaks=[80])
    assert ((np.asarray(blurred.y) > 0) & (np.asarray(blurred.y) < 1)).any()
    assert np.array_equal(cut.y, y)


def test_the_step_where_alignment_ends_is_marked(tmp_path: Path) -> None:
    ended, whole, none = (make_run(tmp_path / name, method=m) for name, m in zip("abc", ("ahpa", "ahpa", "none")))
    for run, until in ((ended, 1000), (whole, 2000), (none, 1000)):
        config = yaml.safe_load((run / "config.yaml").read_text())
        method = "none" if run == none else "ahpa"
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "method": method, "align_until": until}))
    lines = [json.loads(line) for line in (ended / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in e.items() if not k.startswith("align/") or e["step"] <= 1000} for e in lines]
    (ended / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in kept))
    data = [load_run(run) for run in (ended, whole, none)]
    charts = {chart.title: chart for chart in _step_charts(data)}
    assert [(m.x, m.colour) for m in charts["Loss"].marks] == [(1000, 0)]
    assert charts["Loss"].note == "Dotted: alignment of a ends."
    assert not charts["Alignment: cosine"].marks, "nothing goes on beyond"
    (mark,) = _time_charts(data)[0].marks
    assert mark.x == pytest.approx(1000 * 0.5 / 60)
    unmarked = replace(charts["Loss"], marks=())
    assert render_svg(charts["Loss"]).count("stroke-dasharray") == render_svg(unmarked).count("stroke-dasharray") + 1


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("metric/similarity", "Similarity of hidden states and targets"),
        ("metric/similarity/dinov2-b@11", "Similarity of hidden states and targets dinov2-b@11"),
        ("metric/router/G3", "Router: weight of the group G3"),
        ("metric/ahpa/router/G3", "Router: weight of the group G3 (ahpa)"),
        ("metric/unheard/of", "unheard/of"),
    ],
)
def test_measures_of_methods_are_said_in_words(key: str, words: str) -> None:
    assert measure_words(key)[0] == words


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((500, 500), "They rank the runs on this page"),
        ((64, 64), "64 samples are too few to rank the runs by"),
        ((500, 1000), "The runs were not judged alike"),
        ((500,), ""),
    ],
)
def test_runs_are_ranked_by_enough_samples_only(
    tmp_path: Path, runs: list[RunData], counts: tuple[int, ...], said: str
) -> None:
    judged = []
    for run, count in zip(runs, counts):
        entry = {**run.evaluations[-1], "settings": {"sample_count": count}}
        judged.append(replace(run, evaluations=[entry]))
    page = write_comparison(tmp_path / "c.html", judged)
    _, text = read(page)
    assert "they are not FID" in text and said in text
    assert ("rank" in text) == bool(said)
    assert ('class="best"' in page.read_text()) == (counts == (500, 500))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"sampler": {"steps": 250}}, "steps: 50 of demo-ahpa, 250 of demo-none"),
        ({"settings": {"reference": "folder val"}}, "reference: folder train of demo-ahpa, folder val of demo-none"),
        ({"settings": {"sample_count": 1000}}, f"sample count: 500 of demo-ahpa, {number(1000)} of demo-none"),
        ({"sampler": {"guidance": {"scale": 2.0}}}, "guidance scale: 1 of demo-ahpa, 2 of demo-none"),
    ],
)
def test_no_run_leads_where_they_were_judged_otherwise(
    tmp_path: Path, runs: list[RunData], changed: dict[str, dict[str, object]], said: str
) -> None:
    """By the evaluations that the figures are from: an FID of another one does not hold its precision back."""
    sampler, settings = {"steps": 50, "guidance": {"scale": 1.0}}, {"sample_count": 500, "reference": "folder train"}
    entries = [
        {
            "step": 2000,
            "metrics": {"FID": value},
            "settings": settings | (changed.get("settings", {}) if i else {}),
            "sampler": sampler | (changed.get("sampler", {}) if i else {}),
        }
        for i, value in enumerate((10.0, 20.0))
    ]
    # Of what decides no FID, nothing is said: what else was measured beside it, by whom, and what that needed.
    entries[1]["settings"] = {**entries[1]["settings"], "judges": {"clip_score": {"model": "clip"}}}  # type: ignore[dict-item]
    entries[0]["settings"] = {**entries[0]["settings"], "reference_features": 400}  # type: ignore[dict-item]
    later = [{**entries[0], "metrics": {"Recall": value}} for value in (0.3, 0.4)]
    judged = [replace(run, evaluations=[a, b]) for run, a, b in zip(runs, entries, later)]
    page = write_comparison(tmp_path / "c.html", judged)
    _, text = read(page)
    assert page.read_text().count('class="best"') == (1 if said else 2)
    assert ("FID was not measured alike" in text) == bool(said) and said in text
    assert "Recall was not" not in text


def test_caches_of_the_same_images_are_the_same_reference(tmp_path: Path, runs: list[RunData]) -> None:
    """By their images where both evaluations say which; else by what they call them."""

    def leads(*settings: dict[str, str]) -> bool:
        judged = [
            replace(run, evaluations=[{"step": 2000, "metrics": {"FID": value}, "settings": each}])
            for run, value, each in zip(runs, (10.0, 20.0), settings)
        ]
        return 'class="best"' in write_comparison(tmp_path / "c.html", judged).read_text()

    a, b = (
        {"reference": "cache a", "reference_images": "12 adm"},
        {"reference": "cache b", "reference_images": "12 adm"},
    )
    assert leads(a, a) and leads(a, b)
    assert not leads(a, {**b, "reference_images": "34 adm"})
    assert not leads(a, {"reference": "cache b"}) and leads(a, {"reference": "cache a"})


def test_a_chart_of_nothing_but_zeros_is_not_drawn(tmp_path: Path, runs: list[RunData]) -> None:
    def chart(value: float) -> Chart:
        level = Series(label="chance", x=[0, 1], y=[8, 8], dashed=True)
        lines = [Series(label="probe", x=[0, 1], y=[0, value]), level]
        return Chart(title="Accuracy", x_label="t", y_label="%", series=lines)

    pages = [write_report(tmp_path / f"{v}.html", runs[:1], title="t", charts=[chart(v)]) for v in (0, 1)]
    without, drawn = (read(page)[1] for page in pages)
    assert "Accuracy Not drawn: every value is 0." in without and "Not drawn" not in drawn
    assert pages[0].read_text().count("<svg") == pages[1].read_text().count("<svg") - 1


def test_charts_keep_spikes_and_leave_out_what_is_not_finite() -> None:
    y = np.ones(20_000)
    y[[777, 15_001]] = 50, np.nan
    series = smoothed_series("a", np.arange(20_000.0), y, colour=1)
    assert len(series.y) == 19_999 and np.isfinite(series.y).all()
    svg = render_svg(Chart(title="t", x_label="step", y_label="loss (nats)", series=[series]))
    assert svg.startswith("<svg role=") and "loss (nats)" in svg and "var(--s1)" in svg
    assert len(svg) < 60_000
    from trainer.report.charts import _thin

    x, thinned = _thin(np.arange(20_000.0), np.nan_to_num(y, nan=1.0))
    assert len(x) <= 600 and 50 in thinned and (np.diff(x) > 0).all()


def test_charts_on_one_page_do_not_share_ids() -> None:
    charts = [Chart(title=t, x_label="x", y_label="y", series=[Series(label="a", x=[0, 1], y=[0, 1])]) for t in "ab"]
    ids = [re.findall(r'id="([^"]+)"', render_svg(chart)) for chart in charts]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    assert render_svg(charts[0]) == render_svg(charts[0])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8.1, "8.1"),
        (50000, "50\u202f000"),
        (-0.25, "\u22120.25"),
        (1234567.8, "1\u202f234\u202f568"),
        (0.00012, "1.20e\u221204"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_typeset(value: float, text: str) -> None:
    assert number(value) == text


def screenshot(page: Path, out: Path, *, width: int, height: int, profile: Path) -> np.ndarray:
    """What headless Chromium shows: uint8 [height, width, 3]."""
    assert CHROMIUM is not None
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        " --disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    subprocess.run([*command, f"--screenshot={out}", page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(out) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("width", "height"), [(1200, 1500), (390, 3500)])
def test_chromium_shows_samples_and_curves(tmp_path: Path, runs: list[RunData], width: int, height: int) -> None:
    page = demo_report(tmp_path / "report.html", runs)
    shown = screenshot(page, tmp_path / "shot.png", width=width, height=height, profile=tmp_path / "profile")
    assert shown.shape == (height, width, 3)

    def share(colour: tuple[int, int, int]) -> float:
        return float((np.abs(shown.astype(int) - colour) <= 6).all(-1).mean())

    assert share((252, 252, 251)) > 0.3  # paper
    assert share((26, 102, 176)) > 0.0003 and share((196, 84, 26)) > 0.0003  # both runs' lines
    # The first sample grid's background, flat and large, proves that the embedded picture is drawn.
    tile = tuple(int(v) for v in np.asarray(Image.open(runs[0].samples[-1][1]).convert("RGB"))[0, 0])
    assert share(tile) > 0.002  # type: ignore[arg-type]
    # Nothing reaches over the right edge: the margin is paper from top to bottom.
    assert (np.abs(shown[:, -4:].astype(int) - (252, 252, 251)) <= 6).all()


def test_losses_of_streams_are_called_by_what_is_denoised(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", points=20)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    more = {"denoise/tiny@5.cls": 0.03, "denoise/tiny@5.cls/cosine": 0.01, "denoise/cosine": 0.2}
    (run / "log.jsonl").write_text("".join(json.dumps({**entry, **more}) + "\n" for entry in log))
    config = yaml.safe_load((run / "config.yaml").read_text())
    for streams, own in (
        ({"tiny@5.cls": {"weight": 0.03}}, "Denoising loss of tiny@5.cls"),
        (["no", 1], "Denoising: tiny@5.cls"),
    ):
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "streams": streams}))
        page = write_report(tmp_path / "report.html", [load_run(run)], title="Streams").read_text()
        first = "Denoising loss of the latents" if own.startswith("Denoising loss") else "Denoising term"
        titles = [own, f"{own}: cosine" if "loss" in own else f"{own}/cosine", "Denoising: cosine", first]
        for title in titles:
            assert page.count(title) >= 2, title  # a chart, and a row of the table
        assert ("Diffused beside the latents" in page) == isinstance(streams, dict)
