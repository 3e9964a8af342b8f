"""`distill`, `capture` and `demo`: from flags to a run, and from its events to the terminal and an exit code."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from true_kd.cli.flags import (
    ConfigFile,
    Domains,
    Everything,
    Fresh,
    Out,
    Prompts,
    Sets,
    Student,
    Teacher,
    flag,
    overrides,
)
from true_kd.config import Override
from true_kd.errors import shared_exit_code


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
    seed: Annotated[int | None, flag("seed", "--seed")] = None,
    fresh: Fresh = False,
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
        "seed": seed,
        "fresh": fresh or None,
    }
    return _distill(config, domain or [], everything, overrides(flags, sets))


def capture_command(
    domain: Domains = None,
    everything: Everything = False,
    config: ConfigFile = None,
    teacher: Teacher = None,
    cache_bytes: Annotated[float | None, flag("cache_bytes", "--cache-bytes")] = None,
    cache_gb: Annotated[float | None, flag("cache_gb", "--cache-gb")] = None,
    prompts: Prompts = None,
    sets: Sets = None,
) -> int:
    """Let the teacher answer and fill the cache, without training: `distill` then finds all it needs there."""
    from true_kd import pipeline

    flags = {"teacher": teacher, "cache_bytes": cache_bytes, "cache_gb": cache_gb, "prompts": prompts}
    return run_phase(pipeline.capture, config, domain or [], everything, overrides(flags, sets))


def demo(
    out: Out = None,
    fresh: Fresh = False,
    sets: Sets = None,
) -> int:
    """Distil all six domains with the embedded pocket models; needs no network and a few minutes on a laptop."""
    from true_kd.pocket import BASE

    # For the processes of its phases: on matrices this small OpenBLAS's threads wait for each other most of the time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    typer.echo(f"true-kd demo is: true-kd distill --all --config {BASE}")
    return _distill(Path(BASE), [], True, overrides({"out": out, "fresh": fresh or None}, sets))


def _distill(config: Path | None, named: list[str], everything: bool, given: list[Override]) -> int:
    from true_kd import pipeline

    return run_phase(pipeline.distill, config, named, everything, given)


def run_phase(phase: Any, config: Path | None, named: list[str], everything: bool, given: list[Override]) -> int:
    """Plan the domains, run a generator of events on them, and show what it yields."""
    from true_kd import events, jobs
    from true_kd.console import make_view

    domains = jobs.choose_domains(config, named, everything, given)
    planned, failures = jobs.plan(config, domains, given)
    if not planned:
        jobs.refuse(failures)
    # Closed before a signal's last line is printed: by then a run that was stopped is.
    with make_view() as view, contextlib.closing(phase(planned, failures)) as running:
        for event in running:
            view.show(event)
            if isinstance(event, (events.RunFinished, events.CaptureFinished)):
                return shared_exit_code(event.failures.values())
    return 1
