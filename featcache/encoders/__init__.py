"""Encoders by name: the table behind `--encoder`, `--vae` and `--vae-levels` (parsing imports no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featcache.errors import UserError
from featcache.settings import is_number

TINY = "tiny"


@dataclass(frozen=True, kw_only=True)
class EncoderChoice:
    """One `--encoder` as typed: a name and the layers after `@` (empty: the encoder's default)."""

    name: str
    layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name + ("@" + ",".join(map(str, self.layers)) if self.layers else "")


def parse_encoders(texts: Sequence[str]) -> tuple[EncoderChoice, ...]:
    """`["dinov2-b@9,11", "tiny"]` or `["dinov2-b@9,11,tiny"]` => choices, names unchecked.

    Raises `UserError` for a layer that is not a number, or an encoder given twice.
    """
    choices: list[EncoderChoice] = []
    for part in ",".join(texts).split(",") if texts else []:
        part = part.strip()
        if is_number(part) and choices and choices[-1].layers:
            last = choices.pop()
            choices.append(EncoderChoice(name=last.name, layers=(*last.layers, int(part))))
            continue
        name, at, layer = part.rpartition("@") if ".py:" in part and "@" in part else part.partition("@")
        if not name or (at and not is_number(layer)):
            raise UserError(
                f"--encoder {','.join(texts)!r}: {part!r} is not an encoder or a layer",
                remedy="Type for example: --encoder dinov2-b, or --encoder dinov2-b@9,11 for two of its layers",
            )
        choices.append(EncoderChoice(name=name, layers=(int(layer),) if at else ()))
    names = [c.name for c in choices]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--encoder {name} is given twice", remedy=f"Name its layers together: --encoder {name}@9,11"
            )
    return tuple(choices)


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
