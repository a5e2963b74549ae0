"""Affine maps of tokens in files: our own, and the principal components that ReDi publishes."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import UserError, first_line
from featcache.keys import printable
from featcache.read.pickled import Made, array, read_pickle
from featcache.store import files
from featcache.store.derived import AffineMap
from featcache.store.layout import Json

MAX_FILE_BYTES = 1 << 26


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """A map and where it was found (JSON). variance: float64 [K] along each component, largest first; total: of all of them,
    with those that the map leaves out. None where nothing says."""

    map: AffineMap
    how: dict[str, Json]
    variance: np.ndarray | None = None
    total: float | None = None

    def record(self) -> dict[str, Json]:
        """`how`, with the variances."""
        known = self.variance is not None and self.total is not None
        variance = {} if self.variance is None else {"variance": [float(v) for v in self.variance]}
        return {**self.how, **(variance | {"total_variance": self.total} if known else {})}


def load_map(path: Path, components: int | None) -> Found:
    """The map in a file, to the first so many components (None: all of them).

    A `.safetensors` file holds `matrix` [C, K] and `offset` [K], as `save_map` writes them. Any other is taken for what
    ReDi's `calc_pca.py` saves: a PyTorch file with `mean` and `std` of the channels, float [C], and `pca_model`, sklearn's PCA
    of the standardised tokens. It is read as data (`featcache.read.pickled`): z = ((y - mean) / std - mean_) components_^T.

    Raises `UserError` if the file cannot be read, holds something else, or fewer components.
    """
    data = files.read_bounded(path, MAX_FILE_BYTES)
    how: dict[str, Json] = {"method": "file", "file": printable(path.name), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        if path.suffix == ".safetensors":
            matrix, offset, variance = *_safetensors(data), None
        else:
            matrix, offset, variance = _redi(data)
    except UserError as error:
        raise UserError(
            f"{path} holds no map: {error.what}",
            remedy="Pass a file that featcache derive --save-map wrote, or ReDi's dino_pca_model.pth.",
        ) from error
    K = matrix.shape[1] if components is None else components
    if not 1 <= K <= matrix.shape[1]:
        raise UserError(f"{path} has {matrix.shape[1]} components, not {K}", remedy="Choose fewer with --pca.")
    made = AffineMap(matrix=matrix[:, :K].copy(), offset=offset[:K].copy())
    if variance is None:
        return Found(map=made, how=how)
    return Found(map=made, how=how, variance=variance[:K], total=float(variance.sum()))


def save_map(made: AffineMap, path: Path) -> None:
    """Writes a safetensors file, whole or not at all; raises `CacheError` where that cannot be."""
    from safetensors.numpy import save as serialize

    data = serialize({"matrix": np.ascontiguousarray(made.matrix), "offset": np.ascontiguousarray(made.offset)})
    files.make_directory(path.parent)
    with files.atomic_file(path) as file:
        file.write(data)


def is_saved_map(path: Path) -> bool:
    """Whether `save_map` wrote the file."""
    try:
        load_map(path, None)
    except UserError:
        return False
    return path.suffix == ".safetensors"


def _safetensors(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    from safetensors.numpy import load as parse

    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found = parse(data)
    except Exception as error:  # whatever a library says of a file that comes from anywhere
        raise UserError(f"it cannot be read: {first_line(error)}") from error
    names = sorted(key for key in header if key != "__metadata__")
    if names != ["matrix", "offset"] or any(found[n].dtype != np.float64 for n in names) or found["matrix"].ndim != 2:
        raise UserError(f"it holds {', '.join(names)[:200] or 'nothing'}, not matrix [C, K] and offset [K] of float64")
    return found["matrix"], found["offset"]


def _redi(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """matrix [C, K], offset [K], and the variances along all K, if they are there."""
    value = read_pickle(_pickle_of(data))
    model = value.get("pca_model") if isinstance(value, dict) else None
    if not isinstance(model, Made) or not isinstance(model.state, dict) or not {"mean", "std"} <= set(value):
        raise UserError("it does not hold pca_model, mean and std")
    state: dict[Any, Any] = model.state
    if not {"components_", "mean_"} <= set(state):
        raise UserError("its pca_model has no components_ and mean_")
    vectors, shift = array(state["components_"], "components_"), array(state["mean_"], "mean_")
    mean, std = array(value["mean"], "mean"), array(value["std"], "std")
    if vectors.ndim != 2 or not len(vectors) or any(v.shape != vectors.shape[1:] for v in (shift, mean, std)):
        shapes = ", ".join(str(list(v.shape)) for v in (vectors, shift, mean, std))
        raise UserError(f"components_, mean_, mean and std do not fit each other: {shapes}")
    if not all(np.isfinite(v).all() for v in (vectors, shift, mean, std)) or not (std > 0).all():
        raise UserError("its numbers are not finite, or a std is not positive")
    variance = None
    if "explained_variance_" in state:
        variance = array(state["explained_variance_"], "explained_variance_")
        if variance.shape != (len(vectors),) or not np.isfinite(variance).all():
            raise UserError("its explained_variance_ does not fit its components_")
    return (vectors / std).T, -vectors @ (mean / std + shift), variance


def _pickle_of(data: bytes) -> bytes:
    """The pickle in a PyTorch file: the file itself, or a member of an archive."""
    stream = io.BytesIO(data)
    if not zipfile.is_zipfile(stream):
        return data
    try:
        with zipfile.ZipFile(stream) as archive:
            members = [m for m in archive.infolist() if m.filename.rpartition("/")[2] == "data.pkl"]
            if len(members) != 1:
                raise UserError("it is an archive without a pickle")
            with archive.open(members[0]) as member:
                content = member.read(MAX_FILE_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, OSError, ValueError) as error:
        raise UserError(f"it is a damaged archive: {first_line(error)}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"its pickle has more than {MAX_FILE_BYTES >> 20} MiB")
    return content
