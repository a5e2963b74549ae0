"""Run folders: names, places, and the files in them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from featcache.errors import CacheError, UserError, os_error
from featcache.feature_names import is_class_token
from featcache.redact import is_redacted, redact
from featcache.settings import from_mapping, to_mapping
from featcache.store import files
from featcache.store.manifest import nested_deeper
from featcache.store.root import cache_digest
from trainer.align import EARLIER
from trainer.runs import locks, schemas
from trainer.runs.config import RunConfig
from trainer.runs.yaml_text import read_yaml

if TYPE_CHECKING:
    from featcache import Cache

ROOT = Path("runs")
STATISTICS = "normalization.safetensors"
EMPTY_TEXT = "empty_text.safetensors"  # see trainer.runs.empty_text
SKIPPED = "skipped.jsonl"  # the steps that were left out
RECORDS = ("origin.json", "origin.jsonl", SKIPPED)
MAX_JSON_BYTES = 256 << 20
MAX_JSON_DEPTH = 32
MAX_LOG_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 20
_NAME_BYTES = 200  # of one part: 255 less what temporary files add


def run_dir(config: RunConfig, root: Path = ROOT) -> Path:
    """`runs/<name>`; without a name `<method>-<model>`, numbered if taken.

    Raises:
        UserError: a name that cannot be a folder below `root`.
    """
    return next(_candidates(config, root, taken=False))


def _candidates(config: RunConfig, root: Path, *, taken: bool) -> Iterator[Path]:
    """The folder of that name; without a name one after the other, from the first that is not there (or, with
    `taken`, from the one after it)."""
    if config.name is not None:
        yield root / checked_name(config.name)
        return
    stem = f"{config.method}-{config.model.replace('/', '-')}"
    number = 1
    while True:
        candidate = root / (stem if number == 1 else f"{stem}-{number}")
        if taken or not candidate.exists():
            yield candidate
        number += 1


def checked_name(name: str) -> str:
    """`name` if a run can have it.

    Raises:
        UserError: it leaves the runs folder, is empty, too long, or holds control characters.
    """
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts:
        raise UserError(f"--name {name!r} leaves the runs folder", remedy="Type a plain name.")
    if not parts or not name.isprintable():
        raise UserError(f"--name {name!r} cannot name a folder", remedy="Type a plain name.")
    if any(len(part.encode("utf-8", "surrogateescape")) > _NAME_BYTES for part in parts) or len(parts) > 8:
        raise UserError(
            f"--name {name[:40]}... is too long for a folder", remedy=f"Type a name of at most {_NAME_BYTES} bytes."
        )
    return name


@contextlib.contextmanager
def claim(config: RunConfig, root: Path = ROOT) -> Iterator[Path]:
    """The run's folder, made if need be and held for the length of a block. A folder without a run goes again.

    Of several processes that ask for a folder without a name at the same moment, each gets its own.

    Raises:
        UserError: another process works in it, it lies inside another run, or it cannot be made.
    """
    for folder in _candidates(config, root, taken=True):
        around = next((root / p for p in folder.relative_to(root).parents if p.parts and is_run(root / p)), None)
        if around is not None:
            raise UserError(f"--name {config.name} lies inside the run {around}", remedy="Type another --name.")
        files.make_directory(folder.parent)
        try:
            folder.mkdir()
            files.fsync_directory(folder.parent)
        except FileExistsError as error:
            if config.name is None:
                continue
            if not folder.is_dir():
                raise os_error(error) from error
        except OSError as error:
            raise os_error(error) from error
        try:
            with locks.hold(folder, "training", remedy=_in_use(config, folder)):
                yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if nothing is in it
        return


def _in_use(config: RunConfig, folder: Path) -> str:
    return (
        "Wait until it has ended, or end it there (kill and the process id); what it saved is kept. "
        f"To train beside it, type another --name than {config.name or folder.name}."
    )


# What may differ between the two halves of a resumed run: it changes nothing but, at most, the rounding. (But `steps`,
# where the learning rate falls until then.)
_FREE_KEYS = frozenset({
    *("steps", "cache", "name", "device", "compile", "attention", "accumulate", "shard", "weights_dir", "published"),
    *("recompute", "cuda_graphs"),
    *("statistics", "stream_dir", "stream_gib", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints"),
    "skip_nonfinite",
    *("snapshot_every", "snapshot_dtype", "eval_every", "eval_num", "eval_extractor", "eval_reference", "eval_prompts"),
})  # fmt: skip


def check_resumable(run: Path, config: RunConfig, cache: Cache, *, resume: bool) -> None:
    """Whether a run may write to `run`: it is a new folder, or, with `resume`, one of the same settings.

    Raises:
        UserError: the folder exists already, or was begun with other settings.
        CacheError: it was trained on other images or other features.
    """
    if not is_run(run):
        return
    if not resume:
        raise UserError(
            f"{run} exists already",
            remedy=f"Type --resume to continue it, or --name with another name (it is --name {config.name}).",
        )
    saved = load_config(run)
    seen = read_summary(run)
    if seen is None:
        raise UserError(
            f"{run} has no cache.json, so it cannot be told what it was trained on",
            remedy="Restore the file, or start another run with --name.",
        )
    from trainer.runs import checkpoint  # brings torch

    imported = any(checkpoint.is_imported(folder) for _, folder in checkpoint.list_checkpoints(run)[-1:])
    if imported or not seen["fingerprint"]:
        raise UserError(
            f"{run} holds imported weights: averaged ones without an optimiser's state, which cannot be trained on",
            remedy=checkpoint.DRAW_OR_TRAIN,
        )
    free = _FREE_KEYS - ({"steps"} if saved.falls_until_the_end else set())
    theirs, ours = _compared(saved), _compared(config)
    for key in {**theirs, **ours}:
        if key not in free and theirs.get(key) != ours.get(key):
            raise UserError(
                f"{run} was started with {key} = {theirs.get(key)!r:.200}, not {ours.get(key)!r:.200}",
                remedy="Resume with the same settings, or start another run with --name.",
            )
    again = f"Pass the cache it was started with: --cache {seen.get('path')}"
    if seen.get("fingerprint") != cache.fingerprint:
        raise CacheError(
            f"{run} was trained on a cache with fingerprint {seen.get('fingerprint', '?')[:12]}, "
            f"but {cache.path} has {cache.fingerprint[:12]}",
            remedy=again,
        )
    now = as_json(_features(cache))
    for name, feature in seen.get("features", {}).items():
        if name in now and now[name] != feature:
            raise CacheError(
                f"{name} in {cache.path} is not what {run} was trained on: it was made in another way", remedy=again
            )


def _compared(config: RunConfig) -> dict[str, object]:
    """Settings by key, of methods each option. Of streams also each option, wherever statistics came from, and the order
    that the weights go by."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    options = {
        f"streams.{feature}.{option}": value
        for feature, given in config.streams.items()
        for option, value in (given or {}).items()
        if option != "statistics"
    }
    del values["align"]
    aligned = {
        f"align.{method}.{option}": value
        for method, given in config.align.items()
        for option, value in (given or {}).items()
    }
    return values | aligned | {"streams": list(config.streams)} | options


