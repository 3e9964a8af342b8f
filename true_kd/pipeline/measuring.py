"""What is measured without training: finished adapters anew, and what each domain has to gain."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping, Sequence

import mlx.core as mx

from true_kd import events, reporting
from true_kd.alignment import Compatibility, MappedTargets
from true_kd.errors import TrueKDError, VocabularyError, portable
from true_kd.files import make_folder
from true_kd.gate import Headroom, ParentComparison
from true_kd.jobs import Job
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import ModelOptions, open_skeleton, release_memory
from true_kd.pipeline.apart import DEATHS, run_apart
from true_kd.pipeline.steps import (
    Ledger,
    capture_all,
    group_by_teacher,
    hold_folder,
    identify_jobs,
    look_free,
    run_student,
)
from true_kd.probing import compare_samples, compare_with_parents, sample_all
from true_kd.proof import Proof
from true_kd.status import published
from true_kd.student import evaluate_student
from true_kd.suggest import quote
from true_kd.teacher import Teacher


def evaluate(jobs: Sequence[Job], failures: Mapping[str, TrueKDError] | None = None) -> Iterator[events.Event]:
    """Measure the adapters that are there anew, and bring kd_metrics.json and kd_summary.json up to date.

    The teacher answers what the cache lacks of the held-out prompts' replies, and of training ones.

    Raises
    ------
    TrueKDError
        when nothing at all can be done.
    """
    ledger = Ledger()
    proofs: dict[str, Proof] = {}
    look_free(jobs)
    jobs, refused = identify_jobs(jobs, failures or {})
    out = jobs[0].config.out_folder
    with hold_folder(out):
        yield from published(out, jobs, _evaluate_all(jobs, refused, ledger, proofs))
        if proofs:
            reporting.refresh_summary(out)
            if any(job.config.report for job in jobs):
                from true_kd.report import write_report

                write_report(out, [], {})
    yield events.EvaluationFinished(proofs, ledger.failures)


def _evaluate_all(
    jobs: Sequence[Job], refused: Mapping[str, TrueKDError], ledger: Ledger, proofs: dict[str, Proof]
) -> Generator[events.Event, None, None]:
    """The work of an evaluation that holds its folder; fills `proofs`."""
    for domain, error in refused.items():
        yield ledger.failed(domain, error)
    for group in group_by_teacher(jobs):
        for job in group:
            make_folder(job.config.cache_folder)
        for job in (yield from capture_all(group, ledger, jobs)):
            try:
                proof, result = yield from run_student(evaluate_student, job)
                proofs[job.domain] = proof
                yield events.Evaluated(job.domain, proof, kept=result is not None)
            except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
                yield ledger.failed(job.domain, error)
            release_memory()


def analyze(
    jobs: Sequence[Job], failures: Mapping[str, TrueKDError] | None = None, parent: str | None = None
) -> Iterator[events.Event]:
    """Say what each domain has to gain, from a few held-out prompts; nothing is trained.

    Parameters
    ----------
    parent
        the full-precision model that the teacher was quantised from, to be compared with it.

    Raises
    ------
    TrueKDError
        when nothing at all can be done.
    """
    ledger = Ledger()
    headrooms: dict[str, Headroom] = {}
    parents: dict[str, ParentComparison] = {}
    tokenizers: dict[str, _Tokenizers] = {}
    jobs, refused = identify_jobs(jobs, failures or {})
    if parent is not None:
        # Before the teacher has worked for a comparison that cannot be.
        open_skeleton(_parent_of(jobs[0].teacher.options, parent), "--parent")
        if any(job.alignment for job in jobs):
            raise VocabularyError(
                f"--parent: student {quote(jobs[0].config.student.model)} has another tokenizer than the teacher: "
                "what is kept are the student's tokens, expected those of both. Name a student of the teacher's family."
            )
    for domain, error in refused.items():
        yield ledger.failed(domain, error)
    for group in group_by_teacher(jobs):
        for job in group:
            make_folder(job.config.cache_folder)
        try:
            compared, with_parents, theirs = yield from _compare_apart(group, jobs, parent)
        except DEATHS as error:
            compared, with_parents, theirs = {job.domain: error for job in group}, {}, {}
        parents |= with_parents
        tokenizers |= theirs
        for domain, found in compared.items():
            if isinstance(found, Exception):
                yield ledger.failed(domain, found)
            else:
                headrooms[domain] = found
    ranked = dict(sorted(headrooms.items(), key=lambda item: -item[1].kl.value))
    yield events.AnalysisFinished(ranked, parents, tokenizers, ledger.failures)


_Tokenizers = tuple[Compatibility, MappedTargets]
_Compared = tuple[dict[str, Headroom | Exception], dict[str, ParentComparison], dict[str, _Tokenizers]]


def _compare_apart(
    group: Sequence[Job], everyone: Sequence[Job], parent: str | None
) -> Generator[events.Event, None, _Compared]:
    config = group[0].config
    if not config.isolate:
        return (yield from compare_group(group, everyone, parent))
    what = f"teacher {quote(config.teacher.model)} and student {quote(config.student.model)}"
    remedy = "capture.batch_size or training.batch_size, or choose smaller or quantised models"
    return (yield from run_apart(compare_group, group, everyone, parent, what=what, remedy=remedy))


def compare_group(
    group: Sequence[Job], everyone: Sequence[Job], parent: str | None
) -> Generator[events.Event, None, _Compared]:
    """Compare a teacher with the students of its jobs and, where one is named, with its parent; by domain. The last are
    the tokenizers of those that have different ones."""
    set_guards(budget_bytes(None))
    options, cache_folder = group[0].teacher.options, group[0].config.cache_folder
    parents: dict[str, ParentComparison] = {}
    with contextlib.closing(Teacher(options, cache_folder)) as teacher:
        samples, compared = yield from sample_all(group, teacher, everyone)
        ready = [job for job in group if job.domain in samples]
        if parent is not None and ready:
            with contextlib.closing(Teacher(_parent_of(options, parent), cache_folder)) as original:
                parents = yield from compare_with_parents(ready, samples, teacher, original)
        if teacher.close():
            yield events.TeacherFreed(mx.get_active_memory())
        compared |= yield from compare_samples(ready, samples, teacher)
        mapped = {job.domain: samples[job.domain].mapped(teacher) for job in ready}
    told = {name: portable(each) if isinstance(each, Exception) else each for name, each in compared.items()}
    return told, parents, {domain: found for domain, found in mapped.items() if found is not None}


def _parent_of(teacher: ModelOptions, parent: str) -> ModelOptions:
    """The model that a quantised teacher was made from."""
    return teacher.model_copy(update={"model": parent, "adapter": None})
