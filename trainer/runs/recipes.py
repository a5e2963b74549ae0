"""Recipes: what to train for a row of a paper's tables, what the paper reports for it, and the cache it needs.

`pipelines/ahpa.yaml` holds the rows of one paper: `settings` and the `build` line of its cache are common to all its
`trainings`. A training holds keys of `trainer.runs.config.RunConfig` that are its own, `title`, `note`, `build`,
the figures `published` for it and `base`, the row whose settings it starts from instead of the common ones (`b2` in
the same file, `repa/b2` in another). Its `figures` are further rows that it serves: the same training at another
`step`, or samples drawn otherwise. A row is called `ahpa/xl2`, a training and a figure alike.

A user's own file is like one training: its `base` may be a row, or another file by its path relative to itself.
`title`, `note` and `published` belong to one row and are never inherited; `align` is joined option by option; any
other key replaces the one below. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipelines
from featcache.errors import UserError
from featcache.settings import from_mapping
from trainer.runs.config import RunConfig
from trainer.runs.published import MEASURES, Published, Sampling, parse_published
from trainer.runs.yaml_text import read_yaml

_FORMER_FOLDER = re.compile(r"\A(?:(?:.*/)?pipelines/|(?:\.\./)+)")
MAX_BASES = 16  # one upon the other
RECIPE_KEYS = ("base", "title", "note", "build")  # beside RunConfig's
PAPER_KEYS = ("title", "about", "settings", "build", "sampling", "trainings")
FIGURE_KEYS = ("title", "note", "step", "source", "metrics", "sampling")
RUN_KEYS = tuple(f.name for f in dataclasses.fields(RunConfig))
_OWN_KEYS = ("base", "title", "note", "published")  # of one row alone


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One row, or a user's own file, with all that it extends resolved.

    name: `ahpa/xl2`, or the file. values: keys of RunConfig, not validated yet. origins: where each comes from (align's
    by `align.METHOD.OPTION`), and `build`: a row, a file. title, note: text. build: the `featcache build` line of its
    cache, and below it `featcache derive` lines for what is derived of that. published: figures of the paper's row, None where it gives none that we could read. training: name of the row
    whose training this is; its own unless it is a further figure.
    """

    name: str
    values: Mapping[str, Any]
    origins: Mapping[str, str] = field(default_factory=dict)
    title: str = ""
    note: str = ""
    build: str | None = None
    published: Published | None = None
    training: str = ""

    @property
    def method(self) -> str:
        return str(self.values.get("method", RunConfig.method))

    @property
    def model(self) -> str:
        return str(self.values.get("model", RunConfig.model))

    @property
    def steps(self) -> int:
        """Of training.

        Raises:
            UserError: the file says something that is no number.
        """
        steps = self.values.get("steps", RunConfig.steps)
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise UserError(f"{self.name}: steps must be a number, not {steps!r:.80}")
        return steps

    def drawn_as(self, asked: Mapping[str, Any], command: str) -> dict[str, Any]:
        """Settings of `trainer.requests.SampleRequest` for samples as those of the published figures, under what is asked.

        Raises:
            UserError: as `trainer.runs.published.Published.settings`; or the row has no figures.
        """
        assert self.published is not None, "load_figure gives none without"
        sampling = self.published.sampling or Sampling()
        own = {"sampler": sampling.sampler, "steps": sampling.steps, "checkpoint": self.steps}
        return self.published.settings({**own, **asked}, command)

    def config(self) -> RunConfig:
        """The validated configuration.

        Raises:
            UserError: as `RunConfig`.
        """
        return from_mapping(RunConfig, self.values)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One of the project's own files.

    name: `ahpa`. title, about: a heading and a sentence. common: settings and build line of all its trainings.
    rows: by name, without the paper's; a figure is a row that extends its training. trainings: row -> the training
    it belongs to.
    """

    name: str
    file: Path
    title: str
    about: str
    common: Mapping[str, Any]
    rows: Mapping[str, Mapping[str, Any]]
    trainings: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What one row or one user's file says itself. paper: of a row. folder: of a user's file."""

    name: str
    own: Mapping[str, Any]
    paper: Paper | None = None
    folder: Path = Path()


def recipe_root() -> Path:
    """Folder of the project's own recipes: `pipelines` of the checkout, or where the package is installed."""
    return Path(pipelines.__path__[0]).resolve()


def papers() -> list[Paper]:
    """The project's own recipes, by file name."""
    return [_paper(file) for file in _paper_files().values()]


def _paper_files() -> dict[str, Path]:
    return {file.stem: file for file in sorted(recipe_root().glob("*.yaml"))}


def list_recipes(text: str = "") -> list[Recipe]:
    """The project's own rows whose name, method, model, title or source contain `text` (whatever its case)."""
    wanted, found = text.lower(), [_resolve(_row(paper, row)) for paper in papers() for row in paper.rows]
    sources = [r.published.source if r.published is not None else "" for r in found]
    texts = ["\n".join((r.name, r.method, r.model, r.title, source)) for r, source in zip(found, sources)]
    return [r for r, described in zip(found, texts) if wanted in described.lower()]


