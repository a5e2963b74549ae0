"""featcache: encode an image dataset once, keep the features, check them, share them."""

__version__ = "0.1.0"