def check_same_bytes(run: Path, cache: Cache) -> str | None:
    """Whether the arrays that a run was trained on are, byte for byte, those of `cache`.

    Returns a remark where the cache has changed in other respects, or where its layout differs, so that its bytes
    cannot be compared; None where nothing has changed or the run, of an earlier version, has no record.

    Raises:
        CacheError: an array that the run reads has other bytes.
    """
    seen, now = read_summary(run), cache.manifest.checksums
    if seen is None or not seen.get("checksums"):
        return None
    if seen.get("layout") != _layout(cache):
        return f"{cache.path} is stored in another layout than when {run} was started, so their bytes are not compared"
    for name, checksum in seen["checksums"].items():
        if now.get(name) != checksum:
            raise CacheError(
                f"{name} in {cache.path} holds other bytes than {run} was trained on (checksum "
                f"{now.get(name, 'none')[:12]}, then {checksum[:12]})",
                remedy="Bring back the cache as it was, or start another run with --name.",
            )
    digest = _digest(cache)
    if digest != seen.get("digest"):
        then = str(seen.get("digest"))[:12]
        return f"{cache.path} has changed (digest {digest[:12]}, then {then}), but not in what this run reads"
    return None


def _digest(cache: Cache) -> str:
    return cache_digest(cache.manifest)


def _layout(cache: Cache) -> str:
    """What decides, beside the values, which bytes a cache stores."""
    manifest = cache.manifest
    return f"{manifest.format} {manifest.shard_size} {manifest.compressor or ''}".strip()


