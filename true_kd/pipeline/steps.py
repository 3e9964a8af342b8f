"""The steps that runs share: who may begin, who holds the folder, the teacher's phase, and how domains ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from true_kd import events
from true_kd.alignment import Pairing, pair
from true_kd.config import RunConfig
from true_kd.errors import InputError, TrueKDError, let_go, told_plainly
from true_kd.examples import render
from true_kd.files import make_folder, remove, remove_temporaries
from true_kd.gate import NothingToTeach
from true_kd.jobs import Job, find_teacher, refuse
from true_kd.locks import Lock, check_free, hold
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import ModelOptions, check_keys, describe, open_skeleton, open_tokenizer, open_tokenizer_here
from true_kd.pipeline.apart import Phase, run_apart
from true_kd.probing import probe
from true_kd.reporting import KDResult
from true_kd.status import FILE, LOCK
from true_kd.suggest import quote
from true_kd.targets import TargetSettings
from true_kd.teacher import Teacher, WeightsWanted, capture_domain, choose_targets
from true_kd.vocabulary import VocabStrategy


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
        error = told_plainly(error)
        trace = let_go(error)
        return self.failed_elsewhere(events.DomainFailed(domain, error, trace))

    def failed_elsewhere(self, failure: events.DomainFailed) -> events.DomainFailed:
        """Note a failure that another process tells of."""
        self.failures[failure.domain] = failure.error
        return failure


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
    # Domains mostly share their models: each is looked at once, and each pair of vocabularies compared once.
    look = Look()

    def identify(job: Job) -> None:
        teacher, student = job.teacher.options, job.config.student
        job.teacher_digest, job.student_digest = look.at(job, teacher, "teacher"), look.at(job, student, "student")
        paired = look.pair(teacher, job.config)
        job.vocabulary, job.alignment = paired.vocabulary, paired.alignment
        if job.config.lora.keys is not None:
            check_keys(look.skeleton(student, "student"), job.config.lora)

    return sift(jobs, refused, identify)


class Look:
    """What is found out of the models of a run before it makes or opens anything: each model is looked at once."""

    def __init__(self) -> None:
        self.tokenizer = cache(open_tokenizer)
        self.skeleton = cache(open_skeleton)
        self._describe = cache(describe)
        self._pair = cache(self._pair_once)

    def pair(self, teacher: ModelOptions, config: RunConfig, download: bool = True) -> Pairing:
        """How the tokenizers of a teacher and a config's student go together.

        Raises
        ------
        InputError
            when the two vocabularies, or the options, do not allow it.
        ModelError
            when there is no such student; without `download` also when it is not on this disk.
        """
        found = self._pair(teacher, config.student, config.vocab_strategy, config.force, download)
        found.check(config.targets, config.losses)
        return found

    def _pair_once(
        self, teacher: ModelOptions, student: ModelOptions, strategy: VocabStrategy, force: bool, download: bool
    ) -> Pairing:
        theirs = self.tokenizer(teacher, "teacher")
        ours = self.tokenizer(student, "student") if download else open_tokenizer_here(student, "student")
        return pair(theirs, ours, student, strategy, force)

    def at(self, job: Job, options: ModelOptions, seam: str) -> str:
        """The digest of a model that mlx-lm can build of its files, and whose template takes a job's first prompts.

        Raises
        ------
        InputError
            when it cannot, or does not.
        """
        text = self.tokenizer(options, seam)
        if self._describe(options, seam).weights:
            self.skeleton(options, seam)
        for prompt in (*job.train_prompts[:1], *job.valid_prompts[:1]):
            render(prompt, text.tokenizer, text.stop_ids, text.name)
        return text.digest


_WORK = ".lock-work"
"""In an output folder: held by the process that trains, which may outlive a run that is killed by a moment."""
_ORPHAN = 30.0
"""Seconds that such a process may take to notice."""


def look_free(jobs: Sequence[Job]) -> None:
    """Raise `LockedError` where another run has the output folder: before anything that takes its time."""
    for job in jobs[:1]:
        check_free(job.config.out_folder / LOCK)


@contextlib.contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """The lock on an output folder: two runs never write one."""
    if any(path.exists() and not path.is_dir() for path in (out, *out.parents)):
        raise InputError(f"--out {quote(str(out))}: a file is in the way, expected a folder. Choose another name.")
    make_folder(out)
    with hold(out / LOCK):
        remove_temporaries(out)
        remove(out / FILE)
        Lock(out / _WORK).release()
        yield


def group_by_teacher(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs that share a teacher, in order: it answers for all of them before it is freed."""
    groups: dict[ModelOptions, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.teacher.options, []).append(job)
    return list(groups.values())


