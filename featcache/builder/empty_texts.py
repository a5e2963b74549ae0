"""The text of '' of a build's text features: what their encoders say of no text, kept once in the manifest.

As with bases, the process that leads a build finds it; a build that goes on, and its other workers, take it from there.
"""

from __future__ import annotations

from dataclasses import replace

from featcache.builder.begun import known_feature, with_features
from featcache.builder.prepare import Plan
from featcache.store.manifest import FeatureSpec


def settle_empty_texts(plan: Plan) -> Plan:
    """The plan with the text of '' of every text feature: what the cache says of it where a build of the feature is there
    (nothing, if an earlier featcache began it), else what its encoder says."""
    adopted = _known(plan)
    made = {name: values for encoder in plan.work.texts for name, values in encoder.empty().items()}
    found = {
        spec.name: spec.with_empty(made[spec.name]) for spec in plan.specs if spec.name in made.keys() - adopted.keys()
    }
    return with_features(plan, adopted | found)


def adopt_empty_texts(plan: Plan) -> Plan:
    """The plan with those that the cache, complete or begun, holds already."""
    return with_features(plan, _known(plan))


def _known(plan: Plan) -> dict[str, FeatureSpec]:
    found = {}
    for encoder in plan.work.texts:
        for spec in plan.specs:
            have = known_feature(plan, spec.name) if spec.name in encoder.shapes else None
            # Where shapes differ, the writer says so.
            if have is not None and have.shape == spec.shape:
                found[spec.name] = replace(spec, empty=have.empty)
    return found
