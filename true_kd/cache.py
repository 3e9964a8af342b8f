"""Teacher targets on disk: content-addressed, verified, shared by domains and runs.

A cache is a folder per teacher identity (weights, tokenizer, how much is kept; see `CacheIdentity`). It holds replies
in shards, as safetensors, and a manifest with one line a file: its name and its SHA-256. The key of a reply is the
digest of the tokens the teacher was given, and of the sampling where it wrote the reply itself, so an edited prompt
misses and every other one hits. A shard exists only when its manifest line is whole; one whose bytes do not match
their digest is as if absent, and its replies are captured again. Shards are read by mapping them into memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from true_kd.errors import CacheError
from true_kd.files import (
    CannotWrite,
    digest_file,
    digest_json,
    expand,
    make_folder,
    sync_folder,
    write_atomic,
    write_json,
)
from true_kd.models import STAND_IN
from true_kd.shards import CachedReply, pack_replies, read_keys, unpack_replies
from true_kd.targets import TeacherHead

FORMAT = 2
"""Version of what the files mean; part of the identity, so that old files are never misread."""

VARIABLE = "TRUE_KD_CACHE"
"""Environment variable: the folder that holds all caches."""

IDENTITY = "identity.json"
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
ABOUT = "about.json"
"""For people, and believed by nothing: what the teacher is called, and since when the cache is here."""


@dataclass(frozen=True)
class CacheIdentity:
    """Everything that changes the targets of given tokens, and nothing else."""

    facts: Mapping[str, Any]
    about: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What is written to ABOUT: no part of the key."""

    @property
    def key(self) -> str:
        """SHA-256 of the facts and the format version."""
        return digest_json({"format": FORMAT, **self.facts})

    @property
    def folder_name(self) -> str:
        """Name of the cache's folder."""
        return self.key[:16]


def reply_key(prompt: Iterable[int], response: Iterable[int] | None, sampling: Mapping[str, Any] | None = None) -> str:
    """The key of a reply: the digest of the tokens that the teacher is given, and of how it draws what it adds."""
    given = [list(prompt), None if response is None else list(response)]
    return digest_json(given if response is not None else [*given, dict(sampling or {})])[:32]


def default_root() -> Path:
    """`$TRUE_KD_CACHE`, or `true-kd` in the platform's cache folder."""
    if chosen := os.environ.get(VARIABLE):
        return expand(chosen, f"${VARIABLE}")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "true-kd"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "true-kd"


@dataclass(frozen=True)
class StoredFile:
    """One line of a manifest."""

    name: str
    sha256: str
    replies: int
    tokens: int

    @property
    def line(self) -> bytes:
        """The line, its end included."""
        values = (self.name, self.sha256, self.replies, self.tokens)
        return json.dumps(dict(zip(_LINE, values, strict=True))).encode() + b"\n"


_LINE: Mapping[str, type] = {"file": str, "sha256": str, "replies": int, "tokens": int}
SHARD = re.compile(r"[0-9a-f]{16}\.safetensors")
"""Names of shards."""


def is_stored(name: str) -> bool:
    """Whether a manifest may name this file: no other is ever read or written because it does."""
    return name in (HEAD, TEACHER) or any(kind.fullmatch(name) for kind in (SHARD, DEMAND, SIZE))


def parse_line(line: bytes) -> StoredFile | None:
    """A line of a manifest; None for one that a kill cut short, or that says nothing of a cache's file."""
    try:
        record = json.loads(line)
        values = [record[name] for name in _LINE]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not all(type(value) is kind for value, kind in zip(values, _LINE.values(), strict=True)):
        return None
    file = StoredFile(*values)
    counted = 0 <= file.replies < 2**53 and 0 <= file.tokens < 2**53
    return file if is_stored(file.name) and counted and re.fullmatch(r"[0-9a-f]{64}", file.sha256) else None


def read_manifest(folder: Path) -> dict[str, StoredFile]:
    """The files of a cache by name; lines that a kill cut short, or that mean nothing, are passed over."""
    path = folder / MANIFEST
    files: dict[str, StoredFile] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return files
    except OSError as error:
        raise CacheError(f"{path}: cannot be read ({error.strerror}), expected a manifest. Check it.") from error
    for line in lines:
        if file := parse_line(line):
            # Of two lines with one file the later counts, also in the order of files.
            files.pop(file.name, None)
            files[file.name] = file
    return files


