"""A page about all caches at a place: what each holds, how large, made by what, verified when, and how to get it."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from featcache.console import console, plain, safe, size_text
from featcache.errors import UserError
from featcache.feature_names import layer_feature
from featcache.redact import redact
from featcache.share import records as verified
from featcache.share.manage import list_caches
from featcache.share.transfer import list_remote
from featcache.share.verification import Verification
from featcache.store import files
from featcache.store.layout import ROOT_NAMES
from featcache.store.manifest import SAMPLE_FEATURES, Manifest
from featcache.store.places import Location, Missing
from featcache.store.remote import is_remote, local_path, open_location
from featcache.store.root import cache_digest

_TEMPLATES = Path(__file__).with_name("templates")
_MAX_FEATURES = 200


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cache of a catalogue. `manifest` is None where it cannot be read; `problem` then says why.

    where: path or URL, without secrets. changed: when its root document was written at this place (features added or
    removed later count; a copy has the time of copying), None where the place does not say. checked: the latest
    verification on record; check_problem: why the record cannot be read.
    """

    name: str
    where: str
    manifest: Manifest | None
    n_bytes: int = 0
    changed: datetime | None = None
    checked: Verification | None = None
    check_problem: str | None = None
    problem: str | None = None

    @property
    def digest(self) -> str:
        return "" if self.manifest is None else cache_digest(self.manifest)

    @property
    def encoders(self) -> list[str]:
        return [] if self.manifest is None else encoders(self.manifest)

    @property
    def versions(self) -> str:
        """The software that made it, as far as the manifest says."""
        return ", ".join(f"{k} {v}" for k, v in sorted(self.manifest.versions.items())) if self.manifest else ""

    @property
    def current(self) -> bool:
        """Whether the latest verification is of the cache as it is now."""
        return self.checked is not None and self.checked.digest == self.digest

    @property
    def pull(self) -> str:
        """The command that copies it here."""
        return shlex.join(["featcache", "pull", self.where, f"caches/{self.name}"])


def encoders(manifest: Manifest) -> list[str]:
    """What made the features: vision encoders, the VAE, text encoders; random weights are named as such."""
    found: dict[str, bool] = {}
    for name in manifest.encoded:
        if name == "text/count":
            continue
        if name.startswith("vae/"):
            vae = (manifest.dataset.vae or {}).get("name", "unknown")
            encoder = f"VAE {vae!s:.80}"
        elif name.startswith("text/"):
            encoder = name.removeprefix("text/").split(".")[0]
        else:
            feature = layer_feature(name)
            encoder = feature.encoder if feature else name
        found[encoder] = found.get(encoder, False) or manifest.features[name].provenance.get("weights") == "random"
    return [f"{name} (random weights)" if random else name for name, random in sorted(found.items())]


def gather(place: str) -> list[Row]:
    """The caches in a folder or at a URL, by name, with whatever is wrong with one of them in its row.

    Raises `CacheError` if the place cannot be listed.
    """
    return _remote_rows(place) if is_remote(place) else _local_rows(local_path(place))


def _local_rows(folder: Path) -> list[Row]:
    rows = []
    for info in list_caches(folder):
        path = info.path.absolute()
        problem = info.problem
        if info.manifest is None and problem is None:
            problem = f"unfinished: {', '.join(info.unfinished)}"
        rows.append(_row(path.name, str(path), info.manifest, info.n_bytes, open_location(path), problem))
    return rows


def _remote_rows(url: str) -> list[Row]:
    rows = []
    for listed in list_remote(url):
        name = listed.url.partition("?")[0].rsplit("/", 1)[-1]
        place = open_location(listed.address)
        rows.append(_row(name, listed.url, listed.manifest, listed.n_bytes, place, listed.problem))
    return rows


def _row(name: str, where: str, manifest: Manifest | None, n_bytes: int, place: Location, problem: str | None) -> Row:
    if manifest is None:
        return Row(name=name, where=redact(where), manifest=None, problem=problem)
    checked, check_problem, changed = None, None, None
    try:
        checked = verified.last(place.address)
    except UserError as error:
        check_problem = error.what
    try:
        changed = place.modified(ROOT_NAMES[manifest.format])
    except (UserError, Missing, OSError):
        changed = None
    return Row(
        name=name,
        where=redact(where),
        manifest=manifest,
        n_bytes=n_bytes,
        changed=changed,
        checked=checked,
        check_problem=check_problem,
        problem=problem,
    )


def _features(row: Row) -> list[dict[str, str]]:
    if row.manifest is None:
        return []
    return [
        {
            "name": name,
            "shape": spec.shape_text,
            "codec": spec.stored_as,
            "bytes": size_text(spec.bytes_per_sample),
            "random": "random" if spec.provenance.get("weights") == "random" else "",
        }
        for name, spec in list(row.manifest.features.items())[:_MAX_FEATURES]
    ]


def time_text(moment: datetime | None) -> str:
    return "unknown" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def render(rows: Iterable[Row], place: str) -> str:
    """One self-contained HTML page: no file, font or server beside it is needed, and none is asked.

    Whatever comes from manifests is escaped, and a policy in the page forbids every script but its own.
    """
    # Marks that reorder text and control characters are shown, as on a terminal.
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, finalize=plain
    )
    hashes = {kind: _csp_hash(environment.get_template(f"catalogue.{kind}").render()) for kind in ("js", "css")}
    rows = list(rows)
    return environment.get_template("catalogue.html").render(
        place=redact(place),
        rows=[{"row": row, "features": _features(row)} for row in rows],
        max_features=_MAX_FEATURES,
        n_bytes=sum(row.n_bytes for row in rows),
        made=time_text(datetime.now(UTC)),
        hashes=hashes,
        size_text=size_text,
        time_text=time_text,
        timestamp=_timestamp,
    )


def _timestamp(row: Row) -> dict[str, int | str]:
    """Numbers to sort by: 0 where unknown."""
    return {
        "changed": 0 if row.changed is None else int(row.changed.timestamp()),
        "checked": "" if row.checked is None else row.checked.at,
    }


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(rows: Iterable[Row], place: str, target: Path) -> None:
    """`render` into a file, all or nothing; raises `CacheError` if it cannot be written."""
    files.atomic_write(target, [render(rows, place).encode("utf-8", "backslashreplace")])


def print_rows(rows: Iterable[Row]) -> None:
    """A paragraph for each cache."""
    for row in rows:
        console.print(f"[bold]{safe(row.name)}[/bold]  {safe(row.where)}")
        if row.manifest is None:
            console.print(f"  [red]{safe(row.problem)}[/red]")
            continue
        size = "compressed" if row.manifest.compressor else size_text(row.n_bytes)
        held = (f"{f['name']} {f['shape']} {f['codec']}" for f in _features(row) if f["name"] not in SAMPLE_FEATURES)
        checked = row.check_problem or (row.checked.words(row.manifest) if row.checked else "never (on record)")
        for title, text in (
            ("images", f"{row.manifest.dataset.count} of {row.manifest.dataset.name}, {size}"),
            ("features", "; ".join(held)),
            ("encoders", ", ".join(row.encoders) or "none"),
            ("changed", f"{time_text(row.changed)}; made with {row.versions or 'unrecorded versions'}"),
            ("verified", checked),
            ("digest", row.digest),
            ("pull", row.pull),
        ):
            console.print(f"  [dim]{title:<9}[/dim]{safe(text)}")
