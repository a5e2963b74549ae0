"""The store: manifest, journal, checksums, zarr and webdataset backends. Imports neither torch nor zarr."""

from featcache.store.manifest import FORMAT_VERSION, DatasetSpec, FeatureSpec, Manifest, Skipped
from featcache.store.writer import CacheWriter
from featcache.store.writers import create_writer, join_writer, open_writer, repair_writer

__all__ = [
    "FORMAT_VERSION",
    "CacheWriter",
    "DatasetSpec",
    "FeatureSpec",
    "Manifest",
    "Skipped",
    "create_writer",
    "join_writer",
    "open_writer",
    "repair_writer",
]
