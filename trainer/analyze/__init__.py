"""Diagnostics: one file each, found through the table below. Importing this needs no torch.

A diagnostic is a function `run(subject) -> Result`. The first column says which weights and labels its subject needs:
`gradients` (as trained) or `representations` (averaged weights, null label).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trainer.analyze.result import Result
    from trainer.analyze.subject import Subject

# Name -> (kind, module). A new diagnostic is one file and one line here.
DIAGNOSTICS: dict[str, tuple[Literal["gradients", "representations"], str]] = {
    "gsnr": ("gradients", "gsnr"),
    "gradient-angle": ("gradients", "angle"),
    "router": ("gradients", "router"),
    "cknna": ("representations", "cknna"),
    "probe": ("representations", "probe"),
    "spectrum": ("representations", "spectrum"),
    "selfsim": ("representations", "selfsim"),
    "pca": ("representations", "pca"),
    "codec": ("gradients", "codec"),
}


def diagnostic(name: str) -> Callable[[Subject], Result]:
    """The function behind one name of `DIAGNOSTICS`."""
    run: Callable[[Subject], Result] = import_module(f"trainer.analyze.{DIAGNOSTICS[name][1]}").run
    return run
