"""Statistics of cached layers, against numpy on the same tokens and on levels whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from store_helpers import build, dataset, moments, tokens

import featcache
from featcache.errors import CacheError
from featcache.read.statistics import layer_statistics
from featcache.store import FeatureSpec
from featcache.store.writers import create_writer

COUNT, T, C = 40, 16, 6


def cache_of(path: Path, features: dict[str, np.ndarray], *, codec: str = "fp32") -> featcache.Cache:
    """A cache of the given values `[COUNT, *shape]`."""
    specs = [FeatureSpec(name=name, shape=values.shape[1:], codec=codec) for name, values in features.items()]
    with create_writer(path, dataset(COUNT), shard_size=16) as writer:
        writer.begin(specs)
        for shard in writer.pending():
            slots = writer.slots(shard)
            for spec in specs:
                writer.write_shard(spec.name, shard, {"": features[spec.name][slots.start : slots.stop]})
        writer.finish()
    return featcache.open(path)


def levels(seed: int, layers: int = 3) -> np.ndarray:
    """[COUNT, layers, T, C] with a mean and a covariance of its own per layer."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(layers, C, C))
    values = np.einsum("nltc,lcd->nltd", rng.normal(size=(COUNT, layers, T, C)), mixing)
    return (values + 2 * rng.normal(size=(layers, 1, C))).astype(np.float32)


def test_moments_rank_and_share_equal_numpy(tmp_path: Path) -> None:
    values = levels(0)
    found = layer_statistics(cache_of(tmp_path / "c", {"vae/G3": values}), ["vae/G3"])["vae/G3"]
    assert found.count == COUNT * T
    for i in range(values.shape[1]):
        flat = values[:, i].reshape(-1, C).astype(np.float64)
        covariance = np.cov(flat.T, bias=True)
        np.testing.assert_allclose(found.mean[i], flat.mean(0), atol=1e-10)
        np.testing.assert_allclose(found.covariance[i], covariance, atol=1e-10)
        np.testing.assert_allclose(found.std[i], flat.std(0), rtol=1e-10)
        np.testing.assert_allclose(found.rms[i], np.sqrt((flat**2).mean()), rtol=1e-10)
        share = (flat.mean(0) ** 2).sum() / (flat**2).sum(1).mean()
        np.testing.assert_allclose(found.mean_share[i], share, rtol=1e-10)
        p = np.linalg.eigvalsh(covariance) / np.trace(covariance)
        np.testing.assert_allclose(found.effective_rank[i], np.exp(-(p * np.log(p)).sum()), rtol=1e-8)


def test_cosines_of_neighbours_go_on_from_group_to_group(tmp_path: Path) -> None:
    third, fourth = levels(1), levels(2, layers=2)
    cache = cache_of(tmp_path / "c", {"vae/G3": third, "vae/G4": fourth, "wide@1": levels(3)[:, 0, :, :4].copy()})
    found = layer_statistics(cache, ["vae/G3", "vae/G4", "wide@1"])

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())

    assert np.isnan(found["vae/G3"].neighbour[0]) and np.isnan(found["wide@1"].neighbour[0])
    np.testing.assert_allclose(found["vae/G3"].neighbour[2], cosine(third[:, 2], third[:, 1]), rtol=1e-9)
    np.testing.assert_allclose(found["vae/G4"].neighbour[0], cosine(fourth[:, 0], third[:, 2]), rtol=1e-9)
    assert found["wide@1"].mean.shape == (1, 4)


def test_levels_that_are_one_signal_are_seen_as_such(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    constant = np.broadcast_to(rng.normal(size=C), (COUNT, 1, T, C))
    line = rng.normal(size=(COUNT, 1, T, 1)) * rng.normal(size=C)
    noise = rng.normal(size=(COUNT, 1, T, C))
    values = np.concatenate([constant, line, 3 * line, noise], axis=1).astype(np.float32)
    found = layer_statistics(cache_of(tmp_path / "c", {"vae/G3": values}), ["vae/G3"])["vae/G3"]
    np.testing.assert_allclose(found.mean_share[0], 1, rtol=1e-6)
    np.testing.assert_allclose(found.effective_rank[1:3], [1, 1], rtol=1e-6)
    np.testing.assert_allclose(found.neighbour[2], 1, rtol=1e-6)
    assert found.effective_rank[3] > 0.9 * C and found.mean_share[3] < 0.05


def test_whitened_tokens_have_unit_covariance(tmp_path: Path) -> None:
    values = levels(4)
    found = layer_statistics(cache_of(tmp_path / "c", {"vae/G3": values}), ["vae/G3"])["vae/G3"]
    whitening = found.whitening(1e-12)
    torch.testing.assert_close(whitening, whitening.mT)
    for i in range(values.shape[1]):
        white = (values[:, i].reshape(-1, C) - found.mean[i].numpy()) @ whitening[i].numpy()
        np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(C), atol=1e-5)


def test_directions_without_variance_are_not_blown_up(tmp_path: Path) -> None:
    values = levels(5)
    values[..., 0] = values[..., 1]  # one direction has no variance at all
    found = layer_statistics(cache_of(tmp_path / "c", {"vae/G3": values}), ["vae/G3"])["vae/G3"]
    largest = torch.linalg.eigvalsh(found.whitening(1e-3))[:, -1]
    mean_variance = found.covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(largest, (1e-3 * mean_variance).rsqrt(), rtol=1e-3, atol=0)


def test_a_sample_is_drawn_by_its_seed_and_estimates_the_whole(tmp_path: Path) -> None:
    cache = cache_of(tmp_path / "c", {"vae/G3": levels(6)})
    first, again, other = (
        layer_statistics(cache, ["vae/G3"], images=20, tokens=8, seed=seed)["vae/G3"] for seed in (1, 1, 2)
    )
    assert first.count == 160 and torch.equal(first.covariance, again.covariance)
    assert not torch.equal(first.mean, other.mean)
    whole = layer_statistics(cache, ["vae/G3"])["vae/G3"]
    assert float((first.mean - whole.mean).abs().max() / whole.std.max()) < 5 / np.sqrt(160)


def test_stored_codecs_are_decoded(tmp_path: Path) -> None:
    build(tmp_path / "c", [moments(), tokens()])
    found = layer_statistics(featcache.open(tmp_path / "c"), ["tiny@5"])["tiny@5"]
    assert found.mean.shape == (1, 32) and bool(torch.isfinite(found.covariance).all())


def test_what_cannot_be_measured_says_so(tmp_path: Path) -> None:
    values = levels(7)
    values[3, 0, 0, 0] = np.inf
    cache = cache_of(tmp_path / "c", {"vae/G3": values})
    with pytest.raises(CacheError, match="not finite"):
        layer_statistics(cache, ["vae/G3"])
    with pytest.raises(CacheError, match="does not hold vae/G4"):
        layer_statistics(cache, ["vae/G4"])
