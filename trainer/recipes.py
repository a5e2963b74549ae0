"""Recipes: YAML files with the settings of one run, what the paper reports for it, and the cache it needs.

A recipe holds keys of :class:`trainer.config.RunConfig` and three more: ``title``, ``build`` (the ``featcache build``
line of its cache) and ``base``, the path of another recipe, relative to its own, whose settings it starts from.
``title`` and ``published`` belong to one file and are never inherited; ``align`` is joined option by option; any other
key replaces the base's. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from featcache.errors import UserError
from trainer.config import RunConfig, from_mapping
from trainer.yaml_text import read_yaml

MAX_BASES = 16  # one upon the other
RECIPE_KEYS = ("base", "title", "build")
_OWN_KEYS = ("base", "title", "published")  # of one file alone
PAPER_RESOLUTION = 256  # where a build line says nothing
METRICS = ("FID", "sFID", "IS", "Precision", "Recall")

# Tables by paper, as our copies of the papers number them. SRA's have lost their captions; its text calls the
# component-wise analysis Table 3.2 and all system-level comparisons Table 3.3.
PAPER_TABLES: Mapping[str, tuple[str, ...]] = {
    "REPA": tuple(str(n) for n in range(1, 13)),
    "SARA": ("1a", "1b", "2", "3", "4", "5"),
    "DyA": tuple(str(n) for n in range(1, 8)),
    "AHPA": (
        *(str(n) for n in range(1, 8)),
        *("A.8", "A.9", "B.10", "B.11", "C.12", "D.13", "D.14", "D.15", "D.16", "D.17", "E.18", "F.19", "G.20", "I.21"),
    ),
    "SRA": ("3.2", "3.3"),
}
_SOURCE = re.compile(r"(?P<paper>\w+), Table (?P<table>\S+)")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the samples behind published figures were drawn; None where the paper does not say.

    sampler: ``sde`` (Euler-Maruyama), ``ode`` (Euler), ``heun`` or ``ddpm``. steps: function evaluations.
    guidance: classifier-free guidance scale, 1 for none. interval: of t, in which it acted.
    """

    sampler: Literal["sde", "ode", "heun", "ddpm"] | None = None
    steps: int | None = None
    guidance: float | None = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __str__(self) -> str:
        drawn = " ".join(str(part) for part in (self.sampler, self.steps) if part is not None)
        guided = ""
        if self.guidance is None:
            guided = "guided, scale not given"
        elif self.guidance != 1:
            low, high = self.interval
            guided = f"guidance {self.guidance:g}" + ("" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]")
        return ", ".join(part for part in (drawn, guided) if part)

    def eval_options(self) -> str:
        """The same conditions as options of ``trainer eval``; empty where they are its defaults on a GPU."""
        words = []
        if self.sampler in ("ode", "heun"):
            words.append(f"--sampler {self.sampler}")
        if self.steps not in (None, 250):
            words.append(f"--steps {self.steps}")
        if self.guidance not in (None, 1):
            words.append(f"--guidance {self.guidance:g}")
            if self.interval != (0, 1):
                words.append(f"--interval {self.interval[0]:g},{self.interval[1]:g}")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a paper reports for a row.

    source: reads ``AHPA, Table 3``. metrics: FID, sFID, IS, Precision and Recall, as far as the table has them.

    Raises:
        UserError: an unknown metric, a paper or table that does not exist.
    """

    source: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        match = _SOURCE.fullmatch(self.source)
        if match is None or match["table"] not in PAPER_TABLES.get(match["paper"], ()):
            raise UserError(
                f"published.source {self.source!r:.80} names no table of a known paper",
                remedy=f"Write for example 'AHPA, Table 3'; papers: {', '.join(PAPER_TABLES)}.",
            )
        for metric in self.metrics:
            if metric not in METRICS:
                near = difflib.get_close_matches(metric, METRICS, n=1, cutoff=0.3)
                hint = f"Did you mean {near[0]}?" if near else f"Metrics: {', '.join(METRICS)}"
                raise UserError(f"published.metrics holds an unknown metric {metric!r:.80}", remedy=hint)

    @property
    def paper(self) -> str:
        return self.source.partition(",")[0]

    def figures(self) -> dict[str, str]:
        """The metrics with the papers' decimals: at least two for sFID, precision and recall, else at least one."""
        shown = {}
        for metric, value in self.metrics.items():
            digits = 2 if metric in ("sFID", "Precision", "Recall") else 1
            shown[metric] = max(f"{value:.{digits}f}", repr(float(value)), key=len)
        return shown


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe file with its bases resolved.

    path: the file. values: keys of RunConfig, not validated yet. title: one line. build: the ``featcache build`` line
    of its cache. published: figures of the paper's row, None where it gives none that we could read.
    """

    path: Path
    values: Mapping[str, Any]
    title: str = ""
    build: str | None = None
    published: Published | None = None

    @property
    def name(self) -> str:
        """As it is listed: ``pipelines/ahpa/xl2.yaml`` for the project's own, else the path."""
        root = recipe_root()
        return str(Path(root.name) / self.path.relative_to(root)) if self.path.is_relative_to(root) else str(self.path)

    @property
    def method(self) -> str:
        return str(self.values.get("method", RunConfig.method))

    @property
    def model(self) -> str:
        return str(self.values.get("model", RunConfig.model))

    @property
    def steps(self) -> int:
        return int(self.values.get("steps", RunConfig.steps))

    def config(self) -> RunConfig:
        """The validated configuration. Raises UserError as :class:`RunConfig`."""
        return from_mapping(RunConfig, self.values)


