"""What the JSON files of a run folder may hold, checked when they are read: they may come from anybody.

Only types and ranges that the code relies on; what else a file says is kept as it is.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypeVar, cast

from pydantic import Field, Strict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from featcache.errors import UserError

_Whole = Annotated[int, Strict(), Field(ge=0, le=2**53)]
_Side = Annotated[int, Strict(), Field(ge=1, le=2**16)]
_Text = Annotated[str, Strict(), Field(max_length=1 << 16)]
_Number = Annotated[float, Field(strict=True)]  # as pages can draw it, or not finite
_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e300, le=1e300)]


class _Vae(TypedDict):
    name: _Text
    sha256: NotRequired[_Text | None]
    latent_channels: _Side
    downsampling: _Side
    scaling_factor: NotRequired[_Finite]
    shift_factor: NotRequired[_Finite]
    pixel_range: NotRequired[tuple[_Finite, _Finite] | None]


class _Preprocessing(TypedDict):
    resolution: _Side


class _Dataset(TypedDict):
    source: _Text
    class_names: Annotated[list[_Text], Field(min_length=1, max_length=1 << 20)]
    preprocessing: _Preprocessing
    vae: _Vae


class _Feature(TypedDict):
    shape: Annotated[list[_Side], Field(max_length=8)]
    layers: NotRequired[list[_Text]]
    weights: NotRequired[Any]
    seed: NotRequired[Annotated[int, Strict()] | None]


class Summary(TypedDict):
    """`cache.json`."""

    path: _Text
    fingerprint: _Text
    dataset: _Dataset
    features: dict[_Text, _Feature]
    digest: NotRequired[_Text]
    layout: NotRequired[_Text]
    checksums: NotRequired[dict[_Text, _Text]]


class Evaluation(TypedDict):
    """One entry of `metrics.json`."""

    step: NotRequired[_Whole | None]
    metrics: NotRequired[dict[_Text, _Number]]
    intervals: NotRequired[dict[_Text, tuple[_Number, _Number] | None] | None]
    warnings: NotRequired[list[Any]]
    sampler: NotRequired[dict[str, Any] | None]
    settings: NotRequired[dict[str, Any] | None]
    figure: NotRequired[Any]
    asked: NotRequired[Any]


class OriginEntry(TypedDict):
    """A run that a branch came from, and the step of its checkpoint."""

    run: _Text
    name: _Text
    step: _Whole
    config_sha256: _Text


class Origins(TypedDict):
    """`origin.json`: the oldest origin first."""

    origins: Annotated[list[OriginEntry], Field(min_length=1, max_length=1 << 10)]


class SweepPoint(TypedDict):
    """One point of a sweep, beside what an evaluation holds."""

    value: Annotated[float, Field(strict=True, gt=-1e30, lt=1e30)]  # an axis holds it
    metrics: Annotated[dict[_Text, _Number], Field(min_length=1)]


class Sweep(TypedDict):
    """A file of `sweeps/`."""

    setting: _Text
    step: _Whole
    common: dict[str, Any]
    points: Annotated[list[SweepPoint], Field(min_length=1, max_length=10_000)]


class SampledPrompts(TypedDict):
    """`prompts.json` beside samples."""

    source: _Text
    count: _Whole
    sha256: _Text
    prompts: Annotated[list[_Text], Field(min_length=1)]


class CheckpointState(TypedDict):
    """`state.json` of a checkpoint. skipped: the steps that were left out so far."""

    step: _Whole
    skipped: NotRequired[Annotated[list[_Whole], Field(max_length=1 << 16)]]
    time_s: NotRequired[Annotated[float, Field(strict=True, ge=0, le=1e12)]]
    scaler: NotRequired[dict[_Text, _Finite]]
    dtype: NotRequired[_Text]  # of a snapshot
    sha256: NotRequired[dict[_Text, _Text]]


_Stem = Annotated[str, Strict(), Field(max_length=200, pattern=r"^[^/\x00]+$")]  # of a file beside


class Diagnostic(TypedDict):
    """`<what>.json` of the diagnostics, as far as files are found by it; `trainer.plots` says how plots are kept.

    Earlier versions kept the plots' names and no drawings.
    """

    plots: list[_Stem]
    drawings: NotRequired[list[dict[str, Any]]]


class ComparedDiagnostic(TypedDict):
    """One diagnostic of several runs, as far as files are found by it."""

    plots: list[_Stem] | dict[_Stem, Any]
    drawings: NotRequired[list[dict[str, Any]]]


class Comparison(TypedDict):
    """`comparison.json` of the diagnostics."""

    compared: list[_Text]
    diagnostics: dict[_Text, ComparedDiagnostic]


T = TypeVar("T")


def check(value: object, schema: type[T], where: object, *, remedy: str) -> T:
    """`value` itself, once it is known to fit.

    Raises:
        UserError: as `parse`.
    """
    parse(value, schema, where, remedy=remedy)
    return cast(T, value)


def parse(value: object, schema: type[T], where: object, *, remedy: str) -> T:
    """`value` as an instance of `schema`.

    Raises:
        UserError: naming the first entry that does not fit.
    """
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise UserError(f"{where} is damaged: {place or 'it'}: {first['msg']:.200}", remedy=remedy) from error


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(schema: type[T]) -> TypeAdapter[T]:
    """Made once per schema."""
    if schema not in _ADAPTERS:
        _ADAPTERS[schema] = TypeAdapter(schema)
    return _ADAPTERS[schema]
