"""Text that a run's model is conditioned on. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from featcache.errors import CacheError, UserError
from trainer.models.config import TextShape, takes_text

EXAMPLE = "text/clip-l"  # of REPA's MMDiT
NEEDED = "text/count"  # how many captions an image has, beside their rows


def is_text(name: str) -> bool:
    """Whether a feature of this name holds an encoder's hidden states of captions."""
    encoder = name.removeprefix("text/")
    return encoder not in (name, "") and "." not in encoder and name != NEEDED


def check_condition(name: str, model: str) -> None:
    """Raises `UserError` for what cannot be the condition of this model.

    The name may come from anybody's `config.yaml`, and is printed.
    """
    from featcache.store.manifest import check_feature_name  # brings numpy

    try:
        check_feature_name(name)
    except CacheError as error:
        raise UserError(f"condition: {error.what}", remedy=f"Type for example: --condition {EXAMPLE}") from error
    if not is_text(name):
        raise UserError(
            f"{name} cannot be the condition: it is no encoder's text, whose features are called text/ENCODER",
            remedy=f"Type for example: --condition {EXAMPLE}; or leave it out, to train on "
            + ("the text that the cache holds" if takes_text(model) else "labels"),
        )
    if not takes_text(model):
        raise UserError(
            f"{model} takes labels, and the condition is to be {name}",
            remedy="Leave --condition out, or take a model that takes text: --model MMDiT-L/2",
        )


def only_text(names: Iterable[str]) -> str | None:
    """The text feature among these, if there is exactly one."""
    found = [name for name in names if is_text(name)]
    return found[0] if len(found) == 1 else None


def text_shape(condition: str | None, shapes: Mapping[str, tuple[int, ...]]) -> TextShape | None:
    """How the backbone sees a condition, given the shapes of the features; None without one.

    Raises:
        UserError: its shape is not there, or is not [captions, tokens, width].
    """
    if condition is None:
        return None
    if condition not in shapes:
        raise UserError(
            f"{condition} is the condition, and the run's cache.json does not say its shape",
            remedy="Bring the file back.",
        )
    if len(shapes[condition]) != 3:
        text = " x ".join(map(str, shapes[condition]))
        raise UserError(f"{condition}, of shape {text}, is no text: captions x tokens x width was expected.")
    _, tokens, width = shapes[condition]
    return TextShape(name=condition, tokens=tokens, width=width)
