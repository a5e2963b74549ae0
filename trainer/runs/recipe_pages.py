"""Recipes as text for the terminal: an overview by paper, a table of rows, one row in full."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path

from trainer.runs.published import PROMPTS, Sampling
from trainer.runs.recipes import Paper, Recipe, figures_of, flat, is_recipe, list_recipes, load_recipe_file, papers

DATA = "/path/to/imagenet/train"  # in commands to be typed


def page(text: str, width: int) -> list[str]:
    """What `trainer recipes TEXT` shows: the row or file of that name, else the rows that contain it; "" is all.

    Raises:
        UserError: as `trainer.runs.recipes.load_recipe_file`, where no row contains the text either.
    """
    if not text:
        rows = sum(len(paper.rows) for paper in papers())
        next_steps = f"{rows} recipes   next: trainer recipes TEXT   or: trainer recipes ahpa/xl2"
        return [*overview(papers(), width), "", next_steps]
    if is_recipe(text) or not (found := list_recipes(text)):
        return describe(load_recipe_file(text))
    return [*listing(found), f"{len(found)} recipes   next: trainer run --recipe RECIPE"]


def overview(papers: Sequence[Paper], width: int) -> list[str]:
    """For each paper a heading and the names of its rows; a training's further figures stand behind it in brackets."""
    lines = []
    for paper in papers:
        figures = by_training(paper)
        heading = f"{paper.name}/  {paper.title}: {paper.about}"
        lines.append(f"{heading} {len(figures)} trainings, {len(paper.rows)} rows")
        names = "  ".join(name + (f" ({', '.join(further)})" if further else "") for name, further in figures.items())
        lines += textwrap.wrap(
            names,
            width,
            initial_indent="    ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def by_training(paper: Paper) -> dict[str, list[str]]:
    """Training -> its further figures, in the file's order."""
    figures: dict[str, list[str]] = {}
    for row, training in paper.trainings.items():
        figures.setdefault(training, []).extend([row] if row != training else [])
    return figures


def listing(recipes: Sequence[Recipe]) -> list[str]:
    """One line per row, in columns: name, method, model, published FID, title. The first line names the columns."""
    rows = [("recipe", "method", "model", "FID", "title")]
    for recipe in recipes:
        fid = recipe.published.figures().get("FID", "-") if recipe.published is not None else "-"
        rows.append((recipe.name, recipe.method, recipe.model, fid, recipe.title))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths)), row[4]]) for row in rows]


def describe(recipe: Recipe) -> list[str]:
    """One row in full: settings and where each comes from, its training's figures, the commands that reproduce them."""
    shown = figures_of(recipe)
    lines = [f"{recipe.name}   {recipe.title}".rstrip()]
    if recipe.training != recipe.name:
        lines.append(f"A further figure of the training {recipe.training}.")
    lines += ["", "Settings, and where each comes from (anything else: the defaults)"]
    settings = _settings(recipe)
    widths = [max((len(row[i]) for row in settings), default=0) for i in range(2)]
    lines += [f"  {key.ljust(widths[0])}  {value.ljust(widths[1])}  {origin}" for key, value, origin in settings]
    lines += ["", "Published figures"]
    for row in shown:
        lines += _figure(row)
    wanted = shown if recipe.name == recipe.training else [recipe]
    lines += ["", "To reproduce them" if len(wanted) > 1 else "To reproduce it", *commands(recipe, wanted)]
    return lines


def _settings(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(key, value, origin) of each setting, and of the build line."""
    values = flat(recipe.values) | ({} if recipe.build is None else {"build": recipe.build})
    return [
        (key, str(values[key]).replace("\n", "; "), origin) for key, origin in recipe.origins.items() if key in values
    ]


def _figure(row: Recipe) -> list[str]:
    published = row.published
    if published is None:
        lines = [f"  {row.name}: none"]
    else:
        numbers = ", ".join(f"{name} {value}" for name, value in published.figures().items())
        sampling = published.sampling or Sampling(guidance=1.0)
        how = ", ".join(filter(None, (str(sampling), sampling.further)))
        drawn = f" ({how})" if how else ""
        lines = [f"  {row.name}: {numbers} at step {row.steps:,}{drawn}; {published.source}"]
    return [*lines, *textwrap.wrap(row.note, 118, initial_indent="    ", subsequent_indent="    ")]


def commands(recipe: Recipe, rows: Sequence[Recipe]) -> list[str]:
    """Build, derive, then train to each row's step in turn and evaluate there as the row's samples were drawn."""
    name = shlex.quote(Path(recipe.name).stem if Path(recipe.name).is_absolute() else recipe.name.replace("/", "-"))
    data = "" if recipe.build is None or "--data" in recipe.build.split() else f" --data {DATA}"
    build, *derive = recipe.build.splitlines() if recipe.build else [""]
    lines = [f"  {build}{data}"] if build else []
    lines += [f"  {line}" for line in derive]
    reached = 0
    for row in sorted(rows, key=lambda r: r.steps):
        if row.steps > reached:
            resume = " --resume" if reached else ""
            lines.append(f"  trainer run --recipe {shlex.quote(row.name)} --name {name}{resume}")
            reached = row.steps
        lines += _evaluation(row, name, data)
    return lines


def _evaluation(row: Recipe, name: str, data: str) -> list[str]:
    """What judges a run of that name as the row's samples were judged; where the paper leaves the guidance open, each way."""
    published = row.published
    if published is None:
        return [f"  trainer eval runs/{name}{data}"]
    if not published.is_of_samples:
        return [f"  trainer analyze runs/{name} --what gsnr"]
    sampling = published.sampling or Sampling()
    prompted = "" if sampling.prompts is None else f" {PROMPTS[sampling.prompts][0]}"
    line = f"  trainer eval runs/{name} --figure {shlex.quote(row.name)}{prompted}{data}"
    if sampling.guidance is None:
        tried = [f"{line} {option.flags}   # {option.why}; the paper gives no scale" for option in sampling.options]
        return [*tried, f"{line} --sweep guidance=1.0:2.5:0.1   # the curve over the scale"]
    lines = [line, *(f"{line} {other.flags}   # {other.why}" for other in sampling.variants)]
    return [*lines, *(f"{line} --reference {shlex.quote(further)}" for further in sampling.also)]
