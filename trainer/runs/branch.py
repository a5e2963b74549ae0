"""A branch: a run that begins from a checkpoint of another one, its origin, with other settings.

The branch's folder is complete without the origin's. `origin.json` says where it came from, `origin.jsonl` holds the
origin's log up to the step where the branch begins, and the first checkpoint is what was taken over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import CacheError, UserError
from featcache.paths import typed
from featcache.settings import to_mapping
from featcache.store import files
from trainer.runs import checkpoint, schemas
from trainer.runs import folder as runs
from trainer.runs.config import RunConfig
from trainer.runs.records import cache_summary, run_model_config

if TYPE_CHECKING:
    from featcache import Cache
    from trainer.models import ModelConfig

FILE, LOG = "origin.json", "origin.jsonl"
_SHOWN_STEPS = 20
_FREE_OF_MODEL = ("attention",)  # fields of its configuration that leave its weights as they are


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a branch begins: a run, one of its checkpoints with its folder, and what the run was configured with.

    any_cache: the branch's cache was typed, so that it may be another than the origin's.
    """

    run: Path
    step: int
    folder: Path
    config: RunConfig
    any_cache: bool = False

    @property
    def name(self) -> str:
        """As it is typed after `--from`."""
        return f"{typed(self.run)}@{self.step}"


def find_origin(text: str, *, any_cache: bool, root: Path = runs.ROOT) -> Origin:
    """What `--from RUN[@STEP]` names: a run folder or a run's name below `root`, at a step or at its latest checkpoint.

    Raises:
        UserError: there is no such run or checkpoint, or the run's folder is damaged.
    """
    run, step = _split(text, root)
    config = runs.load_config(run)
    found = checkpoint.list_checkpoints(run)
    if not found:
        raise UserError(
            f"--from {text!r:.200}: {run} holds no complete checkpoint",
            remedy="Let it train first, or name another run.",
        )
    at, folder = next(((at, path) for at, path in reversed(found) if step in (None, at)), (None, None))
    if at is None or folder is None:
        steps = [str(known) for known, _ in found]
        shown = ", ".join(steps[-_SHOWN_STEPS:])
        raise UserError(
            f"{run} has no checkpoint at step {step}; it has: {'..., ' if len(steps) > _SHOWN_STEPS else ''}{shown}",
            remedy=f"Type for example: trainer run --from {typed(run)}@{steps[-1]} --name NAME",
        )
    return Origin(run=run, step=at, folder=folder, config=config, any_cache=any_cache)


def _split(text: str, root: Path) -> tuple[Path, int | None]:
    """The run's folder and the step, None where none is named. A folder's own name may hold an @."""
    name, at, number = text.rpartition("@")
    choices: list[tuple[str, int | None]] = [(text, None)]
    if at and name and number.isdecimal() and number.isascii() and len(number) <= 16:
        choices.append((name, int(number)))
    for words, step in choices:
        if (place := _folder(words, root)) is not None:
            return place, step
    if at and name and _folder(name, root) is not None:
        raise UserError(
            f"--from {text!r:.200}: what follows the @ is no step of the run {name}",
            remedy="Type a whole number there, or leave the @ out for the latest checkpoint.",
        )
    raise UserError(
        f"--from {text!r:.200} is neither a run's folder nor the name of a run below {root}",
        remedy=f"List the runs with: ls {root}   Then type for example: trainer run --from RUN@STEP --name NAME",
    )


def _folder(words: str, root: Path) -> Path | None:
    """The run of that folder, or of that name below `root`."""
    places = [Path(words)] if words else []
    with contextlib.suppress(UserError):
        places.append(root / runs.checked_name(words))
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            if runs.is_run(place):
                return place
    return None


def inherited(origin: Origin) -> dict[str, Any]:
    """The origin's settings, as far as a branch takes them over: all but its name. Of an imported run the cache that it was
    imported with, if there was one."""
    values = to_mapping(origin.config)
    del values["name"]
    if values["cache"] is None:
        values["cache"] = cache_summary(origin.run)["path"] or None
    return values


def check(origin: Origin, config: RunConfig, root: Path) -> None:
    """Whether a branch of that configuration may begin there.

    Raises:
        UserError: it would have nothing to train, or it is to be written into the origin's own folder.
    """
    if config.steps <= origin.step:
        raise UserError(
            f"the branch begins at step {origin.step}, and its last step is to be {config.steps}",
            remedy=f"Type more --steps than {origin.step} (they count from the origin's beginning).",
        )
    if config.name is not None and (root / runs.checked_name(config.name)).resolve() == origin.run.resolve():
        raise UserError(
            f"--name {config.name} is the run that --from names",
            remedy="Type another --name; to continue the run itself, type --resume without --from.",
        )


