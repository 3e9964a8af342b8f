"""One process at a time: locks on files that end with the process that holds them, and say who that is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from true_kd.errors import LockedError
from true_kd.files import CannotWrite


class Lock:
    """A lock on a file beside what it guards; `<file>.json` says who holds it. A dead holder holds nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._about = path.with_name(f"{path.name}.json")
        self._lock = FileLock(path)

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._lock.is_locked

    @property
    def holder(self) -> str:
        """Who holds it, for messages."""
        try:
            told = json.loads(self._about.read_text(encoding="utf-8"))
            where = "" if told["host"] == socket.gethostname() else f" on {told['host']}"
            return f"`{told['command']}` (process {told['pid']}{where}, since {told['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another true-kd run"

    def acquire(self, patience: float = 0.0) -> bool:
        """Take it, in so many seconds at most (negative: however long it takes); returns whether it was taken."""
        try:
            self._lock.acquire(timeout=patience)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            raise CannotWrite(self.path, error) from error
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        about = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
        with contextlib.suppress(OSError):  # it is for people only
            # Anew, as a link in its place would lead elsewhere.
            self._about.unlink(missing_ok=True)
            with self._about.open("x", encoding="utf-8") as file:
                file.write(json.dumps(about))
        return True

    def try_out(self) -> bool:
        """Whether it could be taken: it is, and given back at once."""
        try:
            with FileLock(self.path, timeout=0):
                return True
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            raise CannotWrite(self.path, error) from error

    def release(self) -> None:
        """Give it back, where it is held; where nobody holds it, remove what a dead holder has left."""
        if not self.is_held and not (self._about.exists() and self.acquire()):
            return
        with contextlib.suppress(OSError):
            self._about.unlink(missing_ok=True)
        self._lock.release()


@contextlib.contextmanager
def hold(path: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of that file's folder.

    Raises
    ------
    LockedError
        when another process has it for longer than `patience` seconds.
    """
    lock = Lock(path)
    if not lock.acquire(patience):
        raise LockedError(path.parent, lock.holder)
    try:
        yield
    finally:
        lock.release()


def check_free(path: Path) -> None:
    """Raise `LockedError` where another process holds the lock of that file; makes nothing."""
    lock = Lock(path)
    if path.is_file() and not lock.try_out():
        raise LockedError(path.parent, lock.holder)
