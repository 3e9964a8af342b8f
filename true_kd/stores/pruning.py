"""What can go: whole caches by age, size or name, and what kills have left behind in the others."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from true_kd.cache import IDENTITY
from true_kd.errors import CacheError, InputError
from true_kd.manifest import LOCK, MANIFEST
from true_kd.stores.checking import hold, remove
from true_kd.stores.reading import Store, read_store
from true_kd.suggest import quote


@dataclass(frozen=True)
class Pruning:
    """What would be removed, or was."""

    stores: tuple[Store, ...]
    """Whole caches."""
    strays: Mapping[Path, int]
    """Bytes of what kills have left behind in other caches."""

    @property
    def bytes(self) -> int:
        """What this frees."""
        return sum(store.bytes for store in self.stores) + sum(self.strays.values())


def plan_pruning(
    stores: Sequence[Store],
    named: Sequence[Store] | None = None,
    older_than: float | None = None,
    keep_bytes: int | None = None,
) -> Pruning:
    """Choose what can go; nothing is removed.

    Parameters
    ----------
    stores
        all caches of a root.
    named
        the caches that may go, None for all. Named ones go as they are, unless one of the rules below is given.
    older_than
        seconds since a cache was last used, from which on it goes.
    keep_bytes
        what all that stay may have together: the last used first, each stays that still fits, and the others go.
    """
    now = time.time()
    candidates = stores if named is None else named
    going = {store.key for store in candidates if older_than is not None and now - store.last_used >= older_than}
    if named is not None and older_than is None and keep_bytes is None:
        going = {store.key for store in named}
    if keep_bytes is not None:
        may_go = {store.key for store in candidates}
        kept = sum(_solid(store) for store in stores if store.key not in may_go)
        for store in sorted(candidates, key=lambda store: -store.last_used):
            if store.key not in going and kept + _solid(store) <= keep_bytes:
                kept += _solid(store)
            else:
                going.add(store.key)
    strays = {
        store.folder / name: store.sizes[name] for store in candidates if store.key not in going for name in store.stray
    }
    return Pruning(tuple(store for store in stores if store.key in going), strays)


def prune(plan: Pruning) -> Pruning:
    """Remove what a plan names, unless it was used since; returns what was removed."""
    stores = tuple(store for store in plan.stores if _remove_store(store))
    strays: dict[Path, int] = {}
    for folder in dict.fromkeys(path.parent for path in plan.strays):
        with hold(folder):
            # Who holds the lock is the only writer: what is temporary now will never get its name.
            current = read_store(folder).stray
            for path, size in plan.strays.items():
                if path.parent == folder and path.name in current:
                    remove(path)
                    strays[path] = size
    return Pruning(stores, strays)


def parse_age(text: str) -> float:
    """Seconds of an age such as 30d, 12h or 2w."""
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([mhdw])\s*", text, re.ASCII)
    if not match:
        raise InputError(f"age {quote(text)}: expected minutes, hours, days or weeks. Write it like 30d, 12h or 2w.")
    return float(match[1]) * {"m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]


def parse_size(text: str) -> int:
    """Bytes of a size such as 10GB, of 10^9 bytes each, or 10GiB."""
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*(?:([kmgt])(i?))?b\s*", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise InputError(f"size {quote(text)}: expected kB, MB, GB or TB. Write it like 500MB or 10GB.")
    return math.floor(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index((match[2] or " ").lower()))


def _solid(store: Store) -> int:
    """Bytes of a cache without its strays, which go anyway."""
    return store.bytes - sum(store.sizes[name] for name in store.stray)


def _remove_store(store: Store) -> bool:
    with hold(store.folder):
        try:
            current = read_store(store.folder)
        except CacheError:
            return False
        if current.last_used != store.last_used:
            return False
        # Without its manifest a cache holds nothing, without its identity it is none: a kill in between does no harm.
        last = (IDENTITY, LOCK)
        for name in (MANIFEST, *(name for name in current.sizes if name not in (MANIFEST, *last)), *last):
            remove(store.folder / name)
        with contextlib.suppress(OSError):
            # Files of others keep the folder.
            store.folder.rmdir()
    return True
