"""What `true-kd status` says, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter

from true_kd.options import record

FORMAT = 1
"""Version of the layout of what `status --json` prints."""
LOCK = ".lock"
"""In an output folder: held by a run, from its beginning to its end."""
FILE = ".status.json"
"""In an output folder: how far the run is that holds its lock."""

Stage = Literal[
    "starting",
    "teacher_busy",
    "teacher_opening",
    "probing",
    "capturing",
    "student_opening",
    "training",
    "control",
    "proving",
    "report",
]


@record
class Progress:
    """How far a run is. What is not known yet is null."""

    updated_at: str
    """UTC, ISO 8601. A run tells of each stage, and about once a second of what it does in it."""
    stage: Stage
    """What it does: waits for another run that captures from its teacher (teacher_busy), opens a model, looks at a few
    replies (probing), captures all, trains the student or its control, measures (proving), or writes the report."""
    domain: str | None
    """The domain at hand."""
    number: int | None
    """Its place among the domains of the run, counted from 1."""
    domains: int
    """How many domains the run has."""
    done: int | None
    """Of this stage: replies captured, or iterations made."""
    total: int | None
    """How many there are to be in this stage."""
    tokens_per_second: float | None
    """Captured or trained."""
    loss: float | None
    """Of the last step."""
    kd: float | None
    """Its distillation part."""
    ce: float | None
    """Its cross-entropy part."""
    validation_loss: float | None
    """The last that was measured of the domain."""
    peak_memory: int | None
    """Bytes that the student's phase took so far at most."""
    stage_seconds_left: float | None
    """Until the end of the stage, at the pace of the last steps."""
    domain_seconds_left: float | None
    """Until the domain is finished: with its control, and about as long for the proof as the first measuring took."""
    run_seconds_left: float | None
    """Until all domains are; null until the first has been trained for a few steps."""
    finished: tuple[str, ...]
    """Domains that are finished, those of earlier runs included."""
    failed: tuple[str, ...]
    """Domains that failed in this run."""
    waiting: tuple[str, ...]
    """Domains that are still to come."""


@record
class Running:
    """A run that holds an output folder."""

    pid: int
    """Its process."""
    host: str
    """The machine that it is on."""
    is_here: bool
    """Whether that is this machine; of another's run nobody here knows whether it still lives."""
    command: str
    """Its first words."""
    since: str
    """Local time of that machine with its offset, ISO 8601."""
    folder: str
    """The output folder that it holds: of a sweep, that of the point at hand."""
    progress: Progress | None
    """None until it tells."""


@record
class DomainStatus:
    """What is there of one domain."""

    state: Literal["finished", "running", "waiting", "failed", "stopped"]
    """`stopped`: begun, and neither finished nor worked at; the same command goes on with it."""
    iteration: int | None
    """Steps that were made."""
    iters: int | None
    """Steps that were to be made."""
    checkpoint: int | None
    """The iteration that a stopped or running domain would go on from; null for the beginning."""
    loss: float | None
    """Of the last step."""
    finished_at: str | None
    """UTC, ISO 8601; of a finished domain."""
    says: str | None
    """The verdict on a finished domain, or why one failed."""


@record
class Status:
    """An output folder."""

    format: int
    """Version of this layout; a new one when a field changes its meaning or goes."""
    out: str
    """The folder."""
    running: Running | None
    """The run that holds it; null where none does."""
    domains: Mapping[str, DomainStatus]
    """By name."""


def status_schema() -> dict[str, Any]:
    """The JSON schema of what `true-kd status --json` prints."""
    return TypeAdapter(Status).json_schema(mode="serialization")
