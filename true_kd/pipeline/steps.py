"""The steps that runs share: who may begin, who holds the folder, the teacher's phase, and how domains ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx
from filelock import FileLock, Timeout

from true_kd import events
from true_kd.errors import InputError, LockedError, TrueKDError, let_go
from true_kd.files import make_folder, remove_temporaries
from true_kd.gate import NothingToTeach
from true_kd.jobs import Job, find_teacher, refuse
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import ModelOptions, check_keys, open_skeleton, open_tokenizer
from true_kd.probing import probe
from true_kd.reporting import KDResult
from true_kd.suggest import quote
from true_kd.targets import TargetSettings
from true_kd.teacher import Teacher, capture_domain, choose_targets
from true_kd.vocabulary import VocabStrategy, VocabularyMap, map_vocabulary


class Ledger:
    """How the domains of a run ended."""

    def __init__(self) -> None:
        self.results: list[KDResult] = []
        self.failures: dict[str, Exception] = {}

    def finished(self, result: KDResult) -> events.DomainFinished:
        """Note a result."""
        self.results.append(result)
        return events.DomainFinished(result)

    def failed(self, domain: str, error: Exception) -> events.DomainFailed:
        """Note a failure, without the frames that would keep models in memory."""
        trace = let_go(error)
        self.failures[domain] = error
        return events.DomainFailed(domain, error, trace)


def sift(
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


def find_job_teacher(job: Job) -> None:
    """Note where a job's teacher is."""
    job.teacher = find_teacher(job.config)


def identify_jobs(jobs: Sequence[Job], failures: Mapping[str, TrueKDError]) -> tuple[list[Job], dict[str, TrueKDError]]:
    """The jobs whose models fit together, each with its digest and vocabulary map, and the errors of the others.

    Nothing is written and no weights are opened: what cannot work is found before hours are spent on it.
    """
    jobs, refused = sift(jobs, failures, find_job_teacher)
    # Domains mostly share their models: each tokenizer is opened once, and each pair of vocabularies compared once.
    tokenizer = cache(open_tokenizer)

    @cache
    def vocabulary(teacher: ModelOptions, student: ModelOptions, strategy: VocabStrategy) -> VocabularyMap:
        ours, theirs = tokenizer(teacher, "teacher"), tokenizer(student, "student")
        return map_vocabulary(ours.ids, theirs.ids, ours.size, theirs.size, strategy)

    def identify(job: Job) -> None:
        teacher, student = job.teacher.options, job.config.student
        job.teacher_digest, job.student_digest = (
            tokenizer(teacher, "teacher").digest,
            tokenizer(student, "student").digest,
        )
        job.vocabulary = vocabulary(teacher, student, job.config.vocab_strategy)
        if job.config.lora.keys is not None:
            check_keys(open_skeleton(job.config.student, "student"), job.config.lora)

    return sift(jobs, refused, identify)


@contextlib.contextmanager
def hold(out: Path) -> Iterator[None]:
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


def group_by_teacher(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that share a teacher, in order: it answers for all of them before it is freed."""
    groups: dict[ModelOptions, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.teacher.options, []).append(job)
    return list(groups.values())


def capture_all(
    group: Sequence[Job], ledger: Ledger, everyone: Sequence[Job], look_first: bool = False
) -> Generator[events.Event, None, list[Job]]:
    """The jobs whose targets are in the cache. When this returns, the teacher is gone from memory.

    `look_first`: compare teacher and student on a few prompts before hours of work.
    """
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
    worth = (yield from _probe_all(group, teacher, settings, ledger)) if look_first else group
    for job in worth:
        try:
            job.targets = yield from capture_domain(job, teacher, settings[job.domain])
            captured.append(job)
        except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
            yield ledger.failed(job.domain, error)
    if teacher.close():
        yield events.TeacherFreed(mx.get_active_memory())
    return captured


def _probe_all(
    group: Sequence[Job], teacher: Teacher, settings: Mapping[str, TargetSettings], ledger: Ledger
) -> Generator[events.Event, None, list[Job]]:
    """The jobs whose teacher has something to teach, as far as a few held-out prompts tell."""
    compared = yield from probe(group, teacher, settings)
    passed = []
    for job in group:
        headroom = compared.get(job.domain)
        if isinstance(headroom, Exception):
            yield ledger.failed(job.domain, headroom)
        elif headroom is not None and job.config.gate.refuses(headroom):
            yield ledger.failed(job.domain, NothingToTeach(headroom))
        else:
            passed.append(job)
    return passed
