"""The main job, top to bottom: plan, capture the teacher, train each student, sum up.

`distill` is the one function to read first. It is a generator of events (see `true_kd.events`): it prints nothing,
and whoever runs it shows what it wants. The teacher is opened once, answers for all domains and is freed before the
first student is opened, so a run's peak memory is that of its larger phase, not the sum.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
from filelock import FileLock, Timeout

from true_kd import events, reporting
from true_kd.cache import TargetCache, default_root
from true_kd.capture import capture, render_for, teacher_identity
from true_kd.errors import InputError, LockedError, TrueKDError
from true_kd.evaluation import score_answers
from true_kd.files import CannotWrite
from true_kd.jobs import CapturedTargets, Job
from true_kd.models import LanguageModel, ModelOptions, describe, open_model, open_tokenizer, release_memory
from true_kd.reporting import KDResult
from true_kd.student import distill_student
from true_kd.vocabulary import map_vocabulary


def distill(jobs: Sequence[Job], failures: Mapping[str, TrueKDError] | None = None) -> Iterator[events.Event]:
    """Distil every domain: one adapter folder each, and `kd_summary.json` over all.

    A domain that fails is reported and the others go on; one that is finished and unchanged is not done again.
    `failures` are those of planning (see `jobs.plan`), reported along with the others.

    Raises
    ------
    TrueKDError
        for what stops all domains: a model that cannot be opened, vocabularies that differ, a locked folder.
    """
    started = time.perf_counter()
    out = Path(jobs[0].config.out)
    ledger = _Ledger()
    with _hold(out):
        for domain, error in (failures or {}).items():
            yield ledger.failed(domain, error)
        todo = yield from _skip_finished(jobs, ledger)
        for group in _group_by_models(todo):
            _compare_vocabularies(group)
            captured = yield from _capture_all(group, ledger)
            for job in captured:
                yield from _train_isolated(job, ledger)
        seconds = time.perf_counter() - started
        summary = reporting.write_summary(
            out, ledger.results, {domain: str(error) for domain, error in ledger.failures.items()}, seconds
        )
    yield events.RunFinished(tuple(ledger.results), ledger.failures, summary, seconds)


class _Ledger:
    """How the domains of a run ended."""

    def __init__(self) -> None:
        self.results: list[KDResult] = []
        self.failures: dict[str, Exception] = {}

    def finished(self, result: KDResult) -> events.DomainFinished:
        self.results.append(result)
        return events.DomainFinished(result)

    def failed(self, domain: str, error: Exception) -> events.DomainFailed:
        self.failures[domain] = error
        return events.DomainFailed(domain, error)


@contextlib.contextmanager
def _hold(out: Path) -> Iterator[None]:
    """The lock on an output folder: two runs never write one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out {out}: a file is in the way, expected a folder. Choose another name.") from error
    except OSError as error:
        raise CannotWrite(out, error) from error
    lock = FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise LockedError(out, "another true-kd run") from error
    except OSError as error:
        raise CannotWrite(out, error) from error
    try:
        yield
    finally:
        lock.release()


def _skip_finished(jobs: Sequence[Job], ledger: _Ledger) -> Generator[events.Event, None, list[Job]]:
    """The jobs that have work to do; each gets its digest."""
    seams = {job.config.teacher: "teacher" for job in jobs} | {job.config.student: "student" for job in jobs}
    models = {options: describe(options, seam).digest for options, seam in seams.items()}
    todo = []
    for job in jobs:
        job.run_digest = job.digest(models)
        finished = None if job.config.fresh else reporting.read_result(job.folder, job.run_digest)
        if finished is None:
            todo.append(job)
        else:
            yield ledger.finished(finished)
    return todo


def _group_by_models(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that share teacher and student, in order: a teacher is opened once per group."""
    groups: dict[tuple[ModelOptions, ModelOptions], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.config.teacher, job.config.student), []).append(job)
    return list(groups.values())


def _compare_vocabularies(group: Sequence[Job]) -> None:
    """Prove that teacher and student mean the same by their ids, from the tokenizers alone, before hours of work."""
    teacher = open_tokenizer(group[0].config.teacher, "teacher")
    student = open_tokenizer(group[0].config.student, "student")
    for job in group:
        job.vocabulary = map_vocabulary(teacher.ids, student.ids, teacher.size, student.size, job.config.vocab_strategy)


def _capture_all(group: Sequence[Job], ledger: _Ledger) -> Generator[events.Event, None, list[Job]]:
    """The jobs whose targets are in the cache. When this returns, the teacher is gone from memory."""
    yield events.TeacherOpening(group[0].config.teacher.model)
    mx.reset_peak_memory()
    teacher = open_model(group[0].config.teacher, "teacher")
    captured = []
    for job in group:
        try:
            job.targets = yield from _capture(job, teacher)
            captured.append(job)
        except Exception as error:
            yield ledger.failed(job.domain, error)
    del teacher
    release_memory()
    yield events.TeacherFreed(mx.get_active_memory())
    return captured


def _capture(job: Job, teacher: LanguageModel) -> Generator[events.Event, None, CapturedTargets]:
    started = time.perf_counter()
    config = job.config
    root = Path(config.cache).expanduser() if config.cache else default_root()
    cache = TargetCache(root, teacher_identity(teacher, config.capture, config.targets))
    train = render_for(teacher, job.train_prompts)
    valid = render_for(teacher, job.valid_prompts)
    for progress in capture(teacher, [*train, *valid], cache, config.capture, config.targets):
        yield events.Captured(job.domain, progress)
    replies = cache.read(dict.fromkeys(prompt.key for prompt in valid))
    answered = [
        (prompt, replies[asked.key].tokens)
        for prompt, asked in zip(job.valid_prompts, valid, strict=True)
        if prompt.answer is not None
    ]
    score = score_answers(*zip(*answered, strict=True), teacher, config.evaluation) if answered else None
    return CapturedTargets(cache, train, valid, time.perf_counter() - started, mx.get_peak_memory(), score)


def _train_isolated(job: Job, ledger: _Ledger) -> Iterator[events.Event]:
    try:
        result = yield from distill_student(job)
        yield ledger.finished(result)
    except Exception as error:
        yield ledger.failed(job.domain, error)
    release_memory()
