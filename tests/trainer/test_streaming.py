"""Training on a cache that lies on S3, as it is typed, through a local directory smaller than the cache."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import Listener, losses

from featcache.errors import CacheError
from featcache.share.transfer import push
from featcache.store.manifest import DatasetSpec, FeatureSpec
from featcache.store.writers import create_writer
from trainer.runs.cache import find_cache
from trainer.runs.config import RunConfig
from trainer.runs.folder import load_config
from trainer.training.loop import train

COUNT, BATCH = 160, 16
LIMIT_BYTES = 4 << 20  # the least a stream takes


@pytest.fixture
def bucket(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://`` URL of an empty bucket on a server of the loopback."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return f"s3://{s3_bucket}"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Small latents and wide tokens of random numbers: 8 MB in ten shards."""
    path = tmp_path / "caches" / "wide"
    dataset = DatasetSpec(
        name="random",
        count=COUNT,
        class_names=("a", "b"),
        fingerprint="0" * 64,
        preprocessing={"resolution": 64},
        vae={"name": "random", "latent_channels": 4, "scaling_factor": 1.0, "shift_factor": 0.0, "downsampling": 8},
        grid=4,
    )
    specs = [
        FeatureSpec(name="vae/moments", shape=(8, 8, 8), codec="fp16"),
        FeatureSpec(name="dino@11", shape=(16, 768), codec="fp32"),
        FeatureSpec(name="label", shape=(), codec="raw", dtype="int64"),
        FeatureSpec(name="key", shape=(8,), codec="raw", dtype="uint8"),
    ]
    rng = np.random.default_rng(0)
    with create_writer(path, dataset, shard_size=16) as writer:
        writer.begin(specs)
        for shard in writer.pending():
            n = len(writer.slots(shard))
            for spec in specs:
                arrays = {
                    name[len(spec.name) :]: (
                        rng.integers(0, 2, (n, *shape)) if dtype.kind in "iu" else rng.random((n, *shape))
                    ).astype(dtype)
                    for name, (dtype, shape) in spec.arrays.items()
                }
                writer.write_shard(spec.name, shard, arrays)
        writer.finish()
    return path


def bytes_below(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def test_a_run_streams_through_less_than_the_cache(
    cli: Callable[..., subprocess.CompletedProcess[str]], bucket: str, cache: Path, tmp_path: Path
) -> None:
    """More than an epoch; the numbers are those of the cache on disk, and the directory never passes its bound."""
    push(cache, f"{bucket}/wide")
    blocks = tmp_path / "blocks"
    common: dict[str, Any] = {"method": "repa", "model": "SiT-Ti/2", "batch_size": BATCH, "log_every": 1}
    done = cli(
        *f"trainer run --method repa --model SiT-Ti/2 --steps 11 --batch-size {BATCH} --name remote".split(),
        *f"--cache {bucket}/wide --set stream_dir={blocks} --set stream_gib={LIMIT_BYTES / 2**30}".split(),
        *("--device", "cpu", "--set", "log_every=1"),
    )
    assert done.returncode == 0, done.stderr
    config = RunConfig(cache=str(cache), name="local", steps=11, device="cpu", **common)
    local, remote = (
        train(config, resume=False, watcher=Listener(), root=tmp_path / "runs"),
        tmp_path / "runs" / "remote",
    )
    assert len(losses(local)) == 11 and losses(remote) == losses(local)
    assert bytes_below(cache) > 1.5 * LIMIT_BYTES
    assert 0.5 * LIMIT_BYTES < bytes_below(blocks) <= LIMIT_BYTES

    saved = load_config(remote)
    assert saved.cache == f"{bucket}/wide"
    train(replace(saved, steps=12), resume=True, watcher=Listener(), root=tmp_path / "runs")
    assert len(losses(remote)) == 12 and bytes_below(blocks) <= LIMIT_BYTES
    with pytest.raises(CacheError, match=f"there is no cache at {bucket}/none"):
        find_cache(replace(saved, cache=f"{bucket}/none"))
    with pytest.raises(CacheError, match="needs at least"):
        find_cache(replace(saved, stream_gib=0.001))
