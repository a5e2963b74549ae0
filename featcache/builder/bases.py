"""Fitting the bases of a build: principal components of the first images' tokens, before anything is written.

One process fits them; a build that goes on, and its other workers, take them from where that one wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from featcache.builder.begun import known_feature, with_features
from featcache.builder.pipeline import Meter, run_shards
from featcache.builder.prepare import Plan
from featcache.progress import Progress
from featcache.read.components import Components
from featcache.store.basis import Basis
from featcache.store.manifest import FeatureSpec

IMAGES = 2048
SHARD = 16


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
    )
    progress.begin(f"finding the components of {', '.join(wanted)}", len(sample.order))
    shards = -(-len(sample.order) // sample.shard_size)
    run_shards(sample, list(range(shards)), components, meter=Meter(), progress=_WithoutNotes(progress))
    return _with(plan, {name: components.basis(name, _rank(spec)) for name, spec in wanted.items()})


class _WithoutNotes:
    """Progress that keeps to itself which images are left out: the build says it."""

    def __init__(self, progress: Progress) -> None:
        self.begin, self.update = progress.begin, progress.update

    def note(self, text: str) -> None:
        pass


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
    have = known_feature(plan, spec.name)
    # Where ranks differ, or one has none, the writer says so.
    if have is None or have.basis is None or have.basis.rank != _rank(spec):
        return None
    return have.basis


def _with(plan: Plan, bases: Mapping[str, Basis]) -> Plan:
    return with_features(plan, {s.name: replace(s, basis=bases[s.name]) for s in plan.specs if s.name in bases})
