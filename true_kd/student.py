"""The student's phase of one domain: measure, train, train the control, measure again, prove, write the folder."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from true_kd import adapters, events, reporting
from true_kd.arms import Clock, Trained, find_job_start, train_arm, write_run
from true_kd.backend import versions
from true_kd.checkpoints import Start, clean_up
from true_kd.datasets import DomainData, build_data
from true_kd.errors import InputError
from true_kd.evaluation import EvalMetrics, evaluate, exact_match, measure
from true_kd.gate import Headroom, NothingToTeach, check_sound, weigh_up
from true_kd.jobs import Job
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import LanguageModel, open_model, release_memory
from true_kd.proof import Measured, Proof, prove
from true_kd.reporting import KDResult, Validation
from true_kd.sizes import ModelSize, measure_size, measure_speed
from true_kd.suggest import quote


def distill_student(job: Job) -> Generator[events.Event, None, KDResult]:
    """Train one domain's adapter from the cached targets, prove what it is worth and write its folder.

    An adapter that an earlier run of this job has finished is measured, and not trained again.

    Raises
    ------
    NothingToTeach
        when the teacher is no better than the student, and the gate is to refuse that.
    PoorTargetsError, NonFiniteLossError
        see `arms.train_arm`.
    """
    config = job.config
    set_guards(budget_bytes(config.memory_gb))
    mx.reset_peak_memory()
    earlier = None if config.fresh else reporting.read_result(job.folder, job.run_digest)
    student = open_model(config.student, "student")
    data = build_data(job, student)
    start = Start() if earlier else find_job_start(job)
    if earlier is None:
        yield from _announce(job, data, start)
    clock = Clock()
    base = _measure_base(job, student, data)
    clock.stop("evaluation")
    if earlier is None:
        yield events.Validated(job.label, base.validation)
        yield from _pass_gate(job, base.headroom)
        has_signal = base.headroom.standing != "same"
        trained = yield from train_arm(job, student, data, clock, start, base.validation, has_signal)
    tokenizer = student.tokenizer
    del student
    release_memory()
    yield events.Proving(job.label, len(data.valid))
    # What is reported is measured on the folder as it was saved, opened anew as its user will.
    adapted = _measure_adapter(job, base)
    clock.stop("evaluation")
    after = adapted.scores.metrics(config.losses.final)
    if earlier is None:
        result = _result(job, base.validation, after, data, trained, clock)
    else:
        result = replace(earlier, after=after, unchanged=False, finished_at=reporting.now(), versions=versions())
    result = replace(result, proof=_prove(job, base, adapted, None, tokenizer))
    # Before the control: should that fail, what was distilled is finished all the same.
    _write(job, result)
    control, took = yield from _run_control(job, base)
    if control is not None:
        proof = _prove(job, base, adapted, control, tokenizer)
        result = replace(result, proof=proof, seconds={**result.seconds, **took})
        _write(job, result)
    return result


def evaluate_student(job: Job) -> Generator[events.Event, None, tuple[Proof, KDResult | None]]:
    """Measure the adapter in a job's folder; what an earlier run of this job left is brought up to date.

    Returns
    -------
    proof, result
        the latter None where the adapter is of other prompts or settings, or its run was not finished.

    Raises
    ------
    InputError
        when there is no adapter.
    """
    config = job.config
    set_guards(budget_bytes(config.memory_gb))
    if not (job.folder / adapters.WEIGHTS).is_file():
        raise InputError(f"{job.folder}: no adapter here, expected one. Run `true-kd distill --domain {job.domain}`.")
    student = open_model(config.student, "student")
    data = build_data(job, student)
    base = _measure_base(job, student, data)
    tokenizer = student.tokenizer
    del student
    release_memory()
    earlier = reporting.read_result(job.folder, job.run_digest)
    control, took = yield from _run_control(job, base, may_train=earlier is not None)
    yield events.Proving(job.label, len(data.valid))
    adapted = _measure_adapter(job, base)
    proof = _prove(job, base, adapted, control, tokenizer)
    if earlier is None:
        return proof, None
    after = adapted.scores.metrics(config.losses.final)
    result = replace(
        earlier, after=after, proof=proof, unchanged=False, versions=versions(), seconds={**earlier.seconds, **took}
    )
    _write(job, result)
    return proof, result


def _write(job: Job, result: KDResult) -> None:
    """The record of a finished domain, and the settings that it was measured by."""
    write_run(job)
    settle_lines(job, result)
    reporting.write_result(job.folder, result, job.run_digest, job.proof_digest)
    clean_up(job.folder)


def settle_lines(job: Job, result: KDResult) -> None:
    """Have metrics.jsonl say what the result of a job says."""
    reporting.settle(job.folder, job.label, job.config.training.iters, result)


@dataclass(frozen=True)
class _Base:
    """The student as it came, on a domain's held-out prompts."""

    data: DomainData
    measured: Measured
    validation: Validation
    headroom: Headroom


def _announce(job: Job, data: DomainData, start: Start) -> Generator[events.Event, None, None]:
    if not job.config.fresh and (wrong := reporting.find_damage(job.folder, job.run_digest)):
        yield events.AdapterDamaged(job.label, str(job.folder), wrong)
    if start.damaged:
        yield events.CheckpointsDamaged(job.label, start.damaged, start.made)
    elif not (start.made or job.config.fresh) and (others := adapters.checkpoints(job.folder)):
        yield events.CheckpointsReplaced(job.label, max(others))
    iters, digest = job.config.training.iters, job.run_digest
    yield events.TrainingStarted(job.label, iters, data.counts, start.made, job.config, digest)


