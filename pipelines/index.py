"""Writes `pipelines/README.md`, the index of all recipes: `python -m pipelines.index`."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.runs.config import RunConfig
from trainer.runs.recipe_pages import by_training
from trainer.runs.recipes import Recipe, load_recipe_file, papers, recipe_root

INTRODUCTION = """\
# Recipes

One file for each paper, in it a training for each row of the paper's tables: what to train, what the paper reports, and the
cache it needs. This page is written by `python -m pipelines.index`; `trainer recipes` lists the same in the terminal, and
`trainer recipes ahpa/xl2` shows a row in full: its settings and where each comes from, its figures, and the commands that
reproduce them.

A row from images to its numbers, here SiT-XL/2 with AHPA:

```sh
featcache build --data /path/to/imagenet/train --vae-levels G3,G4     # the row's build line
trainer run --recipe ahpa/xl2 --name ahpa-xl2                         # takes the newest cache that fits, or --cache
trainer eval runs/ahpa-xl2 --data /path/to/imagenet/train             # draws samples as the paper did
```

- A row shows the paper's figures, in brackets how its samples were drawn (sampler and evaluations; guidance if any).
  `trainer eval` draws them so for a run made from the recipe, and for any run with `--figure NAME`. For numbers that may
  stand beside published ones, pass ADM's reference: `--reference VIRTUAL_imagenet256_labeled.npz`.
- Rows whose guidance scale no source of ours gives ("scale not given") are refused by `trainer eval` until one is typed; the error and
  `trainer recipes ROW` name the options, and `--sweep guidance=1.0:2.5:0.1` draws the curve ([docs](../docs/evaluation.md#the-published-protocol)).
- Rows that differ in their sampling or their step alone are figures of one training (a `↳` marks the further ones): train
  it once and evaluate it several times, `trainer eval runs/repa-xl2 --figure repa/xl2-150k`. `trainer run --recipe` takes
  their names too, and trains to their step; with `--resume` it goes on from an earlier one.
- **Rows whose latents are normalised differently are not comparable**, not even without alignment: "latents" says whether one
  factor scales all channels (`scalar`: DiT, SiT, REPA, SARA, DyA, SRA, REG, ReDi) or each `channel` has its own mean and spread (iREPA, and by
  its data AHPA, both with their baselines). Beside AHPA's rows belong `none/b2-ahpa` and `repa/b2-ode`, not `none/b2` and `repa/b2`.
  The statistics of `channel` are computed from the cache when a run starts ([docs](../docs/normalization.md)).
- Any setting can be changed: `trainer run --recipe ahpa/xl2 --set steps=1000 --set ahpa.weight=0.5`. A file of your own
  holds the same keys and may start from a row: `base: ahpa/xl2`; then `trainer run --recipe my.yaml`.
- Rows at 512 px and with other VAEs refuse a cache of another kind; the others take the newest that holds what the
  method reads. With several data sets or resolutions below `./caches`, pass `--cache`.
- One cache serves many rows. Add what another row needs with `featcache build --into CACHE ...`.
- ReDi's rows have a second command: components are derived of the tokens in a cache (CACHE is its folder). It finds them anew; to
  reproduce the authors' numbers add `--map dino_pca_model.pth`, the file in their repository ([docs](../docs/codecs.md#derived-features)).
- "–" stands where the paper shows no figure, or our copy of it has lost it; the file then says which.
- The papers train in fp16 on 8 GPUs. Here a GPU trains in bf16 unless `--precision fp16` is given, and the global batch
  stays the same for any number of GPUs.

`experiments/methods.py` compares all methods on shapes and on photographs, on any machine:
`python -m pipelines.experiments.methods --help`.
"""


def render() -> str:
    """The page: introduction, then a table for each paper."""
    found = papers()
    rows = sum(len(paper.rows) for paper in found)
    links = ", ".join(f"[{p.title}](#{p.title.lower().replace(' ', '-')}) {len(p.rows)}" for p in found)
    parts = [INTRODUCTION, f"{rows} rows of {len(found)} files: {links}.\n"]
    for paper in found:
        parts.append(f"## {paper.title}\n\n{paper.about} File: [{paper.file.name}]({paper.file.name}).\n")
        parts.append("| row | recipe | latents | build | published | source |\n|---|---|---|---|---|---|")
        names = (f"{paper.name}/{row}" for figures in by_training(paper).items() for row in (figures[0], *figures[1]))
        parts.append("\n".join(_row(load_recipe_file(name)) for name in names) + "\n")
    return "\n".join(parts)


def _row(recipe: Recipe) -> str:
    further = recipe.training != recipe.name
    figures, source = "–", "–"
    if recipe.published is not None:
        figures = ", ".join(f"{name} {value}" for name, value in recipe.published.figures().items())
        source = recipe.published.source
        if recipe.published.sampling is not None and str(recipe.published.sampling):
            figures += f" ({recipe.published.sampling})"
    title = ("↳ " if further else "") + recipe.title + (f"<br><sub>{recipe.note}</sub>" if recipe.note else "")
    lines = "<br>".join(f"`{line}`" for line in (recipe.build or "").splitlines())
    build = f"as `{recipe.training}`" if further else lines
    latents = str(recipe.values.get("normalization", RunConfig.normalization))
    cells = (title, f"`{recipe.name}`", latents, build, figures, source)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def readme() -> Path:
    """Where the index lies: beside the recipes."""
    return recipe_root() / "README.md"


def main() -> int:
    """Writes the index; with `--check` only says whether it is up to date (exit code 1 if not)."""
    page = render()
    if "--check" in sys.argv[1:]:
        current = readme().read_text(encoding="utf-8") if readme().is_file() else ""
        return 0 if current == page else 1
    readme().write_text(page, encoding="utf-8")
    print(f"{readme()}: {sum(len(paper.rows) for paper in papers())} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
