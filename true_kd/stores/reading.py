"""Reads cache folders without trust: who they are, what their manifest names, how large they are."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from true_kd.cache import ABOUT, FORMAT, IDENTITY, LOCK, MANIFEST, SHARD, StoredFile, is_stored, read_manifest
from true_kd.errors import CacheError, EnvironmentProblem, InputError
from true_kd.files import TEMPORARY, digest_json
from true_kd.suggest import printable, quote

_NAME = re.compile(r"[0-9a-f]{16}")
_KNOWN = {IDENTITY, MANIFEST, ABOUT, LOCK, ".DS_Store"}
_MOST_JSON = 2**20
MOST_MANIFEST = 2**28
"""Bytes of a manifest: a million lines and more."""


class CannotRead(EnvironmentProblem):
    """A file or folder cannot be read, which says nothing of what it holds."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: cannot be read ({error.strerror}). Check its permissions and the disk.")


@dataclass(frozen=True)
class Store:
    """A cache as it lay on disk when it was looked at."""

    folder: Path
    identity: Mapping[str, Any]
    """What identity.json holds: `format`, and the facts."""
    files: Mapping[str, StoredFile]
    """The manifest, by name; empty where the format is another version's."""
    sizes: Mapping[str, int]
    """Bytes of the plain files that are there and have names of true-kd."""
    others: tuple[str, ...]
    """What else is in the folder."""
    teacher: str
    """Its name, or the start of its digest."""
    created: str | None
    """ISO 8601, as about.json has it."""
    last_used: float
    """When replies were last read or added, seconds since 1970."""

    @property
    def key(self) -> str:
        """The 16 digits that name the cache."""
        return self.folder.name

    @property
    def format(self) -> int:
        """Version of what the files mean."""
        return self.identity["format"]

    @property
    def is_current(self) -> bool:
        """Whether this version of true-kd reads the cache."""
        return self.format == FORMAT

    @property
    def settings(self) -> Mapping[str, Any]:
        """How much of the teacher's distribution is kept: `TargetSettings`, as far as the identity has them."""
        return settings_of(self.identity)

    @property
    def shards(self) -> list[StoredFile]:
        """The manifest's files that hold replies."""
        return [file for file in self.files.values() if SHARD.fullmatch(file.name)]

    @property
    def replies(self) -> int:
        """Replies, as the manifest counts them."""
        return sum(file.replies for file in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of those replies."""
        return sum(file.tokens for file in self.shards)

    @property
    def bytes(self) -> int:
        """Size on disk: all files of the cache, the teacher's and strays included."""
        return sum(self.sizes.values())

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of the shards over their tokens; None where there are none."""
        return sum(self.sizes.get(file.name, 0) for file in self.shards) / self.tokens if self.tokens else None

    @property
    def stray(self) -> tuple[str, ...]:
        """What kills have left behind: temporary files, and shards that never got their line in the manifest."""
        # What another version's manifest names is not known.
        unlisted = {name for name in self.sizes if SHARD.fullmatch(name)} - set(self.files) if self.is_current else ()
        return tuple(sorted(name for name in self.sizes if name.startswith(TEMPORARY) or name in unlisted))


@dataclass(frozen=True)
class Scan:
    """The caches of a root, and the folders that have a cache's name but are none."""

    root: Path
    stores: tuple[Store, ...]
    """The last used first."""
    refused: Mapping[str, str]
    """Why, by name of the folder."""


def scan(root: Path) -> Scan:
    """Look at everything in a root; a root that does not exist holds nothing.

    Raises
    ------
    InputError
        when it is no folder.
    """
    if root.exists() and not root.is_dir():
        raise InputError(f"{root}: a file, expected the folder of the caches. Give another --cache.")
    stores, refused = [], {}
    for name in filter(is_key, names_in(root) if root.exists() else ()):
        try:
            stores.append(read_store(root / name))
        except CacheError as error:
            # A kill before the first file leaves a folder with nothing but its lock.
            if any(os.path.lexists(root / name / file) for file in (IDENTITY, MANIFEST)):
                refused[name] = str(error)
    stores.sort(key=lambda store: (-store.last_used, store.key))
    return Scan(root, tuple(stores), refused)


def find(root: Path, prefix: str) -> Store:
    """The cache whose key begins with `prefix`, as no other's does.

    Raises
    ------
    InputError
        with the candidates, when there is none or more than one.
    CacheError
        when there is such a folder, and it is not a cache.
    """
    found = scan(root)
    matching = [store.key for store in found.stores if prefix and store.key.startswith(prefix.lower())]
    candidates = sorted(matching or [store.key for store in found.stores])
    listed = ", ".join(candidates[:8]) + (f" and {len(candidates) - 8} more" if len(candidates) > 8 else "")
    if len(matching) == 1:
        return next(store for store in found.stores if store.key == matching[0])
    if matching:
        raise InputError(f"cache {quote(prefix)}: {len(matching)} keys begin so, expected one: {listed}. Add digits.")
    if refused := [why for name, why in found.refused.items() if prefix and name.startswith(prefix.lower())]:
        raise CacheError(refused[0])
    there = f"the start of one of {listed}" if candidates else "a folder with caches"
    raise InputError(f"cache {quote(prefix)}: no such key in {root}, expected {there}. See `true-kd cache ls`.")


def read_store(folder: Path) -> Store:
    """Read a cache's folder: identity, manifest and sizes, nothing of the shards.

    Raises
    ------
    CacheError
        when the folder is not a cache's.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise CacheError(f"{folder}: a link or a file, expected a cache's folder. true-kd leaves it alone.")
    sizes, others, last_used = _list_files(folder)
    if MANIFEST in others:
        raise CacheError(f"{folder / MANIFEST}: a link or a folder, expected a file. true-kd leaves it alone.")
    identity = read_identity(folder)
    digest = digest_json(identity)[: len(folder.name)]
    if digest != folder.name:
        raise CacheError(
            f"{folder / IDENTITY}: its digest begins with {digest}, expected the folder's name: it was changed, or is "
            "none. true-kd leaves it alone."
        )
    about = read_about(folder)
    return Store(
        folder=folder,
        identity=identity,
        files=_read_files(folder) if identity["format"] == FORMAT and MANIFEST in sizes else {},
        sizes=sizes,
        others=others,
        teacher=about.get("teacher") or printable(str(identity.get("teacher")))[:12],
        created=about.get("created"),
        last_used=last_used,
    )


def read_identity(folder: Path) -> dict[str, Any]:
    """What identity.json of a folder holds: `format`, a number, and the facts.

    Raises
    ------
    CacheError
        when there is none, or it cannot be one.
    """
    path = folder / IDENTITY
    try:
        identity = _read_json(path)
        if not isinstance(identity, dict) or type(identity.get("format")) is not int:
            raise ValueError("no object with a format")
        digest_json(identity)
    except FileNotFoundError as error:
        raise CacheError(f"{folder}: no {IDENTITY}, expected a cache's folder. true-kd leaves it alone.") from error
    except (ValueError, RecursionError) as error:
        raise CacheError(
            f"{path}: not an identity ({brief(error)}), expected what true-kd writes. true-kd leaves it alone."
        ) from error
    return identity


def settings_of(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the targets in an identity; empty where it has none."""
    found = identity.get("targets")
    return found if isinstance(found, dict) else {}


def read_about(folder: Path) -> dict[str, str]:
    """`teacher` and `created` of about.json as far as they are there, fit to be shown; nothing depends on them."""
    shown = {}
    try:
        about = _read_json(folder / ABOUT)
        if isinstance(about.get("teacher"), str):
            shown["teacher"] = printable(" ".join(about["teacher"].split())[:200])
        shown["created"] = datetime.fromisoformat(about["created"]).isoformat(timespec="seconds")
    except (FileNotFoundError, CannotRead, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        pass
    return shown


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file to read it; a link, a pipe or a device is refused at once.

    Raises
    ------
    ValueError
        when it is no plain file.
    FileNotFoundError, CannotRead
        when it is not there, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EOPNOTSUPP):
            raise ValueError("a link or a socket, expected a plain file") from error
        raise CannotRead(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("a folder, a pipe or a device, expected a plain file")
    return os.fdopen(descriptor, "rb")


def read_plain(path: Path, most: int) -> bytes:
    """The content of a plain file; see `open_plain`, and a ValueError for one of more than `most` bytes."""
    with open_plain(path) as file:
        try:
            content = file.read(most + 1)
        except OSError as error:
            raise CannotRead(path, error) from error
    if len(content) > most:
        raise ValueError(f"larger than {most // 2**20} MiB")
    return content


def names_in(folder: Path) -> list[str]:
    """The names of all that is in a folder, sorted."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CannotRead(folder, error) from error


def brief(error: Exception) -> str:
    """An error of a library on one short line."""
    return printable(" ".join(str(error).split()))[:100] or type(error).__name__


def is_key(name: str) -> bool:
    """Whether a folder of this name may be a cache."""
    return _NAME.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether true-kd gives files this name."""
    return name in _KNOWN or is_stored(name) or name.startswith(TEMPORARY)


def _list_files(folder: Path) -> tuple[dict[str, int], tuple[str, ...], float]:
    """Sizes of the plain files with true-kd's names, all other names, and when the cache was last used."""
    sizes, others, used = {}, [], 0.0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if is_ours(entry.name) and stat.S_ISREG(status.st_mode):
                        sizes[entry.name] = status.st_size
                    else:
                        others.append(entry.name)
                    if entry.name in (MANIFEST, IDENTITY):
                        used = max(used, status.st_mtime)
    except OSError as error:
        raise CannotRead(folder, error) from error
    # Up to the year 9892, whatever the disk says: what `datetime` can tell.
    return sizes, tuple(sorted(others)), min(used, 250e9)


def _read_files(folder: Path) -> dict[str, StoredFile]:
    try:
        if (folder / MANIFEST).stat().st_size > MOST_MANIFEST:
            raise CacheError(
                f"{folder / MANIFEST}: larger than 256 MiB, expected a line a file. true-kd leaves it alone."
            )
        return read_manifest(folder)
    except OSError as error:
        raise CannotRead(folder / MANIFEST, error) from error


def _read_json(path: Path) -> Any:
    return json.loads(read_plain(path, _MOST_JSON))
