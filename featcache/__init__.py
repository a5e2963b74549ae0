"""featcache: encode an image dataset once, keep the features, check them, share them."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from featcache.read.open import open_cache as open
    from featcache.read.order import epoch_order
    from featcache.read.reader import Cache, Reader

__all__ = ["Cache", "Reader", "__version__", "epoch_order", "open"]


def __getattr__(name: str) -> object:
    # Late, so that the command line answers at once.
    modules = {"open": "open", "Cache": "reader", "Reader": "reader", "epoch_order": "order"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"featcache.read.{modules[name]}"), "open_cache" if name == "open" else name)
