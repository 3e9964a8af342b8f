"""`true-kd cache`: what the caches of teacher targets hold, whether they are whole, what can go, and where to."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from true_kd import stores
from true_kd.cache import default_root
from true_kd.cli.flags import AsJson
from true_kd.cli.output import say_json
from true_kd.errors import CacheError, InputError
from true_kd.files import expand
from true_kd.manifest import DEMAND, TEACHER
from true_kd.stores import Store
from true_kd.suggest import printable
from true_kd.targets import Preset, TargetOptions

app = typer.Typer(help="Look after the caches of teacher targets.", rich_markup_mode=None)

Root = Annotated[
    str | None,
    typer.Option("--cache", metavar="PATH", help="Folder of the caches. [default: $TRUE_KD_CACHE or the platform's]"),
]
Key = Annotated[str, typer.Argument(metavar="KEY", help="The start of a cache's key, as `true-kd cache ls` shows it.")]
Keys = Annotated[
    list[str] | None, typer.Argument(metavar="KEY", help="Starts of the keys of caches.", show_default=False)
]


@app.callback(invoke_without_command=True)
def _main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def ls(as_json: AsJson = False, cache: Root = None) -> int:
    """List the caches, the last used first."""
    found = stores.scan(_root(cache))
    if as_json:
        say_json([_facts(store) for store in found.stores])
        return 0
    if found.stores:
        _show_table(found.stores)
    _say(f"{_number(len(found.stores), 'cache')}, {_size(sum(store.bytes for store in found.stores))} in {found.root}")
    for why in found.refused.values():
        _say(f"passed over: {why}")
    return 0


@app.command()
def info(key: Key, as_json: AsJson = False, cache: Root = None) -> int:
    """Show one cache: what it holds, and whether it is whole.

    Every file is checked against its digest; `verify` also unpacks it.
    """
    store = stores.find(_root(cache), key)
    findings = list(_watched(stores.verify(store, deep=False), len(store.files)))
    damage = [finding for finding in findings if finding.is_damage]
    if as_json:
        say_json({**_facts(store), "findings": [vars(finding) for finding in findings if finding.state != "whole"]})
        return 0
    settings = ", ".join(f"{name} {value}" for name, value in store.settings.items())
    aligned = store.identity.get("alignment")
    alignment = (
        ", ".join(f"{name} {value}" for name, value in aligned.items())[:100] if isinstance(aligned, dict) else ""
    )
    head = store.sizes.get("head.safetensors")
    stray = sum(store.sizes[name] for name in store.stray)
    state = "whole" if not damage else f"{len(damage)} of {len(store.files)} files damaged or missing"
    rows = {
        "key": store.key,
        "folder": str(store.folder),
        "teacher": store.teacher,
        "digest": str(store.identity.get("teacher"))[:64],
        "targets": settings[:300],
        **({"tokens of": f"a student of another tokenizer ({alignment})"} if alignment else {}),
        "created": _date(store.created) if store.created else "",
        "last used": f"{_date(_iso(store.last_used))}, {_age(store.last_used)} ago",
        "shards": f"{len(store.shards):,}",
        "replies": f"{store.replies:,}",
        "tokens": f"{store.tokens:,}",
        "size": f"{_size(store.bytes)}" + (f", {_size(head)} of it the teacher's output head" if head else ""),
        "per token": f"{store.bytes_per_token:.1f} bytes" if store.bytes_per_token is not None else "",
        "state": state if store.is_current else f"format {str(store.format)[:20]}, of another version of true-kd",
        "stray": f"{_number(len(store.stray), 'file')}, {_size(stray)}: see `true-kd cache prune`"
        if store.stray
        else "",
    }
    for name, value in rows.items():
        if value:
            _say(f"{name:<11}{value}")
    for finding in damage:
        _say(f"{finding.state:<11}{finding.file} ({finding.reason})")
    return 0


@app.command()
def verify(
    keys: Keys = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Drop what is damaged, so that the next run captures just that again.")
    ] = False,
    as_json: AsJson = False,
    cache: Root = None,
) -> int:
    """Check every file of all caches, or of those named.

    Each file must have the digest that it was written with, and each shard is unpacked. What is damaged, missing or
    left over is named; where anything is damaged or missing, removed or not, the exit code is 5.
    """
    root = _root(cache)
    if keys:
        chosen, refused = _named(root, keys), {}
    else:
        found = stores.scan(root)
        chosen = list(found.stores)
        # A link is no damage: it is only not followed.
        refused = {name: why for name, why in found.refused.items() if not (root / name).is_symlink()}
    damaged, dropped, report = 0, 0, {}
    for store in chosen:
        findings = list(_watched(stores.verify(store), len(store.files)))
        damage = [finding for finding in findings if finding.is_damage]
        gone = stores.drop_damaged(store, damage) if remove and damage else ()
        damaged, dropped = damaged + len(damage), dropped + len(gone)
        report[store.key] = {"findings": [vars(finding) for finding in findings], "dropped": list(gone)}
        if not as_json:
            _show_findings(store, findings, gone)
    if as_json:
        say_json({"caches": report, "refused": refused})
    else:
        for why in refused.values():
            _say(why)
        if not chosen and not refused:
            _say(f"no caches in {root}")
    if damaged or refused:
        raise CacheError(_sum_up(root, damaged, dropped, len(refused)))
    return 0


@app.command()
def prune(
    keys: Keys = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Caches not used for so long: 30d, 12h, 2w.")
    ] = None,
    keep_size: Annotated[
        str | None,
        typer.Option("--keep-size", metavar="SIZE", help="What may stay, the last used first: 10GB. The others go."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove them; without it they are only listed.")] = False,
    as_json: AsJson = False,
    cache: Root = None,
) -> int:
    """List what can go, and with --yes remove it.

    That is the caches named, or those of them, or of all, that --older-than and --keep-size choose; and in the others
    the files that killed runs left behind. Folders that are not a cache of true-kd are never touched.
    """
    age = None if older_than is None else stores.parse_age(older_than)
    size = None if keep_size is None else stores.parse_size(keep_size)
    root = _root(cache)
    every = stores.scan(root).stores
    named = _named(root, keys) if keys else None
    plan = stores.plan_pruning(every, named, age, size)
    done = stores.prune(plan) if yes else plan
    kept = [store.key for store in plan.stores if store not in done.stores]
    if as_json:
        strays = [{"file": str(path), "bytes": length} for path, length in done.strays.items()]
        caches = [_facts(store) for store in done.stores]
        say_json({"removed": yes, "caches": caches, "strays": strays, "kept": kept, "bytes": done.bytes})
        return 0
    verb = "removed" if yes else "would go"
    for store in done.stores:
        _say(f"{verb}: {store.key} ({store.teacher}, {_size(store.bytes)}, used {_age(store.last_used)} ago)")
        if yes and store.others and store.folder.exists():
            _say(f"kept: {store.folder}, for what is not true-kd's in it")
    for path, length in done.strays.items():
        _say(f"{verb}: {path.parent.name}/{path.name} (left by a killed run, {_size(length)})")
    for key in kept:
        _say(f"kept: {key}, which was used since")
    if not plan.stores and not plan.strays:
        _say(f"nothing to remove in {root}")
    elif yes:
        _say(f"{_size(done.bytes)} freed")
    else:
        _say(f"{_size(plan.bytes)} in all. Nothing was removed: add --yes.")
    return 0


@app.command()
def export(
    key: Key,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="A new or empty folder.", show_default=False)],
    as_json: AsJson = False,
    cache: Root = None,
) -> int:
    """Copy a cache to a folder, for another machine."""
    store = stores.find(_root(cache), key)
    moved = stores.export_store(store, _path(destination, "DEST"))
    if as_json:
        say_json(_moved(store.key, moved, _way_to_use(store, store.key[:8])))
        return 0
    _say(f"{store.key}: {_number(moved.replies, 'reply')}, {_size(moved.bytes)} copied to {moved.folder}")
    _say(f"There: true-kd cache import {moved.folder.name}")
    if hint := _way_to_use(store, store.key[:8]):
        _say(f"       {hint}")
    return 0


@app.command(name="import")
def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="What `true-kd cache export` made.", show_default=False)],
    as_json: AsJson = False,
    cache: Root = None,
) -> int:
    """Add an exported cache to those here.

    All of it is checked first. Where the same cache is here already, it gets what it lacks.
    """
    root = _root(cache)
    moved = stores.import_store(_path(source, "SRC"), root)
    digits = _digits([found.key for found in stores.scan(root).stores])
    hint = _way_to_use(stores.read_store(moved.folder), moved.folder.name[:digits])
    if as_json:
        say_json(_moved(moved.folder.name, moved, hint))
        return 0
    kept = f"; nothing new in {_number(moved.present, 'file')}" if moved.present else ""
    _say(f"{moved.folder.name}: {_number(moved.replies, 'reply')}, {_size(moved.bytes)} copied to {moved.folder}{kept}")
    if hint:
        _say(f"Next, with the configs and prompts it was captured with: {hint}")
    return 0


def _moved(key: str, moved: stores.Moved, hint: str) -> dict[str, Any]:
    """A copied cache for programs; `command` trains from it where it knows its teacher."""
    return {
        "key": key,
        "folder": str(moved.folder),
        "replies": moved.replies,
        "bytes": moved.bytes,
        "present": moved.present,
        "command": hint or None,
    }


def _way_to_use(store: Store, key: str) -> str:
    """The command that trains from a cache without its teacher; "" where it does not know its teacher."""
    if TEACHER not in store.files:
        return ""
    presets = {preset: asdict(TargetOptions(preset=preset).settings) for preset in get_args(Preset)}
    loose = {"share": store.settings.get("share")}
    preset = next((name for name, found in presets.items() if {**found, **loose} == store.settings), "default")
    flags = [f"--teacher cache:{key}", *([f"--set targets.preset={preset}"] if preset != "default" else [])]
    # No other names: a stranger may have written the identity, and this line is copied to a shell.
    differing = {name: store.settings.get(name) for name in presets[preset]}
    differing = {name: value for name, value in differing.items() if presets[preset][name] != value}
    if "threshold" in differing and any(DEMAND.fullmatch(name) for name in store.files):
        flags.append("--cache-bytes N")
        del differing["threshold"]
    flags += [f"--set targets.{name}={value!r}" for name, value in differing.items() if isinstance(value, float)]
    return f"true-kd distill {' '.join(flags)}"


def _root(given: str | None) -> Path:
    return default_root() if given is None else _path(given, "--cache")


def _path(given: str, what: str) -> Path:
    if not given.strip():
        raise InputError(f"{what} '': empty, expected a folder. Write its path.")
    return expand(given, what)


def _named(root: Path, keys: list[str]) -> list[Store]:
    return list({store.key: store for store in (stores.find(root, key) for key in keys)}.values())


def _show_findings(store: Store, findings: list[stores.Finding], gone: tuple[str, ...]) -> None:
    for finding in findings:
        if finding.is_damage:
            lost = f", {_number(finding.replies, 'reply')}" if finding.replies else ""
            dropped = "; dropped" if finding.file in gone else ""
            _say(f"{store.key}/{finding.file}: {finding.state} ({finding.reason}){lost}{dropped}")
        elif finding.state == "stray":
            _say(f"{store.key}/{finding.file}: stray ({finding.reason}); see `true-kd cache prune`")
    if not store.is_current:
        _say(f"{store.key}: format {str(store.format)[:20]}, of another version of true-kd; not checked")
    else:
        whole = sum(finding.state == "whole" for finding in findings)
        _say(f"{store.key}: {whole} of {len(store.files)} files whole, {_number(store.replies, 'reply')}")


def _sum_up(root: Path, damaged: int, dropped: int, refused: int) -> str:
    parts = [f"{_number(damaged, 'file')} damaged or missing"] if damaged else []
    parts += [f"{_number(refused, 'folder')} not as named"] if refused else []
    if dropped:
        remedy = f"{_number(dropped, 'file')} dropped: the next run captures again what was lost."
    elif damaged:
        remedy = "Run `true-kd cache verify --remove`: the next run captures again what was lost."
    else:
        remedy = "Look at them, and delete them by hand."
    return f"{root}: {' and '.join(parts)}, expected none. {remedy}"


def _show_table(found: Iterable[Store]) -> None:
    from rich.table import Table
    from rich.text import Text

    from true_kd.console import make_console

    console = make_console()
    # What a narrow terminal has no room for, `info` tells.
    wide = console.width >= 78
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("key", "teacher", *(("targets",) if wide else ())):
        table.add_column(name, overflow="fold", no_wrap=name == "key")
    for name in (*(("replies",) if wide else ()), "tokens", "size", "B/token", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = list(found)
    digits = _digits([store.key for store in shown])
    for store in shown:
        each = store.bytes_per_token
        cells = [store.key[:digits], store.teacher.rpartition("/")[2], *((_settings(store),) if wide else ())]
        counts = (_count(store.replies), _count(store.tokens)) if store.is_current else ("-", "-")
        cells += [*counts[not wide :], _size(store.bytes), f"{each:.1f}" if each is not None else "-"]
        table.add_row(*(Text(printable(cell)) for cell in (*cells, _age(store.last_used))))
    console.print(table)


def _facts(store: Store) -> dict[str, Any]:
    """A cache for programs."""
    return {
        "key": store.key,
        "folder": str(store.folder),
        "format": store.format,
        "teacher": store.teacher,
        "identity": dict(store.identity),
        "shards": len(store.shards),
        "replies": store.replies,
        "tokens": store.tokens,
        "bytes": store.bytes,
        "bytes_per_token": store.bytes_per_token,
        "created": store.created,
        "last_used": _iso(store.last_used),
        "stray": list(store.stray),
    }


def _settings(store: Store) -> str:
    match store.settings:
        case {"kind": "sparse", "threshold": float() as threshold, "draw_temperature": float() as draw}:
            words = f"{threshold:g} T{draw:g}"
        case {"kind": "hidden"}:
            words = "exact"
        case _:
            return f"format {str(store.format)[:8]}" if not store.is_current else "?"
    share = store.settings.get("share")
    return f"{words} {share:.0%}" if isinstance(share, float) and share != 1.0 else words


def _digits(keys: list[str]) -> int:
    """How many digits tell the keys apart, 8 at least."""
    return next(digits for digits in range(8, 17) if digits == 16 or len({key[:digits] for key in keys}) == len(keys))


def _count(number: int) -> str:
    for power, unit in ((10**9, "G"), (10**6, "M")):
        if number >= power:
            return f"{number / power:.3g}{unit}" if number < 999 * power else f"{number // power:,}{unit}"
    return f"{number:,}"


def _size(length: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while length >= 999.5 and len(units) > 1:
        length /= 1000
        del units[0]
    return f"{length:.3g} {units[0]}" if length < 999.5 else f"{length:,.0f} {units[0]}"


def _number(count: int, what: str) -> str:
    many = f"{what[:-1]}ies" if what.endswith("y") else f"{what}s"
    return f"{count:,} {what if count == 1 else many}"


def _age(since: float) -> str:
    seconds = max(0.0, datetime.now(UTC).timestamp() - since)
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "0 min"


def _iso(time: float) -> str:
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")


def _date(text: str) -> str:
    return text[:16].replace("T", " ") + (" UTC" if text.endswith("+00:00") else text[19:])


def _watched(findings: Iterable[stores.Finding], total: int) -> Iterator[stores.Finding]:
    """The findings as they come, with a bar where there is somebody to watch it."""
    from rich.progress import track

    if not sys.stderr.isatty() or total < 2:
        yield from findings
        return
    from rich.console import Console

    yield from track(findings, "checking", total, console=Console(stderr=True), transient=True)


def _say(line: str) -> None:
    typer.echo(printable(line))
