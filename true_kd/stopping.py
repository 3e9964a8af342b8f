"""Ctrl-C and its kin: a run ends at the next place where nothing is lost, and says so; a second one ends it at once.

A first signal raises `Stopped` wherever the program is, but for work that is `uninterrupted`, after which it is raised.
Where Python drops what is raised (in a destructor, say), it is raised again a moment later.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a run to end; SIGHUP comes when its terminal is closed."""

NAMES = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM", "SIGHUP": "the closing of its terminal"}


class Stopped(KeyboardInterrupt):
    """A signal asked the run to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells have it: 130 for Ctrl-C."""
        return exit_code(self.number)

    @property
    def cause(self) -> str:
        """What stopped the run, in words."""
        name = signal.Signals(self.number).name
        return NAMES.get(name, name)


class _Asked:
    """The first signal that came since `listen`, and whether a second one ends the process."""

    number: int | None = None
    is_final: bool = False


def exit_code(number: int) -> int:
    """What a process returns that a signal ended."""
    return 128 + number


def listen(until_done: bool = False) -> None:
    """Have the signals raise `Stopped`, but those that are ignored (nohup); from the main thread, which hears them.

    `until_done`: a second one changes nothing, instead of ending the process at once.
    """
    _Asked.number, _Asked.is_final = None, not until_done
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _hear_dropped


def first() -> Stopped | None:
    """The signal that came, if one did; for places where an exception was turned into another."""
    return None if _Asked.number is None else Stopped(_Asked.number)


def answer(interrupt: KeyboardInterrupt) -> None:
    """What Ctrl-C was to end has ended, and the program goes on; any other signal is raised again."""
    if isinstance(interrupt, Stopped) and interrupt.number != signal.SIGINT:
        raise interrupt
    _Asked.number = None


def _stop(number: int, _: FrameType | None) -> None:
    if _Asked.number is None:
        _Asked.number = number
        raise Stopped(number)
    _leave(number)


def _hear_dropped(dropped: sys.UnraisableHookArgs) -> None:
    """Python's hook for what a destructor raised, which goes nowhere: a signal must not be lost there.

    What else a stop broke off and left half made is no news: only `TRUE_KD_DEBUG` shows it.
    """
    if isinstance(dropped.exc_value, Stopped):
        number = dropped.exc_value.number
        # In here it would be dropped as well. An alarm, not a thread: this may be within any lock of `threading`.
        signal.signal(signal.SIGALRM, lambda *_: _raise_again(number))
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    elif _Asked.number is None or os.environ.get("TRUE_KD_DEBUG") == "1":
        sys.__unraisablehook__(dropped)


def _raise_again(number: int) -> None:
    if _Asked.number is not None:
        _Asked.number = None
        signal.raise_signal(number)  # to whoever hears signals now


def _leave(number: int) -> None:
    """End the process, where that is what a second signal does: what it has on disk is whole at any moment."""
    if _Asked.is_final:
        os._exit(exit_code(number))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Work that a signal does not break off: it is heard at the end. After `listen` a second one ends the process.

    Python hears signals in its main thread alone; elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if waiting or _Asked.number is not None:
            _leave(number)
        waiting.append(number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    # What is not set from Python cannot be set again, and what is ignored stays so.
    held = {number: known for number, known in before.items() if callable(known)}
    for number in held:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, known in held.items():
            signal.signal(number, known)
        if waiting:
            signal.raise_signal(waiting[0])
