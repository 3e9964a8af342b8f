"""The other end of `true_kd.pipeline.apart`: what runs in a child."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from true_kd import stopping
from true_kd.errors import let_go, portable
from true_kd.events import DomainFailed
from true_kd.models import take_over_digests
from true_kd.pipeline.apart import ERROR, EVENT, RESULT, STOPPED


def main(downward: int, upward: int) -> None:
    """Run what the parent sends through one pipe, and send through the other what comes of it."""
    faulthandler.enable()
    down, up = Connection(downward, writable=False), Connection(upward, readable=False)
    try:
        # Whoever stops a whole job signals parent and child, and the parent asks its child besides: that is no second
        # thought. What ends a child at once is the end of its parent.
        stopping.listen(until_done=True)
        task = down.recv()
        sys.argv = list(task.command)
        take_over_digests(task.digests)
        threading.Thread(target=_end_with_parent, args=(down,), daemon=True).start()
        ending = _run(task.phase(*task.arguments), up)
    except stopping.Stopped as stop:
        ending = STOPPED, stop.number
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent is to hear of it
        ending = ERROR, portable(error, let_go(error))
    with contextlib.suppress(OSError), stopping.uninterrupted():
        up.send(ending)


def _run(generator: Any, up: Connection) -> tuple[str, Any]:
    stop = None
    while True:
        try:
            event = generator.throw(stop) if stop else next(generator)
            if isinstance(event, DomainFailed):
                event = replace(event, error=portable(event.error, event.trace))
            with stopping.uninterrupted():
                up.send((EVENT, event))
        except StopIteration as end:
            return RESULT, end.value
        except stopping.Stopped as heard:
            if stop is not None:
                raise
            # Where it was not within the generator that it came, that has its checkpoint to write.
            stop = heard


def _end_with_parent(down: Connection) -> None:
    """The parent sends nothing more: when its end of the pipe closes, it is gone, and its lock with it."""
    with contextlib.suppress(EOFError, OSError):
        down.recv_bytes()
    os._exit(1)