@dataclass(frozen=True)
class _Ready:
    """A job whose targets are in the cache, on its way from the process that captured them."""

    job: Job

    @property
    def domain(self) -> str:
        return self.job.domain


def capture_all(
    group: Sequence[Job], ledger: Ledger, everyone: Sequence[Job], look_first: bool = False
) -> Generator[events.Event, None, list[Job]]:
    """The jobs whose targets are in the cache. When this returns, the teacher is gone from memory.

    Where the process of the teacher dies at a domain, another goes on with the next.

    `look_first`: compare teacher and student on a few prompts before hours of work.
    """
    captured: list[Job] = []
    waiting, at = list(group), ""
    # What the cache holds needs no process of its own: that one has its imports to do, and opens nothing.
    apart = False
    while waiting:
        try:
            with contextlib.closing(_capture(waiting, everyone, look_first, apart)) as capturing:
                for event in capturing:
                    if isinstance(event, (_Ready, events.DomainFailed)):
                        waiting = [job for job in waiting if job.domain != event.domain]
                        at = waiting[0].domain if waiting else ""
                    elif isinstance(event, (events.Captured, events.TeacherOpening)):
                        at = getattr(event, "domain", "")
                    if isinstance(event, _Ready):
                        captured.append(event.job)
                    elif isinstance(event, events.DomainFailed):
                        yield ledger.failed_elsewhere(event)
                    else:
                        yield event
            break
        except WeightsWanted:
            apart = True
        except TrueKDError as error:
            # Before the first domain nothing tells whose work was too much.
            blamed = [job for job in waiting if job.domain == at] or waiting
            for job in blamed:
                yield ledger.failed(job.domain, error)
            waiting = [job for job in waiting if job not in blamed]
    return captured


def _capture(
    group: Sequence[Job], everyone: Sequence[Job], look_first: bool, apart: bool
) -> Generator[events.Event | _Ready, None, None]:
    if not (apart and group[0].config.isolate):
        return capture_group(group, everyone, look_first, may_open=not group[0].config.isolate)
    what = f"teacher {quote(group[0].config.teacher.model)}"
    remedy = (
        "capture.batch_size, capture.max_tokens or (for the student of a probe) training.batch_size, or choose a "
        "smaller or quantised teacher"
    )
    return run_apart(capture_group, group, everyone, look_first, what=what, remedy=remedy)


def capture_group(
    group: Sequence[Job], everyone: Sequence[Job], look_first: bool, may_open: bool = True
) -> Generator[events.Event | _Ready, None, None]:
    """Capture the targets of jobs that share a teacher; yields each that has them.

    Raises
    ------
    WeightsWanted
        when the teacher is needed for the next of them, and `may_open` is false.
    """
    set_guards(budget_bytes(None))
    mx.reset_peak_memory()
    ledger = Ledger()
    try:
        teacher = Teacher(group[0].teacher.options, group[0].config.cache_folder, may_open)
    except TrueKDError as error:
        for job in group:
            yield ledger.failed(job.domain, error)
        return
    with contextlib.closing(teacher):
        try:
            alike = [job for job in everyone if job.teacher.options == teacher.options]
            settings = yield from choose_targets(group, teacher, alike)
        except TrueKDError as error:
            for job in group:
                yield ledger.failed(job.domain, error)
            return
        worth = (yield from _probe_all(group, teacher, settings, ledger)) if look_first else group
        for job in worth:
            try:
                job.targets = yield from capture_domain(job, teacher, settings[job.domain])
            except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
                yield ledger.failed(job.domain, error)
                continue
            yield _Ready(job)
        if teacher.close():
            yield events.TeacherFreed(mx.get_active_memory())


def run_student(phase: Phase, job: Job) -> Generator[events.Event, None, Any]:
    """The student's phase of one domain, in a process of its own where the config has it so.

    Parameters
    ----------
    phase
        takes the job.
    """
    if not job.config.isolate:
        return (yield from _hold_work(phase, job))
    what = f"{job.domain}: student {quote(job.config.student.model)}"
    remedy = "training.batch_size, --max-seq-length or --memory-gb, set training.grad_checkpoint=true"
    return (yield from run_apart(_hold_work, phase, job, what=what, remedy=remedy))


def _hold_work(phase: Phase, job: Job) -> Generator[events.Event, None, Any]:
    """Only one process writes in the folders of the domains, also where the parent of another was killed just now."""
    with hold(job.config.out_folder / _WORK, patience=_ORPHAN):
        return (yield from phase(job))


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
