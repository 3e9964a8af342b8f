"""The run's side: its events, as they pass, to a small file."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from true_kd import events
from true_kd.files import TEMPORARY, write_fleeting
from true_kd.jobs import Job, parse_label
from true_kd.reporting import now
from true_kd.status.pace import Outlook, Pace
from true_kd.status.records import FILE, Progress, Stage
from true_kd.stopping import uninterrupted

Result = TypeVar("Result")

_EVERY = 1.0
"""Seconds between what is told of one stage."""


def published(
    out: Path, jobs: Sequence[Job], running: Generator[events.Event, None, Result]
) -> Generator[events.Event, None, Result]:
    """Pass on a run's events, and tell of them beside the lock, which the run holds; nothing is left at the end."""
    teller = _Teller(out, jobs)
    try:
        with contextlib.closing(running):
            while True:
                try:
                    event = next(running)
                except StopIteration as end:
                    return end.value
                with uninterrupted():
                    teller.note(event)
                yield event
    finally:
        teller.close()


class _Teller:
    """What was last told, and when."""

    def __init__(self, out: Path, jobs: Sequence[Job]) -> None:
        self._path = out / FILE
        self._names = [job.domain for job in jobs]
        self._outlook = Outlook(
            {job.domain: (job.config.training.iters,) * (1 + (job.config.control != "none")) for job in jobs}
        )
        self._finished: list[str] = []
        self._failed: list[str] = []
        self._pace = Pace()
        self._iters = 0
        self._stage: Stage = "starting"
        self._domain: str | None = None
        self._now: dict[str, Any] = {}
        self._told_at = -_EVERY
        self._tell()

    def note(self, event: events.Event) -> None:
        """Take in an event, and tell of it where it is time."""
        before = (self._stage, self._domain)
        match event:
            case events.TeacherOpening():
                self._begin("teacher_opening")
            case events.TeacherBusy():
                self._begin("teacher_busy")
            case events.Captured(domain, progress, is_probe):
                self._begin("probing" if is_probe else "capturing", domain)
                self._pace.mark(progress.done)
                speed = progress.tokens / progress.seconds if progress.tokens and progress.seconds else None
                self._now |= {"done": progress.done, "total": progress.total, "tokens_per_second": speed}
            case events.TeacherFreed() | events.CaptureReused():
                self._begin("student_opening")
            case events.TrainingStarted():
                domain, is_control = parse_label(event.domain)
                self._begin("control" if is_control else "training", domain)
                self._iters = event.iters
                self._outlook.start(is_control)
                self._now |= {"done": event.made, "total": event.iters}
            case events.Stepped(_, step):
                is_first = "loss" not in self._now
                self._pace.mark(step.iteration)
                self._outlook.step(self._pace, is_first)
                self._now |= {"done": step.iteration, "loss": step.total, "kd": step.kd, "ce": step.ce}
                self._now |= {"tokens_per_second": step.tokens_per_second, "peak_memory": step.peak_memory}
            case events.Validated(_, validation):
                self._now["validation_loss"] = validation.metrics.loss
            case events.Proving(label, _):
                self._begin("proving", parse_label(label)[0])
            case events.DomainFinished(result):
                self._end(result.domain, self._finished)
            case events.Evaluated(domain, _, _):
                self._end(domain, self._finished)
            case events.DomainFailed(domain, _, _):
                self._end(domain, self._failed)
        if (self._stage, self._domain) != before or time.monotonic() - self._told_at >= _EVERY:
            self._tell()

    def close(self) -> None:
        """Take away what was told."""
        for path in (self._path, self._path.with_name(f"{TEMPORARY}{FILE.lstrip('.')}")):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _begin(self, stage: Stage, domain: str | None = None) -> None:
        if (stage, domain) != (self._stage, self._domain):
            self._stage, self._domain, self._now, self._pace = stage, domain, {}, Pace()

    def _end(self, domain: str, ended: list[str]) -> None:
        if domain == self._domain:
            self._outlook.finish()
        # A report that cannot be written fails under a name of its own.
        if domain in self._names:
            ended.append(domain)
        self._begin("student_opening" if self._waiting() else "report")

    def _waiting(self) -> list[str]:
        return [name for name in self._names if name not in (*self._finished, *self._failed)]

    def _tell(self) -> None:
        waiting = [name for name in self._waiting() if name != self._domain]
        stage_left = domain_left = run_left = None
        if self._now.get("done") is not None:
            stage_left = self._pace.left(self._now["total"] - self._now["done"])
        if self._stage in ("training", "control"):
            domain_left = self._outlook.domain_left(self._domain, stage_left)
            others_left = self._outlook.others_left(waiting)
            run_left = None if domain_left is None or others_left is None else domain_left + others_left
        known = dict.fromkeys(("done", "total", "tokens_per_second", "loss", "kd", "ce", "validation_loss"))
        progress = Progress(
            updated_at=now(),
            stage=self._stage,
            domain=self._domain,
            number=None if self._domain is None else self._names.index(self._domain) + 1,
            domains=len(self._names),
            **{**known, "peak_memory": None, **self._now},
            stage_seconds_left=stage_left,
            domain_seconds_left=domain_left,
            run_seconds_left=run_left,
            finished=tuple(self._finished),
            failed=tuple(self._failed),
            waiting=tuple(waiting),
        )
        told = {"pid": os.getpid(), "host": socket.gethostname(), "progress": asdict(progress)}
        # It is for people only.
        with contextlib.suppress(OSError):
            write_fleeting(self._path, json.dumps(told, allow_nan=False))
        self._told_at = time.monotonic()