def _measure_base(job: Job, student: LanguageModel, data: DomainData) -> _Base:
    final = job.config.losses.final
    scores = measure(student.module, data.valid, final, job.config.training.batch_size)
    check_sound(scores, f"student {quote(job.config.student.model)}")
    right = _right_answers(job, student, data)
    speed_tokens = job.config.evaluation.speed_tokens
    size = measure_size(student, job.config.student, "student", _prompts(data), speed_tokens)
    headroom = weigh_up(data.valid, scores, student.tokenizer, data.given and job.knows_text, job.targets.right, right)
    return _Base(data, Measured(scores, right, size), Validation(0, scores.metrics(final)), headroom)


def _prompts(data: DomainData) -> list[list[int]]:
    return [example.prompt.tolist() for example in data.valid]


def _pass_gate(job: Job, headroom: Headroom) -> Generator[events.Event, None, None]:
    if not job.was_probed:
        yield events.Probed(job.label, headroom)
    if job.config.gate.refuses(headroom):
        raise NothingToTeach(headroom)


def _prove(job: Job, base: _Base, adapted: Measured, control: Measured | None, tokenizer: Any) -> Proof:
    return prove(
        job.domain,
        base.data.valid,
        base.measured,
        adapted,
        control,
        job.targets.right,
        job.targets.teacher_size,
        base.headroom,
        tokenizer,
    )


def _run_control(
    job: Job, base: _Base, may_train: bool = True
) -> Generator[events.Event, None, tuple[Measured | None, dict[str, float]]]:
    """The control as it measures, and the seconds that it took; one is trained where it is wanted and not there.

    `may_train` is false where the adapter itself is of other prompts or settings: then no control is made for it.
    """
    control, wanted = job.control(), job.config.control != "none" and may_train
    redo = wanted and job.config.fresh
    finished = None if redo else reporting.read_result(control.folder, control.run_digest)
    if finished is None and not wanted:
        return None, {}
    if finished is None:
        finished = yield from _train_control(control)
    return _measure_adapter(control, base, job), {"control": sum(finished.seconds.values())}


def _train_control(control: Job) -> Generator[events.Event, None, KDResult]:
    final, batch_size = control.config.losses.final, control.config.training.batch_size
    student = open_model(control.config.student, "student")
    data = build_data(control, student)
    start = find_job_start(control)
    yield from _announce(control, data, start)
    clock = Clock()
    before = Validation(0, evaluate(student.module, data.valid, final, batch_size))
    yield events.Validated(control.label, before)
    trained = yield from train_arm(control, student, data, clock, start, before)
    del student
    release_memory()
    adapted = open_model(control.config.student, "student")
    adapters.load_adapter(adapted.module, control.folder)
    after = evaluate(adapted.module, data.valid, final, batch_size)
    clock.stop("evaluation")
    result = _result(control, before, after, data, trained, clock)
    settle_lines(control, result)
    reporting.write_result(control.folder, result, control.run_digest)
    clean_up(control.folder)
    return result


def _measure_adapter(job: Job, base: _Base, judge: Job | None = None) -> Measured:
    """A job's adapter on the held-out prompts, by the objective of `judge`; None stands for the job itself."""
    config = (judge or job).config
    adapted = open_model(config.student, "student")
    adapters.load_adapter(adapted.module, job.folder)
    scores = measure(adapted.module, base.data.valid, config.losses.final, config.training.batch_size)
    check_sound(scores, f"adapter {quote(str(job.folder))}", "Distil it again.")
    weights = job.folder / adapters.WEIGHTS
    size = ModelSize(
        parameters=(base.measured.size.parameters or 0) + adapters.count_parameters(weights),
        bytes=(base.measured.size.bytes or 0) + weights.stat().st_size,
        tokens_per_second=measure_speed(adapted, _prompts(base.data), config.evaluation.speed_tokens),
    )
    right = _right_answers(judge or job, adapted, base.data)
    del adapted
    release_memory()
    return Measured(scores, right, size)


def _right_answers(job: Job, model: LanguageModel, data: DomainData) -> np.ndarray | None:
    if not (job.config.evaluation.exact_match and data.checkable):
        return None
    return exact_match(model, data.checkable, job.config.capture, job.config.evaluation)


def _result(
    job: Job, before: Validation, after: EvalMetrics, data: DomainData, trained: Trained, clock: Clock
) -> KDResult:
    run = trained.progress
    return KDResult(
        domain=job.domain,
        teacher=job.teacher.name,
        student=job.config.student.model,
        adapter_path=str(job.folder),
        data=data.counts,
        before=before.metrics,
        after=after,
        best_iteration=run.best.iteration,
        steps=tuple(run.steps),
        validations=(before, *run.validations),
        seconds={"capture": 0.0 if job.is_control else job.targets.seconds, **clock.seconds},
        capture_peak_memory=0 if job.is_control else job.targets.peak_memory,
        training_peak_memory=trained.peak_memory,
        trainable_parameters=sum(weights.size for weights in run.best_weights.values()),
        fidelity=trained.fidelity,
        finished_at=reporting.now(),
        versions=versions(),
    )
