"""Recipes: every row loads, fits its model, method and cache, and says what the paper says; the loader's rules."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from featcache.encoders.table import ENCODERS, VAES
from featcache.errors import CacheError, UserError
from pipelines import index
from trainer import align
from trainer.align.base import BackboneInfo, FeatureInfo
from trainer.caches import find_cache
from trainer.config import RunConfig, apply_overrides, from_mapping, load_recipe
from trainer.diffusion.interval import Interval
from trainer.models import model_config
from trainer.recipes import (
    METRICS,
    Recipe,
    find_recipe,
    list_recipes,
    listing,
    load_recipe_file,
    parse_build,
    recipe_files,
    recipe_root,
)

RECIPES = list_recipes()
PUBLISHED = [r for r in RECIPES if r.published is not None]
LEVEL_SHAPES = {"G1": (4, 128), "G2": (3, 256), "G3": (4, 512), "G4": (4, 512)}
# Between the best and the worst that a table of these papers could hold.
PLAUSIBLE = {
    "FID": (1.0, 60.0),
    "sFID": (3.5, 40.0),
    "IS": (20.0, 400.0),
    "Precision": (0.3, 0.9),
    "Recall": (0.3, 0.9),
}

every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name.removeprefix("pipelines/"))


def cache_features(recipe: Recipe) -> dict[str, FeatureInfo]:
    """Token features and VAE groups that the recipe's build line makes, with their shapes."""
    assert recipe.build is not None
    line = parse_build(recipe.build)
    tokens = (line.resolution // 16) ** 2
    shapes: dict[str, tuple[int, ...]] = {}
    for name in line.features:
        encoder, at, layer = name.partition("@")
        if at:
            assert int(layer) < ENCODERS[encoder].depth
            shapes[name] = (tokens, ENCODERS[encoder].width)
        elif name.startswith("vae/G"):
            layers, channels = LEVEL_SHAPES[name.removeprefix("vae/")]
            shapes[name] = (layers, tokens, channels)
    return {name: FeatureInfo(shape=shape) for name, shape in shapes.items()}


@every_recipe
def test_recipe_fits_its_model_method_and_cache(recipe: Recipe) -> None:
    assert recipe.title and recipe.build
    config = recipe.config()
    assert config.cache is None
    line = parse_build(recipe.build)
    assert set(line.encoders) <= set(ENCODERS)
    assert line.vae is None or line.vae in VAES
    # What the run asks of its cache is what the line builds, so that no other cache is taken by mistake.
    assert (config.resolution or 256, config.vae) == (line.resolution, line.vae)
    available = cache_features(recipe)
    chosen = [(name, config.method_config(name)) for name in config.methods]
    wanted = {f for name, options in chosen for f in align.required_features(name, options)}
    assert wanted == set(available)  # nothing missing, nothing built in vain

    latent = line.resolution // 8
    model = model_config(config.model, latent_channels=4, latent_size=latent, num_classes=1000)
    if not chosen:
        return
    info = BackboneInfo(
        name=config.model,
        depth=model.depth,
        width=model.width,
        patch_size=model.patch_size,
        latent_channels=model.latent_channels,
        latent_size=model.latent_size,
    )
    offline = [
        (name, dataclasses.replace(options, discriminator_weights="random") if name == "sara" else options)
        for name, options in chosen
    ]
    with torch.device("meta"):
        module = align.build(offline, info, available)
    assert set(module.reads) == wanted
    assert all(1 <= tap <= model.depth for tap in module.taps)


@every_recipe
def test_figures_are_plausible(recipe: Recipe) -> None:
    assert 50_000 <= recipe.steps <= 7_000_000
    if recipe.published is None:
        return
    assert recipe.published.metrics
    for metric, value in recipe.published.metrics.items():
        low, high = PLAUSIBLE[metric]
        assert low <= value <= high, f"{metric} {value}"
    sampling = recipe.published.sampling
    assert sampling is not None
    assert (sampling.sampler == "ddpm") == (recipe.model.startswith("DiT"))
    assert sampling.guidance is None or 1 <= sampling.guidance <= 2
    assert 0 <= sampling.interval.low < sampling.interval.high <= 1
    assert ("guided" in recipe.title) == (sampling.guidance != 1), "the title says whether samples were guided"


def test_metric_names_are_those_of_the_evaluation() -> None:
    from trainer.evaluate.extractors import STANDARD_NAMES

    assert set(METRICS) <= set(STANDARD_NAMES.values())


# Rows whose table holds one metric a line, or that say themselves that the text and not the table was read.
SPREAD = {("REPA", "5"), ("AHPA", "1"), ("AHPA", "D.16"), ("DyA", "6"), ("DyA", "7")}


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda r: r.name.removeprefix("pipelines/"))
def test_figures_are_the_papers(recipe: Recipe, papers: Path) -> None:
    """All figures of a row stand in one line of the paper's text; where a table is turned, each stands somewhere."""
    published = recipe.published
    assert published is not None
    text = (papers / f"{published.paper.lower()}.txt").read_text(encoding="utf-8")
    numbers = [{float(n) for n in re.findall(r"\d+\.\d+", line)} for line in text.splitlines()]
    figures = set(published.metrics.values())
    if (published.paper, published.source.rpartition(" ")[2]) in SPREAD:
        assert all(any(figure in line for line in numbers) for figure in figures)
    else:
        assert any(figures <= line for line in numbers)


