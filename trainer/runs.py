"""Run folders: names, places, and the files in them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featcache.errors import CacheError, UserError
from trainer.config import RunConfig, from_mapping, to_mapping

ROOT = Path("runs")


def run_dir(config: RunConfig, root: Path = ROOT) -> Path:
    """``runs/<name>``; without a name ``<method>-<model>``, numbered if taken."""
    if config.name:
        if Path(config.name).is_absolute() or ".." in Path(config.name).parts:
            raise UserError(f"--name {config.name!r} leaves the runs folder", remedy="Type a plain name.")
        return root / config.name
    stem = f"{config.method}-{config.model.replace('/', '-')}"
    candidate, number = root / stem, 2
    while candidate.exists():
        candidate, number = root / f"{stem}-{number}", number + 1
    return candidate


# What may differ between the two halves of a resumed run: it changes nothing but, at most, the rounding.
_FREE_KEYS = frozenset({
    *("steps", "cache", "name", "device", "compile", "attention", "accumulate", "shard", "weights_dir", "published"),
    *("stream_dir", "stream_gib", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints"),
})  # fmt: skip


def check_resumable(run: Path, config: RunConfig, cache: Any, *, resume: bool) -> None:
    """Whether a run may write to ``run``: it is a new folder, or, with ``resume``, one of the same settings.

    Raises:
        UserError: the folder exists already, or was begun with other settings.
        CacheError: it was trained on other images or other features.
    """
    if not (run / "config.yaml").exists():
        return
    if not resume:
        raise UserError(
            f"{run} exists already",
            remedy=f"Type --resume to continue it, or --name with another name (it is --name {config.name}).",
        )
    seen = read_json(run / "cache.json", {})
    if not seen.get("fingerprint"):
        raise UserError(
            f"{run} holds imported weights: averaged ones without an optimiser's state, which cannot be trained on",
            remedy="Draw from them: trainer sample, trainer eval; or train anew under another --name.",
        )
    saved = load_config(run)
    for field in dataclasses.fields(RunConfig):
        theirs, ours = getattr(saved, field.name), getattr(config, field.name)
        if field.name not in _FREE_KEYS and theirs != ours:
            raise UserError(
                f"{run} was started with {field.name} = {theirs!r}, not {ours!r}",
                remedy="Resume with the same settings, or start another run with --name.",
            )
    again = f"Pass the cache it was started with: --cache {seen.get('path')}"
    if seen.get("fingerprint") != cache.fingerprint:
        raise CacheError(
            f"{run} was trained on a cache with fingerprint {seen.get('fingerprint', '?')[:12]}, "
            f"but {cache.path} has {cache.fingerprint[:12]}",
            remedy=again,
        )
    now = _plain(_features(cache))
    for name, feature in seen.get("features", {}).items():
        if name in now and now[name] != feature:
            raise CacheError(
                f"{name} in {cache.path} is not what {run} was trained on: it was made in another way", remedy=again
            )


def summary_of(cache: Any) -> dict[str, Any]:
    """What a run's ``cache.json`` records of its cache: path, fingerprint, dataset and features."""
    summary = {
        "path": str(cache.path),
        "fingerprint": cache.fingerprint,
        "dataset": cache.manifest.dataset.to_json(),
        "features": _features(cache),
    }
    return dict(_plain(summary))


def open_folder(run: Path, config: RunConfig, cache: Any, start: int, *, main: bool) -> None:
    """Writes what describes the run before its first step, and cuts the log back to ``start``. Only where ``main``."""
    if not main:
        return
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / "cache.json", json.dumps(summary_of(cache), indent=1))
    save_config(run, config)
    truncate_log(run, start)


def _features(cache: Any) -> dict[str, Any]:
    """Shape, codec and provenance of a cache's tokens, groups and latents."""
    features = cache.manifest.features.items()
    return {n: {"shape": list(f.shape), "codec": f.codec, **f.provenance} for n, f in features if len(f.shape) >= 2}


def _plain(values: Any) -> Any:
    """As JSON gives it back: mappings as dicts, tuples as lists."""
    return json.loads(json.dumps(values, default=dict))


def save_config(run: Path, config: RunConfig) -> None:
    """Writes ``config.yaml``, whole or not at all."""
    import yaml

    write_text(run / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))


def load_config(run: Path) -> RunConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: not a run folder.
    """
    from trainer.config import load_recipe

    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} is not a run (it has no config.yaml)", remedy="Runs lie below ./runs; list them with ls runs."
        )
    return from_mapping(RunConfig, load_recipe(run / "config.yaml"))


def find_runs(root: Path = ROOT) -> list[Path]:
    """All runs below ``root``, oldest first (by the time of their latest log line or configuration)."""

    def age(run: Path) -> float:
        return max((run / f).stat().st_mtime for f in ("config.yaml", "log.jsonl") if (run / f).exists())

    return sorted((p.parent for p in root.glob("**/config.yaml")), key=age) if root.is_dir() else []


def display_name(run: Path) -> str:
    """A run's name as reports show it: its folder's last part, as :func:`trainer.report.data.load_run` does."""
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
    """Replaces a small file atomically and durably."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_json(path: Path, default: Any) -> Any:
    """A JSON file, or ``default`` if it does not exist.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return default
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}", remedy="Remove it and run the command again.") from error


def read_log(run: Path) -> Iterator[dict[str, Any]]:
    """Records of ``log.jsonl``; a torn last line is left out."""
    path = run / "log.jsonl"
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def truncate_log(run: Path, step: int) -> None:
    """Drops records after ``step`` (a resumed run writes them again) and a torn last line."""
    kept = [json.dumps(record) for record in read_log(run) if record.get("step", 0) <= step]
    write_text(run / "log.jsonl", "".join(line + "\n" for line in kept))
