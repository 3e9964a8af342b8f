"""Work in a process of its own: what dies there takes nothing with it, and its memory returns to the system.

A Metal command that runs out of memory aborts the process, and a system short of memory kills it: neither can be
caught from within. The parent plans, shows and sums up; a child opens models, one phase of one run at a time, and
sends back the events of the generator that it was given. A child ends with its parent, whatever that one dies of.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import IO, Any, TypeVar

from true_kd.errors import EnvironmentProblem, TrueKDError
from true_kd.events import Event
from true_kd.metal import is_watchdog, ran_out_of_memory
from true_kd.models import known_digests
from true_kd.stopping import Stopped, uninterrupted

Result = TypeVar("Result")
Phase = Callable[..., Generator[Event, None, Result]]

_PATIENCE = 60.0
"""Seconds that a child which is asked to stop may take: a step of training and its checkpoint."""


class OutOfMemory(EnvironmentProblem):
    """The process of a phase was killed, most likely because memory ran out."""


class GPUStopped(EnvironmentProblem):
    """macOS stopped the work on the GPU."""


class ProcessDied(TrueKDError):
    """The process of a phase ended without a word of its own."""


DEATHS = (OutOfMemory, GPUStopped, ProcessDied)


def run_apart(phase: Phase, *arguments: Any, what: str, remedy: str) -> Generator[Event, None, Result]:
    """Run a generator in a process of its own: yields what it yields, returns what it returns, raises what it raises.

    Parameters
    ----------
    phase
        a function of a module, with arguments that can be pickled.
    what, remedy
        whose process it is, and what to lower where memory runs out: for the message.

    Raises
    ------
    OutOfMemory, GPUStopped, ProcessDied
        when the process dies.
    """
    child = _Child(phase, arguments)
    try:
        while True:
            try:
                kind, value = child.receive()
            except (EOFError, OSError):
                code, words = child.wait()
                death = _explain(code, words, what, remedy)
                death.add_note(words)
                raise death from None
            if kind == EVENT:
                yield value
            elif kind == RESULT:
                return value
            elif kind == STOPPED:
                raise Stopped(value)
            else:
                raise value
    except (KeyboardInterrupt, GeneratorExit):
        child.ask_to_stop()
        raise
    finally:
        child.close()


@dataclass(frozen=True)
class Task:
    """What a parent sends to a child."""

    phase: Phase
    arguments: tuple[Any, ...]
    digests: Mapping[Any, str]
    """Digests of files that the parent has taken."""
    command: tuple[str, ...]
    """The parent's, by which the locks that the child takes name their holder."""


_BEGIN = (
    "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from true_kd.pipeline.child import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
"""A child finds its modules where its parent finds them, and in the same order."""

EVENT, RESULT, ERROR, STOPPED = "event", "result", "error", "stopped"
"""What a child sends, each with a value."""


class _Child:
    """A process that runs a phase. Its end of the pipes is closed with it."""

    def __init__(self, phase: Phase, arguments: tuple[Any, ...]) -> None:
        down, self._down = _pipe()
        self._up, up = _pipe()
        self._words = _scratch()
        into = self._words or subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _BEGIN, json.dumps(sys.path), str(down.fileno()), str(up.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=into,
                stderr=into,
                pass_fds=(down.fileno(), up.fileno()),
                # Out of reach of the terminal's Ctrl-C: it is the parent that hears it, and asks.
                start_new_session=True,
            )
        except OSError as error:
            raise EnvironmentProblem(
                f"{sys.executable}: cannot be started ({error.strerror}). Close programs."
            ) from error
        finally:
            down.close()
            up.close()
        with contextlib.suppress(OSError):  # one that died at once says so when it is listened to
            self._down.send(Task(phase, arguments, known_digests(), tuple(sys.argv)))

    def receive(self) -> tuple[str, Any]:
        """What it sends next."""
        self._up.poll(None)
        # In one piece: what is left of half a message cannot be read.
        with uninterrupted():
            return self._up.recv()

    def ask_to_stop(self) -> None:
        """Have it write its checkpoint, and wait for its end."""
        with contextlib.suppress(OSError):
            self._process.terminate()
        with contextlib.suppress(EOFError, OSError):
            while self._up.poll(_PATIENCE):
                self._up.recv()

    def wait(self) -> tuple[int, str]:
        """Its exit code, negative for a signal, and the end of what it wrote."""
        code = self._process.wait()
        if self._words is None:
            return code, ""
        self._words.seek(max(0, self._words.seek(0, os.SEEK_END) - _TAIL))
        return code, self._words.read().decode(errors="replace")

    def close(self) -> None:
        """End it, where it has not ended."""
        self._up.close()
        self._down.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSING)
        self._process.kill()
        self._process.wait()
        if self._words is not None:
            self._words.close()


_TAIL = 16_384
_CLOSING = 10.0
"""Seconds in which a process ends whose work is done, or whose pipes are closed."""


def _pipe() -> tuple[Connection, Connection]:
    reading, writing = os.pipe()
    return Connection(reading, writable=False), Connection(writing, readable=False)


def _scratch() -> IO[bytes] | None:
    """Where a child's own words go, which matter when it dies; None where there is no place for them."""
    with contextlib.suppress(OSError):
        return tempfile.TemporaryFile()
    return None


def _explain(code: int, words: str, what: str, remedy: str) -> TrueKDError:
    again = "and run the same command again: it goes on from what was written before."
    if is_watchdog(words):
        return GPUStopped(
            f"{what}: macOS stopped the GPU's work, because it held up the display for too long. Let the display "
            f"sleep, or lower {remedy}, {again}"
        )
    if ran_out_of_memory(words) or code == -signal.SIGKILL:
        how = "Metal ran out of memory" if ran_out_of_memory(words) else "killed by the system (SIGKILL)"
        return OutOfMemory(f"{what}: {how}, most likely for want of memory. Lower {remedy}, {again}")
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    said = next((line for line in lines if "terminating" in line or "Fatal" in line), lines[-1] if lines else "")
    how = f"ended with exit code {code}" if code >= 0 else f"died of {_name(-code)}"
    return ProcessDied(
        f"{what}: its process {how}{f' ({said[:200]})' if said else ''}. Run the same command again: it goes on from "
        "what was written before; should it die again, set TRUE_KD_DEBUG=1 and report it."
    )


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
