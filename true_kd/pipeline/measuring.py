"""What is measured without training: finished adapters anew, and what each domain has to gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx

from true_kd import events, reporting
from true_kd.errors import TrueKDError
from true_kd.files import make_folder
from true_kd.gate import Headroom, ParentComparison
from true_kd.jobs import Job
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import release_memory
from true_kd.pipeline.steps import Ledger, capture_all, group_by_teacher, hold, identify_jobs
from true_kd.probing import compare_samples, compare_with_parents, sample_all
from true_kd.proof import Proof
from true_kd.report import write_report
from true_kd.student import evaluate_student
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
    jobs, refused = identify_jobs(jobs, failures or {})
    out = jobs[0].config.out_folder
    with hold(out):
        for domain, error in refused.items():
            yield ledger.failed(domain, error)
        for group in group_by_teacher(jobs):
            for job in group:
                make_folder(job.config.cache_folder)
            for job in (yield from capture_all(group, ledger, jobs)):
                try:
                    proof, result = yield from evaluate_student(job)
                    proofs[job.domain] = proof
                    yield events.Evaluated(job.domain, proof, kept=result is not None)
                except Exception as error:  # noqa: BLE001 - a domain fails alone, be it by a bug
                    yield ledger.failed(job.domain, error)
                release_memory()
        if proofs:
            reporting.refresh_summary(out)
            if any(job.config.report for job in jobs):
                write_report(out, [], {})
    yield events.EvaluationFinished(proofs, ledger.failures)


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
    jobs, refused = identify_jobs(jobs, failures or {})
    for domain, error in refused.items():
        yield ledger.failed(domain, error)
    for group in group_by_teacher(jobs):
        for job in group:
            make_folder(job.config.cache_folder)
        set_guards(budget_bytes(None))
        teacher = Teacher(group[0].teacher.options)
        samples, compared = yield from sample_all(group, teacher, jobs)
        ready = [job for job in group if job.domain in samples]
        if parent is not None and ready:
            original = Teacher(group[0].teacher.options.model_copy(update={"model": parent, "adapter": None}))
            parents |= yield from compare_with_parents(ready, samples, teacher, original)
        if teacher.close():
            yield events.TeacherFreed(mx.get_active_memory())
        compared |= yield from compare_samples(ready, samples, teacher)
        for domain, found in compared.items():
            if isinstance(found, Exception):
                yield ledger.failed(domain, found)
            else:
                headrooms[domain] = found
    ranked = dict(sorted(headrooms.items(), key=lambda item: -item[1].kl.value))
    yield events.AnalysisFinished(ranked, parents, ledger.failures)
