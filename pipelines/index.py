"""Writes ``pipelines/README.md``, the index of all recipes: ``python -m pipelines.index``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.recipes import Recipe, list_recipes, recipe_root

# Folder -> heading and one sentence. Another folder gets its name.
SECTIONS = {
    "none": ("Vanilla", "The backbones without alignment."),
    "repa": ("REPA", "Representation alignment with an image encoder (Yu et al., ICLR 2025)."),
    "irepa": ("iREPA", "REPA with a convolution as head and spatially normalised targets (Singh et al., 2025)."),
    "haste": ("HASTE", "REPA that stops early (Wang et al., 2025)."),
    "sara": ("SARA", "Structural and adversarial representation alignment (Chen et al., 2025)."),
    "dya": ("DyA", "Dynamic alignment with two layers of one encoder."),
    "ahpa": ("AHPA", "Adaptive hierarchical prior alignment with the VAE encoder's own layers."),
    "sra": ("SRA", "Self-representation alignment with the averaged model (Jiang et al., 2025)."),
    "sra2": ("SRA 2", "Alignment with the clean latent (Wang et al., 2026)."),
}

INTRODUCTION = """\
# Recipes

One file for each row of the papers' tables: what to train, what the paper reports, and the cache it needs. This page is
written by `python -m pipelines.index`; `trainer recipes TEXT` lists the same in the terminal.

A row from images to its numbers, here SiT-XL/2 with AHPA:

```sh
featcache build --data /path/to/imagenet/train --vae-levels G3,G4     # the row's build line
trainer run --recipe pipelines/ahpa/xl2.yaml --name ahpa-xl2          # takes the newest cache that fits, or --cache
trainer eval runs/ahpa-xl2 --data /path/to/imagenet/train             # draws samples as the paper did
```

- A row shows the paper's figures, in brackets how its samples were drawn (sampler and evaluations; guidance if any).
  `trainer eval` draws them so for a run made from the recipe. The last column has the same as options, for other runs;
  none means the defaults on a GPU: 50,000 samples by the SDE (DiT: DDPM) with 250 evaluations, no guidance. For numbers
  that may stand beside published ones, pass ADM's reference: `--reference VIRTUAL_imagenet256_labeled.npz`.
- Rows that differ in their sampling alone train the same model: evaluate one run twice, with those options.
- Any setting can be changed: `trainer run --recipe pipelines/ahpa/xl2.yaml --set steps=1000 --set ahpa.weight=0.5`.
- Rows at 512 px and with other VAEs refuse a cache of another kind; the others take the newest that holds what the
  method reads. With several data sets or resolutions below `./caches`, pass `--cache`.
- One cache serves many rows. Add what another row needs with `featcache build --into CACHE ...`.
- A recipe holds only what is particular to it; `base:` names the file it starts from (`_base/` holds the methods').
- "–" stands where the paper shows no figure, or our copy of it has lost it; the file then says which.
- The papers train in fp16 on 8 GPUs. Here a GPU trains in bf16 unless `--precision fp16` is given, and the global batch
  stays the same for any number of GPUs.

`experiments/methods_on_shapes.py` compares all methods on the embedded set, on any machine:
`python -m pipelines.experiments.methods_on_shapes --help`.
"""


def render(recipes: Sequence[Recipe]) -> str:
    """The page: introduction, then a table for each folder in the order of :data:`SECTIONS`."""
    folders: dict[str, list[Recipe]] = {name: [] for name in SECTIONS}
    for recipe in recipes:
        folders.setdefault(_folder(recipe), []).append(recipe)
    parts = [INTRODUCTION, f"{len(recipes)} recipes: {_contents(folders)}\n"]
    for folder, rows in folders.items():
        heading, sentence = SECTIONS.get(folder, (folder, ""))
        parts.append(f"## {heading}\n\n{sentence}\n")
        parts.append("| row | file | build | published | source | eval |\n|---|---|---|---|---|---|")
        parts.append("\n".join(_row(recipe) for recipe in rows) + "\n")
    return "\n".join(parts)


def _folder(recipe: Recipe) -> str:
    return recipe.path.relative_to(recipe_root()).parts[0]


def _contents(folders: dict[str, list[Recipe]]) -> str:
    entries = []
    for folder, rows in folders.items():
        heading = SECTIONS.get(folder, (folder, ""))[0]
        entries.append(f"[{heading}](#{heading.lower().replace(' ', '-')}) {len(rows)}")
    return ", ".join(entries) + "."


def _row(recipe: Recipe) -> str:
    file = recipe.path.relative_to(recipe_root()).as_posix()
    figures, source, options = "–", "–", ""
    if recipe.published is not None:
        figures = ", ".join(f"{name} {value}" for name, value in recipe.published.figures().items())
        source = recipe.published.source
        if recipe.published.sampling is not None:
            figures += f" ({recipe.published.sampling})"
            options = recipe.published.sampling.eval_options()
    build = f"`{recipe.build}`" if recipe.build else "–"
    cells = (recipe.title, f"[{file}]({file})", build, figures, source, f"`{options}`" if options else "")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def readme() -> Path:
    """Where the index lies: beside the recipes."""
    return recipe_root() / "README.md"


def main() -> int:
    """Writes the index; with ``--check`` only says whether it is up to date (exit code 1 if not)."""
    page = render(list_recipes())
    if "--check" in sys.argv[1:]:
        current = readme().read_text(encoding="utf-8") if readme().is_file() else ""
        return 0 if current == page else 1
    readme().write_text(page, encoding="utf-8")
    print(f"{readme()}: {page.count('.yaml](')} recipes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
