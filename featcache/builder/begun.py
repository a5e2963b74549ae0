"""What a cache, complete or begun, holds already of the features of a plan: what is found once is taken from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from featcache.builder.prepare import Plan
from featcache.store.manifest import FeatureSpec
from featcache.store.writer import building_directory, declared, known_manifest


def known_feature(plan: Plan, name: str) -> FeatureSpec | None:
    """The feature as the cache of a plan holds it, or as a build of it was begun; None if there is neither."""
    if not plan.path.is_dir():
        return None
    manifest = known_manifest(plan.path)
    have = manifest.features.get(name) if manifest is not None else None
    building = building_directory(plan.path, name)
    if have is None and (building / "spec.json").is_file():
        have = declared(building)
    return have


def with_features(plan: Plan, changed: Mapping[str, FeatureSpec]) -> Plan:
    """The plan with some of its features as `changed` has them."""
    specs = tuple(changed.get(spec.name, spec) for spec in plan.specs)
    return replace(plan, specs=specs, work=replace(plan.work, specs={spec.name: spec for spec in specs}))