def figures_of(recipe: Recipe) -> list[Recipe]:
    """The recipe's training and its further figures, in the file's order; a user's own file alone."""
    family, _, training = recipe.training.partition("/")
    file = _paper_files().get(family)
    if file is None:
        return [recipe]
    paper = _paper(file)
    return [_resolve(_row(paper, row)) for row, owner in paper.trainings.items() if owner == training]


def load_recipe_file(path: Path | str) -> Recipe:
    """The recipe that `path` means: a user's file, else a row such as `ahpa/xl2`.

    Raises:
        UserError: no such file or row (the error names the nearest), rows that extend each other in a circle, no valid
            YAML, a key given twice or unknown, a `published` entry that is not well formed.
    """
    return _resolve(_user_file(Path(path)) if _is_file(path) else _named_row(str(path)))


def load_figure(path: Path | str) -> Recipe:
    """As `load_recipe_file`, of a row with published figures.

    Raises:
        UserError: also where it has none.
    """
    recipe = load_recipe_file(path)
    if recipe.published is None:
        raise UserError(
            f"{recipe.name} has no published figures", remedy="Type: trainer recipes   for those that have."
        )
    return recipe


def is_recipe(path: Path | str) -> bool:
    """Whether `path` is a file or names a row."""
    return _is_file(path) or _find_row(str(path)) is not None


def _is_file(path: Path | str) -> bool:
    return os.path.isfile(path)  # noqa: PTH113 (False for names that no file can have, where Path raises)


def _plain(typed: str) -> str:
    """`pipelines/ahpa/xl2.yaml`, once a file, or `../ahpa/xl2.yaml`, as its neighbours named it: `ahpa/xl2`."""
    return _FORMER_FOLDER.sub("", typed).removesuffix(".yaml")


def _find_row(typed: str) -> _Entry | None:
    """The row of that name; no other file than its paper's is read."""
    family, _, row = _plain(typed).partition("/")
    file = _paper_files().get(family)
    return _row(_paper(file), row) if file is not None and row in _paper(file).rows else None


def _named_row(typed: str) -> _Entry:
    found = _find_row(typed)
    if found is not None:
        return found
    near = difflib.get_close_matches(_plain(typed), [f"{p.name}/{row}" for p in papers() for row in p.rows], n=1)
    hint = f"Did you mean {near[0]}?   " if near else ""
    raise UserError(f"there is no recipe {typed!r:.200}", remedy=f"{hint}Type: trainer recipes   to list them.")


def _row(paper: Paper, row: str) -> _Entry:
    return _Entry(name=f"{paper.name}/{row}", own=paper.rows[row], paper=paper)


def _user_file(path: Path) -> _Entry:
    file = path.resolve()
    own = _read(file)
    if "trainings" in own:
        raise UserError(f"{file} holds many rows, not one recipe", remedy="Name a row of it, for example ahpa/xl2.")
    _check_keys(own, (*RECIPE_KEYS, *RUN_KEYS), str(file))
    return _Entry(name=str(file), own=own, folder=file.parent)


def _resolve(entry: _Entry) -> Recipe:
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, layer in _layers(entry):
        merged = _join(merged, layer)
        origins.update(dict.fromkeys(flat(layer), origin))
    own = entry.own
    published = None if own.get("published") in (None, {}) else _published(own["published"], entry.name)
    texts = {"title": own.get("title"), "note": own.get("note"), "build": merged.get("build")}
    for key, value in texts.items():
        if not isinstance(value, str | None):
            raise UserError(f"{entry.name}: {key} must be one line of text, not {value!r:.80}")
    values = {key: value for key, value in merged.items() if key not in RECIPE_KEYS}
    if published is not None:
        values["published"] = own["published"]
    paper, row = entry.paper, entry.name.partition("/")[2]
    return Recipe(
        name=entry.name,
        values=values,
        origins=origins,
        title=texts["title"] or "",
        note=texts["note"] or "",
        build=texts["build"],
        published=published,
        training=entry.name if paper is None else f"{paper.name}/{paper.trainings[row]}",
    )


def _published(values: object, where: str) -> Published:
    try:
        return parse_published(values)
    except UserError as error:
        raise UserError(f"{where}: {error.what}", remedy=error.remedy) from error


def _layers(entry: _Entry, chain: tuple[str, ...] = ()) -> list[tuple[str, Mapping[str, Any]]]:
    """What an entry starts from and then what it says itself, each with its origin, without what is not inherited."""
    if entry.name in chain:
        raise UserError(
            f"{chain[0]} extends itself in a circle: {' -> '.join([*chain, entry.name])}",
            remedy="Take base out of one of them.",
        )
    if len(chain) >= MAX_BASES:
        raise UserError(f"{chain[0]} extends more than {MAX_BASES} others, one upon the other")
    below: list[tuple[str, Mapping[str, Any]]] = []
    base = entry.own.get("base")
    if base is not None:
        if not isinstance(base, str) or len(base) > 1000 or "\0" in base:
            raise UserError(f"{entry.name}: base {base!r:.80} names no row and no file")
        below = _layers(_base_of(entry, base), (*chain, entry.name))
    elif entry.paper is not None:
        below = [(entry.paper.file.name, entry.paper.common)]
    return [*below, (entry.name, {key: value for key, value in entry.own.items() if key not in _OWN_KEYS})]


