"""The list of a cache's files: a line each, with a check of its own, so that no changed line is ever believed.

A line is appended when its file is whole on the disk, by whoever holds the folder's lock. The files themselves have
names that say what they are; no other is ever read, written or removed because a manifest names it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from true_kd.errors import CacheError
from true_kd.files import (
    CHECK,
    TEMPORARY,
    CannotRead,
    CannotWrite,
    digest_json,
    flush,
    open_plain,
    read_plain,
    write_atomic,
)
from true_kd.models import STAND_IN

MANIFEST = "manifest.jsonl"
HEAD = "head.safetensors"
"""The teacher's output head, beside targets that are hidden states."""
TEACHER = STAND_IN
"""All of the teacher but its weights, so that its replies are of use where it is not."""
DEMAND = re.compile(r"demand-[0-9a-f]{16}\.json")
"""Names of what a budget was measured to need of the teacher: see `true_kd.budget`."""
SIZE = re.compile(r"size-[0-9a-f]{16}\.json")
"""Names of how large and fast the teacher was on a machine: see `true_kd.sizes`."""
LOCK = ".lock"


@dataclass(frozen=True)
class StoredFile:
    """One line of a manifest."""

    name: str
    sha256: str
    replies: int
    tokens: int

    def line(self, key: str) -> bytes:
        """The line, its end included, in the manifest of the cache whose folder is named `key`.

        Its check covers that name, so that no line counts in another teacher's cache.
        """
        record = dict(zip(_LINE, (self.name, self.sha256, self.replies, self.tokens), strict=True))
        check = digest_json({"cache": key, **record})[:16]
        return json.dumps({**record, CHECK: check}).encode() + b"\n"


_LINE: Mapping[str, type] = {"file": str, "sha256": str, "replies": int, "tokens": int}
SHARD = re.compile(r"[0-9a-f]{16}\.safetensors")
"""Names of shards."""
_MOST_LINE = 512
MOST_MANIFEST = 2**28
"""Bytes of a manifest: a million lines and more."""


def is_stored(name: str) -> bool:
    """Whether a manifest may name this file: no other is ever read or written because it does."""
    return name in (HEAD, TEACHER) or any(kind.fullmatch(name) for kind in (SHARD, DEMAND, SIZE))


def parse_line(line: bytes, key: str) -> StoredFile | None:
    """A line, without its end, of the manifest of the cache `key`; None for one that differs in any byte from what
    `StoredFile.line` gives."""
    if len(line) > _MOST_LINE or not line.startswith(b'{"file": '):
        return None
    try:
        record = json.loads(line)
        values = [record[name] for name in _LINE]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(type(value) is kind for value, kind in zip(values, _LINE.values(), strict=True)):
        return None
    file = StoredFile(*values)
    counted = 0 <= file.replies < 2**53 and 0 <= file.tokens < 2**53
    sound = is_stored(file.name) and counted and re.fullmatch(r"[0-9a-f]{64}", file.sha256)
    return file if sound and file.line(key) == line + b"\n" else None


@dataclass(frozen=True)
class Manifest:
    """What a manifest says."""

    files: Mapping[str, StoredFile]
    """By name. Of two lines with one file the later counts, also in the order."""
    spoiled: int = 0
    """Lines that were changed since they were written, or mean nothing."""
    unfinished: bool = False
    """Whether its last line has no end: a kill, or a full disk, has cut it short."""


def parse_manifest(content: bytes, key: str) -> Manifest:
    """Read the manifest of the cache `key`; lines that are not whole are only counted."""
    *lines, last = content.split(b"\n")
    found = [parse_line(line, key) for line in (*lines, last)]
    files: dict[str, StoredFile] = {}
    for file in found:
        if file:
            files.pop(file.name, None)
            files[file.name] = file
    return Manifest(files, found[:-1].count(None), bool(last))


def load_manifest(folder: Path, key: str | None = None) -> Manifest:
    """The manifest in a folder, of the cache `key`: of the folder's own name unless it is given.

    Raises
    ------
    CacheError
        when something else is in its place.
    CannotRead
        when it cannot be read.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(read_plain(path, MOST_MANIFEST), folder.name if key is None else key)
    except FileNotFoundError:
        return Manifest({})
    except ValueError as error:
        raise CacheError(f"{path}: {error}, expected a line a file. Look at it, and move it away.") from error


def read_manifest(folder: Path, key: str | None = None) -> dict[str, StoredFile]:
    """The files of a cache by name; see `load_manifest`."""
    return dict(load_manifest(folder, key).files)


def take_lock(folder: Path, patience: float = -1.0) -> contextlib.AbstractContextManager[Any]:
    """Hold the lock of a folder, as whoever writes in it does, until the block ends. It goes with its holder's life.

    Raises
    ------
    filelock.Timeout
        when another process still holds it after `patience` seconds; below 0 is for ever.
    CannotWrite
        when there can be no lock.
    """
    try:
        return FileLock(folder / LOCK, timeout=patience).acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        raise CannotWrite(folder / LOCK, error) from error


def remove_left_over(folder: Path, names: Iterable[str]) -> None:
    """Delete files that kills have left; whoever does holds the folder's lock. What cannot be deleted stays."""
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def left_over(folder: Path, listed: Iterable[str]) -> list[str]:
    """The plain files of a folder that have no name yet, or are a shard's and not among those that are listed."""
    known = set(listed)
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.startswith(TEMPORARY) or (SHARD.fullmatch(entry.name) and entry.name not in known)
                if stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
            )
    except OSError:
        return []


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a plain file has this digest; False also where there is none, or its disk has lost it.

    Raises
    ------
    CannotRead
        when nothing can be said of it.
    """
    try:
        with open_plain(path) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == sha256
    except (FileNotFoundError, ValueError):
        return False
    except OSError as error:
        if error.errno == errno.EIO:
            return False
        raise CannotRead(path, error) from error


def write_manifest(folder: Path, key: str, files: Iterable[StoredFile]) -> None:
    """Write the whole manifest of the cache `key` anew."""
    lines = b"".join(file.line(key) for file in files)
    write_atomic(folder / MANIFEST, lambda temporary: temporary.write_bytes(lines), len(lines))


def append_line(manifest: Path, line: bytes) -> None:
    """Append a line, on the disk itself when this returns; where that fails the manifest is as it was."""
    try:
        with manifest.open("a+b", buffering=0) as opened:
            end = opened.seek(0, os.SEEK_END)
            try:
                # A kill may have left half a line; a line of its own keeps it from spoiling this one.
                left = line if end == 0 or _ends_line(opened) else b"\n" + line
                while left:
                    left = left[opened.write(left) :]
                flush(opened.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(opened.fileno(), end)
                raise
    except OSError as error:
        raise CannotWrite(manifest, error, len(line)) from error


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
