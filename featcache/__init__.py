"""featcache: encode an image dataset once, keep the features, check them, share them."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from featcache.read.reader import Cache, Reader, epoch_order
    from featcache.read.reader import open_cache as open

__all__ = ["Cache", "Reader", "__version__", "epoch_order", "open"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line answers at once.
    names = {"open": "open_cache", "Cache": "Cache", "Reader": "Reader", "epoch_order": "epoch_order"}
    if name not in names:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import featcache.read.reader

    return getattr(featcache.read.reader, names[name])