def _base_of(entry: _Entry, base: str) -> _Entry:
    if entry.paper is None and _is_file(entry.folder / base):
        return _user_file(entry.folder / base)
    try:
        return _named_row(base if entry.paper is None or "/" in base else f"{entry.paper.name}/{base}")
    except UserError as error:
        raise UserError(f"{entry.name}: base: {error.what}", remedy=error.remedy) from error


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


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by key, align's options as `align.METHOD.OPTION`."""
    align = values.get("align")
    if not isinstance(align, Mapping):
        return dict(values)
    options = {
        f"align.{method}.{key}": value for method, given in align.items() for key, value in (given or {}).items()
    }
    return {key: value for key, value in values.items() if key != "align"} | options


@functools.cache
def _paper(file: Path) -> Paper:
    content = _read(file)
    _check_keys(content, PAPER_KEYS, str(file))
    common = {**_mapping(content, "settings", str(file)), "build": content.get("build")}
    _check_keys(common, (*(key for key in RUN_KEYS if key != "published"), "build"), f"{file}: settings")
    drawn = _mapping(content, "sampling", str(file))
    rows: dict[str, Mapping[str, Any]] = {}
    owners: dict[str, str] = {}
    trainings = _mapping(content, "trainings", str(file))
    for name in trainings:
        where = f"{file}: {name}"
        training = _mapping(trainings, name, str(file))
        _check_keys(training, (*RECIPE_KEYS, *RUN_KEYS, "figures"), where)
        figures = _mapping(training, "figures", where)
        found = {name: {key: value for key, value in training.items() if key != "figures"}}
        for figure in figures:
            if figure in found:
                raise UserError(f"{where}: a figure has the training's own name", remedy="Give it another.")
            found[figure] = _figure(name, _mapping(figures, figure, where), f"{where}.{figure}")
        for row, entry in found.items():
            if row in rows:
                raise UserError(f"{file}: two rows are called {row}", remedy="Give each a name of its own.")
            rows[row] = _with_sampling(entry, drawn)
            owners[row] = name
    title, about = str(content.get("title", file.stem)), str(content.get("about", ""))
    return Paper(name=file.stem, file=file, title=title, about=about, common=common, rows=rows, trainings=owners)


def _figure(training: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A figure as the row that it is: its training, to its step, with what was published."""
    _check_keys(values, FIGURE_KEYS, where)
    if "source" not in values:
        raise UserError(f"{where}: a figure has no source", remedy="Write for example: source: AHPA, Table 3")
    row: dict[str, Any] = {"base": training, **{key: values[key] for key in ("title", "note") if key in values}}
    if "step" in values:
        row["steps"] = values["step"]
    row["published"] = {key: values[key] for key in ("source", "metrics", "sampling") if key in values}
    return row


def _with_sampling(row: Mapping[str, Any], drawn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row whose published figures were drawn as the paper's are in common, but for what they say themselves."""
    published = row.get("published")
    if not drawn or not isinstance(published, Mapping) or not isinstance(published.get("sampling") or {}, Mapping):
        return row
    figures = published.get("metrics")
    if isinstance(figures, Mapping) and figures and set(figures) <= set(MEASURES):  # not of samples
        return row
    return {**row, "published": {**published, "sampling": {**drawn, **(published.get("sampling") or {})}}}


def _mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """The keys and values below `key`; none where it is left out."""
    below = values.get(key)
    if below is not None and not isinstance(below, Mapping):
        raise UserError(f"{where}: {key} must hold keys and values, not {below!r:.80}")
    return below or {}


def _check_keys(values: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    """Refuses keys that are none, and options of a method that are not keys and values."""
    for key in values:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Valid keys: {', '.join(sorted(valid))}"
            raise UserError(f"{where}: unknown key {key!s:.80}", remedy=hint)
    options = values.get("align")
    for method, given in options.items() if isinstance(options, Mapping) else ():
        if not isinstance(given, Mapping | None):
            raise UserError(f"{where}: align.{method!s:.80} must hold options, not {given!r:.80}")


def _read(file: Path) -> dict[str, Any]:
    """The mapping in one file."""
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise UserError(
            f"{file} must hold keys and values, for example 'method: ahpa'",
            remedy="Type: trainer recipes   to list them.",
        )
    return values


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe, all that it extends resolved (see `trainer.runs.recipes`).

    Raises:
        UserError: as `trainer.runs.recipes.load_recipe_file`.
    """
    return dict(load_recipe_file(path).values)
