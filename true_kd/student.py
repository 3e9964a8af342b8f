"""The student's phase of one domain: open, measure, adapt, train, keep the best, measure again, write the folder."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from dataclasses import replace

import mlx.core as mx

from true_kd import adapters, events, reporting
from true_kd.backend import versions
from true_kd.checkpoints import Checkpoint, Progress, drop_states, find_checkpoint, save_checkpoint
from true_kd.datasets import DomainData, build_data
from true_kd.errors import ModelError, NonFiniteLossError, PoorTargetsError
from true_kd.evaluation import evaluate, exact_match
from true_kd.fidelity import Fidelity, certify
from true_kd.files import remove, remove_temporaries, write_json
from true_kd.jobs import Job
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import LanguageModel, add_lora, open_model, parameter_count, release_memory, trainable
from true_kd.reporting import ExactMatch, KDResult, Validation
from true_kd.suggest import quote
from true_kd.training import NonFinite, Room, TrainingState, train


def distill_student(job: Job) -> Generator[events.Event, None, KDResult]:
    """Train one domain's adapter from the cached targets and write its folder; returns the result.

    Raises
    ------
    NonFiniteLossError
        when training diverges; the folder then holds the best weights so far.
    """
    config = job.config
    budget = budget_bytes(config.memory_gb)
    set_guards(budget)
    mx.reset_peak_memory()
    student = open_model(config.student, "student")
    data = build_data(job, student)
    checkpoint = None if config.fresh else find_checkpoint(job.folder, job.run_digest)
    made = checkpoint.progress.iteration if checkpoint else 0
    if not (checkpoint or config.fresh) and (others := adapters.checkpoints(job.folder)):
        yield events.CheckpointsReplaced(job.domain, max(others))
    yield events.TrainingStarted(job.domain, config.training.iters, data.counts, made)

    clock = _Clock()
    before = Validation(0, evaluate(student.module, data.valid, config.losses.final, config.training.batch_size))
    if not math.isfinite(before.metrics.loss):
        raise ModelError(
            f"student {quote(config.student.model)}: its loss on the validation prompts is not a finite number before "
            "any training, expected sound weights. Choose another model."
        )
    answers_before = _exact_match(job, student, data)
    clock.stop("evaluation")
    yield events.Validated(job.domain, before)

    student_parameters = parameter_count(student.module)
    mx.random.seed(config.seed)
    add_lora(student.module, config.lora)
    held = job.targets.cache.head_path
    budget -= held.stat().st_size if held else 0
    room = Room(student.module, data.train, config.training, config.losses, budget)
    fidelity = _certify(job, student, data, budget)
    clock.stop("evaluation")
    # With alpha 0 nothing is taken from the targets.
    poor = config.losses.distils and fidelity.is_poor(config.fidelity)
    yield events.Certified(job.domain, fidelity, poor)
    if poor and fidelity.refuses(config.fidelity):
        raise PoorTargetsError(
            fidelity.cosine, config.fidelity.least_cosine, fidelity.temperature, config.targets.has_budget
        )
    sampled = config.losses.final.divergence.sampled
    if not sampled and config.losses.distils and job.targets.cache.head_path is None:
        yield events.DivergenceCoarsened(job.domain, config.losses.divergence, fidelity.tail_mass)
    if (need := room.need(data.train)) > budget:
        yield events.MemoryShort(job.domain, need, room.weights, budget, config.training.grad_checkpoint)
    _begin_folder(job, made)
    run = yield from _train(job, student, data, clock, room, checkpoint)

    # What is reported is measured on the folder as it was saved, opened anew as its user will.
    del student
    release_memory()
    adapted = open_model(config.student, "student")
    adapters.load_adapter(adapted.module, job.folder)
    after = evaluate(adapted.module, data.valid, config.losses.final, config.training.batch_size)
    answers_after = _exact_match(job, adapted, data)
    clock.stop("evaluation")
    result = KDResult(
        domain=job.domain,
        teacher=job.teacher.name,
        student=config.student.model,
        adapter_path=str(job.folder),
        data=data.counts,
        before=before.metrics,
        after=after,
        best_iteration=run.best.iteration,
        exact_match=_compare_answers(job, data, answers_before, answers_after),
        steps=tuple(run.steps),
        validations=(before, *run.validations),
        seconds={"capture": job.targets.seconds, **clock.seconds},
        capture_peak_memory=job.targets.peak_memory,
        training_peak_memory=mx.get_peak_memory(),
        trainable_parameters=sum(weights.size for weights in run.best_weights.values()),
        student_parameters=student_parameters,
        fidelity=fidelity,
        finished_at=reporting.now(),
        versions=versions(),
    )
    reporting.write_result(job.folder, result, job.run_digest)
    drop_states(job.folder)
    return result


def _certify(job: Job, student: LanguageModel, data: DomainData, budget: int) -> Fidelity:
    config = job.config
    # Layers recompute in training mode only, and with dropout the certificate would measure that.
    plainly = config.training.model_copy(update={"grad_checkpoint": False})
    return certify(
        student.module,
        data.valid,
        replace(config.losses.final, temperature=config.losses.hottest),
        config.training.batch_size,
        config.fidelity,
        data.counts.cache_bytes,
        data.counts.cache_tokens,
        Room(student.module, data.valid, plainly, config.losses, budget),
    )


class _Clock:
    """Seconds per phase: `stop` books the time since the last stop."""

    def __init__(self) -> None:
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self._since = time.perf_counter()

    def stop(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now


def _begin_folder(job: Job, made: int) -> None:
    """Take away what passes for this run's but is beyond its steps; an adapter stays until there is a new one."""
    remove(job.folder / adapters.METRICS)
    adapters.remove_checkpoints(job.folder, made)
    for folder in (job.folder, *adapters.checkpoints(job.folder).values()):
        remove_temporaries(folder)