class TargetCache:
    """The cached replies of one teacher identity. Opening it reads the manifest and the keys; replies when asked."""

    def __init__(self, root: Path, identity: CacheIdentity) -> None:
        self.identity = identity
        self.folder = root / identity.folder_name
        self._files: dict[str, StoredFile] = {}
        self._where: dict[str, list[str]] = {}
        self._whole: dict[StoredFile, bool] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def refresh(self) -> None:
        """See what other processes have added, or mended."""
        self._whole = {file: True for file, whole in self._whole.items() if whole}
        known, self._files = self._files, read_manifest(self.folder)
        for name, file in self._files.items():
            if SHARD.fullmatch(name) and (known.get(name) != file or file not in self._whole):
                self._locate(name, read_keys(self.folder / name))

    def read(self, keys: Iterable[str], head: TeacherHead | None = None) -> dict[str, CachedReply]:
        """The replies of `keys`, each of which must be present; `head` reads targets that are hidden states.

        Raises
        ------
        CacheError
            when a shard was damaged or removed since it was found whole.
        """
        wanted: dict[str, list[str]] = {}
        for key in keys:
            wanted.setdefault(self._find(key) or self._where[key][-1], []).append(key)
        found: dict[str, CachedReply] = {}
        for name, members in wanted.items():
            path = self.folder / name
            try:
                content = np.memmap(path, dtype=np.uint8, mode="r")
                if hashlib.sha256(content).hexdigest() != self._files[name].sha256:
                    raise ValueError("its digest is not the manifest's")
                found.update(unpack_replies(content, members, head))
            except (OSError, KeyError, ValueError, TypeError) as error:
                raise CacheError(f"{path}: damaged or gone ({error}). Run again: it will be captured anew.") from error
        with contextlib.suppress(OSError):
            # When it was last used, for `true-kd cache prune`; a read-only disk has to do without.
            os.utime(self.folder / MANIFEST)
        return found

    def add(self, replies: Mapping[str, CachedReply]) -> None:
        """Write replies as one shard; they are in the cache when this returns, or not at all.

        It is named by its content, so that two processes with the same replies never write over each other's.
        """
        tokens = sum(len(reply.tokens) for reply in replies.values())
        payload = pack_replies(replies)
        name = f"{hashlib.sha256(payload).hexdigest()[:16]}.safetensors"
        self.add_file(name, len(replies), tokens, lambda path: path.write_bytes(payload))
        self._locate(name, replies)

    def stored_tokens(self, keys: Iterable[str]) -> int:
        """Response tokens in the shards that hold `keys`, those of other replies included."""
        return sum(self._files[shard].tokens for shard in {self._find(key) for key in keys} if shard)

    def count_tokens(self, keys: Iterable[str]) -> int:
        """Response tokens of the replies of `keys`."""
        return sum(len(reply.tokens) for reply in self.read(keys).values())

    def add_head(self, write: Callable[[Path], None]) -> None:
        """Keep the teacher's output head, which `write` saves, beside the hidden states that it reads."""
        self.keep(HEAD, write)

    @property
    def head_path(self) -> Path | None:
        """The stored output head; None where there is none, or it is damaged."""
        return self.path_of(HEAD)

    def keep(self, name: str, write: Callable[[Path], Any]) -> None:
        """Let `write` fill a file that holds no replies, unless it is there and whole."""
        if self.path_of(name) is None:
            self.add_file(name, 0, 0, write)

    def path_of(self, name: str) -> Path | None:
        """A file of the cache; None where there is none, or it is damaged."""
        return self.folder / name if name in self._files and self._is_whole(name) else None

    def names(self, kind: re.Pattern[str]) -> list[str]:
        """The files of the cache whose names are of a kind."""
        return [name for name in self._files if kind.fullmatch(name)]

    def size(self, keys: Iterable[str]) -> int:
        """Bytes of the shards that hold `keys`, whole files."""
        shards = {self._find(key) for key in keys}
        return sum((self.folder / shard).stat().st_size for shard in shards if shard)

    def add_file(self, name: str, replies: int, tokens: int, write: Callable[[Path], Any]) -> None:
        """Let `write` fill a file of the cache; it is in the cache when this returns, or not at all."""
        path = self.folder / name
        make_folder(self.folder)
        with FileLock(self.folder / LOCK):
            if not (self.folder / IDENTITY).exists():
                write_json(self.folder / IDENTITY, {"format": FORMAT, **self.identity.facts})
            if not (self.folder / ABOUT).exists():
                created = datetime.now(UTC).isoformat(timespec="seconds")
                write_json(self.folder / ABOUT, {"created": created, **self.identity.about})
            write_atomic(path, write)
            file = StoredFile(name, digest_file(path), replies, tokens)
            try:
                with (self.folder / MANIFEST).open("a+b") as manifest:
                    # A kill may have left half a line; a line of its own keeps it from spoiling this one.
                    if manifest.tell() and not _ends_line(manifest):
                        manifest.write(b"\n")
                    manifest.write(file.line)
                    manifest.flush()
                    os.fsync(manifest.fileno())
                sync_folder(self.folder)
            except OSError as error:
                raise CannotWrite(self.folder / MANIFEST, error) from error
        self._files[name] = file
        self._whole[file] = True

    def _locate(self, name: str, keys: Iterable[str]) -> None:
        """Note that a shard holds the replies of `keys`."""
        for key in keys:
            shards = self._where.setdefault(key, [])
            if name in shards:
                shards.remove(name)
            shards.append(name)

    def _find(self, key: str) -> str | None:
        """The shard that holds a reply: of several the last that is whole."""
        return next((name for name in reversed(self._where.get(key, ())) if self._is_whole(name)), None)

    def _is_whole(self, name: str) -> bool:
        file, path = self._files.get(name), self.folder / name
        if file is None:
            return False
        if file not in self._whole:
            self._whole[file] = path.is_file() and digest_file(path) == file.sha256
        return self._whole[file]


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
