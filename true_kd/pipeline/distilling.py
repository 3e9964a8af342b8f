"""The main job, top to bottom: plan, capture the teacher, train each student, sum up."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

from true_kd import events, reporting
from true_kd.checkpoints import clean_up
from true_kd.errors import EnvironmentProblem, ModelError, TrueKDError
from true_kd.files import make_folder
from true_kd.jobs import Job
from true_kd.models import release_memory
from true_kd.pipeline.steps import (
    Ledger,
    Look,
    capture_all,
    find_job_teacher,
    group_by_teacher,
    hold_folder,
    identify_jobs,
    look_free,
    run_student,
    sift,
)
from true_kd.status import published
from true_kd.student import distill_student, settle_lines


def distill(jobs: Sequence[Job], failures: Mapping[str, TrueKDError] | None = None) -> Iterator[events.Event]:
    """Distil every domain: one adapter folder each, and `kd_summary.json` over all.

    A domain that fails is reported and the others go on; one that is finished and unchanged is not done again.
    `failures` are those of planning (see `jobs.plan`), reported along with the others.

    Raises
    ------
    TrueKDError
        when nothing at all can be done: the model of every domain is missing, the output folder is locked.
    """
    started = time.perf_counter()
    ledger = Ledger()
    look_free(jobs)
    jobs, refused = identify_jobs(jobs, failures or {})
    out = jobs[0].config.out_folder
    with hold_folder(out):
        summary, report = yield from published(out, jobs, _distill_all(out, jobs, refused, ledger, started))
    seconds = time.perf_counter() - started
    yield events.RunFinished(tuple(ledger.results), ledger.failures, summary, seconds, report)


def _distill_all(
    out: Path, jobs: Sequence[Job], refused: Mapping[str, TrueKDError], ledger: Ledger, started: float
) -> Generator[events.Event, None, tuple[Path, Path | None]]:
    """The work of a run that holds its folder; returns where summary and report lie."""
    for domain, error in refused.items():
        yield ledger.failed(domain, error)
    try:
        todo = yield from _skip_finished(jobs, ledger)
        for group in group_by_teacher(todo):
            captured = yield from capture_all(group, ledger, jobs, look_first=True)
            for job in captured:
                yield from _train_isolated(job, ledger)
    finally:
        # Also when the run is stopped halfway: what is finished is in the summary.
        seconds = time.perf_counter() - started
        failed = {domain: str(error) for domain, error in ledger.failures.items()}
        summary = reporting.write_summary(out, ledger.results, failed, seconds)
    if any(job.config.report for job in jobs) and ledger.results:
        from true_kd.report import write_report  # jinja2: not for a run that ends at its first line

        try:
            return summary, write_report(out, ledger.results, failed)
        except EnvironmentProblem as error:
            # The adapters are there, and the table is still to come: a page less is no reason to end here.
            yield ledger.failed("report", error)
    return summary, None


def capture(jobs: Sequence[Job], failures: Mapping[str, TrueKDError] | None = None) -> Iterator[events.Event]:
    """The teacher's phase alone: fill the cache with every domain's targets, so that students can train later.

    Raises
    ------
    TrueKDError
        when nothing at all can be done.
    """
    started = time.perf_counter()
    ledger = Ledger()
    done: list[str] = []
    jobs, refused = sift(jobs, failures or {}, find_job_teacher)
    look = Look()
    unknown: dict[str, str] = {}

    def prepare(job: Job) -> None:
        look.at(job, job.teacher.options, "teacher")
        try:
            paired = look.pair(job.teacher.options, job.config, download=False)
        except ModelError as error:
            if job.config.vocab_strategy not in ("auto", "match"):
                raise
            # It may be on another machine: what is captured then fits students of the teacher's tokenizer.
            unknown[job.domain] = str(error)
        else:
            job.vocabulary, job.alignment = paired.vocabulary, paired.alignment

    jobs, refused = sift(jobs, refused, prepare)
    for domain, why in unknown.items():
        yield events.StudentUnknown(domain, why)
    for domain, error in refused.items():
        yield ledger.failed(domain, error)
    for group in group_by_teacher(jobs):
        for job in group:
            make_folder(job.config.cache_folder)
        for job in (yield from capture_all(group, ledger, jobs)):
            prompts = {prompt.key for prompt in (*job.targets.train, *job.targets.valid)}
            kept = job.targets.cache
            done.append(job.domain)
            size, tokens = kept.size(prompts), kept.count_tokens(prompts)
            per_token = size / kept.stored_tokens(prompts)
            yield events.DomainCaptured(job.domain, len(prompts), tokens, size, per_token, kept.folder)
    yield events.CaptureFinished(tuple(done), ledger.failures, time.perf_counter() - started)


def _skip_finished(jobs: Sequence[Job], ledger: Ledger) -> Generator[events.Event, None, list[Job]]:
    """The jobs that have work to do, and a folder to do it in."""
    todo = []
    for job in jobs:
        finished = None if job.config.fresh else reporting.read_result(job.folder, job.run_digest, job.proof_digest)
        if finished is not None and finished.proof is not None and not job.lacks_control(finished.proof):
            try:
                _tidy(job, finished)
            except TrueKDError as error:
                yield ledger.failed(job.domain, error)
            else:
                yield ledger.finished(finished)
            continue
        try:
            make_folder(job.folder)
            make_folder(job.config.cache_folder)
            todo.append(job)
        except TrueKDError as error:
            yield ledger.failed(job.domain, error)
    return todo


def _tidy(job: Job, finished: reporting.KDResult) -> None:
    """Have a finished domain's folder be what a run leaves that nothing stopped."""
    settle_lines(job, finished)
    control = job.control()
    if (beside := reporting.read_result(control.folder, control.run_digest)) is not None:
        settle_lines(control, beside)
    for folder in (job.folder, control.folder):
        clean_up(folder)


def _train_isolated(job: Job, ledger: Ledger) -> Iterator[events.Event]:
    try:
        result = yield from run_student(distill_student, job)
        yield ledger.finished(result)
    except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
        yield ledger.failed(job.domain, error)
    release_memory()