@pytest.mark.parametrize("paper", ["REPA", "SARA", "DyA", "AHPA"])
def test_tables_exist_in_the_papers(paper: str, papers: Path) -> None:
    text = (papers / f"{paper.lower()}.txt").read_text(encoding="utf-8")
    for source in {r.published.source for r in PUBLISHED if r.published and r.published.paper == paper}:
        assert re.search(rf"Table {re.escape(source.rpartition(' ')[2])}\b", text), source


def test_main_rows_are_there() -> None:
    names = {r.name for r in RECIPES}
    for method in ("none", "repa", "irepa", "haste", "sara", "dya", "ahpa", "sra", "sra2"):
        assert {f"pipelines/{method}/{size}.yaml" for size in ("b2", "l2", "xl2")} <= names
    for method in ("none", "repa", "sara", "dya", "sra"):
        assert any(r.model.startswith("DiT") and r.name.startswith(f"pipelines/{method}/") for r in RECIPES)
    for method in ("none", "repa", "ahpa", "sra", "sra2"):
        assert any("--resolution 512" in (r.build or "") and r.method == method for r in RECIPES)


def test_no_two_recipes_are_the_same() -> None:
    seen: dict[str, str] = {}
    for recipe in RECIPES:
        key = json.dumps([dict(recipe.values), recipe.build], sort_keys=True, default=dict)
        assert key not in seen, f"{recipe.name} repeats {seen.get(key)}"
        seen[key] = recipe.name
    assert len({r.title for r in RECIPES}) == len(RECIPES)


def test_every_base_is_used() -> None:
    root = recipe_root()
    bases = {
        (path.parent / base).resolve()
        for path in root.rglob("*.yaml")
        if (base := yaml.safe_load(path.read_text()).get("base"))
    }
    assert {p.resolve() for p in root.glob("_base/*.yaml")} <= bases


def test_index_is_up_to_date() -> None:
    written = index.readme().read_text(encoding="utf-8")
    assert written == index.render(RECIPES), "type: python -m pipelines.index"
    assert all(f"({p.relative_to(recipe_root()).as_posix()})" in written for p in recipe_files())


def test_eval_options_draw_samples_as_the_paper_did() -> None:
    from trainer.cli import app
    from trainer.sample import SAMPLERS

    command: Any = typer.main.get_command(app)
    for recipe in PUBLISHED:
        assert recipe.published is not None and recipe.published.sampling is not None
        sampling = recipe.published.sampling
        given = command.commands["eval"].make_context("eval", ["runs/x", *sampling.eval_options().split()]).params
        family = recipe.model[:3].lower()
        if sampling.sampler is not None:
            assert (given["sampler"] or SAMPLERS[family][0]) == sampling.sampler
        assert (given["guidance"] or 1) == (sampling.guidance or 1)
        assert Interval.parse(given["interval"] or "0,1") == sampling.interval

    published = load_recipe_file("repa/xl2-4m-interval").published
    assert published is not None and published.sampling is not None
    assert published.sampling.eval_options() == "--guidance 1.8 --interval 0,0.7"
    published = load_recipe_file("ahpa/b2").published
    assert published is not None and published.sampling is not None
    assert published.sampling.eval_options() == "--sampler ode"


