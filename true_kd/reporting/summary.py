"""kd_summary.json: all domains of an output folder, for people and for scripts.

Its layout is that of `Summary`, from which the JSON schema in `schemas/` and docs/kd_summary.md are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from true_kd import adapters
from true_kd.backend import versions
from true_kd.evaluation import EvalMetrics
from true_kd.fidelity import Fidelity
from true_kd.files import write_json
from true_kd.options import record
from true_kd.proof import ProofSummary
from true_kd.reporting.metrics import FORMAT, read_result
from true_kd.reporting.records import DataCounts, KDResult
from true_kd.training import StepMetrics


@record
class PeakMemory:
    """Bytes; the phases never overlap."""

    capture: int
    """With the teacher; 0 where all was in the cache."""
    training: int
    """With the student."""
    run: int
    """The larger of the two."""


@record
class Losses:
    """Of one optimizer step, means over its response tokens, nats."""

    total: float
    """alpha * kd + (1 - alpha) * ce."""
    kd: float
    """With its T^2."""
    ce: float
    """Cross-entropy on the teacher's text."""


@record
class TrainingLoss:
    """How far training came on its own batches."""

    first: Losses
    """Of the first step."""
    last: Losses
    """Of the last step."""


@record
class DomainSummary:
    """One domain."""

    teacher: str
    """Its name, as the config has it."""
    student: str
    """Its name, as the config has it."""
    adapter_path: str
    """The folder of the adapter, as the run was told."""
    data: DataCounts
    """What it was trained and validated on."""
    before: EvalMetrics
    """The student as it came, by the run's objective."""
    after: EvalMetrics
    """With the adapter that was kept: that of `best_iteration`."""
    best_iteration: int
    """The iteration of the lowest validation loss."""
    proof: ProofSummary | None
    """Whether it helped, and how sure that is."""
    training_loss: TrainingLoss
    """On the batches of the first step and of the last."""
    fidelity: Fidelity | None
    """What the cached targets kept of the teacher."""
    seconds: Mapping[str, float]
    """By phase: capture, training, evaluation, and control where one was trained."""
    peak_memory: PeakMemory
    """Of this domain's run."""
    trainable_parameters: int
    """Numbers in the adapter."""
    finished_at: str
    """UTC, ISO 8601."""
    unchanged: bool
    """True where an earlier run finished the domain, and this one had no need to."""
    versions: Mapping[str, str]
    """Of what made the result."""


@record
class Summary:
    """All domains of an output folder."""

    format: int
    """Version of this layout; a new one when a field changes its meaning or goes."""
    finished_at: str
    """Of the last run, UTC, ISO 8601."""
    seconds: float
    """That the last run took."""
    peak_memory: PeakMemory
    """Of the last run."""
    versions: Mapping[str, str]
    """Of what the last run was made with."""
    domains: Mapping[str, DomainSummary]
    """By name, those finished by earlier runs included."""
    failed: Mapping[str, str]
    """Why, by name, of the domains that failed in the last run."""


def schema() -> dict[str, Any]:
    """The JSON schema of kd_summary.json."""
    return TypeAdapter(Summary).json_schema(mode="serialization")


def write_summary(out: Path, results: Sequence[KDResult], failures: Mapping[str, str], seconds: float) -> Path:
    """Write kd_summary.json over this run's results, its failures, and domains finished in `out` before."""
    known = {result.domain: result for result in results}
    for folder in sorted(out.iterdir()) if out.is_dir() else ():
        if folder.name not in known and folder.name not in failures and (earlier := read_result(folder)):
            known[folder.name] = earlier
    summary = Summary(
        format=FORMAT,
        finished_at=now(),
        seconds=round(seconds, 3),
        peak_memory=peak_memory([result for result in results if not result.unchanged]),
        versions=versions(),
        domains={name: summarize(known[name]) for name in sorted(known)},
        failed=dict(failures),
    )
    write_json(out / adapters.SUMMARY, asdict(summary))
    return out / adapters.SUMMARY


def refresh_summary(out: Path) -> Path:
    """Bring the domains of kd_summary.json up to date, and leave what it says of the last run."""
    path = out / adapters.SUMMARY
    record = adapters.read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("domains"), dict):
        return write_summary(out, [], {}, 0.0)
    finished = {folder.name: result for folder in sorted(out.iterdir()) if (result := read_result(folder))}
    record["domains"] |= {name: asdict(summarize(result)) for name, result in finished.items()}
    write_json(path, record)
    return path


def summarize(result: KDResult) -> DomainSummary:
    """A result without its curves."""
    return DomainSummary(
        teacher=result.teacher,
        student=result.student,
        adapter_path=result.adapter_path,
        data=result.data,
        before=result.before,
        after=result.after,
        best_iteration=result.best_iteration,
        proof=result.proof and result.proof.summary,
        training_loss=TrainingLoss(_losses(result.steps[0]), _losses(result.steps[-1])),
        fidelity=result.fidelity,
        seconds=result.seconds,
        peak_memory=peak_memory([result]),
        trainable_parameters=result.trainable_parameters,
        finished_at=result.finished_at,
        unchanged=result.unchanged,
        versions=result.versions,
    )


def _losses(step: StepMetrics) -> Losses:
    return Losses(step.total, step.kd, step.ce)


def peak_memory(results: Sequence[KDResult]) -> PeakMemory:
    """Peak memory of each phase, and of the whole."""
    capture = max((result.capture_peak_memory for result in results), default=0)
    training = max((result.training_peak_memory for result in results), default=0)
    return PeakMemory(capture, training, max(capture, training))


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
