"""What a run leaves to read: `kd_metrics.json` per domain and `kd_summary.json` over all of them.

`KDResult` is the same record in Python; it is what the files are written from and read back into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from true_kd import adapters
from true_kd.backend import versions
from true_kd.evaluation import EvalMetrics
from true_kd.fidelity import Fidelity
from true_kd.files import digest_file, write_json
from true_kd.training import StepMetrics

FORMAT = 2
"""Version of the two files' layout."""


@dataclass(frozen=True)
class Validation:
    """The student on the validation prompts after an iteration (0: before training)."""

    iteration: int
    metrics: EvalMetrics


@dataclass(frozen=True)
class DataCounts:
    """What a domain was trained and validated on."""

    train_examples: int
    valid_examples: int
    train_response_tokens: int
    """Tokens that count in the loss, once through the data."""
    train_tokens: int
    """Prompt and response tokens, once through the data."""
    truncated: int
    """Training examples whose response was cut at training.max_seq_length."""
    dropped: int
    """Examples left out: prompt too long, or a reply that the student's vocabulary cannot write."""
    cut_replies: int
    """Replies that reached capture.max_tokens without ending."""
    differing_ids: int
    """Ids that stand for different tokens in teacher and student; 0 under vocab_strategy match."""
    cache_bytes: int
    """Size of the cache files that hold the domain's targets."""
    cache_tokens: int = 0
    """Response tokens in those files, of other domains as well where they share one."""


@dataclass(frozen=True)
class ExactMatch:
    """Share of checkable validation tasks answered right; the student takes its most likely token each time."""

    tasks: int
    student: float
    adapted: float
    """The student with its adapter."""
    teacher: float | None
    """By the replies it wrote at capture, drawn as `capture` says; None where the data brought replies of its own."""


@dataclass(frozen=True)
class KDResult:
    """What distilling one domain gave. Losses in nats per response token, memory in bytes, time in seconds."""

    domain: str
    teacher: str
    student: str
    adapter_path: str
    data: DataCounts
    before: EvalMetrics
    after: EvalMetrics
    """With the weights of `best_iteration`, which are those that were kept."""
    best_iteration: int
    exact_match: ExactMatch | None
    """None where the validation prompts have no answers."""
    steps: tuple[StepMetrics, ...]
    validations: tuple[Validation, ...]
    seconds: Mapping[str, float]
    """Per phase: capture, training, evaluation. Capture counts what this run captured, not what the cache held."""
    capture_peak_memory: int
    training_peak_memory: int
    trainable_parameters: int
    student_parameters: int
    finished_at: str
    fidelity: Fidelity | None = None
    """What the cached targets kept of the teacher; None in files of versions that did not measure it."""
    unchanged: bool = False
    """True when the result is that of an earlier run that this one had no need to repeat."""
    versions: Mapping[str, str] = field(default_factory=dict)


def write_result(folder: Path, result: KDResult, run_digest: str) -> None:
    """Write kd_metrics.json. It is written last: where it stands, the domain is finished."""
    record = {
        "format": FORMAT,
        "run_digest": run_digest,
        "sha256": _digests(folder),
        "result": asdict(result),
        "curves": _columns(result.steps, [name for name in _STEP if name not in StepMetrics.MEASURED]),
        "timings": _columns(result.steps, StepMetrics.MEASURED),
    }
    del record["result"]["steps"], record["result"]["unchanged"]
    write_json(folder / adapters.METRICS, record)


def read_result(folder: Path, run_digest: str | None = None) -> KDResult | None:
    """The result of a finished domain; None where there is none, it is of another run, or its adapter changed."""
    record = adapters.read_json(folder / adapters.METRICS)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    if run_digest is not None and record.get("run_digest") != run_digest:
        return None
    if _digests(folder) != record.get("sha256"):
        return None
    try:
        columns = {**record["curves"], **record["timings"]}
        steps = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if not steps:
            return None
        result = TypeAdapter(KDResult).validate_python({**record["result"], "steps": steps})
    except (ValidationError, KeyError, ValueError, TypeError, AttributeError):
        return None
    return replace(result, unchanged=True, adapter_path=str(folder))


def _digests(folder: Path) -> dict[str, str]:
    """Digests of the files that make the adapter, those that are there."""
    files = [folder / name for name in (adapters.WEIGHTS, adapters.CONFIG)]
    return {file.name: digest_file(file) for file in files if file.is_file()}


_STEP = tuple(item.name for item in fields(StepMetrics))


def _columns(steps: Sequence[StepMetrics], names: Sequence[str]) -> dict[str, list[Any]]:
    """One list per quantity, which is what plotting wants."""
    return {name: [getattr(step, name) for step in steps] for name in names}


def write_summary(out: Path, results: Sequence[KDResult], failures: Mapping[str, str], seconds: float) -> Path:
    """Write kd_summary.json over this run's results, its failures, and domains finished in `out` before."""
    known = {result.domain: result for result in results}
    for folder in sorted(out.iterdir()) if out.is_dir() else ():
        if folder.name not in known and folder.name not in failures and (earlier := read_result(folder)):
            known[folder.name] = earlier
    summary = {
        "format": FORMAT,
        "finished_at": now(),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory([result for result in results if not result.unchanged]),
        "versions": versions(),
        "domains": {name: _summary(known[name]) for name in sorted(known)},
        "failed": dict(failures),
    }
    write_json(out / adapters.SUMMARY, summary)
    return out / adapters.SUMMARY


def _summary(result: KDResult) -> dict[str, Any]:
    record = asdict(result)
    for name in ("steps", "validations", "domain"):
        del record[name]
    record["peak_memory"] = peak_memory([result])
    record["training_loss"] = {
        "first": _losses(result.steps[0]),
        "last": _losses(result.steps[-1]),
    }
    return record


def _losses(step: StepMetrics) -> dict[str, float]:
    return {"total": step.total, "kd": step.kd, "ce": step.ce}


def peak_memory(results: Sequence[KDResult]) -> dict[str, int]:
    """Peak memory in bytes of each phase, and of the whole: the larger of the two, as they never overlap."""
    capture = max((result.capture_peak_memory for result in results), default=0)
    training = max((result.training_peak_memory for result in results), default=0)
    return {"capture": capture, "training": training, "run": max(capture, training)}


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
