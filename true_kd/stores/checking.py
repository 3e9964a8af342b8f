"""Whether a cache is whole: every file by its digest, and every shard by unpacking it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import Timeout
from safetensors import safe_open

from true_kd.errors import EnvironmentProblem, TrueKDError
from true_kd.files import TEMPORARY, open_plain, read_record
from true_kd.manifest import DEMAND, HEAD, MANIFEST, SIZE, TEACHER, StoredFile, take_lock, write_manifest
from true_kd.models import load_head, read_stand_in
from true_kd.shards import CachedReply, read_keys, unpack_replies
from true_kd.sizes import read_size
from true_kd.stores.reading import Store, brief, read_store, settings_of
from true_kd.targets import SparseTargets, TeacherHead

_PATIENCE = 30.0
"""Seconds to wait for a cache's lock, which a run holds while it writes one file."""


class StoreBusy(TrueKDError):
    """Another process is writing in a folder. Exit code 3."""

    exit_code = 3

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder}: another process is writing in it, expected none. Try again when that is done.")


class CannotRemove(EnvironmentProblem):
    """A file of a cache cannot be removed."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: cannot be removed ({error.strerror}). Check its permissions.")


@dataclass(frozen=True)
class Finding:
    """The state of one file of a cache."""

    file: str
    state: Literal["whole", "damaged", "missing", "stray"]
    reason: str = ""
    replies: int = 0
    """How many it holds, or should."""

    @property
    def is_damage(self) -> bool:
        """Whether something was lost."""
        return self.state in ("damaged", "missing")


def verify(store: Store, deep: bool = True) -> Iterator[Finding]:
    """Check every file of a cache against its digest and, when `deep`, that it unpacks to what it should hold."""
    for file in store.files.values():
        yield check_file(store.folder, file, store.identity, deep)
    if store.spoiled:
        what = "1 line was" if store.spoiled == 1 else f"{store.spoiled:,} lines were"
        yield Finding(MANIFEST, "damaged", f"{what} changed")
    if store.settings.get("kind") == "hidden" and store.shards and HEAD not in store.files:
        yield Finding(HEAD, "missing", "not in the manifest")
    for name in store.stray:
        yield Finding(name, "stray", "a temporary file" if name.startswith(TEMPORARY) else "not in the manifest")


def check_file(folder: Path, file: StoredFile, identity: Mapping[str, Any], deep: bool = True) -> Finding:
    """Check one file of a folder against its line of the manifest and, when `deep`, the identity of the cache."""
    path = folder / file.name
    try:
        with open_plain(path) as opened:
            # Read and not mapped: a bad block of the disk is an error then, where it would end the process.
            if hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
                raise ValueError("its digest is not the manifest's")
            content = np.memmap(opened, dtype=np.uint8, mode="r")
        if deep and file.name == HEAD:
            _check_head(path)
        elif deep and file.name == TEACHER:
            _check_teacher(path, identity)
        elif deep and DEMAND.fullmatch(file.name):
            _check_demand(path)
        elif deep and SIZE.fullmatch(file.name):
            read_size(path)
        elif deep:
            _check_shard(path, content, file, settings_of(identity))
    except FileNotFoundError:
        return Finding(file.name, "missing", "no such file", file.replies)
    except TrueKDError:
        raise
    except MemoryError as error:
        # It says nothing of the file, unless that is forged.
        raise EnvironmentProblem(f"{path}: too large for this machine's memory, expected it to fit.") from error
    except Exception as error:  # noqa: BLE001 - a stranger's file may be wrong in any way
        return Finding(file.name, "damaged", brief(error), file.replies)
    return Finding(file.name, "whole", "", file.replies)


def drop_damaged(store: Store, findings: Iterable[Finding]) -> tuple[str, ...]:
    """Remove damaged files and lines, and the lines of missing files, so that their replies are captured again.

    Returns
    -------
    tuple
        the names that are gone; not among them is a file that was written anew since it was found damaged.
    """
    with hold(store.folder):
        current = read_store(store.folder)
        files = current.files
        gone = [
            finding.file
            for finding in findings
            if finding.is_damage and finding.file in files
            if check_file(store.folder, files[finding.file], store.identity).is_damage
        ]
        if gone or current.spoiled:
            write_manifest(store.folder, store.key, (file for name, file in files.items() if name not in gone))
        for name in gone:
            remove(store.folder / name)
    return (*gone, *([MANIFEST] if current.spoiled else []))


@contextlib.contextmanager
def hold(folder: Path, patience: float | None = None) -> Iterator[None]:
    """The lock of a folder, which whoever writes in it holds.

    Raises
    ------
    StoreBusy
        when another process still holds it after `patience` seconds.
    """
    try:
        lock = take_lock(folder, _PATIENCE if patience is None else patience)
    except Timeout as error:
        raise StoreBusy(folder) from error
    with lock:
        yield


def remove(path: Path) -> None:
    """Remove a file; none is fine."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CannotRemove(path, error) from error


def _check_head(path: Path) -> None:
    load_head(path)


def _check_teacher(path: Path, identity: Mapping[str, Any]) -> None:
    if read_stand_in(path).digest != identity.get("teacher"):
        raise ValueError("another teacher than the identity's")


def _check_demand(path: Path) -> None:
    record = read_record(path, 2**16) or {}
    numbers = [*record["entries"], record["reply_tokens"], record["tokens"]]
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in numbers):
        raise ValueError("not what a budget is measured to need")


def _check_shard(path: Path, content: np.ndarray, file: StoredFile, settings: Mapping[str, Any]) -> None:
    """Unpack all replies. The numbers are bounded first, so that a forged shard cannot ask for all memory."""
    with safe_open(path, framework="np") as opened:
        layout = json.loads((opened.metadata() or {})["layout"])
    if (layout["replies"], layout["tokens"]) != (file.replies, file.tokens):
        raise ValueError("other replies than the manifest says")
    bits = 8 * len(content)
    bounds = {"replies": (1, bits), "tokens": (1, bits), "rows": (0, bits), "vocab_size": (1, 2**25)}
    bounds |= dict.fromkeys((name for name in layout if name.endswith("_bits")), (1, 32))
    for name, (least, most) in bounds.items():
        value = layout.get(name, least)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{name} out of bounds")
    for name in ("kind", "threshold", "draw_temperature"):
        if name in layout and layout[name] != settings.get(name):
            raise ValueError(f"{name} is not that of the cache")
    keys = read_keys(path)
    if len(keys) != file.replies or len(set(keys)) != file.replies:
        raise ValueError(f"{len(set(keys))} keys for {file.replies} replies")
    for reply in unpack_replies(content, keys, TeacherHead(lambda states: states)).values():
        _check_reply(reply)


def _check_reply(reply: CachedReply) -> None:
    targets = reply.targets
    if len(reply.tokens) == 0 or len(targets) != len(reply.kept):
        raise ValueError("targets of other tokens")
    if isinstance(targets, SparseTargets):
        parts = {len(part) for part in (targets.ids, targets.logprob_codes, targets.exact)}
        if parts != {int(targets.offsets[-1])} or not (np.diff(targets.offsets) > 0).all():
            raise ValueError("rows of other lengths")
        if max(targets.ids.max(initial=0), reply.tokens.max()) >= targets.vocab_size:
            raise ValueError("an id outside the vocabulary")
    elif targets.states.ndim != 2:
        raise ValueError("states of another shape")