def _train(
    job: Job, student: LanguageModel, data: DomainData, clock: _Clock, room: Room, checkpoint: Checkpoint | None
) -> Generator[events.Event, None, Progress]:
    options, losses = job.config.training, job.config.losses
    run, state = Progress(), TrainingState(student.module, options)
    if checkpoint is not None:
        run = checkpoint.progress
        student.module.load_weights(list(checkpoint.weights.items()), strict=False)
        state.restore(run.iteration, checkpoint.state)
        if run.best is not None:
            _save(job, run.best_weights)
        clock.seconds["training"] += sum(step.seconds for step in run.steps)
    if run.is_over(options.iters, options.patience):
        return run
    # The loss of a step is that of the weights before it: a finite step proves those, not the ones it leaves.
    proven = current = trainable(student.module)
    try:
        for step in train(student.module, data.train, options, losses, job.config.seed, state, room):
            proven, current = current, trainable(student.module)
            run.steps.append(step)
            yield events.Stepped(job.domain, step)
            if step.iteration % options.validate_every == 0 or step.iteration == options.iters:
                clock.stop("training")
                metrics = evaluate(student.module, data.valid, losses.final, options.batch_size)
                if not math.isfinite(metrics.loss):
                    raise NonFinite(step.iteration, "the validation loss")
                if run.validated(Validation(step.iteration, metrics), current):
                    _save(job, current)
                clock.stop("evaluation")
                yield events.Validated(job.domain, run.validations[-1])
            over = run.is_over(options.iters, options.patience)
            if step.iteration % options.checkpoint_every == 0 or over:
                _save(job, current, step.iteration)
                save_checkpoint(job.folder, run, state.arrays(), job.run_digest)
            if over:
                break
    except NonFinite as error:
        if run.best is None:
            _save(job, proven)
        raise NonFiniteLossError(error.iteration, error.what, job.folder) from error
    clock.stop("training")
    return run


def _save(job: Job, weights: dict[str, mx.array], checkpoint: int | None = None) -> None:
    config = job.config
    folder = job.folder if checkpoint is None else adapters.checkpoint_folder(job.folder, checkpoint)
    settings = {
        "domain": job.domain,
        "teacher": job.teacher.name,
        **config.losses.model_dump(include={"divergence", "temperature", "alpha"}),
        "iters": config.training.iters,
        "learning_rate": config.training.learning_rate,
        "seed": config.seed,
        "run_digest": job.run_digest,
    }
    adapters.save_adapter(folder, weights, config.lora, config.student.model, settings)
    if checkpoint is None:
        # With the weights, so that it never describes others.
        write_json(folder / adapters.RUN, {**config.model_dump(mode="json"), "domains": [job.domain], "fresh": False})


def _exact_match(job: Job, student: LanguageModel, data: DomainData) -> float | None:
    if not (job.config.evaluation.exact_match and data.checkable):
        return None
    return exact_match(student, data.checkable, job.config.capture, job.config.evaluation)


def _compare_answers(job: Job, data: DomainData, before: float | None, after: float | None) -> ExactMatch | None:
    if before is None or after is None:
        return None
    return ExactMatch(tasks=len(data.checkable), student=before, adapted=after, teacher=job.targets.exact_match)
