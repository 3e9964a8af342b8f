"""The main job, top to bottom: plan, capture the teacher, train each student, sum up.

`distill` is the one function to read first. It is a generator of events (see `true_kd.events`): it prints nothing,
and whoever runs it shows what it wants. The teacher is opened once, answers for all domains and is freed before the
first student is opened, so a run's peak memory is that of its larger phase, not the sum.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
from filelock import FileLock, Timeout

from true_kd import events, reporting
from true_kd.checkpoints import drop_states
from true_kd.errors import InputError, LockedError, TrueKDError
from true_kd.files import make_folder, remove_temporaries
from true_kd.jobs import Job, find_teacher, refuse
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import (
    ModelOptions,
    check_keys,
    open_skeleton,
    open_tokenizer,
    release_memory,
)
from true_kd.reporting import KDResult
from true_kd.student import distill_student
from true_kd.suggest import quote
from true_kd.teacher import Teacher, capture_domain, choose_targets
from true_kd.vocabulary import VocabStrategy, VocabularyMap, map_vocabulary


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
    ledger = _Ledger()
    jobs, refused = _identify(jobs, failures or {})
    out = jobs[0].config.out_folder
    with _hold(out):
        for domain, error in refused.items():
            yield ledger.failed(domain, error)
        try:
            todo = yield from _skip_finished(jobs, ledger)
            for group in _group_by_teacher(todo):
                captured = yield from _capture_all(group, ledger, jobs)
                for job in captured:
                    yield from _train_isolated(job, ledger)
        finally:
            # Also when the run is stopped halfway: what is finished is in the summary.
            seconds = time.perf_counter() - started
            failed = {domain: str(error) for domain, error in ledger.failures.items()}
            summary = reporting.write_summary(out, ledger.results, failed, seconds)
    yield events.RunFinished(tuple(ledger.results), ledger.failures, summary, seconds)


def capture(jobs: Sequence[Job], failures: Mapping[str, TrueKDError] | None = None) -> Iterator[events.Event]:
    """The teacher's phase alone: fill the cache with every domain's targets, so that students can train later.

    Raises
    ------
    TrueKDError
        when nothing at all can be done.
    """
    started = time.perf_counter()
    ledger = _Ledger()
    done: list[str] = []
    jobs, refused = _sift(jobs, failures or {}, _find_teacher)
    tokenizer = cache(open_tokenizer)
    jobs, refused = _sift(jobs, refused, lambda job: tokenizer(job.teacher.options, "teacher"))
    for domain, error in refused.items():
        yield ledger.failed(domain, error)
    for group in _group_by_teacher(jobs):
        for job in group:
            make_folder(job.config.cache_folder)
        for job in (yield from _capture_all(group, ledger, jobs)):
            prompts = {prompt.key for prompt in (*job.targets.train, *job.targets.valid)}
            kept = job.targets.cache
            done.append(job.domain)
            size, tokens = kept.size(prompts), kept.count_tokens(prompts)
            per_token = size / kept.stored_tokens(prompts)
            yield events.DomainCaptured(job.domain, len(prompts), tokens, size, per_token, kept.folder)
    yield events.CaptureFinished(tuple(done), ledger.failures, time.perf_counter() - started)


class _Ledger:
    """How the domains of a run ended."""

    def __init__(self) -> None:
        self.results: list[KDResult] = []
        self.failures: dict[str, Exception] = {}

    def finished(self, result: KDResult) -> events.DomainFinished:
        self.results.append(result)
        return events.DomainFinished(result)

    def failed(self, domain: str, error: Exception) -> events.DomainFailed:
        trace = "".join(traceback.format_exception(error))
        if not isinstance(error, TrueKDError):
            error.add_note(trace)
        linked: BaseException | None = error
        while linked is not None:
            traceback.clear_frames(linked.__traceback__)
            linked.__traceback__ = None
            linked = linked.__cause__ or linked.__context__
        self.failures[domain] = error
        return events.DomainFailed(domain, error, trace)


def _sift(
    jobs: Sequence[Job], failures: Mapping[str, TrueKDError], prepare: Callable[[Job], object]
) -> tuple[list[Job], dict[str, TrueKDError]]:
    """The jobs that `prepare` lets pass, and `failures` with the errors of the others.

    Raises
    ------
    TrueKDError
        when none passes.
    """
    ready, refused = [], dict(failures)
    for job in jobs:
        try:
            prepare(job)
            ready.append(job)
        except TrueKDError as error:
            refused[job.domain] = error
    if not ready:
        refuse(refused)
    return ready, refused


def _find_teacher(job: Job) -> None:
    job.teacher = find_teacher(job.config)


def _identify(jobs: Sequence[Job], failures: Mapping[str, TrueKDError]) -> tuple[list[Job], dict[str, TrueKDError]]:
    """The jobs whose models fit together, each with its digest and vocabulary map, and the errors of the others.

    Nothing is written and no weights are opened: what cannot work is found before hours are spent on it.
    """
    jobs, refused = _sift(jobs, failures, _find_teacher)
    # Domains mostly share their models: each tokenizer is opened once, and each pair of vocabularies compared once.
    tokenizer = cache(open_tokenizer)

    @cache
    def vocabulary(teacher: ModelOptions, student: ModelOptions, strategy: VocabStrategy) -> VocabularyMap:
        ours, theirs = tokenizer(teacher, "teacher"), tokenizer(student, "student")
        return map_vocabulary(ours.ids, theirs.ids, ours.size, theirs.size, strategy)

    def identify(job: Job) -> None:
        teacher, student = job.teacher.options, job.config.student
        job.run_digest = job.digest(tokenizer(teacher, "teacher").digest, tokenizer(student, "student").digest)
        job.vocabulary = vocabulary(teacher, student, job.config.vocab_strategy)
        if job.config.lora.keys is not None:
            check_keys(open_skeleton(job.config.student, "student"), job.config.lora)

    return _sift(jobs, refused, identify)


@contextlib.contextmanager
def _hold(out: Path) -> Iterator[None]:
    """The lock on an output folder: two runs never write one."""
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise InputError(f"--out {quote(str(out))}: a file is in the way, expected a folder. Choose another name.")
    make_folder(out)
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise LockedError(out, "another true-kd run") from error
    try:
        remove_temporaries(out)
        yield
    finally:
        lock.release()


def _skip_finished(jobs: Sequence[Job], ledger: _Ledger) -> Generator[events.Event, None, list[Job]]:
    """The jobs that have work to do, and a folder to do it in."""
    todo = []
    for job in jobs:
        finished = None if job.config.fresh else reporting.read_result(job.folder, job.run_digest)
        if finished is not None:
            drop_states(job.folder)
            yield ledger.finished(finished)
            continue
        try:
            make_folder(job.folder)
            make_folder(job.config.cache_folder)
            todo.append(job)
        except TrueKDError as error:
            yield ledger.failed(job.domain, error)
    return todo


def _group_by_teacher(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that share a teacher, in order: it is opened once per group."""
    groups: dict[ModelOptions, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.teacher.options, []).append(job)
    return list(groups.values())


def _capture_all(
    group: Sequence[Job], ledger: _Ledger, everyone: Sequence[Job]
) -> Generator[events.Event, None, list[Job]]:
    """The jobs whose targets are in the cache. When this returns, the teacher is gone from memory."""
    set_guards(budget_bytes(None))
    mx.reset_peak_memory()
    captured: list[Job] = []
    try:
        teacher = Teacher(group[0].teacher.options)
    except TrueKDError as error:
        for job in group:
            yield ledger.failed(job.domain, error)
        return captured
    try:
        alike = [job for job in everyone if job.teacher.options == teacher.options]
        settings = yield from choose_targets(group, teacher, alike)
    except TrueKDError as error:
        for job in group:
            yield ledger.failed(job.domain, error)
        return captured
    for job in group:
        try:
            job.targets = yield from capture_domain(job, teacher, settings[job.domain])
            captured.append(job)
        except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
            yield ledger.failed(job.domain, error)
    if teacher.close():
        yield events.TeacherFreed(mx.get_active_memory())
    return captured


def _train_isolated(job: Job, ledger: _Ledger) -> Iterator[events.Event]:
    try:
        result = yield from distill_student(job)
        yield ledger.finished(result)
    except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
        yield ledger.failed(job.domain, error)
    release_memory()
