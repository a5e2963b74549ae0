"""Every field of a manifest replaced by every absurd value: whatever reads such a cache says so in a paragraph."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache
from featcache.builder.request import BuildRequest
from featcache.builder.run import build
from featcache.cli.info import print_info
from featcache.encoders import EncoderChoice
from featcache.errors import UserError
from featcache.inspect import contact_sheet
from featcache.progress import Quiet
from featcache.share.verify import verify
from featcache.store import files
from featcache.store.layout import canonical_json
from featcache.store.manifest import manifest_from_json
from featcache.store.root import root_bytes


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


ABSURD = [
    None,
    True,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    10**30,
    -0.5,
    1e-300,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J\r\x07",
    "[bold]\u202e",
    "../../etc/passwd",
    "x" * 5000,
    "shapes seed=a count=b",
    "shapes seed=0 count=999999999999",
    "shapes a=b=c seed=1",
    [],
    [1, 2, 3],
    ["x"],
    {},
    {"a": 1},
    {"__proto__": {"x": []}},
    deep(22),
    deep(200),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "c"
    request = BuildRequest(
        data="shapes",
        encoders=(EncoderChoice(name="tiny", layers=(2,)),),
        levels=("G3",),
        vae="tiny",
        limit=6,
        out=path,
    )
    build(BuildRequest(**{**vars(request), "shard_size": 4}), Quiet())
    return path


def places(node: Any, at: tuple = ()) -> Iterator[tuple]:
    """Paths of every field, the whole included."""
    yield at
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(child, (*at, key))


def replaced(manifest: Any, at: tuple, value: Any) -> Any:
    if not at:
        return value
    manifest = copy.deepcopy(manifest)
    node = manifest
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return manifest


def removed(manifest: Any, at: tuple) -> Any:
    manifest = copy.deepcopy(manifest)
    node = manifest
    for key in at[:-1]:
        node = node[key]
    del node[at[-1]]
    return manifest


def absurd_manifests(manifest: Any) -> Iterator[tuple[str, Any]]:
    for at in places(manifest):
        if "versions" in at[:-1] or ("class_names" in at[:-1] and at[-1] > 0):
            continue  # one of many that are alike
        for value in ABSURD:
            yield f"{'.'.join(map(str, at))} = {json.dumps(value)[:40]}", replaced(manifest, at, value)
        if at:
            yield f"{'.'.join(map(str, at))} removed", removed(manifest, at)


def write_root(path: Path, manifest: Any) -> bool:
    """The manifest as a root document, with a right checksum and the metadata that follow from it, if any does."""
    try:
        parsed = manifest_from_json(json.loads(json.dumps(manifest)))
        data = root_bytes(parsed)
        whole = True
    except UserError:
        attributes = {"featcache": manifest, "featcache_sha256": "0" * 64}
        document = {"attributes": attributes, "node_type": "group", "zarr_format": 3}
        data = json.dumps(document).encode()
        whole = False
    (path / "zarr.json").write_bytes(data)
    return whole


def read_all(path: Path) -> None:
    opened = featcache.open(path)
    names = list(opened.manifest.features)
    with opened.reader(names, threads=0) as reader:
        out = reader.allocate(2)
        reader.read(np.array([0, len(opened) - 1]), out)
    opened.labels()
    opened.keys(0, 2)


def inspect(path: Path) -> None:
    contact_sheet(featcache.open(path), count=2)


def info(path: Path) -> None:
    print_info(featcache.open(path))


def check(path: Path) -> None:
    verify(path, threads=1)


def run_all(path: Path, manifest: Any, uses: tuple) -> list[str]:
    """Names of what did not end in an answer or a `UserError`."""
    failed = []
    write_root(path, manifest)
    for use in uses:
        try:
            use(path)
        except UserError as error:
            assert len(error.what) < 2000, error.what[:300]
        except Exception as error:
            failed.append(f"{use.__name__}: {type(error).__name__}: {error!s:.120}")
    return failed


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(61, id="some")])
def test_absurd_manifests(cache: Path, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_fsync", lambda fd: None)
    path = tmp_path / "c"
    shutil.copytree(cache, path)
    manifest = json.loads((path / "zarr.json").read_text())["attributes"]["featcache"]
    bad, seen, accepted = [], 0, 0
    for what, changed in list(absurd_manifests(manifest))[::step]:
        failed = run_all(path, changed, (info, check, read_all))
        seen += 1
        try:
            featcache.open(path)
        except UserError:
            pass
        else:
            # Drawing costs a second, so only what opens.
            accepted += 1
            failed += run_all(path, changed, (inspect,))
        bad += [f"{what}: {failure}" for failure in failed]
    assert not bad, f"{len(bad)} of {seen}:\n" + "\n".join(bad[:60])
    assert seen >= 2000 // step and accepted


def test_a_short_manifest_that_claims_very_many_shards(cache: Path, tmp_path: Path) -> None:
    """What a claimed shard costs to be found missing is a line of the report."""
    import tracemalloc

    manifest = json.loads((cache / "zarr.json").read_text())["attributes"]["featcache"]
    label = manifest["features"]["label"]
    manifest |= {"features": {"label": label}, "shard_size": 1, "blocks": {"label": "0" * 64}}
    manifest["checksums"] = {"label": "0" * 64}
    manifest["dataset"]["count"] = 2**20 + 1
    with pytest.raises(UserError, match="at most 1048576 shards"):
        manifest_from_json(manifest)
    manifest["dataset"]["count"] = 2**12
    parsed = manifest_from_json(manifest)
    tmp_path.joinpath("zarr.json").write_bytes(root_bytes(parsed))
    assert len(canonical_json(manifest)) < 3000 and hashlib.sha256(root_bytes(parsed)).hexdigest()
    tracemalloc.start()
    report = verify(tmp_path, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not report.ok and peak < 2**12 * 1000, peak