# The loader


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_values_come_from_the_bases_but_title_and_figures_do_not(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        leaf="base: middle.yaml\nsteps: 3\nalign: {repa: {depth: 6}}\n",
        middle="base: root.yaml\ntitle: middle\nlr: 0.5\nalign: {repa: {weight: 0.25}, sra: {beta: 0.1}}\n"
        "published: {source: 'REPA, Table 3', metrics: {FID: 7.9}}\n",
        root="method: repa+sra\nsteps: 9\nbatch_size: 8\nbuild: featcache build\n"
        "align: {repa: {weight: 0.5, loss: cosine}}\n",
    )
    recipe = load_recipe_file(path)
    assert recipe.title == "" and recipe.published is None and recipe.build == "featcache build"
    assert recipe.values == {
        "method": "repa+sra",
        "steps": 3,
        "batch_size": 8,
        "lr": 0.5,
        "align": {"repa": {"weight": 0.25, "loss": "cosine", "depth": 6}, "sra": {"beta": 0.1}},
    }
    assert recipe.config().method_config("repa").depth == 6
    middle = load_recipe_file(tmp_path / "middle.yaml")
    assert middle.title == "middle" and middle.published is not None and middle.published.metrics == {"FID": 7.9}
    assert middle.values["published"] == {"source": "REPA, Table 3", "metrics": {"FID": 7.9}}


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("stepz: 3", "unknown key stepz", "Did you mean steps?"),
        ("titel: x", "unknown key titel", "Did you mean title?"),
        ("steps: 3\nsteps: 4", "given twice", "Keep one"),
        ("align: {repa: {depth: 1, depth: 2}}", "given twice", "Keep one"),
        ("- 1\n- 2", "must hold keys and values", None),
        ("a: [", "not valid YAML", None),
        ("base: nowhere.yaml", "does not exist", "relative to the recipe"),
        ("base: leaf.yaml", "in a circle", None),
        ("title: [1]", "title must be one line", None),
        ("published: {metrics: {FID: 1.0}}", "no source", "AHPA, Table 3"),
        ("published: {source: 'AHPA, Table 99', metrics: {FID: 1.0}}", "names no table", "AHPA, Table 3"),
        ("published: {source: 'AHPA, Table 3', metrics: {FIDS: 1.0}}", "unknown metric 'FIDS'", "Did you mean FID?"),
        ("published: {source: 'AHPA, Table 3', metrics: {FID: low}}", "published.metrics", None),
        (
            "published: {source: 'AHPA, Table 3', metric: {FID: 1.0}}",
            "unknown key published.metric",
            "published.metrics",
        ),
        ("published: {source: 'AHPA, Table 3', sampling: {sampler: dpm}}", "published.sampling.sampler", None),
        ("published: {source: 'AHPA, Table 3', sampling: {scale: 2}}", "unknown key published.sampling.scale", None),
    ],
)
def test_bad_recipes_are_refused(tmp_path: Path, text: str, what: str, remedy: str | None) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe_file(write(tmp_path, leaf=text))
    assert what in caught.value.what
    if remedy is not None:
        assert remedy in (caught.value.remedy or "")


def test_a_circle_over_several_files_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, a="base: b.yaml", b="base: c.yaml", c="base: b.yaml")
    with pytest.raises(UserError, match=r"a\.yaml -> b\.yaml -> c\.yaml -> b\.yaml"):
        load_recipe_file(path)


def test_options_are_checked_when_the_recipe_is_used(tmp_path: Path) -> None:
    recipe = load_recipe_file(write(tmp_path, leaf="method: ahpa\nalign: {ahpa: {rooter: mlp}}"))
    with pytest.raises(UserError, match=r"unknown key align\.ahpa\.rooter") as caught:
        recipe.config()
    assert caught.value.remedy == "Did you mean align.ahpa.router?"


def test_set_works_on_a_recipe() -> None:
    values = apply_overrides(load_recipe(Path("pipelines/ahpa/xl2.yaml")), ["steps=1000", "ahpa.depths=[5]", "lr=3e-4"])
    config = from_mapping(RunConfig, values)
    assert (config.steps, config.lr, config.model) == (1000, 3e-4, "SiT-XL/2")
    options = config.method_config("ahpa")
    assert options.depths == (5,) and options.router == "mlp"
    assert isinstance(config.published, Mapping) and config.published["metrics"]["FID"] == 8.1
    assert load_recipe_file("ahpa/xl2").config().method_config("ahpa").depths == (7,), "the recipe is unchanged"