def summary_of(cache: Cache, reads: Sequence[str] = ()) -> dict[str, Any]:
    """What a run's `cache.json` records of its cache: path (without secrets), fingerprint, digest, dataset, features.

    reads: features whose bytes are recorded, too, by the checksums of their arrays.
    """
    arrays = [array for name in reads for array in cache.manifest.features[name].arrays]
    summary = {
        "path": redact(str(cache.path)),
        "fingerprint": cache.fingerprint,
        "digest": _digest(cache),
        "layout": _layout(cache),
        "checksums": {array: cache.manifest.checksums[array] for array in arrays},
        "dataset": cache.manifest.dataset.to_json(),
        "features": _features(cache),
    }
    return dict(as_json(summary))


def open_folder(run: Path, config: RunConfig, cache: Cache, reads: Sequence[str], start: int, *, main: bool) -> int:
    """Writes what describes the run before its first step, and cuts the log back to `start`. Only where `main`.

    reads: names of the features that are trained on. Returns how many damaged lines the log lost.
    """
    if not main:
        return 0
    write_text(run / "cache.json", json.dumps(summary_of(cache, reads), indent=1))
    save_config(run, config)
    if os.path.lexists(run / SKIPPED):
        truncate_log(run, start - 1, SKIPPED)  # these count from 0
    return truncate_log(run, start)


def stream_statistics(feature: str) -> str:
    """File of what a stream is normalised by, in the run's folder; no feature has a + in its name."""
    return f"normalization-{feature.replace('/', '+')}.safetensors"


def clear_leftovers(run: Path, streams: Iterable[str]) -> None:
    """Removes what a killed process left of files it was writing. The caller holds the run (`claim`).

    streams: features that the run diffuses beside the latents.
    """
    own = ("config.yaml", "cache.json", "log.jsonl", "diverged.json", "wandb.json", STATISTICS, EMPTY_TEXT, *RECORDS)
    files.remove_parts(run, of=(*own, *map(stream_statistics, streams)))
    samples = files.inside(run, "samples")
    if samples.is_dir():
        files.remove_parts(samples)


def _features(cache: Cache) -> dict[str, Any]:
    """Shape, codec and provenance of a cache's tokens, class tokens, groups and latents."""
    features = {n: f for n, f in cache.manifest.features.items() if len(f.shape) >= 2 or is_class_token(n)}
    return {n: {"shape": list(f.shape), "codec": f.codec, **f.provenance} for n, f in features.items()}


def as_json(values: object) -> Any:
    """As JSON gives it back: mappings as dicts, tuples as lists."""
    return json.loads(json.dumps(values, default=dict))


def save_config(run: Path, config: RunConfig) -> None:
    """Writes `config.yaml`, whole or not at all."""
    write_text(run / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))


RESTORE = "Restore the file as the run wrote it."


