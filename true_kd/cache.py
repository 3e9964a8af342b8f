"""Teacher targets on disk: content-addressed, verified, shared by domains and runs.

A cache is a folder per teacher identity (weights, tokenizer, how much is kept; see `CacheIdentity`). It holds replies
in shards, as safetensors, and a manifest with one line a file: its name and its SHA-256. The key of a reply is the
digest of the tokens the teacher was given, and of the sampling where it wrote the reply itself, so an edited prompt
misses and every other one hits. A shard exists only when its manifest line is whole, which the line's own check says;
one whose bytes do not match their digest is as if absent, and its replies are captured again. Shards are read by
mapping them into memory. Whoever writes holds the folder's lock.
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

from true_kd.errors import CacheError
from true_kd.files import (
    TEMPORARY,
    CannotRead,
    CannotWrite,
    digest_file,
    digest_json,
    expand,
    open_plain,
    read_plain,
    write_atomic,
    write_json,
)
from true_kd.manifest import (
    HEAD,
    MANIFEST,
    SHARD,
    Manifest,
    StoredFile,
    append_line,
    is_intact,
    left_over,
    load_manifest,
    read_manifest,
    remove_left_over,
    take_lock,
    write_manifest,
)
from true_kd.shards import CachedReply, pack_replies, read_keys, unpack_replies
from true_kd.targets import TeacherHead

FORMAT = 2
"""Version of what the files mean; part of the identity, so that old files are never misread."""

VARIABLE = "TRUE_KD_CACHE"
"""Environment variable: the folder that holds all caches."""

IDENTITY = "identity.json"
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
class Loss:
    """A file of a cache that was damaged or gone, and what it held."""

    file: str
    replies: int


class TargetCache:
    """The cached replies of one teacher identity. Opening it reads the manifest and the keys; replies when asked."""

    def __init__(self, root: Path, identity: CacheIdentity) -> None:
        self.identity = identity
        self.folder = root / identity.folder_name
        self._manifest = Manifest({})
        self._files: Mapping[str, StoredFile] = {}
        self._where: dict[str, list[str]] = {}
        self._whole: dict[StoredFile, bool] = {}
        if self.folder.is_symlink():
            raise CacheError(f"{self.folder}: a link, expected a cache's folder. Remove it, or choose another cache.")
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def refresh(self) -> None:
        """See what other processes have added, or mended."""
        self._whole = {file: True for file, whole in self._whole.items() if whole}
        known, self._manifest = self._files, load_manifest(self.folder)
        self._files = dict(self._manifest.files)
        for name, file in self._files.items():
            if SHARD.fullmatch(name) and (known.get(name) != file or file not in self._whole):
                keys = read_keys(self.folder / name)
                if len(set(keys)) == file.replies:
                    self._locate(name, keys)
                else:
                    self._whole[file] = False

    def read(
        self, keys: Iterable[str], head: TeacherHead | None = None, note_use: bool = True
    ) -> dict[str, CachedReply]:
        """The replies of `keys`, each of which must be present; `head` reads targets that are hidden states.

        `note_use`: leave word of it for `true-kd cache prune`.

        Raises
        ------
        CacheError
            when a shard was damaged or removed since it was found whole.
        """
        wanted: dict[str, list[str]] = {}
        for key in keys:
            name = self._find(key) or next(iter(reversed(self._where.get(key, ()))), None)
            if name is None:
                raise CacheError(f"{self.folder}: a reply is gone, expected all of them. {_AGAIN}")
            wanted.setdefault(name, []).append(key)
        found: dict[str, CachedReply] = {}
        for name, members in wanted.items():
            found.update(self._unpack(name, members, head))
        if note_use:
            with contextlib.suppress(OSError):  # a read-only disk has to do without
                os.utime(self.folder / MANIFEST)
        return found

    def add(self, replies: Mapping[str, CachedReply]) -> None:
        """Write replies as one shard; they are in the cache when this returns, or not at all.

        It is named by its content, so that two processes with the same replies never write over each other's.
        """
        tokens = sum(len(reply.tokens) for reply in replies.values())
        payload = pack_replies(replies)
        name = f"{hashlib.sha256(payload).hexdigest()[:16]}.safetensors"
        self.add_file(name, len(replies), tokens, lambda path: path.write_bytes(payload), len(payload))
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
        try:
            return sum((self.folder / shard).stat().st_size for shard in shards if shard)
        except OSError as error:
            raise CacheError(f"{self.folder}: a shard is gone ({error.strerror}), expected all. {_AGAIN}") from error

    def add_file(
        self, name: str, replies: int, tokens: int, write: Callable[[Path], Any], need: int | None = None
    ) -> None:
        """Let `write` fill a file of the cache, of `need` bytes; it is in the cache when this returns, or not at all.

        Raises
        ------
        CannotWrite
            when the disk takes less than all of it; what is there then is what was there before.
        """
        path, added = self.folder / name, False
        with take_lock(self.folder):
            self._describe()
            try:
                _make_way(path)
                write_atomic(path, write, need)
                file = StoredFile(name, digest_file(path), replies, tokens)
                append_line(self.folder / MANIFEST, file.line(self.folder.name))
                added = True
            except OSError as error:
                raise CannotWrite(path, error) from error
            finally:
                if not added and name not in read_manifest(self.folder):
                    remove_left_over(self.folder, [name])
        self._files = {**self._files, name: file}
        self._whole[file] = True

    def mend(self, lacking: bool) -> list[Loss]:
        """Drop what is damaged from the cache, and what kills have left in its folder, so that nothing is in the way.

        Where the disk cannot be written nothing happens.

        Parameters
        ----------
        lacking
            whether a reply is missing, so that it is worth looking for damage where nobody has looked yet.

        Returns
        -------
        list
            what was lost: not that which a kill has left half written.
        """
        for name in self._files:
            if not SHARD.fullmatch(name):
                self._is_whole(name)
        if lacking:
            self._look_further()
        suspects = {file for file in self._files.values() if self._whole.get(file) is False}
        if not suspects and self._is_tidy():
            return []
        try:
            with take_lock(self.folder):
                losses = self._mend(suspects)
        except CannotWrite:
            return []
        self.refresh()
        return losses

    def _mend(self, suspects: set[StoredFile]) -> list[Loss]:
        """See `mend`; another process may have done it already."""
        there = (self.folder / MANIFEST).exists()
        manifest = load_manifest(self.folder)
        gone = {
            name: file
            for name, file in manifest.files.items()
            if file in suspects and not is_intact(self.folder / name, file.sha256)
        }
        stray = left_over(self.folder, manifest.files)
        unlisted = [name for name in stray if not name.startswith(TEMPORARY)]
        losses = [Loss(name, file.replies) for name, file in gone.items()]
        # A kill leaves one shard without its line; more of them are what a manifest has lost.
        if manifest.spoiled or (unlisted and not there) or len(unlisted) > 1:
            losses.append(Loss(MANIFEST, sum(len(read_keys(self.folder / name)) for name in unlisted)))
        if gone or manifest.spoiled or manifest.unfinished:
            kept = [file for name, file in manifest.files.items() if name not in gone]
            write_manifest(self.folder, self.folder.name, kept)
        remove_left_over(self.folder, [*gone, *stray])
        if there:
            self._describe()
        return losses

    def _is_tidy(self) -> bool:
        """Whether nothing in the folder is in need of mending, as far as can be seen at once."""
        manifest = self._manifest
        if manifest.spoiled or manifest.unfinished or (manifest.files and not self._is_described()):
            return False
        return not left_over(self.folder, self._files)

    def _look_further(self) -> None:
        """Compare digests of shards that nobody has asked for: those of up to a gibibyte, as it takes a second each."""
        left = 2**30
        for name, file in self._files.items():
            if SHARD.fullmatch(name) and file not in self._whole:
                with contextlib.suppress(OSError):
                    left -= (self.folder / name).stat().st_size
                if left < 0:
                    return
                self._is_whole(name)

    def _describe(self) -> None:
        """Have the folder say whose it is, and begin the manifest: where it is gone, it was lost."""
        path = self.folder / IDENTITY
        if not self._is_described():
            _make_way(path)
            write_json(path, {"format": FORMAT, **self.identity.facts})
        if not (self.folder / ABOUT).exists():
            created = datetime.now(UTC).isoformat(timespec="seconds")
            write_json(self.folder / ABOUT, {"created": created, **self.identity.about})
        try:
            (self.folder / MANIFEST).touch()
        except OSError as error:
            raise CannotWrite(self.folder / MANIFEST, error) from error

    def _is_described(self) -> bool:
        try:
            return digest_json(json.loads(read_plain(self.folder / IDENTITY, 2**20))) == self.identity.key
        except (FileNotFoundError, CannotRead, ValueError, RecursionError):
            return False

    def _unpack(self, name: str, keys: Iterable[str], head: TeacherHead | None) -> dict[str, CachedReply]:
        path = self.folder / name
        try:
            with open_plain(path) as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != self._files[name].sha256:
                    raise ValueError("its digest is not the manifest's")
                content = np.memmap(opened, dtype=np.uint8, mode="r")
        except (OSError, KeyError, ValueError) as error:
            raise CacheError(f"{path}: damaged or gone ({error}). {_AGAIN}") from error
        try:
            return unpack_replies(content, keys, head)
        except (KeyError, ValueError, TypeError) as error:
            raise CacheError(
                f"{path}: has its digest and is no shard ({error}), expected one. Run `true-kd cache verify --remove`, "
                "and run again: it will be captured anew."
            ) from error

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
        file = self._files.get(name)
        if file is None:
            return False
        if file not in self._whole:
            self._whole[file] = is_intact(self.folder / name, file.sha256)
        return self._whole[file]


_AGAIN = "Run again: it will be captured anew."


def _make_way(path: Path) -> None:
    """Remove an empty folder from the place of a file; one that holds something is somebody's."""
    with contextlib.suppress(OSError):
        path.rmdir()
