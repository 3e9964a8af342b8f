"""Runs of the command line that start in a moment and can be killed: forked from a process that has imported all.

A run costs three seconds of imports and half a second of work; two hundred that are killed are affordable only so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import true_kd.blas
import mlx_lm.generate, mlx_lm.tuner.utils
import true_kd.pipeline, true_kd.console, true_kd.cli.running, true_kd.cli.flags
from true_kd.models.opening import _mlx_lm_utils
_mlx_lm_utils()
held = {}
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if "argv" in asked:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid:
            os.close(reading)
            held[pid] = writing
            print(json.dumps({"pid": pid}), flush=True)
            continue
        os.setsid()
        os.close(writing)
        for known in held.values():
            os.close(known)
        for number, name in ((0, os.devnull), (1, asked["out"]), (2, asked["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666), number)
        os.read(reading, 1)
        os.chdir(asked["cwd"])
        sys.argv = ["true-kd", *asked["argv"]]
        code = 1
        try:
            from true_kd.__main__ import main
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    elif "go" in asked:
        os.write(held[asked["go"]], b"x")
    elif "wait" in asked:
        _, status = os.waitpid(asked["wait"], 0)
        os.close(held.pop(asked["wait"]))
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Negative for a signal."""
    out: str
    err: str
    seconds: float


class Forked:
    """One run."""

    def __init__(self, server: Server, pid: int, out: Path, err: Path) -> None:
        self._server = server
        self.pid = pid
        self._out, self._err = out, err
        self._began = time.perf_counter()

    def go(self) -> None:
        """Let it begin."""
        self._began = time.perf_counter()
        self._server.ask(go=self.pid)

    def said(self) -> str:
        """What it has printed so far."""
        return self._out.read_text() if self._out.exists() else ""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, and waits to be waited for."""
        with contextlib.suppress(OSError):
            return (Path("/proc") / str(self.pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; one that has ended is not there to get it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait for its end."""
        code = self._server.ask(wait=self.pid)["code"]
        seconds = time.perf_counter() - self._began
        return Ended(code, self._out.read_text(), self._err.read_text(), seconds)


class Server:
    """A process with all imports done, which forks runs."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._count = 0
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "MLX_DISABLE_COMPILE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def ask(self, **request: object) -> dict:
        """Send a request; what it answers, but for `go`, which it does not answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return {} if "go" in request else json.loads(self._process.stdout.readline())

    def start(self, *argv: str, cwd: Path) -> Forked:
        """A run of the command line, which waits for `go`."""
        self._count += 1
        out, err = (self._scratch / f"{self._count}.{name}" for name in ("out", "err"))
        pid = self.ask(argv=list(argv), cwd=str(cwd), out=str(out), err=str(err))["pid"]
        return Forked(self, pid, out, err)

    def run(self, *argv: str, cwd: Path) -> Ended:
        """A run that nothing disturbs."""
        run = self.start(*argv, cwd=cwd)
        run.go()
        return run.wait()

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait(timeout=60)


WRITES = ("write", "pwrite64", "writev")
CALLS = (*WRITES, "fsync", "fdatasync", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat")
CALLS = (*CALLS, "rmdir", "ftruncate")
"""System calls by which a run changes what is on a disk."""


@dataclass(frozen=True)
class Call:
    """One system call of a run: its name, its number among those of the name, and the path that it is about."""

    name: str
    number: int
    path: str


def has_strace() -> bool:
    """Whether strace is here and may watch a process."""
    if shutil.which("strace") is None:
        return False
    tried = subprocess.run(["strace", "-f", "-e", "trace=none", "true"], capture_output=True)
    return tried.returncode == 0


@contextlib.contextmanager
def traced(run: Forked, log: Path, *options: str) -> Iterator[None]:
    """Have strace watch a run that has not begun."""
    calls = ",".join(f"?{name}" for name in CALLS)
    command = ["strace", "-f", "-y", "-o", str(log), "-p", str(run.pid), "-e", f"trace={calls}", *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert "attached" in tracer.stderr.readline()
    try:
        yield
    finally:
        tracer.wait(timeout=120)
        tracer.stderr.close()


def calls_of(log: Path, main: int, under: Path) -> list[Call]:
    """The calls of the main thread of a traced run that are about files under a folder."""
    counts: dict[str, int] = {}
    found = []
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\((.*)", line)
        if match is None or int(match[1]) != main:
            continue
        name, rest = match[2], match[3]
        counts[name] = counts.get(name, 0) + 1
        paths = re.findall(r'<(/[^>]*)>|"(/[^"]*)"', rest)
        path = next((each for pair in paths for each in pair if each.startswith(str(under))), None)
        if path is not None:
            found.append(Call(name, counts[name], path))
    return found


def inject(run: Forked, log: Path, call: Call, what: str) -> contextlib.AbstractContextManager[None]:
    """Have strace do something at one call of a run: `signal=SIGKILL`, `error=ENOSPC`."""
    return traced(run, log, "-e", f"inject={call.name}:{what}:when={call.number}")


def snapshot(folder: Path, but: Sequence[str] = ()) -> dict[str, bytes]:
    """The files below a folder by their relative paths."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