def is_run(folder: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (folder / "config.yaml").exists()


def load_config(run: Path) -> RunConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: not a run folder, or its `config.yaml` is damaged.
    """
    path = run / "config.yaml"
    if not is_run(run):
        raise UserError(
            f"{run} is not a run (it has no config.yaml)", remedy="Runs lie below ./runs; list them with ls runs."
        )
    try:
        values = read_yaml(path)
    except UserError as error:
        raise UserError(error.what, remedy=error.remedy or RESTORE) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys and values", remedy=RESTORE)
    values.setdefault("normalization", "scalar")  # runs from before there was a choice
    try:
        config = from_mapping(RunConfig, values)
        # Where they came from: the run has a copy, and the file may be gone or another.
        streams = {feature: {**(options or {}), "statistics": None} for feature, options in config.streams.items()}
        config = dataclasses.replace(config, statistics=None, streams=streams)
        align = {method: {**EARLIER.get(method, {}), **(config.align.get(method) or {})} for method in config.methods}
        return dataclasses.replace(config, align=align).settled()
    except UserError as error:
        raise UserError(f"{path}: {error.what}", remedy=RESTORE) from error


def find_runs(root: Path = ROOT) -> list[Path]:
    """All runs below `root`, oldest first (by the time of their latest log line or configuration)."""

    def age(run: Path) -> float:
        times = [0.0]
        for file in ("config.yaml", "log.jsonl"):
            with contextlib.suppress(OSError):
                times.append((run / file).stat().st_mtime)
        return max(times)

    def is_run(config: Path) -> bool:
        unfinished = any(map(files.is_part, config.relative_to(root).parts))  # of an import under way, or killed
        return config.is_file() and not unfinished

    return sorted((p.parent for p in root.glob("**/config.yaml") if is_run(p)), key=age) if root.is_dir() else []


def display_name(run: Path) -> str:
    """A run's name as reports show it: its folder's last part, as `trainer.report.data.load_run` does."""
    return run.name


def newest_run(root: Path = ROOT) -> Path:
    """The run that was active last.

    Raises:
        UserError: there is none.
    """
    found = find_runs(root)
    if not found:
        raise UserError("there is no run below ./runs", remedy="Train one first: trainer run --method ahpa")
    return found[-1]


def write_text(path: Path, text: str) -> None:
    """Replaces a small file atomically and durably.

    Raises:
        UserError: the disk refuses.
    """
    files.atomic_write(path, [text.encode("utf-8", "backslashreplace")])


def write_page(path: Path, text: str) -> None:
    """As `write_text`, for what several processes may write at once, and what can be made again."""
    with locks.alone(path):
        files.atomic_write(path, [text.encode("utf-8", "backslashreplace")], durable=False)


def append_lines(path: Path, lines: Sequence[str]) -> None:
    """Adds lines to a small file of a run; they are on the disk when this returns.

    Raises:
        UserError: the disk refuses, or the file is a link or has another name as well.
    """
    if lines:
        descriptor = files.open_to_write(path, os.O_APPEND)
        with os.fdopen(descriptor, "ab") as file:
            file.write("".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())


_REMAKE = "Remove it and run the command again."


def read_json(path: Path, default: object, *, remedy: str = _REMAKE) -> Any:
    """A JSON file, or `default` if it does not exist; of the same type as `default` unless that is None.

    Args:
        remedy: what to do about a damaged one, where it is not made again by the same command.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else.
    """
    if not path.exists():
        return default
    data = files.read_bounded(path, MAX_JSON_BYTES)
    try:
        value = json.loads(data)
        if nested_deeper(value, MAX_JSON_DEPTH):
            raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!s:.200}", remedy=remedy) from error
    if default is not None and not isinstance(value, type(default)):
        kind = "a list" if isinstance(default, list) else "an object"
        raise UserError(f"{path} is damaged: it does not hold {kind}", remedy=remedy)
    return value


def read_summary(run: Path) -> schemas.Summary | None:
    """`cache.json` of a run, checked; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    path = run / "cache.json"
    summary = read_json(path, None, remedy=RESTORE)
    if summary is None and not path.exists():
        return None
    return schemas.check(summary, schemas.Summary, path, remedy=RESTORE)


def cache_path(run: Path, summary: schemas.Summary) -> str:
    """The path or URL of a run's cache, to be opened again; empty for an imported run without one.

    Raises:
        UserError: it is a URL whose secrets were not stored.
    """
    path = str(summary["path"])
    if is_redacted(path):
        raise UserError(
            f"the cache of {run}, {path}, needs a password or token, and none is ever stored",
            remedy="Pull it to a folder and pass that: featcache pull URL FOLDER, or pass the whole URL where the command "
            "takes one (trainer run --cache, trainer eval --reference).",
        )
    return path


def read_metrics(run: Path) -> list[schemas.Evaluation]:
    """Entries of `metrics.json`, oldest first; none if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    path = run / "metrics.json"
    remedy = "Delete or repair the file; trainer eval writes it anew."
    return schemas.check(read_json(path, [], remedy=remedy), list[schemas.Evaluation], path, remedy=remedy)


def log_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """Number (from 1), bytes and record of each line of a `log.jsonl`; None for a line that holds no valid record.

    A record is an object with a whole number `step`. Nothing is yielded for empty lines and if there is no file.

    Raises:
        UserError: the file cannot be read or is far too long.
    """
    if not path.exists():
        return
    for number, line in enumerate(files.read_bounded(path, MAX_LOG_BYTES).split(b"\n"), start=1):
        if line.strip():
            yield number, line, _record(line)


def _record(line: bytes) -> dict[str, Any] | None:
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        record = json.loads(line)
        if nested_deeper(record, MAX_JSON_DEPTH):
            raise ValueError("nested too deeply")
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    step = record.get("step")
    return record if type(step) is int and 0 <= step < 2**53 else None


def read_log(run: Path) -> Iterator[dict[str, Any]]:
    """Records of `log.jsonl`; damaged lines, such as a torn last one, are left out."""
    return (record for _, _, record in log_lines(run / "log.jsonl") if record is not None)


def truncate_log(run: Path, step: int, name: str = "log.jsonl") -> int:
    """Drops records after `step` (a resumed run writes them again) and damaged lines.

    Returns how many damaged lines there were beside a torn last one.
    """
    path = run / name
    lines = list(log_lines(path))
    kept = [json.dumps(record) for _, _, record in lines if record is not None and record["step"] <= step]
    write_text(path, "".join(line + "\n" for line in kept))
    return sum(record is None for _, _, record in lines[:-1])
