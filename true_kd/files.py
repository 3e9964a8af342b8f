"""Writes files so that a reader sees the old content or the new, never a part.

Content goes to a temporary name in the same folder, is flushed to the disk, and takes its final name in one rename.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from true_kd.errors import EnvironmentProblem, InputError
from true_kd.suggest import quote

TEMPORARY = ".tmp-"
"""How the names of files begin that have not got their own yet; where nobody writes, a kill has left them."""


class CannotWrite(EnvironmentProblem):
    """A file or folder cannot be written: disk full, no permission, read-only, something else in its place."""

    def __init__(self, path: Path, error: Exception) -> None:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        super().__init__(f"{path}: cannot be written ({reason}). Free space, or choose another place, and run again.")


def expand(name: str, what: str) -> Path:
    """The path that a user's `name` stands for, `~` expanded; `what` names the setting in messages.

    Raises
    ------
    InputError
        for a name that no path can have: an unknown user's home, over-long parts, a NUL character.
    """
    try:
        path = Path(name).expanduser()
        if "\0" in name:
            # Path.exists takes it for a path of nothing.
            raise ValueError("embedded null byte")
        path.exists()
    except (RuntimeError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{what} {quote(name)}: not a path ({reason}). Write another.") from error
    return path


def make_folder(folder: Path) -> None:
    """Make a folder and prove that files can be written in it.

    Raises
    ------
    CannotWrite
        where they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CannotWrite(folder, error) from error


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then give it the name `path`.

    The temporary name keeps the suffix of `path`, because `mx.save_safetensors` appends one that it misses.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        raise CannotWrite(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove(path: Path) -> None:
    """Delete a file, or what lies in its place, if it is there."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(path, error) from error


def remove_temporaries(folder: Path) -> None:
    """Delete what a kill has left half written in a folder that nobody else writes."""
    for path in folder.glob(f"{TEMPORARY}*"):
        remove(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
