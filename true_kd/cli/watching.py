"""`status`: what a run is doing, told in another terminal, and what is there where none runs."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from true_kd.cli.flags import AsJson
from true_kd.cli.output import say_json
from true_kd.errors import InputError
from true_kd.suggest import in_bytes, printable, quote

if TYPE_CHECKING:
    from true_kd.status import DomainStatus, Progress, Running, Status

_EVERY = 2.0
"""Seconds between two looks."""
_SILENT = 600
"""Seconds without a word after which a run on another machine may be gone."""


def status(
    out: Annotated[
        str | None,
        typer.Option(
            "--out", help="Output folder of the run. [default: that of configs/base.yaml]", show_default=False
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look every two seconds, until no run is there.")] = False,
    as_json: AsJson = False,
) -> int:
    """Show how far a run is, from any terminal and without disturbing it.

    Where none runs: what is finished, and what was stopped at which iteration. With --watch and --json, a line of
    JSON for each change.
    """
    from true_kd.finding import output_folder
    from true_kd.status import read_status

    folder = output_folder(out)
    if not folder.is_dir():
        found = "no such folder" if not folder.exists() else "not a folder"
        raise InputError(f"--out {quote(str(folder))}: {found}, expected that of a run. Run `true-kd distill` first.")
    if watch:
        _watch(folder, as_json)
    elif as_json:
        say_json(asdict(read_status(folder)))
    else:
        _show(read_status(folder))
    return 0


def _watch(folder: Path, as_json: bool) -> None:
    """Look again and again while there is a run."""
    from true_kd.console import make_console
    from true_kd.status import read_status

    console = make_console()
    told: Status | None = None
    while True:
        found = read_status(folder)
        if found != told:
            if as_json:
                say_json(asdict(found), indent=None)
            elif found.running is None:
                _show(found)
            elif console.is_terminal:
                console.clear()
                _show(found)
            elif told is None or told.running is None or _line(told.running) != _line(found.running):
                typer.echo(printable(_line(found.running)))
            told = found
        if found.running is None:
            return
        time.sleep(_EVERY)


def _show(found: Status) -> None:
    rows = _run(found.running) if found.running else [("run", f"none in {found.out}")]
    for name, domain in found.domains.items():
        # What the running one is at stands above.
        if found.running is None or domain.state != "running":
            rows.append((name, _domain(domain)))
    if found.running is None and not found.domains:
        rows.append(("domains", "none begun"))
    width = max(len(name) for name, _ in rows) + 2
    for name, text in rows:
        typer.echo(printable(f"{name:<{width}}{text}"))


def _run(run: Running) -> list[tuple[str, str]]:
    where = "" if run.is_here else f" on {run.host}"
    rows = [("run", run.command), ("process", f"{run.pid}{where}"), ("since", run.since), ("folder", run.folder)]
    progress = run.progress
    if progress is None:
        return [*rows, ("stage", "starting")]
    age = _age(progress)
    gone = "; it may be gone" if not run.is_here and age > _SILENT else ""
    rows.append(("heard", f"{_duration(age)} ago{gone}"))
    if progress.domain is not None:
        rows.append(("domain", f"{progress.domain}, {progress.number} of {progress.domains}"))
    rows.append(("stage", _stage(progress)))
    if progress.tokens_per_second is not None:
        rows.append(("speed", f"{progress.tokens_per_second:,.0f} tok/s"))
    if progress.loss is not None:
        rows.append(("loss", f"{progress.loss:.4f} (kd {progress.kd:.4f}, ce {progress.ce:.4f})"))
    if progress.validation_loss is not None:
        rows.append(("validated", f"{progress.validation_loss:.4f}"))
    if progress.peak_memory is not None:
        rows.append(("memory", f"{in_bytes(progress.peak_memory)} at most so far"))
    lefts = {"stage": progress.stage_seconds_left, "domain": progress.domain_seconds_left}
    lefts["run"] = progress.run_seconds_left
    left = [f"{what} {_duration(seconds)}" for what, seconds in lefts.items() if seconds is not None]
    rows.append(("left", ", ".join(left) or "not known yet"))
    return rows


def _line(run: Running) -> str:
    """A run in a line."""
    progress = run.progress
    if progress is None:
        return "starting"
    parts = [f"{progress.domain} ({progress.number} of {progress.domains})"] if progress.domain else []
    parts.append(_stage(progress))
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.run_seconds_left is not None:
        parts.append(f"{_duration(progress.run_seconds_left)} left")
    return ", ".join(parts)


_STAGES = {
    "teacher_busy": "waiting for a run with the same teacher",
    "teacher_opening": "opening the teacher",
    "student_opening": "opening the student",
    "control": "training the control",
    "report": "writing the report",
}


def _stage(progress: Progress) -> str:
    words = _STAGES.get(progress.stage, progress.stage)
    if progress.done is None:
        return words
    what = "iteration " if progress.stage in ("training", "control") else ""
    return f"{words}, {what}{progress.done} of {progress.total}"


def _domain(domain: DomainStatus) -> str:
    steps = "" if domain.iteration is None else f" at iteration {domain.iteration} of {domain.iters}"
    match domain.state:
        case "finished":
            return f"finished {domain.finished_at}. {domain.says or ''}".rstrip()
        case "failed":
            return f"failed{steps}{f': {domain.says}' if domain.says else ''}"
        case "stopped":
            onward = f"goes on from {domain.checkpoint}" if domain.checkpoint else "no checkpoint: begins anew"
            return f"stopped{steps}; {onward}"
        case state:
            return state


def _age(progress: Progress) -> float:
    told = datetime.fromisoformat(progress.updated_at)
    return max(0.0, (datetime.now(told.tzinfo) - told).total_seconds())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
