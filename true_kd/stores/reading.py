"""Reads cache folders without trust: who they are, what their manifest names, how large they are."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from true_kd.cache import ABOUT, FORMAT, IDENTITY
from true_kd.errors import CacheError, InputError
from true_kd.files import TEMPORARY, CannotRead, digest_json, read_plain
from true_kd.manifest import LOCK, MANIFEST, SHARD, Manifest, StoredFile, is_stored, load_manifest
from true_kd.suggest import printable, quote

_NAME = re.compile(r"[0-9a-f]{16}")
_KNOWN = {IDENTITY, MANIFEST, ABOUT, LOCK, ".DS_Store"}
_MOST_JSON = 2**20
_LEFT = "The next run with this teacher and these targets mends it; until then true-kd leaves it alone."


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
    spoiled: int = 0
    """Lines of the manifest that were changed since they were written."""

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
            f"none. {_LEFT}"
        )
    about = read_about(folder)
    manifest = load_manifest(folder) if identity["format"] == FORMAT else Manifest({})
    return Store(
        folder=folder,
        identity=identity,
        files=manifest.files,
        spoiled=manifest.spoiled,
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
        raise CacheError(f"{folder}: no {IDENTITY}, expected a cache's folder. {_LEFT}") from error
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{path}: not an identity ({brief(error)}), expected what true-kd writes. {_LEFT}") from error
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


def _read_json(path: Path) -> Any:
    return json.loads(read_plain(path, _MOST_JSON))