def recipe_root() -> Path:
    """Folder of the project's own recipes: ``pipelines`` of the checkout, or where the package is installed."""
    import pipelines

    return Path(pipelines.__path__[0]).resolve()


def find_recipe(path: Path | str) -> Path:
    """The file that ``path`` means: as typed, else below the project's recipes (``ahpa/xl2`` is enough).

    Raises:
        UserError: no such file; the error names the nearest recipe.
    """
    typed = Path(path)
    if typed.is_file():
        return typed
    root = recipe_root()
    parts = typed.parts[1:] if typed.parts and typed.parts[0] == root.name else typed.parts
    inner = Path(*parts) if parts else typed
    for candidate in (root / inner, root / f"{inner}.yaml"):
        if not typed.is_absolute() and candidate.is_file():
            return candidate
    known = {p.relative_to(root).with_suffix("").as_posix(): p for p in recipe_files()}
    near = difflib.get_close_matches(inner.with_suffix("").as_posix(), known, n=1)
    hint = f"Did you mean {root.name}/{near[0]}.yaml?   " if near else ""
    raise UserError(f"there is no recipe at {str(path)!r}", remedy=f"{hint}Type: trainer recipes   to list them.")


def recipe_files() -> list[Path]:
    """The project's own recipes, sorted; folders that begin with an underscore hold bases only."""
    root = recipe_root()
    files = [p for p in root.rglob("*.yaml") if not any(part.startswith("_") for part in p.relative_to(root).parts)]
    return sorted(files, key=lambda p: (p.parent, p.name.startswith("dit-"), _natural(p.stem)))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key in which ``depth6`` comes before ``depth10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def list_recipes(text: str = "") -> list[Recipe]:
    """The project's own recipes whose name, method, model, title or source contain ``text`` (whatever its case)."""
    found = [load_recipe_file(path) for path in recipe_files()]
    wanted = text.lower()
    return [
        r for r in found if any(wanted in part.lower() for part in (r.name, r.method, r.model, r.title, _source(r)))
    ]


def _source(recipe: Recipe) -> str:
    return recipe.published.source if recipe.published is not None else ""


def listing(recipes: list[Recipe]) -> list[str]:
    """One line a recipe, in columns: file, method, model, published FID, title. The first line names the columns."""
    rows = [("recipe", "method", "model", "FID", "title")]
    for recipe in recipes:
        fid = recipe.published.figures().get("FID", "-") if recipe.published is not None else "-"
        rows.append((recipe.name, recipe.method, recipe.model, fid, recipe.title))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths)), row[4]]) for row in rows]


def load_recipe_file(path: Path | str) -> Recipe:
    """Reads a recipe and its bases.

    Raises:
        UserError: a missing file or base, bases that lead in a circle, no valid YAML, a key given twice or unknown, a
            ``published`` entry that is not well formed.
    """
    file = find_recipe(path).resolve()
    merged: dict[str, Any] = {}
    for layer in _layers(file):
        merged = _join(merged, layer)
    own = _read(file)
    published = _published(own["published"], file) if own.get("published") else None
    values = {key: value for key, value in merged.items() if key not in RECIPE_KEYS}
    if published is not None:
        values["published"] = own["published"]
    build = merged.get("build")
    for key, value in (("title", own.get("title", "")), ("build", "" if build is None else build)):
        if not isinstance(value, str):
            raise UserError(f"{file}: {key} must be one line of text, not {value!r}")
    return Recipe(path=file, values=values, title=own.get("title", ""), build=build, published=published)


