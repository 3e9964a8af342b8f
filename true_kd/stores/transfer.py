"""Carries a cache from one machine to another, as a folder that can lie on any disk.

What is exported is whole or not there at all. What is imported is checked before anything is written, and once more
by its digest while it is copied; a file counts from the moment its line is in the manifest, so a kill leaves nothing
that is half believed, and importing again goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from true_kd.cache import ABOUT, FORMAT, IDENTITY, CacheIdentity, TargetCache
from true_kd.errors import CacheError, InputError
from true_kd.files import (
    TEMPORARY,
    CannotRead,
    CannotWrite,
    make_folder,
    open_plain,
    read_plain,
    sync_folder,
    write_atomic,
    write_json,
)
from true_kd.manifest import HEAD, LOCK, MANIFEST, MOST_MANIFEST, SHARD, StoredFile, parse_line, write_manifest
from true_kd.shards import read_keys
from true_kd.stores.checking import check_file, hold, remove
from true_kd.stores.reading import (
    Store,
    is_key,
    is_ours,
    names_in,
    read_about,
    read_identity,
    read_store,
    settings_of,
)

_BLOCK = 2**20


@dataclass(frozen=True)
class Moved:
    """What an export or an import copied."""

    folder: Path
    """Where it lies."""
    files: int
    replies: int
    bytes: int
    present: int = 0
    """Files that an import left out, because the cache has all that they hold."""


def export_store(store: Store, destination: Path) -> Moved:
    """Copy a cache to a folder of its own, which appears when it is whole.

    Raises
    ------
    InputError
        when something lies at the destination, or there is nothing to export.
    CacheError
        when a file of the cache is damaged.
    """
    destination = destination.parent.resolve() / destination.name
    _check_destination(store, destination)
    make_folder(destination.parent)
    with _staging(destination.parent / f"{TEMPORARY}export-{store.key}") as folder:
        for file in store.files.values():
            copy = partial(_copy, store.folder / file.name, file.sha256)
            write_atomic(folder / file.name, copy, store.sizes.get(file.name))
        size = sum((folder / name).stat().st_size for name in store.files)
        write_json(folder / IDENTITY, dict(store.identity))
        write_json(folder / ABOUT, read_about(store.folder))
        write_manifest(folder, store.key, store.files.values())
        try:
            (folder / LOCK).unlink()
            folder.rename(destination)
            sync_folder(destination.parent)
        except OSError as error:
            raise CannotWrite(destination, error) from error
    return Moved(destination, len(store.files), store.replies, size)


def import_store(source: Path, root: Path) -> Moved:
    """Add an exported cache, or a plain copy of one, to the caches of a root.

    Where that cache is there already, it gets the files that hold something it lacks.

    Raises
    ------
    InputError
        when the source is not a cache's folder, or one of another version of true-kd.
    CacheError
        when anything in it is not what it says it is; nothing has been written then.
    """
    identity, files = _check_source(source)
    _check_target(root / identity.folder_name)
    cache = TargetCache(root, identity)
    cache.mend(lacking=True)
    copied, size = [], 0
    try:
        for file in files:
            if not _has(cache, source, file):
                copy = partial(_copy, source / file.name, file.sha256)
                need = (source / file.name).stat().st_size
                cache.add_file(file.name, file.replies, file.tokens, copy, need)
                size += (cache.folder / file.name).stat().st_size
                copied.append(file)
    except OSError as error:
        raise CannotWrite(cache.folder, error) from error
    replies = sum(file.replies for file in copied)
    return Moved(cache.folder, len(copied), replies, size, len(files) - len(copied))


def _check_destination(store: Store, destination: Path) -> None:
    if not store.is_current:
        raise InputError(other_format(store.folder, store.format))
    if not store.shards:
        raise InputError(f"{store.folder}: holds no replies, expected some. There is nothing to export.")
    root = store.folder.parent.resolve()
    if root in (destination.resolve(), *destination.resolve().parents):
        raise InputError(f"{destination}: lies in {root}, expected a place outside the caches. Choose another.")
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir() or destination.samefile(Path.cwd()):
        raise InputError(f"{destination}: is there already, expected a new folder. Choose another name.")
    if found := names_in(destination):
        raise InputError(f"{destination}: has {len(found)} files, expected a new or empty folder. Choose another.")


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """An empty folder for one writer; unless it was renamed, it is gone in the end. What a kill left in it goes."""
    if os.path.lexists(folder) and (
        folder.is_symlink() or not folder.is_dir() or not all(map(is_ours, names_in(folder)))
    ):
        raise InputError(f"{folder}: is in the way, expected nothing of this name. Move it, or choose another place.")
    make_folder(folder)
    with hold(folder, patience=0):
        _clear(folder)
        try:
            yield folder
        finally:
            if folder.exists():
                _clear(folder)
                remove(folder / LOCK)
                folder.rmdir()


def _clear(folder: Path) -> None:
    for name in names_in(folder):
        if name != LOCK:
            remove(folder / name)


def _check_source(source: Path) -> tuple[CacheIdentity, list[StoredFile]]:
    """Whose replies a folder holds, and its files; all of it is proved here."""
    if not source.is_dir() or not os.path.lexists(source / IDENTITY):
        what = f"no {IDENTITY} in it" if source.is_dir() else "no such folder"
        raise InputError(f"{source}: {what}, expected a folder that `true-kd cache export` wrote.")
    written = read_identity(source)
    if written["format"] != FORMAT:
        raise InputError(other_format(source, written["format"]))
    facts = {name: fact for name, fact in written.items() if name != "format"}
    identity = CacheIdentity(facts, read_about(source))
    name = source.resolve().name
    if is_key(name) and name != identity.folder_name:
        raise CacheError(
            f"{source / IDENTITY}: its digest begins with {identity.folder_name}, expected the folder's name. It was "
            "changed, so the replies are not what it says; nothing was imported."
        )
    files = _read_manifest(source / MANIFEST, identity.folder_name)
    findings = [check_file(source, file, written) for file in files.values()]
    faults = [f"{finding.file} ({finding.reason})" for finding in findings if finding.state != "whole"]
    if settings_of(written).get("kind") == "hidden" and HEAD not in files:
        faults.append(f"{HEAD} (not in the manifest)")
    if faults:
        listed = ", ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise CacheError(f"{source}: {listed}: expected whole files. Nothing was imported; copy or export it again.")
    return identity, list(files.values())


def _read_manifest(path: Path, key: str) -> dict[str, StoredFile]:
    """The files that a stranger's manifest names; unlike in a cache of one's own, every line must be right."""
    files: dict[str, StoredFile] = {}
    try:
        content = read_plain(path, MOST_MANIFEST)
    except (FileNotFoundError, ValueError) as error:
        why = "not there" if isinstance(error, FileNotFoundError) else error
        raise CacheError(f"{path}: {why}, expected the manifest of a cache. Nothing was imported.") from error
    lines = content.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines if content else [], 1):
        file = parse_line(line, key)
        if file is None:
            raise CacheError(
                f"{path}:{number}: names no file of a cache with its digest, counts and check, as every line is "
                f"expected to, or {IDENTITY} was changed. Nothing was imported; make the folder with "
                "`true-kd cache export`."
            )
        files.pop(file.name, None)
        files[file.name] = file
    if not files:
        raise InputError(f"{path}: names no file, expected some. There is nothing to import.")
    return files


def _check_target(folder: Path) -> None:
    if os.path.lexists(folder):
        try:
            read_store(folder)
        except CacheError:
            # A kill before identity.json leaves the lock and what it was writing; anything else is not a cache's.
            begun = folder.is_dir() and not folder.is_symlink()
            if not begun or not all(name == LOCK or name.startswith(TEMPORARY) for name in names_in(folder)):
                raise


def _has(cache: TargetCache, source: Path, file: StoredFile) -> bool:
    if not SHARD.fullmatch(file.name):
        return cache.path_of(file.name) is not None
    return all(key in cache for key in read_keys(source / file.name))


def _copy(source: Path, sha256: str, target: Path) -> None:
    """Copy a plain file, and prove by its digest on the way that it is the one that is meant."""
    digest = hashlib.sha256()
    try:
        opened = open_plain(source)
    except (FileNotFoundError, ValueError) as error:
        raise CacheError(f"{source}: no plain file, expected a whole one. {_MEND}") from error
    with opened, target.open("wb") as copy:
        while block := _read_block(opened, source):
            digest.update(block)
            copy.write(block)
    if digest.hexdigest() != sha256:
        raise CacheError(f"{source}: damaged, expected the digest of the manifest. {_MEND}")


_MEND = "Run `true-kd cache verify --remove` where it was captured, and distill there again."


def _read_block(opened: BinaryIO, source: Path) -> bytes:
    try:
        return opened.read(_BLOCK)
    except OSError as error:
        raise CannotRead(source, error) from error


def other_format(folder: Path, found: int) -> str:
    """The refusal of a cache of another version of true-kd."""
    if found < FORMAT:
        remedy = "An older true-kd wrote it: capture it again with this version."
    else:
        remedy = "A newer true-kd wrote it: upgrade this one."
    return f"{folder}: cache of format {str(found)[:20]}, expected {FORMAT}. {remedy}"