def check_fits(origin: Origin, config: RunConfig, cache: Cache, model: ModelConfig) -> str | None:
    """Whether the origin's weights can go on in this model, on this cache. Returns a remark on another cache.

    Raises:
        UserError: the model is another one.
        CacheError: the cache is not the origin's, and none was typed; or it is the same with other bytes.
    """
    seen = cache_summary(origin.run)
    same = not seen["fingerprint"] or seen["fingerprint"] == cache.fingerprint
    if not same and not origin.any_cache:
        raise CacheError(
            f"{origin.run} was trained on a cache with fingerprint {seen['fingerprint'][:12]}, but {cache.path} has "
            f"{cache.fingerprint[:12]}",
            remedy=f"Bring back the cache; or, to go on with this one all the same, type --cache {typed(cache.path)}",
        )
    theirs, ours = run_model_config(origin.run, origin.config), model
    changed = [
        f"{field.name} ({getattr(theirs, field.name)!s:.80}, now {getattr(ours, field.name)!s:.80})"
        for field in dataclasses.fields(ours)
        if field.name not in _FREE_OF_MODEL and getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if config.model != origin.config.model or changed:
        told = f"; it differs in {', '.join(changed)}" if changed else ""
        raise UserError(
            f"{origin.run} holds weights of {origin.config.model}, which do not fit the {config.model} of this branch{told}",
            remedy="Leave --model, streams and what else changes the model out, or train anew without --from.",
        )
    if not same:
        return f"{cache.path} is another cache than {origin.run} was trained on, as was typed"
    if origin.any_cache or not seen["fingerprint"]:
        return None
    return runs.check_same_bytes(origin.run, cache)


def with_statistics(config: RunConfig, origin: Origin, cache: Cache) -> RunConfig:
    """`config` with the origin's copies of what the latents and streams are normalised by, where they still hold: on the
    same cache, under the same kind of normalization, and if no others were typed.

    Raises:
        UserError: a copy is a link.
    """
    seen = cache_summary(origin.run)
    if seen["fingerprint"] not in ("", cache.fingerprint):
        return config
    if config.statistics is None and config.normalization == origin.config.normalization:
        config = dataclasses.replace(config, statistics=_copy(origin.run, runs.STATISTICS))
    streams = {}
    for feature, given in config.streams.items():
        options, former = dict(given or {}), origin.config.streams.get(feature) or {}
        normalised = options.get("normalization") not in (None, "none")
        if normalised and not options.get("statistics") and options["normalization"] == former.get("normalization"):
            options["statistics"] = _copy(origin.run, runs.stream_statistics(feature))
        streams[feature] = options
    return dataclasses.replace(config, streams=streams)


def _copy(run: Path, name: str) -> str | None:
    path = files.inside(run, name)
    return str(path.resolve()) if path.is_file() else None


def record(run: Path, origin: Origin | None) -> None:
    """Writes where a branch came from, before `config.yaml` makes it a run; of a run with no origin, removes what a start
    that was cut short has left."""
    if origin is None:
        for name in (FILE, LOG):
            files.inside(run, name).unlink(missing_ok=True)
        return
    earlier = read_origins(origin.run)
    entry = {
        "run": str(origin.run.resolve()),
        "name": runs.display_name(origin.run.resolve()),
        "step": origin.step,
        "config_sha256": _digest(origin),
    }
    lines = [json.dumps(line) + "\n" for line in lines_before(origin.run) if line["step"] <= origin.step]
    runs.write_text(files.inside(run, LOG), "".join(lines))
    # A branch of a branch begins after it, or from what that one took over.
    origins = [*(dict(o) for o in earlier if o["step"] <= origin.step), entry]
    runs.write_text(files.inside(run, FILE), json.dumps({"origins": origins}, indent=1))


def lines_before(run: Path) -> Iterator[dict[str, Any]]:
    """Records of the run's whole course so far: its origins' up to where it begins, then its own."""
    for part in (LOG, "log.jsonl"):
        for _, _, record in runs.log_lines(files.inside(run, part)):
            if record is not None:
                yield record


def _digest(origin: Origin) -> str:
    """Of the origin's `config.yaml`, byte for byte."""
    return hashlib.sha256(files.read_bounded(origin.run / "config.yaml", runs.MAX_JSON_BYTES)).hexdigest()


def read_origins(run: Path) -> list[schemas.OriginEntry]:
    """Where a run came from, the oldest origin first; nothing for a run that is no branch.

    Raises:
        UserError: its `origin.json` is damaged or a link.
    """
    path = files.inside(run, FILE)
    found: Mapping[str, Any] = runs.read_json(path, {}, remedy=runs.RESTORE)
    if not found:
        return []
    return schemas.check(dict(found), schemas.Origins, path, remedy=runs.RESTORE)["origins"]


def recorded_origin(run: Path) -> Origin | None:
    """The origin of a branch that has not saved its first checkpoint yet, to begin from it again; None for no branch.

    Raises:
        UserError: the origin is gone, or is not what it was.
    """
    origins = read_origins(run)
    if not origins:
        return None
    entry = origins[-1]
    again = "Remove this branch's folder and begin it again: trainer run --from RUN@STEP --name NAME"
    try:
        origin = find_origin(f"{entry['run']}@{entry['step']}", any_cache=True)
        same = _digest(origin) == entry["config_sha256"]
    except UserError as error:
        raise UserError(
            f"{run} has saved nothing yet, and its origin cannot be read: {error.what}", remedy=again
        ) from error
    if not same:
        raise UserError(
            f"{run} has saved nothing yet, and the settings of its origin {origin.run} changed", remedy=again
        )
    return origin
