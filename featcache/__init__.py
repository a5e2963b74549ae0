"""featcache: encode an image dataset once, keep the features, check them, share them."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from featcache.builder.python import build
    from featcache.read.open import open_cache as open
    from featcache.read.order import epoch_order
    from featcache.read.reader import Cache, Reader

__all__ = ["Cache", "Reader", "__version__", "build", "epoch_order", "open"]

_PLACES = {
    "build": "builder.python:build",
    "open": "read.open:open_cache",
    "Cache": "read.reader:Cache",
    "Reader": "read.reader:Reader",
    "epoch_order": "read.order:epoch_order",
}


def __getattr__(name: str) -> object:
    # Late, so that the command line answers at once.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(f"featcache.{module}"), attribute)
