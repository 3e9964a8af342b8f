"""`distill`, `capture` and `demo`: from flags to a run, and from its events to the terminal and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from true_kd.cli.flags import (
    AsJson,
    ConfigFile,
    Domains,
    Everything,
    Force,
    Fresh,
    Out,
    Prompts,
    ReportTo,
    Sets,
    Student,
    Teacher,
    flag,
    overrides,
)
from true_kd.cli.output import say_json
from true_kd.config import Override
from true_kd.errors import shared_exit_code

if TYPE_CHECKING:
    from true_kd import events


def distill(
    domain: Domains = None,
    everything: Everything = False,
    config: ConfigFile = None,
    teacher: Teacher = None,
    student: Student = None,
    divergence: Annotated[str | None, flag("divergence", "--divergence")] = None,
    temperature: Annotated[float | None, flag("temperature", "--temperature")] = None,
    alpha: Annotated[float | None, flag("alpha", "--alpha")] = None,
    iters: Annotated[int | None, flag("iters", "--iters")] = None,
    patience: Annotated[int | None, flag("patience", "--patience")] = None,
    learning_rate: Annotated[float | None, flag("learning_rate", "--learning-rate")] = None,
    batch_size: Annotated[int | None, flag("batch_size", "--batch-size")] = None,
    max_seq_length: Annotated[int | None, flag("max_seq_length", "--max-seq-length")] = None,
    rank: Annotated[int | None, flag("rank", "--rank")] = None,
    memory_gb: Annotated[float | None, flag("memory_gb", "--memory-gb")] = None,
    cache_bytes: Annotated[float | None, flag("cache_bytes", "--cache-bytes")] = None,
    cache_gb: Annotated[float | None, flag("cache_gb", "--cache-gb")] = None,
    prompts: Prompts = None,
    out: Out = None,
    control: Annotated[str | None, flag("control", "--control")] = None,
    vocab_strategy: Annotated[str | None, flag("vocab_strategy", "--vocab-strategy")] = None,
    force: Force = False,
    seed: Annotated[int | None, flag("seed", "--seed")] = None,
    fresh: Fresh = False,
    report_to: ReportTo = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> int:
    """Capture the teacher once and train one LoRA adapter per domain."""
    flags = {
        "teacher": teacher,
        "student": student,
        "divergence": divergence,
        "temperature": temperature,
        "alpha": alpha,
        "iters": iters,
        "patience": patience,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "rank": rank,
        "memory_gb": memory_gb,
        "cache_bytes": cache_bytes,
        "cache_gb": cache_gb,
        "prompts": prompts,
        "out": out,
        "control": control,
        "vocab_strategy": vocab_strategy,
        "force": force or None,
        "seed": seed,
        "fresh": fresh or None,
        "report_to": report_to or None,
    }
    return _distill(config, domain or [], everything, overrides(flags, sets), as_json)


def capture_command(
    domain: Domains = None,
    everything: Everything = False,
    config: ConfigFile = None,
    teacher: Teacher = None,
    student: Student = None,
    cache_bytes: Annotated[float | None, flag("cache_bytes", "--cache-bytes")] = None,
    cache_gb: Annotated[float | None, flag("cache_gb", "--cache-gb")] = None,
    prompts: Prompts = None,
    vocab_strategy: Annotated[str | None, flag("vocab_strategy", "--vocab-strategy")] = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> int:
    """Let the teacher answer and fill the cache, without training: `distill` then finds all it needs there."""
    from true_kd import pipeline

    flags = {"teacher": teacher, "student": student, "cache_bytes": cache_bytes, "cache_gb": cache_gb}
    flags |= {"prompts": prompts, "vocab_strategy": vocab_strategy}
    told: list[events.DomainCaptured | events.CaptureFinished] = []
    code = run_phase(pipeline.capture, config, domain or [], everything, overrides(flags, sets), as_json, told.append)
    if as_json:
        *captured, end = told
        domains = {each.domain: {**asdict(each), "folder": str(each.folder)} for each in captured}
        failed = {name: str(error) for name, error in end.failures.items()}
        say_json({"domains": domains, "failed": failed, "seconds": end.seconds})
    return code


def demo(
    out: Out = None,
    fresh: Fresh = False,
    report_to: ReportTo = None,
    as_json: AsJson = False,
    sets: Sets = None,
) -> int:
    """Distil all six domains with the embedded pocket models; needs no network and a few minutes on a laptop."""
    from true_kd.pocket import BASE

    # For the processes of its phases: on matrices this small OpenBLAS's threads wait for each other most of the time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    typer.echo(f"true-kd demo is: true-kd distill --all --config {BASE}", err=as_json)
    given = overrides({"out": out, "fresh": fresh or None, "report_to": report_to or None}, sets)
    return _distill(Path(BASE), [], True, given, as_json)


def _distill(
    config: Path | None, named: list[str], everything: bool, given: list[Override], as_json: bool = False
) -> int:
    from true_kd import pipeline
    from true_kd.adapters import read_json

    told: list[events.RunFinished] = []
    code = run_phase(pipeline.distill, config, named, everything, given, as_json, told.append, tracks=True)
    if as_json:
        say_json(read_json(told[-1].summary))
    return code


def run_phase(
    phase: Any,
    config: Path | None,
    named: list[str],
    everything: bool,
    given: list[Override],
    as_json: bool = False,
    keep: Callable[[Any], None] | None = None,
    tracks: bool = False,
) -> int:
    """Plan the domains, run a generator of events on them, and show what it yields.

    Parameters
    ----------
    as_json
        whether stdout is for programs: then all is shown on stderr.
    keep
        takes what a domain's capture came to, and the last event.
    tracks
        whether the trackers of the config are told of it.
    """
    from true_kd import events, jobs
    from true_kd.console import make_view
    from true_kd.tracking import Trackers, check_installed

    domains = jobs.choose_domains(config, named, everything, given)
    planned, failures = jobs.plan(config, domains, given)
    if not planned:
        jobs.refuse(failures)
    names = planned[0].config.report_to if tracks else ()
    check_installed(names)
    # Closed before a signal's last line is printed: by then a run that was stopped is.
    with (
        make_view(sys.stderr if as_json else sys.stdout) as view,
        Trackers(names, planned[0].config.out_folder) as trackers,
        contextlib.closing(phase(planned, failures)) as running,
    ):
        for event in running:
            for line in trackers.note(event):
                typer.echo(line, err=True)
            view.show(event)
            is_last = isinstance(event, (events.RunFinished, events.CaptureFinished))
            if keep is not None and (is_last or isinstance(event, events.DomainCaptured)):
                keep(event)
            if is_last:
                return shared_exit_code(event.failures.values())
    return 1
