"""Writes files so that a reader sees the old content or the new, never a part.

Content goes to a temporary name in the same folder, is flushed to the disk, and takes its final name in one rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from true_kd.errors import EnvironmentProblem, InputError
from true_kd.suggest import in_bytes, quote

TEMPORARY = ".tmp-"
"""How the names of files begin that have not got their own yet; where nobody writes, a kill has left them."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit on files that has no room left."""


class CannotWrite(EnvironmentProblem):
    """A file or folder cannot be written: disk full, no permission, read-only, something else in its place.

    Parameters
    ----------
    need
        bytes that were to be written; None where nobody knows.
    """

    def __init__(self, path: Path, error: Exception, need: int | None = None) -> None:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
        if getattr(error, "errno", None) in FULL:
            reason = f"{reason}: {in_bytes(max(need or 0, 1))} needed, {_free(path)} free"
        super().__init__(
            f"{path}: cannot be written ({reason}). Free space, or choose another place, and run the same command "
            "again: it goes on from what was written before."
        )


class CannotRead(EnvironmentProblem):
    """A file or folder cannot be read, which says nothing of what it holds."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: cannot be read ({error.strerror}). Check its permissions and the disk.")


def _free(path: Path) -> str:
    """Free bytes where a path is or would be."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            return in_bytes(shutil.disk_usage(place).free)
    return "an unknown amount"


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


class Staging:
    """New files of one folder, whole on the disk under temporary names until all of them get their own."""

    def __init__(self, folder: Path, last: str = "") -> None:
        self.folder = folder
        self._last = last
        self._staged: dict[str, Path] = {}

    def write(self, name: str, write: Callable[[Path], Any], need: int | None = None) -> Path:
        """Let `write` fill the file that will be `name`; returns where it lies until then.

        The temporary name keeps the suffix, because `mx.save_safetensors` appends one that it misses.

        Parameters
        ----------
        need
            bytes that it will take, for the message where there is no room.
        """
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=TEMPORARY, suffix=path.suffix)
            os.close(handle)
            self._staged[name] = Path(temporary)
            write(Path(temporary))
            with Path(temporary).open("rb") as file:
                flush(file.fileno())
            Path(temporary).chmod(0o666 & ~_umask())
        except (OSError, RuntimeError) as error:
            raise CannotWrite(path, error, need) from error
        return Path(temporary)

    def write_json(self, name: str, value: Any) -> None:
        """Write indented JSON; NaN and infinity are refused (ValueError)."""
        text = (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
        self.write(name, lambda path: path.write_bytes(text), len(text))

    def commit(self) -> None:
        """Give the files their names, in the order in which they were written."""
        for name, temporary in sorted(self._staged.items(), key=lambda item: item[0] == self._last):
            try:
                os.replace(temporary, self.folder / name)
                del self._staged[name]
            except OSError as error:
                raise CannotWrite(self.folder / name, error) from error
        try:
            sync_folder(self.folder)
        except OSError as error:
            raise CannotWrite(self.folder, error) from error

    def drop(self) -> None:
        """Delete what has not got its name."""
        for temporary in self._staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
        self._staged.clear()


@contextlib.contextmanager
def staging(folder: Path, last: str = "") -> Iterator[Staging]:
    """Files that take their names together when the block ends, and leave nothing behind where it fails.

    `last` takes its name after all others.
    """
    stage = Staging(folder, last)
    try:
        yield stage
        stage.commit()
    finally:
        stage.drop()


def write_atomic(path: Path, write: Callable[[Path], Any], need: int | None = None) -> None:
    """Let `write` fill a temporary file, then give it the name `path`; see `Staging.write`."""
    with staging(path.parent) as stage:
        stage.write(path.name, write, need)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused (ValueError)."""
    with staging(path.parent) as stage:
        stage.write_json(path.name, value)


def write_fleeting(path: Path, text: str) -> None:
    """Replace a file that nobody needs once its writer has ended: whole for readers, but not flushed to the disk.

    Raises
    ------
    OSError
        where that cannot be done.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name.lstrip('.')}")
    # Anew, as a link in its place would lead elsewhere.
    temporary.unlink(missing_ok=True)
    with temporary.open("x", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def save_tensors(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write MLX arrays as safetensors, in place.

    Through a file of Python's, because MLX itself reports a full disk without a reason.
    """
    import mlx.core as mx

    with path.open("wb") as file:
        mx.save_safetensors(file, dict(arrays), metadata=dict(metadata or {}))


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON that bears its own digest, which `read_record` compares."""
    with staging(path.parent) as stage:
        stage.write_json(path.name, {**value, CHECK: digest_json(value)})


def read_record(path: Path, most: int = 2**28) -> dict[str, Any] | None:
    """What `write_record` wrote, of `most` bytes; None where there is nothing.

    Raises
    ------
    ValueError
        when it is not what was written: cut short, changed, or something else.
    """
    try:
        record = json.loads(read_plain(path, most))
    except FileNotFoundError:
        return None
    except (CannotRead, ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read ({getattr(error, 'strerror', None) or 'not JSON'})") from error
    if not isinstance(record, dict) or record.pop(CHECK, None) != digest_json(record):
        raise ValueError(f"{path.name} is not what was written")
    return record


CHECK = "check"
"""The key under which a record bears its own digest: that of its canonical JSON without this key."""


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
            # Not read(most + 1), which takes that much memory first.
            content = file.read() if os.fstat(file.fileno()).st_size <= most else None
        except OSError as error:
            raise CannotRead(path, error) from error
    if content is None or len(content) > most:
        raise ValueError(f"larger than {most / 2**20:.3g} MiB")
    return content


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


def discard(folder: Path) -> None:
    """Delete a folder: at once by name, so that none is ever there in part."""
    try:
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=TEMPORARY))
        os.replace(folder, aside / folder.name)
        shutil.rmtree(aside)
    except OSError as error:
        raise CannotWrite(folder, error) from error


def flush(descriptor: int) -> None:
    """Have an open file's content on the disk itself, not in the drive's memory."""
    if sys.platform == "darwin":
        import fcntl

        # On macOS fsync stops at the drive. Untested on a Mac; network folders refuse it.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


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
