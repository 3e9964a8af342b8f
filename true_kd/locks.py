"""One process at a time: locks on files that end with the process that holds them, and say who that is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from true_kd.errors import LockedError
from true_kd.files import CannotWrite


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, by its own account."""

    pid: int
    host: str
    command: str
    since: str
    """Local time, ISO 8601 with its offset."""

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == socket.gethostname()

    @property
    def may_live(self) -> bool:
        """False where its process is known to be gone; of another machine's nothing is known."""
        return not self.is_here or _lives(self.pid, self.since)

    def __str__(self) -> str:
        where = "" if self.is_here else f" on {self.host}"
        return f"`{self.command}` (process {self.pid}{where}, since {self.since})"


def read_holder(path: Path) -> Holder | None:
    """Who says of itself that it holds the lock on a file; it may be dead. Takes no lock."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(_about(path).read_text(encoding="utf-8"))
        return Holder(int(told["pid"]), str(told["host"]), str(told["command"]), str(told["since"]))
    return None


def _about(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _lives(pid: int, since: str) -> bool:
    """Whether a process of this machine is there, and is not a younger one that got the number of one that is gone."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except OSError:
        return True  # another user's
    # Where there is no /proc, the number alone must do.
    with contextlib.suppress(OSError, ValueError, IndexError):
        stat = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
        up = float((Path("/proc") / "uptime").read_text().split()[0])
        began = time.time() - up + int(stat[19]) / os.sysconf("SC_CLK_TCK")
        return stat[0] != "Z" and began < datetime.fromisoformat(since).timestamp() + _SLACK
    return True


_SLACK = 120.0
"""Seconds by which a clock may have been set back since."""


class Lock:
    """A lock on a file beside what it guards; `<file>.json` says who holds it. A dead holder holds nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._about = _about(path)
        self._lock = FileLock(path)

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._lock.is_locked

    @property
    def holder(self) -> str:
        """Who holds it, for messages."""
        return str(read_holder(self.path) or "another true-kd run")

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
        about = asdict(Holder(os.getpid(), socket.gethostname(), command, since))
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
