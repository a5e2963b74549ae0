"""Caches as parquet files with a dataset card, as the Hugging Face hub keeps data sets.

Read by `datasets.load_dataset`, which finds shapes and class names in the files' own metadata, and by pyarrow alone, for
which a feature is a column of nested lists. Samples are in the cache's order, which is a permutation already.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from featcache.errors import UserError
from featcache.keys import printable
from featcache.read.reader import Cache
from featcache.redact import redact
from featcache.share.layouts import Piece, Samples
from featcache.store import files
from featcache.store.layout import Json
from featcache.store.manifest import FeatureSpec

CARD = "README.md"
_FILE_BYTES = 256 << 20
_GROUP_BYTES = 32 << 20
_MAX_DIMENSIONS = 5  # `datasets` has no name for more
_KEY, _LABEL = "key", "label"
# Of stored values that float16 holds as they are.
_HALF = ("fp16",)


def parquet_layout(
    cache: Cache, features: Sequence[str] | None, views: tuple[int, ...], dtype: str | None
) -> tuple[Samples, ParquetLayout]:
    """The layout of some features (default: all but the images' hashes). Raises `UserError` for one without a place in it."""
    names = [name for name in cache.features if name != "content"] if features is None else list(features)
    cache.require(names)
    samples = Samples(cache, names, np.arange(len(cache)), views)
    return samples, ParquetLayout(samples, dtype)


class ParquetLayout:
    """Columns by the features' names. `dtype`: of decoded ones; None: float16 for what is stored so, else float32."""

    def __init__(self, samples: Samples, dtype: str | None) -> None:
        self._samples, self._cache = samples, samples.cache
        self._columns = {name: self._column(samples.cache.features[name], dtype) for name in samples.names}
        for name, (_, shape) in self._columns.items():
            if len(shape) > _MAX_DIMENSIONS:
                raise UserError(
                    f"{name} has {len(shape)} dimensions, and a column at most {_MAX_DIMENSIONS}",
                    remedy="Name other features with --features.",
                )
        classes = self._cache.classes
        # Their names must be different from one another to be taken for names of numbers.
        self._classes = list(classes) if classes and len(set(classes)) == len(classes) else None
        row_bytes = sum(_bytes(*column) for column in self._columns.values())
        self._group = max(1, min(4096, _GROUP_BYTES // row_bytes))
        self._rows = max(self._group, _FILE_BYTES // row_bytes // self._group * self._group)
        self._schema = pa.schema(
            [_field(name, *column) for name, column in self._columns.items()],
            metadata={"huggingface": json.dumps({"info": {"features": self._described()}})},
        )

    def _column(self, spec: FeatureSpec, dtype: str | None) -> tuple[np.dtype | None, tuple[int, ...]]:
        """dtype (None: text) and shape."""
        if spec.name == _KEY:
            return None, ()
        lead = (2,) if spec.views > 1 and len(self._samples.views) > 1 else ()
        if spec.codec == "raw":
            return np.dtype(spec.dtype), (*lead, *spec.shape)
        return np.dtype(dtype or ("float16" if spec.codec in _HALF and not spec.basis else "float32")), (
            *lead,
            *spec.shape,
        )

    def _described(self) -> dict[str, Json]:
        """The columns as `datasets` describes them in JSON."""
        found: dict[str, Json] = {}
        for name, (dtype, shape) in self._columns.items():
            value = {"dtype": "string" if dtype is None else str(dtype), "_type": "Value"}
            if name == _LABEL and self._classes:
                found[name] = {"names": self._classes, "_type": "ClassLabel"}
            elif not shape:
                found[name] = value
            elif len(shape) == 1:
                found[name] = {"feature": value, "length": shape[0], "_type": "List"}
            else:
                found[name] = {"shape": list(shape), "dtype": str(dtype), "_type": f"Array{len(shape)}D"}
        return found

    def pieces(self) -> list[Piece]:
        n = len(self._samples)
        starts = range(0, n, self._rows)
        return [
            Piece(name=f"data/train-{i:05d}-of-{len(starts):05d}.parquet", rows=range(s, min(s + self._rows, n)))
            for i, s in enumerate(starts)
        ]

    def write(self, path: Path, piece: Piece) -> None:
        texts = [name for name, (dtype, shape) in self._columns.items() if not shape]
        with (
            files.atomic_file(path) as file,
            pq.ParquetWriter(file, self._schema, compression="zstd", use_dictionary=texts) as writer,
        ):
            for start in range(piece.rows.start, piece.rows.stop, self._group):
                rows = range(start, min(start + self._group, piece.rows.stop))
                batches = [batch for _, batch in self._samples.batches(rows)]
                columns = [
                    _arrow_column([batch[name] for batch in batches], *column, name)
                    for name, column in self._columns.items()
                ]
                writer.write_table(pa.table(columns, schema=self._schema))

    def is_whole(self, path: Path, piece: Piece) -> bool:
        return path.is_file()

    def finish(self, folder: Path) -> None:
        files.atomic_write(folder / CARD, [self._card().encode()])

    def _card(self) -> str:
        dataset = self._cache.manifest.dataset
        front = {
            "license": "unknown",
            "tags": ["featcache", "image-features"],
            "size_categories": [_size_category(len(self._samples))],
            "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
            "dataset_info": {"features": [_in_yaml(name, said) for name, said in self._described().items()]},
        }
        specs = [self._cache.features[name] for name in self._columns]
        rows = [
            f"| `{s.name}` | {'x'.join(map(str, self._columns[s.name][1])) or 'scalar'} | "
            f"{self._columns[s.name][0] or 'string'} | {s.stored_as} |"
            for s in specs
        ]
        made = {
            "dataset": {
                "name": dataset.name,
                "images": len(self._samples),
                "preprocessing": dict(dataset.preprocessing),
            },
            "vae": dataset.vae,
            "features": {s.name: dict(s.provenance) for s in specs},
            "classes": list(dataset.class_names),
            "versions": dict(self._cache.manifest.versions),
            "fingerprint": self._cache.fingerprint,
        }
        views = (
            " Features with a leading axis of 2 are of the image and of its mirror image."
            if len(self._samples.views) > 1
            else ""
        )
        return "\n".join(
            [
                "---",
                yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
                "---",
                "",
                "# Cached features of images",
                "",
                f"Features of {len(self._samples):,} images, exported by featcache from a cache. `vae/moments` are mean and "
                "log-variance of the VAE's posterior, unscaled; other features are what the encoder gives, not normalised."
                + views,
                "",
                "| feature | shape | dtype | stored in the cache as |",
                "|---|---|---|---|",
                *rows,
                "",
                "```python",
                "from datasets import load_dataset",
                'samples = load_dataset("parquet", data_files="data/*.parquet", split="train").with_format("torch")',
                "```",
                "",
                "## Licence",
                "",
                "Unknown: features are made from images and by encoders that have licences of their own.",
                "",
                "## Where it comes from",
                "",
                "```json",
                _fenced(made),
                "```",
                "",
            ]
        )


def _fenced(value: Json) -> str:
    """JSON that cannot end the block of code that it stands in."""
    return redact(json.dumps(value, indent=1, sort_keys=True)).replace("`", "\\u0060")


def _in_yaml(name: str, said: Mapping[str, Any]) -> dict[str, Json]:
    """A column as a dataset card describes it."""
    match said["_type"]:
        case "Value":
            return {"name": name, "dtype": said["dtype"]}
        case "ClassLabel":
            return {"name": name, "dtype": {"class_label": {"names": {str(i): n for i, n in enumerate(said["names"])}}}}
        case "List":
            return {"name": name, "list": said["feature"]["dtype"], "length": said["length"]}
        case kind:
            key = f"{kind[:-2].lower()}{kind[-2]}_d"
            return {"name": name, "dtype": {key: {"shape": said["shape"], "dtype": said["dtype"]}}}


def _size_category(count: int) -> str:
    """The hub's name for so many samples."""
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for bound, name in bounds if count < bound), "n>10M")


def _bytes(dtype: np.dtype | None, shape: tuple[int, ...]) -> int:
    return 64 if dtype is None else math.prod(shape) * dtype.itemsize


def _field(name: str, dtype: np.dtype | None, shape: tuple[int, ...]) -> pa.Field:
    """A column. Nested lists are marked as the arrays that `datasets` makes of them; to others they stay lists."""
    found = pa.string() if dtype is None else pa.from_numpy_dtype(dtype)
    if len(shape) == 1:
        return pa.field(name, pa.list_(found, shape[0]))
    for _ in shape:
        found = pa.list_(found)
    if not shape:
        return pa.field(name, found)
    kind = f"datasets.features.features.Array{len(shape)}DExtensionType"
    return pa.field(
        name,
        found,
        metadata={"ARROW:extension:name": kind, "ARROW:extension:metadata": json.dumps([list(shape), str(dtype)])},
    )


def _arrow_column(parts: Sequence[Any], dtype: np.dtype | None, shape: tuple[int, ...], name: str) -> pa.Array:
    """`[B, *shape]` in parts => a column of B nested lists. Raises `UserError` for what the dtype cannot hold."""
    if dtype is None:
        return pa.array([printable(key) for keys in parts for key in keys], pa.string())
    with np.errstate(over="ignore"):
        values = np.concatenate(parts).astype(dtype, copy=False)
    if values.dtype == np.float16 and not np.isfinite(values).all():
        raise UserError(f"{name} holds values beyond 65,504, which float16 cannot", remedy="Type --dtype float32.")
    column = pa.array(values.reshape(-1))
    if len(shape) == 1:
        return pa.FixedSizeListArray.from_arrays(column, shape[0])
    for size in reversed(shape):
        offsets = pa.array(np.arange(0, len(column) + 1, size, dtype=np.int32))
        column = pa.ListArray.from_arrays(offsets, column)
    return column