def _layers(file: Path) -> list[Mapping[str, Any]]:
    """The file's content after that of its bases, outermost base first."""
    chain: list[Path] = []
    layers: list[Mapping[str, Any]] = []
    at: Path | None = file
    while at is not None:
        if at in chain:
            raise UserError(f"the bases of {file} lead in a circle: {' -> '.join(p.name for p in [*chain, at])}")
        chain.append(at)
        values = _read(at)
        layers.insert(0, values if at == file else {k: v for k, v in values.items() if k not in _OWN_KEYS})
        base = values.get("base")
        if base is None:
            break
        if not isinstance(base, str) or len(base) > 1000 or "\0" in base:
            raise UserError(f"{at}: base {base!r:.80} is not a path")
        following = (at.parent / base).resolve()
        if not os.path.isfile(following):  # noqa: PTH113 (False for names that no file can have, where Path raises)
            raise UserError(
                f"{at}: base {base!r:.200} does not exist ({following})",
                remedy="Write its path relative to the recipe.",
            )
        at = following
        if len(chain) > MAX_BASES:
            raise UserError(f"{file} has more than {MAX_BASES} bases")
    return layers


def _join(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    joined = {**below, **above}
    options = below.get("align"), above.get("align")
    if all(isinstance(o, Mapping) for o in options):
        former, latter = options
        joined["align"] = {
            method: {**(former.get(method) or {}), **(latter.get(method) or {})}  # type: ignore[union-attr]
            for method in {**former, **latter}  # type: ignore[dict-item]
        }
    return joined


def _read(file: Path) -> dict[str, Any]:
    """The mapping in one file, its keys checked."""
    values = read_yaml(file)
    if isinstance(values, dict) and isinstance(values.get("align"), dict):
        for method, options in values["align"].items():
            if options is not None and not isinstance(options, dict):
                raise UserError(f"{file}: align.{method!s:.80} must hold options, not {options!r:.80}")
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold keys and values, for example 'method: ahpa'")
    valid = [*RECIPE_KEYS, *(f.name for f in dataclasses.fields(RunConfig))]
    for key in values:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Valid keys: {', '.join(sorted(valid))}"
            raise UserError(f"{file}: unknown key {key!s:.80}", remedy=hint)
    return values


def parse_published(values: Any) -> Published:
    """What a recipe or a run's configuration says under ``published``. Raises UserError if it is not well formed."""
    if not isinstance(values, Mapping):
        raise UserError(f"published must hold source, metrics and sampling, not {values!r:.80}")
    entry = dict(values)
    sampling = entry.pop("sampling", None)
    if sampling is not None:
        if not isinstance(sampling, Mapping):
            raise UserError(f"published.sampling must hold keys and values, not {sampling!r:.80}")
        entry["sampling"] = from_mapping(Sampling, sampling, where="published.sampling")
    if "source" not in entry:
        raise UserError("published has no source", remedy="Write for example: source: AHPA, Table 3")
    return from_mapping(Published, entry, where="published")


def _published(values: Any, file: Path) -> Published:
    try:
        return parse_published(values)
    except UserError as error:
        raise UserError(f"{file}: {error.what}", remedy=error.remedy) from error


@dataclass(frozen=True, kw_only=True)
class BuildLine:
    """What a ``featcache build`` line makes.

    features: beside keys and content hashes. encoders, vae: names as typed (None: the default VAE), unchecked.
    resolution: side of the crop in pixels.
    """

    features: tuple[str, ...]
    encoders: tuple[str, ...]
    vae: str | None
    resolution: int


def parse_build(line: str) -> BuildLine:
    """Reads a ``featcache build`` line with featcache's own command line, without running it.

    Raises:
        UserError: not such a line, an option it does not know, or an encoder without layers.
    """
    import typer

    from featcache.cli import app
    from featcache.cli_build import parse_resolution
    from featcache.encoders import parse_encoders, parse_levels

    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"{line!r:.200} is not a featcache build line: {error}") from error
    if words[:2] != ["featcache", "build"]:
        raise UserError(f"{line!r:.200} is not a featcache build line", remedy="Begin it with: featcache build")
    command: Any = typer.main.get_command(app)
    try:
        options = command.commands["build"].make_context("build", words[2:]).params
    except Exception as error:
        if not hasattr(error, "show"):  # not a usage error of typer's parser, whose classes it does not export
            raise
        raise UserError(f"{line!r:.200}: {error!s:.300}") from error
    features = ["vae/moments", "label", *(f"vae/{level}" for level in parse_levels(options["vae_levels"]))]
    encoders = parse_encoders(options["encoder"] or [])
    for choice in encoders:
        if not choice.layers:
            raise UserError(
                f"{line!r:.200} leaves the layers of {choice.name} open", remedy="Write them, e.g. dinov2-b@11."
            )
        features += [f"{choice.name}@{layer}" for layer in choice.layers]
    return BuildLine(
        features=tuple(features),
        encoders=tuple(c.name for c in encoders),
        vae=options["vae"],
        resolution=parse_resolution(options["resolution"]) or PAPER_RESOLUTION,
    )
