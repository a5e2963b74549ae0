"""The commands around the life of a cache: list, check, share, convert, import, remove. Thin: parse, call, print."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

import featcache
from featcache.builder.asked import request_of
from featcache.builder.request import BuildRequest
from featcache.console import console, plain, safe, size_text
from featcache.console_progress import RichProgress
from featcache.errors import CacheError, UserError, first_line
from featcache.feature_names import layer_feature
from featcache.paths import PAGES, check_output, on_this_machine, typed
from featcache.redact import redact
from featcache.settings import Given, takes

if TYPE_CHECKING:
    from featcache.share.verify import Report

# Imports inside the commands: the rooms that they call load numpy or torch, which `featcache --help` does without.

CachePath = Annotated[Path, typer.Argument(help="Folder of the cache.", show_default=False, callback=on_this_machine)]
Features = Annotated[str | None, typer.Option(help="Only these features, separated by commas. \\[default: all]")]
Threads = Annotated[int, typer.Option(help="Files at once.", min=1)]
Expect = Annotated[
    str | None, typer.Option(help="Digest that the cache must have, as featcache info prints it. \\[default: any]")
]
SignedBy = Annotated[
    Path | None,
    typer.Option(
        help="Public key or allowed-signers file (OpenSSH) of whoever must have signed it. \\[default: anybody or nobody]"
    ),
]
Data = Annotated[str | None, typer.Option(help="Image folder, to encode again. \\[default: as for build]")]
WeightsDir = Annotated[Path | None, typer.Option(help="Pretrained weights, to encode again. \\[default: the hub]")]
Device = Annotated[str, typer.Option(help="For encoding again.")]
Captions = Annotated[
    Path | None,
    typer.Option(
        help="Table of captions or COCO's annotations, to encode text features again. \\[default: the source's own]"
    ),
]


def _local(path: Path | None) -> Path | None:
    return None if path is None else on_this_machine(path)


def _split(text: str | None) -> list[str] | None:
    """`"vae/G3,dinov2-b@9,11,11.cls"` => names, each once; what begins with a bare number is of the encoder before it.

    Raises `UserError` if it names nothing: that is not the same as naming no features, which means all.
    """
    if text is None:
        return None
    names: list[str] = []
    for part in (p.strip() for p in text.split(",")):
        before = layer_feature(names[-1]) if names else None
        if before and (added := layer_feature(f"{before.encoder}@{part}")):
            names.append(str(added))
        elif part:
            names.append(part)
    if not names:
        raise UserError(
            f"--features {text!r} names no feature", remedy="Name some, separated by commas, or leave --features out."
        )
    return list(dict.fromkeys(names))


def list_caches(
    place: Annotated[
        str, typer.Argument(help="Folder of caches, a cache, or a URL (s3://, gs://, hf://, http://).")
    ] = "caches",
) -> None:
    """List caches with their features and sizes."""
    from featcache.share import manage, transfer

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("cache", "images", "size", "features"):
        table.add_column(title, no_wrap=title != "features", overflow="fold")
    problems: list[str] = []
    if "://" in place:
        for listed in transfer.list_remote(place):
            if listed.manifest is None:
                problems.append(f"{safe(listed.url)}  [red]{safe(listed.problem)}[/red]")
                continue
            count = str(listed.manifest.dataset.count)
            table.add_row(safe(listed.url), count, size_text(listed.n_bytes), safe(" ".join(listed.manifest.encoded)))
    else:
        for info in manage.list_caches(place):
            names = info.manifest.encoded if info.manifest else []
            notes = [f"[yellow]unfinished: {safe(' '.join(info.unfinished))}[/yellow]"] if info.unfinished else []
            if info.problem:
                problems.append(f"{safe(info.path)}  [red]{safe(info.problem)}[/red]")
                continue
            count = str(info.manifest.dataset.count) if info.manifest else "-"
            size = size_text(info.n_bytes) if info.manifest else "-"
            table.add_row(safe(info.path), count, size, " ".join([safe(" ".join(names)), *notes]).strip())
    if not table.row_count and not problems:
        raise UserError(
            f"no caches at {place}", remedy="Build one: featcache build --encoder dinov2-b --vae-levels G3,G4"
        )
    if table.row_count:
        console.print_table(table)
    for line in problems:
        console.print(line)


def _counted(problems: Sequence[object]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


def verify(
    cache: Annotated[
        str, typer.Argument(help="Folder of the cache, or of several caches; or a cache's URL.", show_default=False)
    ],
    features: Features = None,
    threads: Annotated[int | None, typer.Option(help="\\[default: one per core; 8 for a URL]", min=1)] = None,
    expect: Expect = None,
    signed_by: SignedBy = None,
    sample: Annotated[
        str | None, typer.Option(help="Read only this part, drawn at random: 1% or 0.01. \\[default: every byte]")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of --sample. \\[default: a fresh one]", min=0, max=(1 << 64) - 1)
    ] = None,
    since_last: Annotated[
        bool,
        typer.Option(
            "--since-last", help="Only shards that no earlier verification found as they are now. \\[default: off]"
        ),
    ] = False,
    record: Annotated[
        bool | None,
        typer.Option(
            "--record/--no-record",
            help="Note beside the cache when it was verified, how, and by whom. \\[default: --record; not at a URL]",
            show_default=False,
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Encode damaged shards again from the images. \\[default: off]")
    ] = False,
    data: Data = None,
    weights_dir: WeightsDir = None,
    device: Device = "auto",
    captions: Captions = None,
) -> None:
    """Check every byte of a cache against its recorded checksums, and its labels and keys; of a folder of caches each of
    them. Exit code 1 if one is damaged."""
    from featcache.share import manage, transfer, verify
    from featcache.store.remote import is_remote

    names, remote = _split(features), is_remote(cache)
    fraction = None if sample is None else verify.parse_fraction(sample)
    _check_options(cache, fraction, seed, repair=repair, since_last=since_last, remote=remote)
    keep = not remote if record is None else record

    def checked(cache: str) -> Report:
        with RichProgress() as progress:
            if remote:
                return transfer.verify_remote(
                    cache, features=names, threads=threads or 8, fraction=fraction, seed=seed, progress=progress
                )
            return verify.verify(
                Path(cache),
                features=names,
                threads=threads,
                fraction=fraction,
                seed=seed,
                since_last=since_last,
                remember=keep,
                progress=progress,
            )

    if not remote and manage.holds_caches(Path(cache)):
        _refuse_for_many(cache, {"--expect": expect, "--signed-by": signed_by, "--repair": repair or None})
        _verify_all(Path(cache), checked, names, keep=keep)
        return
    authentic = _require_authentic(cache, expect, signed_by)
    report = checked(cache)
    if authentic is not None and report.digest not in (None, authentic):
        raise CacheError(
            f"{cache} is not the cache that was asked for any more: it was exchanged after its digest "
            f"{authentic} had been found right, and what was checked has {report.digest}",
            remedy="run the same command again; where nobody adds features meanwhile, do not trust that place",
        )
    _show_problems(report, "damaged")
    if keep:
        _record(cache, report, names)
    if report.ok:
        console.print(f"{safe(cache)}: sound ({_how_much(report)})")
        return
    if report.digest is None or remote or not repair:
        console.print(f"{_counted(report.problems)}; {_advice(cache, report, remote=remote)}")
        raise typer.Exit(1)
    _encode_again(Path(cache), report.damaged, data, weights_dir, device, captions)
    _check_again(Path(cache), features, threads)


def _refuse_for_many(place: str, given: Mapping[str, object]) -> None:
    """Raises `UserError` for options that are about one cache."""
    for flag, value in given.items():
        if value is not None:
            raise UserError(
                f"{flag} is about one cache, and {place} is a folder of several",
                remedy=f"Name one of them (featcache ls {typed(place)} lists them), or leave {flag} out.",
            )


def _verify_all(place: Path, check: Callable[[str], Report], features: list[str] | None, *, keep: bool) -> None:
    """Checks each cache in a folder and prints a table of them. Exit code 1 unless all that are complete are sound."""
    from featcache.share import manage

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("cache", "", "files", "read"):
        table.add_column(title, justify="right" if title in ("files", "read") else "left", no_wrap=True)
    bad = 0
    for info in manage.list_caches(place):
        if info.problem is None and info.manifest is None:
            table.add_row(safe(info.path), "[yellow]unfinished: nothing to check yet[/yellow]", "-", "-")
            continue
        try:
            if info.problem is not None:
                raise CacheError(info.problem)
            console.print(f"[bold]{safe(info.path)}[/bold]")
            report = check(str(info.path))
        except UserError as error:
            bad += 1
            table.add_row(safe(info.path), f"[red]not checked: {safe(first_line(error))}[/red]", "-", "-")
            continue
        _show_problems(report, "damaged")
        if keep:
            _record(str(info.path), report, features)
        bad += not report.ok
        found = "sound" if report.ok else f"[red]{_counted(report.problems)}[/red]"
        table.add_row(safe(info.path), found, f"{report.n_files:,}", size_text(report.n_bytes))
    console.print_table(table)
    if bad:
        console.print(f"{bad} of {table.row_count} caches are not sound; featcache repair CACHE mends a damaged one")
        raise typer.Exit(1)


def _advice(cache: str, report: Report, *, remote: bool) -> str:
    """What to do about a damaged cache."""
    if report.digest is None:
        from featcache.store.root import DAMAGED_REMEDY

        return DAMAGED_REMEDY
    if remote:
        return "push the cache again from where it is sound"
    return f"type: featcache repair {safe(shlex.quote(cache))}, with --from URL if there is another copy"


def _check_options(
    cache: str, fraction: float | None, seed: int | None, *, repair: bool, since_last: bool, remote: bool
) -> None:
    """Raises `UserError` for options of verify that do not go together."""
    if remote and repair:
        raise UserError(
            f"{cache} cannot be repaired where it lies",
            remedy="Repair the cache it was pushed from and push it again, or pull it to a folder first.",
        )
    if remote and since_last:
        raise UserError(
            f"--since-last looks at files on this machine, and {cache} is elsewhere",
            remedy="Leave it out, or type --sample 1% instead.",
        )
    if fraction is not None and (repair or since_last):
        raise UserError("--sample goes with neither --repair nor --since-last", remedy="Leave one of them out.")
    if seed is not None and fraction is None:
        raise UserError("--seed is for --sample", remedy="Add --sample 1%, or leave --seed out.")


def _require_authentic(cache: str, expect: str | None, signed_by: Path | None) -> str | None:
    """Raises `CacheError` unless it is the expected cache, signed by one of the signers; says who signed it.

    Returns the digest of which that is true, None if nothing was asked for.
    """
    if expect is None and signed_by is None:
        return None
    from featcache.read.root import require_authentic, required_root
    from featcache.store.remote import is_remote, local_path, open_location
    from featcache.store.root import cache_digest, read_root

    if not is_remote(cache):
        read_root(Path(local_path(cache)))  # says more of what lies there instead of a cache
    place = open_location(cache)
    manifest = required_root(place)
    who = require_authentic(place, manifest, expect, signed_by)
    if who is not None:
        console.print(f"signed by {safe(who)}")
    return cache_digest(manifest)


def _encode_again(
    folder: Path,
    damaged: Mapping[str, Sequence[int]],
    data: str | None,
    weights_dir: Path | None,
    device: str,
    captions: Path | None,
) -> None:
    """Metadata from the manifest, damaged shards (feature -> numbers) from the images."""
    from featcache.builder.repair import repair_shards
    from featcache.share.verify import repair_metadata

    for name in repair_metadata(folder):
        console.print(f"metadata written again: {safe(name)}")
    if damaged:
        with RichProgress() as progress:
            repair_shards(
                folder,
                damaged,
                data=data,
                weights_dir=weights_dir,
                device=device,
                progress=progress,
                captions=captions,
            )


_SHOWN_PROBLEMS = 100


def _record(cache: str, report: Report, features: list[str] | None) -> None:
    """Note the verification beside the cache; where that is not possible, say so."""
    from featcache.share import records

    reason = records.record(cache, report, features)
    if reason is not None:
        console.print(f"[yellow]not recorded[/yellow]: {safe(reason)}")


def _show_problems(report: Report, word: str) -> None:
    for problem in report.problems[:_SHOWN_PROBLEMS]:
        console.print(f"[red]{word}[/red] {safe(problem)}")
    rest = len(report.problems) - _SHOWN_PROBLEMS
    if rest > 0:
        console.print(f"[red]{word}[/red] and {rest} more")


def _how_much(report: Report) -> str:
    words = f"{report.n_files} files, {size_text(report.n_bytes)}"
    if report.fraction is not None:
        return f"a sample of {100 * report.fraction:g} %: {words}; again with --seed {report.seed}"
    if report.since_last:
        return f"{words} read, {report.n_unread} shards as they were when last verified"
    return words


def _check_again(folder: Path, features: str | None, threads: int | None) -> None:
    """Exit code 1 unless the cache is sound now."""
    from featcache.share import verify

    with RichProgress() as progress:
        again = verify.verify(folder, features=_split(features), threads=threads, progress=progress)
    _show_problems(again, "still damaged")
    _record(str(folder), again, _split(features))
    if not again.ok:
        raise typer.Exit(1)
    console.print(f"{safe(folder)}: repaired and sound")


def repair(
    cache: CachePath,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Another copy (URL or folder): only what is damaged here is fetched from it. \\[default: encode again]",
        ),
    ] = None,
    features: Features = None,
    threads: Threads = 8,
    data: Data = None,
    weights_dir: WeightsDir = None,
    device: Device = "auto",
    captions: Captions = None,
) -> None:
    """Make a damaged cache whole again: from another copy of it (--from), else from the images."""
    from featcache.share import restore, verify

    if source is None:
        with RichProgress() as progress:
            report = verify.verify(cache, features=_split(features), progress=progress)
        _encode_again(cache, report.damaged, data, weights_dir, device, captions)
    else:
        with RichProgress() as progress:
            done = restore.restore(cache, source, features=_split(features), threads=threads, progress=progress)
        for name in done.files:
            console.print(f"mended: {safe(name)}")
        for what in done.refused:
            console.print(f"[yellow]not mended[/yellow] {safe(what)}")
        console.print(f"{size_text(done.n_bytes)} fetched from {safe(redact(source))}")
    _check_again(cache, features, None)


def sign(
    cache: CachePath,
    key: Annotated[
        Path,
        typer.Option(help="SSH key: the private one, or a public one whose private one is in an agent or on a token."),
    ],
) -> None:
    """Vouch for a cache: sign its digest with an SSH key. Push and pull take the signature along."""
    from featcache.store import signing

    with contextlib.suppress(RuntimeError):  # no such user, or no home: the name stays as it was typed
        key = key.expanduser()
    console.print(f"{safe(cache)}: signed {signing.sign(cache, key)}")


def _confirmed(question: str) -> bool:
    """The answer to a question; no where there is nobody to ask."""
    if sys.stdin is None:
        return False
    try:
        return bool(typer.confirm(question))
    except typer.Abort:
        return False


def remove(
    cache: CachePath,
    features: Annotated[str | None, typer.Option(help="Features to remove. \\[default: the whole cache]")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask. \\[default: off]")] = False,
    now: Annotated[
        bool, typer.Option("--now", help="Delete for good instead of moving to the trash. \\[default: off]")
    ] = False,
) -> None:
    """Remove features of a cache, or (without --features) the whole cache. featcache restore undoes it."""
    from featcache.share import manage, trash

    names = _split(features)
    what = f"{', '.join(names)} of {cache}" if names else f"the whole cache {cache}"
    if names:
        featcache.open(cache).require(names)
    else:
        trash.require_cache(cache)
    if not yes and not _confirmed(plain(f"remove {what}{' for good' if now else ''}?")):
        raise UserError("nothing was removed", remedy="Type --yes to remove without being asked.")
    place = cache if names else cache.parent
    if names:
        size = f": {size_text(manage.remove_features(cache, names, now=now))}"
    else:
        manage.remove_cache(cache, now=now)
        size = ""
    console.print(safe(f"removed {what}{size}"))
    if not now:
        undo, empty = shlex.quote(str(cache)), shlex.quote(str(place))
        console.print(safe(f"it is in the trash; to undo: featcache restore {undo}"))
        console.print(safe(f"to empty the trash now: featcache gc {empty} --trash --older-than 0d"))


def restore(
    cache: CachePath,
    features: Annotated[
        str | None, typer.Option(help="Only these features. \\[default: what was removed last]")
    ] = None,
) -> None:
    """Undo featcache rm: bring a removed cache, or the features removed last, back from the trash."""
    from featcache.share import manage

    console.print(safe(f"restored {manage.restore(cache, _split(features))}"))


def collect_garbage(
    cache: Annotated[
        Path,
        typer.Argument(help="Folder of the cache, or of several caches.", show_default=False, callback=on_this_machine),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go. \\[default: off]")] = False,
    older_than: Annotated[str, typer.Option(help="Age from which the trash is emptied: 0d, 36h, 2w.")] = "7d",
    only_trash: Annotated[
        bool, typer.Option("--trash", help="Only empty the trash; leave what dead builds left. \\[default: off]")
    ] = False,
) -> None:
    """Remove what dead builds left behind (they can then no longer be continued), and empty the trash by age."""
    from featcache.share import manage, trash

    removed = manage.collect_garbage(
        cache,
        dry_run=dry_run,
        older_than_s=trash.parse_age(older_than),
        only_trash=only_trash,
        warn=lambda line: console.print(f"[yellow]kept[/yellow] {safe(line)}"),
    )
    for name, n_bytes in removed:
        console.print(f"{'would remove' if dry_run else 'removed'} {safe(name)}  {size_text(n_bytes)}")
    console.print(f"{len(removed)} leftover{'s' * (len(removed) != 1)}, {size_text(sum(n for _, n in removed))}")


def catalogue(
    place: Annotated[
        str, typer.Argument(help="Folder of caches, a cache, or a URL (s3://, gs://, hf://, http://).")
    ] = "caches",
    html: Annotated[
        Path | None, typer.Option(help="Page to write: one file, for a browser. \\[default: none, a table here]")
    ] = None,
) -> None:
    """What the caches at a place hold, what made them, when they changed and were verified, and how to get them."""
    from featcache.share import catalogue

    if html is not None:
        check_output(html, PAGES, example="caches.html")
    rows = catalogue.gather(place)
    if not rows:
        raise UserError(
            f"no caches at {place}", remedy="Build one: featcache build --encoder dinov2-b --vae-levels G3,G4"
        )
    if html is not None:
        catalogue.write_page(rows, place, html)
        console.print(f"page: [bold]{safe(html)}[/bold]   ({len(rows)} cache{'s' * (len(rows) != 1)})")
        return
    catalogue.print_rows(rows)


def push(
    cache: CachePath,
    url: Annotated[
        str, typer.Argument(help="s3://bucket/path, gs://, hf://datasets/owner/name, or a folder.", show_default=False)
    ],
    features: Features = None,
    threads: Threads = 8,
    replace_unfinished: Annotated[
        bool,
        typer.Option(
            "--replace-unfinished", help="Send over what a push of other bytes left unfinished there. \\[default: off]"
        ),
    ] = False,
) -> None:
    """Copy a cache to a place that others read; resumable, verified, visible only when complete."""
    from featcache.share import transfer

    with RichProgress() as progress:
        done = transfer.push(
            cache,
            url,
            features=_split(features),
            threads=threads,
            replace_unfinished=replace_unfinished,
            progress=progress,
        )
    console.print(
        f"{safe(redact(url))}: {done.n_files} files, {size_text(done.n_bytes)} sent, {done.n_files_before} were there"
    )


def pull(
    url: Annotated[
        str, typer.Argument(help="Where the cache is: s3://, gs://, hf://, http(s):// or a folder.", show_default=False)
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to copy it to.", show_default=False, callback=on_this_machine)],
    features: Features = None,
    samples: Annotated[
        int | None, typer.Option(help="Only the first so many samples (whole shards). \\[default: all]", min=1)
    ] = None,
    threads: Threads = 8,
    expect: Expect = None,
    signed_by: SignedBy = None,
) -> None:
    """Copy a cache, or a part of one, to this machine; resumable, verified on arrival."""
    from featcache.share import transfer

    with RichProgress() as progress:
        done = transfer.pull(
            url,
            folder,
            features=_split(features),
            samples=samples,
            threads=threads,
            expect=expect,
            signed_by=signed_by,
            progress=progress,
        )
    console.print(
        f"{safe(folder)}: {done.n_files} files, {size_text(done.n_bytes)} fetched, {done.n_files_before} were there"
    )


def convert(
    source: Annotated[Path, typer.Argument(help="Cache to read.", show_default=False, callback=on_this_machine)],
    target: Annotated[
        Path, typer.Argument(help="Folder of the new cache.", show_default=False, callback=on_this_machine)
    ],
    to: Annotated[str, typer.Option(help="zarr or wds (webdataset).")],
    features: Features = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Samples per shard of the new cache. \\[default: as it was]", min=1)
    ] = None,
    compressor: Annotated[str | None, typer.Option(help="zstd or blosc, for zarr. \\[default: none]")] = None,
) -> None:
    """Copy a cache into the other format, bit for bit."""
    from featcache.share import convert

    if to not in ("zarr", "wds"):
        raise UserError(f"--to {to!r} is neither zarr nor wds", remedy="Type --to zarr or --to wds.")
    with RichProgress() as progress:
        manifest = convert.convert(
            source,
            target,
            to=to,
            features=_split(features),
            shard_size=shard_size,
            compressor=compressor,
            progress=progress,
        )
    console.print(f"{safe(target)}: {manifest.dataset.count} samples as {to}")


def import_latents(
    source: Annotated[Path, typer.Argument(help="Folder of latents, .zip or .h5.", show_default=False)],
    layout: Annotated[str, typer.Option("--from", help="Who made them: repa, edm2, lightningdit, irepa or repae.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the new cache. \\[default: ./caches/<folder>-<layout>]", callback=_local),
    ] = None,
    vae: Annotated[str | None, typer.Option(help="VAE that made them. \\[default: the layout's usual one]")] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Of irepa and repae: the VAE's ...-latents-stats.pt. \\[default: found beside, else computed]"
        ),
    ] = None,
) -> None:
    """Turn latents that you already have into a cache."""
    from featcache.share import importers

    target = out or Path("caches") / f"{source.resolve().name}-{layout}"
    with RichProgress() as progress:
        request = importers.ImportRequest(source=source, out=target, layout=layout, vae=vae, statistics=statistics)
        manifest = importers.import_latents(request, progress)
    console.print(f"cache: [bold]{safe(target)}[/bold]   ({manifest.dataset.count} samples)")


def export(
    cache: Annotated[str, typer.Argument(help="Folder of the cache, or its URL.", show_default=False)],
    to: Annotated[str, typer.Option(help="Whose layout: repa, edm2, lightningdit, or hf (parquet, for datasets).")],
    out: Annotated[
        Path,
        typer.Option(help="Folder to write; for REPA one that is called vae-sd.", callback=_local),
    ],
    features: Annotated[str | None, typer.Option(help="Of --to hf: only these. \\[default: all]")] = None,
    view: Annotated[
        int | None,
        typer.Option(
            help="0: the images as they are, 1: mirrored. \\[default: what the layout has places for]", min=0, max=1
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of --to hf: float32 or float16. \\[default: the smaller that loses nothing]")
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help="Of the samples that --to lightningdit draws of the posterior.", min=0, max=(1 << 63) - 1),
    ] = 0,
) -> None:
    """Write a cache in the layout that another trainer reads. Resumable.

    [dim]Example: featcache export caches/NAME --to repa --out data/vae-sd[/dim]
    """
    from featcache.share import exporters

    names = _split(features)
    with RichProgress() as progress:
        request = exporters.ExportRequest(
            cache=cache,
            out=out,
            layout=to,
            features=None if names is None else tuple(names),
            view=view,
            seed=seed,
            dtype=dtype,
        )
        count = exporters.export(request, progress)
    console.print(f"{safe(out)}: {count} samples in the layout of {to}")


@takes(
    BuildRequest,
    but=[
        *("batch_size", "compile", "on_bad_image", "shard_size", "format", "compressor", "seed"),
        *("workers", "engine", "schedule", "ray_workers"),  # one process plans, and decodes with one thread
    ],
)
def plan(
    given: Given,
    steps_per_s: Annotated[float, typer.Option(help="Training speed to plan reading for.", min=0, max=1e6)] = 2.0,
    batch: Annotated[int, typer.Option(help="Training batch to plan reading for.", min=1, max=2**31 - 1)] = 256,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Encode a few real images: rates, error of each precision and codec. \\[default: off]"
        ),
    ] = False,
    images: Annotated[int, typer.Option(help="How many images --measure encodes.", min=1)] = 8,
) -> None:
    """What a build will cost: bytes, reading speed needed, encoding time, disk; with --measure also what precisions
    and codecs lose."""
    request = request_of(given)
    from featcache.builder.estimate import estimate, print_estimate

    planned = estimate(request, measure=images if measure else 0)
    random = not measure or request.random_weights is not None
    print_estimate(planned, steps_per_s=steps_per_s, batch=batch, random=random)


def register(app: typer.Typer) -> None:
    """Adds the commands to the application."""
    app.command()(plan)
    app.command(name="ls")(list_caches)
    app.command()(verify)
    app.command(name="rm")(remove)
    app.command()(restore)
    app.command(name="gc")(collect_garbage)
    app.command()(catalogue)
    app.command()(repair)
    app.command()(sign)
    app.command()(push)
    app.command()(pull)
    app.command()(convert)
    app.command(name="import")(import_latents)
    app.command()(export)
