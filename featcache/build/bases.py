"""Fitting the bases of a build: principal components of the first images' tokens, before anything is written.

One process fits them; a build that goes on, and its other workers, take them from where that one wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from featcache.build.pipeline import Meter, run_shards
from featcache.build.prepare import Plan
from featcache.errors import CacheError, UserError
from featcache.progress import Progress
from featcache.store.basis import Basis, token_width
from featcache.store.manifest import FeatureSpec
from featcache.store.writer import building_directory, declared, known_manifest

IMAGES = 2048
TOKENS = 64  # of each image: neighbours say much the same
SHARD = 16
_SMALLEST = 1e-6  # of the largest standard deviation: a component below it is rounding


def settle_bases(plan: Plan, progress: Progress) -> Plan:
    """The plan with every basis fitted: taken from the cache if a build of the feature is there, else from its images.

    Raises `UserError` if there are too few tokens for so many components, `CacheError` if the unfinished build that is
    there was begun otherwise.
    """
    plan = adopt_bases(plan)
    wanted = {spec.name: spec for spec in _open(plan)}
    if not wanted:
        return plan
    components = Components()
    work = plan.work
    plain = {name: replace(spec, codec="fp32", basis=None, views=1) for name, spec in wanted.items()}
    sample = replace(
        work,
        order=work.order[:IMAGES],
        shard_size=min(SHARD, work.batch_size),
        specs=plain,
        encoders=[encoder for encoder in work.encoders if any(name in plain for name in encoder.shapes)],
        texts=[],
        captions=None,
        flip=False,
        skip_bad=True,  # the build itself says what is to be said of them
    )
    progress.begin(f"finding the components of {', '.join(wanted)}", len(sample.order))
    shards = -(-len(sample.order) // sample.shard_size)
    run_shards(sample, list(range(shards)), components, meter=Meter(), progress=progress)
    return _with(plan, {name: components.basis(name, _rank(spec)) for name, spec in wanted.items()})


def adopt_bases(plan: Plan) -> Plan:
    """The plan with those bases that the cache, complete or begun, holds already."""
    found = {spec.name: basis for spec in _open(plan) if (basis := _known(plan, spec)) is not None}
    return _with(plan, found)


def _open(plan: Plan) -> list[FeatureSpec]:
    return [spec for spec in plan.specs if spec.basis is not None and not spec.basis.is_fitted]


def _rank(spec: FeatureSpec) -> int:
    assert spec.basis is not None
    return spec.basis.rank


def _known(plan: Plan, spec: FeatureSpec) -> Basis | None:
    if not plan.path.is_dir():
        return None
    manifest = known_manifest(plan.path)
    have = manifest.features.get(spec.name) if manifest is not None else None
    building = building_directory(plan.path, spec.name)
    if have is None and (building / "spec.json").is_file():
        have = declared(building)
    # Where ranks differ, or one has none, the writer says so.
    if have is None or have.basis is None or have.basis.rank != _rank(spec):
        return None
    return have.basis


def _with(plan: Plan, bases: Mapping[str, Basis]) -> Plan:
    specs = tuple(replace(s, basis=bases[s.name]) if s.name in bases else s for s in plan.specs)
    return replace(plan, specs=specs, work=replace(plan.work, specs={spec.name: spec for spec in specs}))


class Components:
    """Mean and covariance of tokens, in float64, taken as the shards of a build come; a `ShardWriter`."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._sum: dict[str, np.ndarray] = {}
        self._products: dict[str, np.ndarray] = {}

    def skip(self, shard: int, slots: Sequence[tuple[int, str, str]]) -> None:
        pass

    def write_shard(self, feature: str, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
        values = arrays[""]
        left_out = (values == 0).reshape(len(values), -1).all(1)  # the place of an image that could not be read
        self.add(feature, values[~left_out], seed=shard)

    def commit(self) -> None:
        pass

    def add(self, feature: str, values: np.ndarray, *, seed: int) -> None:
        """Tokens of images `[n, T, C]` or `[n, L, T, C]`; of more than `TOKENS` places some, drawn by `seed`."""
        places = np.sort(np.random.default_rng(seed).permutation(values.shape[-2])[:TOKENS])
        chosen = values[..., places, :].astype(np.float64)
        tokens = chosen if chosen.ndim == 3 else chosen.swapaxes(1, 2)
        tokens = tokens.reshape(-1, token_width(values.shape[1:]))
        self._count[feature] = self._count.get(feature, 0) + len(tokens)
        self._sum[feature] = self._sum.get(feature, 0) + tokens.sum(0)
        self._products[feature] = self._products.get(feature, 0) + tokens.T @ tokens

    def basis(self, feature: str, rank: int) -> Basis:
        """The leading components of what was added.

        Raises:
            UserError: there are fewer tokens than components. CacheError: their numbers are not finite.
        """
        count = self._count.get(feature, 0)
        if count < rank:
            raise UserError(
                f"{rank} components of {feature} were asked for, and there are {count} tokens to find them in",
                remedy="Choose fewer components, or build from more images.",
            )
        mean = self._sum[feature] / count
        covariance = self._products[feature] / count - np.outer(mean, mean)
        if not np.isfinite(covariance).all():
            raise CacheError(f"{feature} has values that are not finite", remedy="Type --precision fp32.")
        values, vectors = np.linalg.eigh(covariance)  # ascending
        values, vectors = values[::-1][:rank], vectors.T[::-1][:rank]
        std = np.sqrt(np.clip(values, 0, None))
        std = np.clip(std, _SMALLEST * max(float(std[0]), 1e-30), None)
        # Signs are the solver's choice: the largest entry is positive, so that one sample gives one basis.
        largest = np.abs(vectors).argmax(1)
        signs = np.sign(vectors[np.arange(rank), largest])
        return Basis.of(mean, std, vectors * signs[:, None])
