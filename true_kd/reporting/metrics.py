"""kd_metrics.json: a domain's result with all its curves, written last, and read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from true_kd import adapters
from true_kd.files import digest_file, read_record, write_record
from true_kd.reporting.records import KDResult
from true_kd.training import StepMetrics

FORMAT = 3
"""Version of the layout of kd_metrics.json and kd_summary.json."""


def write_result(folder: Path, result: KDResult, run_digest: str, proof_digest: str = "") -> None:
    """Write kd_metrics.json. It is written last: where it stands, the domain is finished."""
    record = {
        "format": FORMAT,
        "run_digest": run_digest,
        "proof_digest": proof_digest,
        "sha256": _digests(folder),
        "result": asdict(result),
        "curves": _columns(result.steps, [name for name in _STEP if name not in StepMetrics.MEASURED]),
        "timings": _columns(result.steps, StepMetrics.MEASURED),
    }
    del record["result"]["steps"], record["result"]["unchanged"]
    write_record(folder / adapters.METRICS, record)


def read_result(folder: Path, run_digest: str | None = None, proof_digest: str | None = None) -> KDResult | None:
    """The result of a finished domain; None where there is none, it is of another run, or its adapter changed.

    Digests that are None are not compared.
    """
    try:
        record = read_record(folder / adapters.METRICS)
    except ValueError:
        return None
    if record is None or record.get("format") != FORMAT:
        return None
    for name, expected in (("run_digest", run_digest), ("proof_digest", proof_digest)):
        if expected is not None and record.get(name) != expected:
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


def find_damage(folder: Path, run_digest: str) -> str | None:
    """What is wrong with what this run left in a domain's folder when it was finished; None where nothing is."""
    try:
        record = read_record(folder / adapters.METRICS)
    except ValueError as error:
        return str(error)
    if record is None or record.get("format") != FORMAT or record.get("run_digest") != run_digest:
        return None
    if not isinstance(written := record.get("sha256"), dict):
        return f"{adapters.METRICS} is not what was written"
    found = _digests(folder)
    changed = [name for name, expected in written.items() if found.get(name) != expected]
    return f"{changed[0]} is not what was written" if changed else None


def _digests(folder: Path) -> dict[str, str]:
    """Digests of the files that make the adapter, those that are there."""
    files = [folder / name for name in (adapters.WEIGHTS, adapters.CONFIG)]
    return {file.name: digest_file(file) for file in files if file.is_file()}


_STEP = tuple(item.name for item in fields(StepMetrics))


def _columns(steps: Sequence[StepMetrics], names: Sequence[str]) -> dict[str, list[Any]]:
    """One list per quantity, which is what plotting wants."""
    return {name: [getattr(step, name) for step in steps] for name in names}