@pytest.mark.parametrize("typed", ["ahpa/b2", "ahpa/b2.yaml", "pipelines/ahpa/b2.yaml", "pipelines/ahpa/b2"])
def test_recipes_are_found_from_anywhere(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(typed) == recipe_root() / "ahpa" / "b2.yaml"


def test_a_file_here_wins_and_a_missing_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ahpa").mkdir()
    (tmp_path / "ahpa/b2.yaml").write_text("method: none")
    assert load_recipe_file("ahpa/b2.yaml").method == "none"
    with pytest.raises(UserError) as caught:
        load_recipe_file("pipelines/ahpa/xxl2.yaml")
    assert "Did you mean pipelines/ahpa/xl2.yaml?" in (caught.value.remedy or "")


def test_lists_filter_and_align_columns() -> None:
    found = list_recipes("Table D.17")
    assert found and all(r.published is not None and r.published.source == "AHPA, Table D.17" for r in found)
    assert {r.method for r in list_recipes("DYA/")} == {"dya", "repa"}
    assert list_recipes("no such thing") == []
    head, *lines = listing([r for r in RECIPES if "ahpa/xl2" in r.name])
    column = head.index("method")
    assert all(line[column:].startswith("ahpa") and line[column - 1] == " " for line in lines)
    assert next(line for line in lines if "/xl2.yaml" in line).split()[3] == "8.1"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("trainer build", "not a featcache build line"),
        ("featcache build --encodr dinov2-b@11", "No such option"),
        ("featcache build --encoder dinov2-b", "layers of dinov2-b open"),
        ("featcache build --batch-size many", "batch-size"),
        ("featcache build --resolution big", "a number of pixels"),
    ],
)
def test_bad_build_lines_are_refused(line: str, what: str) -> None:
    with pytest.raises(UserError, match=re.escape(what)):
        parse_build(line)


def test_build_lines_name_their_features() -> None:
    line = parse_build("featcache build --resolution 512 --encoder dinov2-b@9,11 --vae sdxl --vae-levels G3,G4")
    assert line.features == ("vae/moments", "label", "vae/G3", "vae/G4", "dinov2-b@9", "dinov2-b@11")
    assert line.encoders == ("dinov2-b",) and line.vae == "sdxl" and line.resolution == 512


def test_command_lists_and_refuses(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("trainer", "recipes", "sara/xl2-beta")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("pipelines/sara/xl2-beta-0.1-gamma-0.01.yaml  sara")
    assert "3 recipes" in done.stdout
    done = cli("trainer", "run", "--recipe", "pipelines/ahpa/b2.yaml", "--set", "stepz=3")
    assert done.returncode == 2 and "Did you mean steps?" in done.stderr and "Traceback" not in done.stderr


def test_a_recipe_trains(
    cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty folder: a cache of the embedded set, then AHPA's recipe on it with a small model."""
    words = "featcache build --data shapes --limit 16 --encoder tiny --vae-levels G3,G4 --out caches/small"
    done = cli(*words.split())
    assert done.returncode == 0, done.stderr
    words = "trainer run --recipe pipelines/ahpa/b2.yaml --name small --model SiT-Ti/2 --steps 2 --batch-size 4"
    done = cli(*words.split(), "--set", "sample_every=0", "--set", "ahpa.depths=[2]")
    assert done.returncode == 0, done.stderr
    saved = load_recipe(tmp_path / "runs/small/config.yaml")
    assert saved["published"]["source"] == "AHPA, Table 3" and saved["clip"] == 2.0
    assert saved["align"]["ahpa"]["depths"] == [2] and saved["align"]["ahpa"]["head"] == "conv1"
    records = [json.loads(line) for line in (tmp_path / "runs/small/log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2] and all("align/cosine" in r for r in records)

    monkeypatch.chdir(tmp_path)
    large = load_recipe_file("repa/xl2-512-80ep").config()
    with pytest.raises(CacheError, match="was made with resolution 64, and the run asks for 512") as caught:
        find_cache(dataclasses.replace(large, cache="caches/small"))
    assert "featcache build --resolution 512 --encoder dinov2-b@11\n" in (caught.value.remedy or "")
    with pytest.raises(CacheError, match=r"none of the 1 caches below \./caches fits") as caught:
        find_cache(load_recipe_file("none/xl2-512").config())
    assert "featcache build --resolution 512\n" in (caught.value.remedy or "")
    assert "--into" not in (caught.value.remedy or "")
