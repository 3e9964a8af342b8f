"""The other terminal's side: who holds an output folder, how far it is, and what is there of each domain.

Files may come, go and change while they are read; each is whole or not there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from true_kd import adapters
from true_kd.checkpoints import RECORD
from true_kd.errors import PromptError
from true_kd.files import CannotRead, read_plain, read_record
from true_kd.locks import Holder, read_holder
from true_kd.prompts import check_domain_name
from true_kd.reporting import Start, read_lines
from true_kd.status.records import FILE, FORMAT, LOCK, DomainStatus, Progress, Running, Status
from true_kd.training import StepMetrics

_MOST = 2**20


def read_status(out: Path) -> Status:
    """What an output folder says of itself; takes no lock."""
    running = next(filter(None, map(_running, (out, *sorted(out.glob(f"{adapters.SWEEP}/*"))))), None)
    progress = running.progress if running is not None and running.folder == str(out) else None
    failed = {} if running is not None else _failures(out)
    domains: dict[str, DomainStatus] = {}
    for name in _names(out, [*progress.waiting, *filter(None, [progress.domain])] if progress else [], failed):
        domains[name] = _domain(out / name, failed.get(name), progress)
    return Status(FORMAT, str(out), running, domains)


def _running(folder: Path) -> Running | None:
    holder = read_holder(folder / LOCK)
    if holder is None or not holder.may_live:
        return None
    progress = _progress(folder / FILE, holder)
    return Running(holder.pid, holder.host, holder.is_here, holder.command, holder.since, str(folder), progress)


def _progress(path: Path, holder: Holder) -> Progress | None:
    """What the holder of a lock has told; what another has left says nothing of it."""
    told = _read(path)
    if (told.get("pid"), told.get("host")) != (holder.pid, holder.host):
        return None
    try:
        return TypeAdapter(Progress).validate_python(told.get("progress"))
    except ValidationError:
        return None


def _names(out: Path, expected: Sequence[str], failed: dict[str, str]) -> list[str]:
    files = (adapters.METRICS, adapters.LINES, adapters.WEIGHTS)
    there = [path.name for path in out.iterdir() if any((path / name).is_file() for name in files)]
    return sorted({*there, *expected, *failed})


def _domain(folder: Path, why: str | None, progress: Progress | None) -> DomainStatus:
    lines = list(read_lines(folder / adapters.LINES))
    steps = [line for line in lines if isinstance(line, StepMetrics)]
    iteration, loss = (steps[-1].iteration, steps[-1].total) if steps else (None, None)
    iters = lines[0].iters if lines and isinstance(lines[0], Start) else None
    places = adapters.checkpoints(folder).items()
    checkpoint = max((at for at, place in places if (place / RECORD).is_file()), default=None)
    finished_at, verdict = _finished(folder)
    says = verdict
    if progress is not None and folder.name == progress.domain:
        state = "running"
    elif progress is not None and folder.name in progress.waiting and finished_at is None and not steps:
        state = "waiting"
    elif why is not None or (progress is not None and folder.name in progress.failed):
        state, says = "failed", why
    elif finished_at is not None:
        state, checkpoint = "finished", None
    else:
        state = "stopped"
    return DomainStatus(state, iteration, iters, checkpoint, loss, finished_at, says)


def _finished(folder: Path) -> tuple[str | None, str | None]:
    """When a domain was finished, and the verdict on it; None for what is not, or not known."""
    try:
        result = (read_record(folder / adapters.METRICS) or {})["result"]
        proof = result["proof"]
        return str(result["finished_at"]), None if proof is None else str(proof["verdict"]["sentence"])
    except (ValueError, KeyError, TypeError):
        return None, None


def _failures(out: Path) -> dict[str, str]:
    """Why domains failed in the last run that came to its end."""
    told = _read(out / adapters.SUMMARY, 2**28).get("failed")
    failed = {}
    for name, why in told.items() if isinstance(told, dict) else ():
        # Else it says of a folder what is none of a domain's.
        with contextlib.suppress(PromptError):
            check_domain_name(name)
            failed[name] = str(why)
    return failed


def _read(path: Path, most: int = _MOST) -> dict[str, Any]:
    try:
        found = json.loads(read_plain(path, most))
    except (FileNotFoundError, CannotRead, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
