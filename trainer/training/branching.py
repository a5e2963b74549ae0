"""Takes over from a checkpoint of another run what fits a branch of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainer.runs import checkpoint
from trainer.runs.branch import Origin
from trainer.runs.config import RunConfig
from trainer.training.state import Parts, adversary_names, load_backbone, load_scaler


def take_over(
    parts: Parts, origin: Origin, config: RunConfig, note: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    """Loads weights and average of the backbone, heads and moments as far as they fit; the step and `state.json` to go on
    from.

    Heads are taken over by a branch of the same method, if its options leave their shapes as they were; else they start anew,
    and `note` is told so. Of imported weights there are neither heads nor moments.

    Raises:
        UserError: a file is missing, damaged or of another run.
    """
    folder, former = origin.folder, origin.config
    state = checkpoint.require_own(folder, method=former.method, model=former.model)
    kept = ["weights and average"]
    imported = "imported" in state
    load_backbone(parts.model, folder, "ema" if imported else "model")
    load_backbone(parts.ema, folder, "ema")
    had = () if imported else former.averages[1:]
    for average in parts.averages.take_over(
        parts.model, had, lambda stem: checkpoint.load_tensors(folder, stem), source=folder
    ):
        note(
            f"{average}, which {origin.run} does not keep, counts the weights before step {origin.step} as those of then"
        )
    with_heads = not imported and _load_heads(parts, origin, config, note)
    if imported:
        kept[0] = "averaged weights, which are all that was imported"
    else:
        names = {p: n for p, n in parts.names.items() if with_heads or n.startswith("model.")}
        wanted = set(names.values())
        moments = checkpoint.load_tensors(folder, "optimizer")
        moments = {key: value for key, value in moments.items() if key.partition("/")[2] in wanted}
        checkpoint.load_optimizer(parts.optimizer, moments, names)
        kept.append("the optimiser's moments")
    if with_heads:
        kept.append(f"the heads of {config.method}")
        if parts.adversary_optimizer is not None:
            moments = checkpoint.load_tensors(folder, "adversary")
            checkpoint.load_optimizer(parts.adversary_optimizer, moments, adversary_names(parts))
    if parts.scaler is not None and "scaler" in state:
        load_scaler(parts.scaler, folder, state["scaler"])
    note(f"a branch of {origin.run} at step {origin.step}, from its {', '.join(kept)}")
    return origin.step, state


def _load_heads(parts: Parts, origin: Origin, config: RunConfig, note: Callable[[str], None]) -> bool:
    if parts.alignment is None:
        return False
    anew = f"the heads of {config.method} start anew: "
    if config.methods != origin.config.methods:
        note(f"{anew}{origin.run} was trained with {origin.config.method}")
        return False
    saved = checkpoint.load_tensors(origin.folder, "alignment")
    wrong = checkpoint.misfits(parts.alignment, saved)
    if wrong:
        note(f"{anew}with these options {wrong[0]:.100} is not what {origin.run} has")
        return False
    parts.alignment.load_state_dict(saved)
    return True
