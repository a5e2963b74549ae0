"""How samples of a run are drawn unless told otherwise: as those of its recipe's published figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from featcache.paths import typed
from trainer.runs import folder as runs
from trainer.runs.published import parse_published


def drawn_as_published(run: Path, asked: Mapping[str, Any], note: Callable[[str], None]) -> dict[str, Any]:
    """Settings of `trainer.requests.SampleRequest` for samples of a run: those asked for, above those of its recipe's
    figures, if it came from a recipe that has some.

    Raises:
        UserError: no such run; or the figures were drawn with guidance of a scale that the paper does not give, and none
            is asked for.
    """
    config = runs.load_config(run)
    published = parse_published(config.published) if config.published else None
    if published is None or published.sampling is None or not published.is_of_samples:
        return dict(asked)
    sampling = published.sampling
    is_dit = config.model.startswith("DiT")  # a run may have another model than its recipe
    fits = (sampling.sampler == "ddpm") == is_dit
    own = {"sampler": sampling.sampler if fits else None, "steps": sampling.steps}
    found = published.settings({**own, **asked}, f"trainer sample {typed(run)}")
    further = f", {sampling.further}" if sampling.further else ""
    note(
        f"drawn as the samples of the recipe's figures ({published.source}: {sampling}{further}), but for what is typed"
    )
    return found
