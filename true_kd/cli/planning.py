"""`plan`: what a run will do, take and leave, before it does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from true_kd.cli.flags import (
    AsJson,
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
from true_kd.cli.output import line_width, say_json
from true_kd.suggest import in_bytes, percent, printable

if TYPE_CHECKING:
    from true_kd.planning import DomainForecast, Fit, Forecast


def plan(
    domain: Domains = None,
    everything: Everything = False,
    config: ConfigFile = None,
    teacher: Teacher = None,
    student: Student = None,
    iters: Annotated[int | None, flag("iters", "--iters")] = None,
    batch_size: Annotated[int | None, flag("batch_size", "--batch-size")] = None,
    max_seq_length: Annotated[int | None, flag("max_seq_length", "--max-seq-length")] = None,
    rank: Annotated[int | None, flag("rank", "--rank")] = None,
    memory_gb: Annotated[float | None, flag("memory_gb", "--memory-gb")] = None,
    cache_bytes: Annotated[float | None, flag("cache_bytes", "--cache-bytes")] = None,
    cache_gb: Annotated[float | None, flag("cache_gb", "--cache-gb")] = None,
    prompts: Prompts = None,
    out: Out = None,
    control: Annotated[str | None, flag("control", "--control")] = None,
    fresh: Fresh = False,
    sets: Sets = None,
    no_probe: Annotated[
        bool, typer.Option("--no-probe", help="Leave the rehearsal out: no minutes, and no memory of this machine.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Say what a run would do, take and leave, before it does: data, disk, memory, minutes, what is there already.

    The run is that of `distill` with the same flags.

    No weights are opened, though a local folder's digest is taken: minutes and memory are those of a rehearsal with
    models of the same shapes, cut to a few layers. Nothing is written.
    """
    from true_kd import jobs
    from true_kd.planning import forecast

    flags = {
        "teacher": teacher,
        "student": student,
        "iters": iters,
        "batch_size": batch_size,
        "max_seq_length": max_seq_length,
        "rank": rank,
        "memory_gb": memory_gb,
        "cache_bytes": cache_bytes,
        "cache_gb": cache_gb,
        "prompts": prompts,
        "out": out,
        "control": control,
        "fresh": fresh or None,
    }
    given = overrides(flags, sets)
    domains = jobs.choose_domains(config, domain or [], everything, given)
    planned, failures = jobs.plan(config, domains, given)
    if not planned:
        jobs.refuse(failures)
    found = forecast(planned, failures, with_probe=not no_probe)
    if as_json:
        say_json(asdict(found))
    else:
        for line in _lines(found):
            typer.echo(printable(line))
    return found.exit_code


_LABEL = 11


def _row(label: str, text: str) -> str:
    """A line with its label, wrapped below itself."""
    return textwrap.fill(
        text,
        width=max(line_width(), 30),
        initial_indent=f"  {label:<{_LABEL}}",
        subsequent_indent=" " * (_LABEL + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _lines(found: Forecast) -> Iterator[str]:
    for domain in found.domains:
        yield domain.domain
        for label, text in _rows(domain, found):
            yield _row(label, text)
    for name, error in found.failures.items():
        yield f"{name}: cannot be run. {error}"
    yield "all"
    if found.seconds is not None:
        yield _row("time", _minutes(found.seconds))
    new = sum(domain.new_cache_bytes + domain.folder_bytes for domain in found.domains)
    yield _row("disk", f"{in_bytes(new)} more, of {in_bytes(min(found.free.values()))} free")
    if new > min(found.free.values()):
        yield _row("", "NOT ENOUGH: the run would stop with exit code 4")
    if found.fits:
        yield "what fits a Mac (computed, not measured on one):"
        yield from map(_fit, found.fits)


def _rows(domain: DomainForecast, found: Forecast) -> Iterator[tuple[str, str]]:
    cut = _share(domain.truncated, domain)
    dropped = f", {domain.dropped} dropped" if domain.dropped else ""
    yield "examples", f"{domain.train_examples:,} and {domain.valid_examples:,} held out; {cut} cut{dropped}"
    yield "tokens", f"{_about(domain)}{domain.train_tokens:,}, {domain.train_response_tokens:,} of them responses"
    yield "replies", _replies(domain)
    guess = "" if domain.bytes_known else ", a guess from other teachers"
    rate = f"{domain.bytes_per_token:.0f} bytes per token{guess}"
    new = f"{in_bytes(domain.new_cache_bytes)} of it new" if domain.new_cache_bytes else "none of it new"
    yield "cache", f"{in_bytes(domain.cache_bytes)}, {new} ({rate})"
    if not domain.reuse.finished:
        size = in_bytes(domain.folder_bytes)
        yield "folder", f"{size} at most; {domain.trainable_parameters:,} parameters are trained"
    if domain.capture_peak or domain.training_peak:
        yield "memory", _memory(domain, found.budget)
    if domain.seconds:
        parts = {name: seconds for name, seconds in domain.seconds.items() if seconds >= 1}
        each = ", ".join(f"{_NAMES[name]} {_minutes(seconds)}" for name, seconds in parts.items())
        yield "time", f"{_about(domain)}{_minutes(sum(domain.seconds.values()))}" + (f": {each}" if each else "")
    yield "adapter", domain.reuse.reason
    for note in domain.notes:
        yield "note", note


_NAMES = {
    "capture": "teacher",
    "training": "training",
    "evaluation": "measuring",
    "control": "control",
    "starting": "starting",
}


def _about(domain: DomainForecast) -> str:
    return "at most " if domain.basis == "bound" else ""


def _share(count: int, domain: DomainForecast) -> str:
    total = domain.train_examples + domain.valid_examples
    return f"{count:,} ({percent(count / total)})" if count and total else "none"


def _replies(domain: DomainForecast) -> str:
    parts = [f"{domain.cached:,} in the cache"] if domain.cached else []
    if domain.to_score:
        parts.append(f"{domain.to_score:,} of the data for the teacher to read")
    if domain.to_write:
        length = {
            "bound": f"of at most {domain.reply_tokens:,} tokens; `true-kd analyze` captures some, and tells",
            "sample": f"taken to have {domain.reply_tokens:,} tokens as those in the cache have",
        }[domain.basis]
        parts.append(f"{domain.to_write:,} for the teacher to write, {length}")
    return "; ".join(parts)


def _memory(domain: DomainForecast, budget: int) -> str:
    teacher = f"teacher's phase {in_bytes(domain.capture_peak)}, " if domain.capture_peak else "no teacher, "
    student = f"student's phase {in_bytes(domain.training_peak)}" if domain.training_peak else "no student"
    over = max(domain.capture_peak or 0, domain.training_peak or 0) > budget
    verdict = f"TOO MUCH for the {in_bytes(budget)}" if over else f"of the {in_bytes(budget)}"
    return f"{teacher}{student}, {verdict} that a run takes here"


def _fit(fit: Fit) -> str:
    if not fit.capture_batch:
        teacher = "the teacher is too large"
    else:
        teacher = f"teacher with capture.batch_size up to {fit.capture_batch}"
    if fit.training_batch:
        student = f"student with {fit.training_batch} longest sequences in a micro-batch"
    elif fit.training_batch_recomputed:
        student = f"student with training.grad_checkpoint and {fit.training_batch_recomputed} longest sequences"
    else:
        student = "the student is too large, or training.max_seq_length too long"
    return _row(f"{fit.memory_gb} GB", f"{teacher}; {student}")


def _minutes(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
