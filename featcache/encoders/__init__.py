"""Encoders by name: the table behind `--encoder`, `--vae` and `--vae-levels` (parsing imports no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from featcache.errors import UserError
from featcache.feature_names import CLASS_TOKEN
from featcache.settings import is_number

TINY = "tiny"


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """One `--encoder` as typed: a name and what stands after `@`: layers whose patch tokens are wanted (`9`), and those
    whose class token is (`11.cls`). Nothing at all: the patch tokens of the encoder's default layers."""

    name: str
    layers: tuple[int, ...] = ()
    class_tokens: tuple[int, ...] = ()

    def __str__(self) -> str:
        typed = [*map(str, self.layers), *(f"{layer}.{CLASS_TOKEN}" for layer in self.class_tokens)]
        return self.name + ("@" + ",".join(typed) if typed else "")


def parse_encoders(texts: Sequence[str]) -> tuple[EncoderChoice, ...]:
    """`["dinov2-b@9,11", "tiny"]` or `["dinov2-b@9,11,11.cls,tiny"]` => choices, names unchecked.

    Raises `UserError` for a layer that is not a number (perhaps with `.cls`), or an encoder given twice.
    """
    choices: list[EncoderChoice] = []
    for part in ",".join(texts).split(",") if texts else []:
        part = part.strip()
        if _is_layer(part) and choices and (choices[-1].layers or choices[-1].class_tokens):
            choices.append(_with_layer(choices.pop(), part))
            continue
        name, at, layer = part.rpartition("@") if ".py:" in part and "@" in part else part.partition("@")
        if not name or (at and not _is_layer(layer)):
            raise UserError(
                f"--encoder {','.join(texts)!r}: {part!r} is not an encoder or a layer",
                remedy="Type for example: --encoder dinov2-b, or --encoder dinov2-b@9,11 for two of its layers, "
                "or --encoder dinov2-b@11,11.cls for one and its class token",
            )
        choice = EncoderChoice(name=name)
        choices.append(_with_layer(choice, layer) if at else choice)
    names = [c.name for c in choices]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--encoder {name} is given twice", remedy=f"Name its layers together: --encoder {name}@9,11"
            )
    return tuple(choices)


def _is_layer(text: str) -> bool:
    return is_number(text.removesuffix(f".{CLASS_TOKEN}"))


def _with_layer(choice: EncoderChoice, text: str) -> EncoderChoice:
    number = int(text.removesuffix(f".{CLASS_TOKEN}"))
    if text.endswith(CLASS_TOKEN):
        return replace(choice, class_tokens=(*choice.class_tokens, number))
    return replace(choice, layers=(*choice.layers, number))


def parse_levels(text: str | None) -> tuple[str, ...]:
    """`"G3,G4"` => `("G3", "G4")`; unknown levels are refused by the VAE encoder, which knows them.

    Raises `UserError` for text that names no level.
    """
    if text is None:
        return ()
    levels = tuple(part.strip().upper() for part in text.split(",") if part.strip())
    if not levels:
        raise UserError(f"--vae-levels {text!r} names no level", remedy="Type for example --vae-levels G3,G4")
    return levels
