"""One training of a student: the distillation itself, or the control beside it. Adapter, train, keep the best, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from true_kd import adapters, events
from true_kd.checkpoints import Progress, Start, find_start, save_checkpoint
from true_kd.datasets import DomainData
from true_kd.errors import NonFiniteLossError, PoorTargetsError
from true_kd.evaluation import evaluate
from true_kd.fidelity import Fidelity, certify
from true_kd.files import make_folder, remove, remove_temporaries, write_json
from true_kd.jobs import Job
from true_kd.memory import budget_bytes
from true_kd.models import LanguageModel, add_lora, is_finite, trainable
from true_kd.reporting import Finish, MetricsFile, Validation, lines_of
from true_kd.stopping import uninterrupted
from true_kd.training import NonFinite, Room, TrainingState, train


class Clock:
    """Seconds per phase: `stop` books the time since the last stop."""

    def __init__(self) -> None:
        self.seconds = {"training": 0.0, "evaluation": 0.0}
        self._since = time.perf_counter()

    def skip(self) -> None:
        """The time since the last stop is nobody's."""
        self._since = time.perf_counter()

    def stop(self, phase: str) -> None:
        """The time since the last stop went to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now


@dataclass(frozen=True)
class Trained:
    """What came of it; the best weights are in the job's folder."""

    progress: Progress
    fidelity: Fidelity | None
    """None for a control, which takes nothing from the targets' distribution."""
    peak_memory: int


def find_job_start(job: Job) -> Start:
    """Where an earlier run of this job stopped."""
    return Start() if job.config.fresh else find_start(job.folder, job.run_digest)


def train_arm(
    job: Job,
    student: LanguageModel,
    data: DomainData,
    clock: Clock,
    start: Start,
    before: Validation,
    has_signal: bool = True,
) -> Generator[events.Event, None, Trained]:
    """Put an adapter on a freshly opened student, train it and leave the best weights in the job's folder.

    `before` is the student's validation as it came. `has_signal` is false for a student that says what its teacher
    says: the gradient from any targets is then noise, which says nothing against the targets.

    Raises
    ------
    PoorTargetsError
        when the cached targets say too little of the teacher.
    NonFiniteLossError
        when training diverges; the folder then holds the best weights so far.
    """
    config = job.config
    mx.random.seed(config.seed)
    add_lora(student.module, config.lora)
    budget = budget_bytes(config.memory_gb)
    held = job.targets.cache.head_path
    budget -= held.stat().st_size if held else 0
    room = Room.of(student.module, data.train, config.training, config.losses, budget)
    fidelity = None if job.is_control else (yield from _certify(job, student, data, budget, has_signal))
    clock.stop("evaluation")
    if (need := room.need(data.train)) > budget:
        yield events.MemoryShort(job.label, need, room.weights, budget, config.training.grad_checkpoint)
    _begin_folder(job, start.made)
    with contextlib.closing(MetricsFile(job.folder)) as told:
        run = yield from _train(job, student, data, clock, room, start, before, told)
    return Trained(run, fidelity, mx.get_peak_memory())


def _certify(
    job: Job, student: LanguageModel, data: DomainData, budget: int, has_signal: bool
) -> Generator[events.Event, None, Fidelity]:
    config = job.config
    # Layers recompute in training mode only, and with dropout the certificate would measure that.
    plainly = config.training.model_copy(update={"grad_checkpoint": False})
    fidelity = certify(
        student.module,
        data.valid,
        replace(config.losses.final, temperature=config.losses.hottest),
        config.training.batch_size,
        config.fidelity,
        data.counts.cache_bytes,
        data.counts.cache_tokens,
        Room.of(student.module, data.valid, plainly, config.losses, budget),
    )
    # With alpha 0 nothing is taken from the targets.
    poor = config.losses.distils and has_signal and fidelity.is_poor(config.fidelity)
    yield events.Certified(job.label, fidelity, poor)
    if poor and fidelity.refuses(config.fidelity):
        raise PoorTargetsError(
            fidelity.cosine, config.fidelity.least_cosine, fidelity.temperature, config.targets.has_budget
        )
    sampled = config.losses.final.divergence.sampled
    if not sampled and config.losses.distils and job.targets.cache.head_path is None:
        yield events.DivergenceCoarsened(job.label, config.losses.divergence, fidelity.tail_mass)
    return fidelity


def _begin_folder(job: Job, made: int) -> None:
    """Take away what passes for this run's but is beyond its steps; an adapter stays until there is a new one."""
    make_folder(job.folder)
    remove(job.folder / adapters.METRICS)
    adapters.remove_checkpoints(job.folder, made)
    for folder in (job.folder, *adapters.checkpoints(job.folder).values()):
        remove_temporaries(folder)


def _train(
    job: Job,
    student: LanguageModel,
    data: DomainData,
    clock: Clock,
    room: Room,
    start: Start,
    before: Validation,
    told: MetricsFile,
) -> Generator[events.Event, None, Progress]:
    options, losses = job.config.training, job.config.losses
    run, state = Progress(), TrainingState(student.module, options)
    checkpoint, made = start.checkpoint, start.made
    # The loss of a step is that of the weights before it: a finite step proves those, not the ones it leaves. A new
    # adapter changes nothing, and the student itself was measured.
    proven = current = trainable(student.module)
    if checkpoint is not None:
        run = checkpoint.progress
        student.module.load_weights(list(checkpoint.weights.items()), strict=False)
        current = trainable(student.module)
        state.restore(run.iteration, checkpoint.state)
        if run.best is not None:
            _save(job, run.best_weights)
        clock.seconds["training"] += sum(step.seconds for step in run.steps)
    told.begin(lines_of(job.label, options.iters, run.steps, [before, *run.validations]))
    steps = train(student.module, data.train, options, losses, job.config.seed, state, room)
    try:
        while True:
            # A run that was stopped in its validation goes on with that.
            if run.lacks_validation(options.iters, options.validate_every):
                clock.stop("training")
                yield from _validate(job, student, data, run, current, told)
                clock.stop("evaluation")
            over = run.is_over(options.iters, options.patience)
            # One that was saved in the validation that ends the run did not know that it is the last.
            if over or (run.iteration > made and run.iteration % options.checkpoint_every == 0):
                with uninterrupted():
                    _save_checkpoint(job, current, run, state)
            if over:
                with uninterrupted():
                    told.add(Finish(run.iteration, run.best.iteration))
                break
            with uninterrupted():
                step = next(steps)
                proven, current = current, trainable(student.module)
                run.steps.append(step)
                told.add(step)
            yield events.Stepped(job.label, step)
    except NonFinite as error:
        if run.best is None:
            _save(job, proven)
            # Nothing has proved the weights of its newest checkpoint: the run would go on only to end here again.
            adapters.remove_checkpoints(job.folder, run.iteration - 1)
        raise NonFiniteLossError(error.iteration, error.what, job.folder) from error
    except KeyboardInterrupt:
        if run.iteration > made:
            # What is not finite is no place to go on from; the signal is what ends the run all the same.
            with uninterrupted(), contextlib.suppress(NonFinite):
                _save_checkpoint(job, current, run, state)
        raise
    clock.stop("training")
    return run


def _validate(
    job: Job,
    student: LanguageModel,
    data: DomainData,
    run: Progress,
    current: dict[str, mx.array],
    told: MetricsFile,
) -> Generator[events.Event, None, None]:
    metrics = evaluate(student.module, data.valid, job.config.losses.final, job.config.training.batch_size)
    if not metrics.is_finite:
        raise NonFinite(run.iteration, "the validation loss")
    if not is_finite(current).item():
        raise NonFinite(run.iteration, "the adapter")
    # Noted with its weights, or not at all.
    with uninterrupted():
        if run.validated(Validation(run.iteration, metrics), current):
            _save(job, current)
        told.add(run.validations[-1])
    yield events.Validated(job.label, run.validations[-1])


def _save_checkpoint(job: Job, weights: dict[str, mx.array], run: Progress, state: TrainingState) -> None:
    options = job.config.training
    scheduled = run.iteration % options.checkpoint_every == 0 or run.is_over(options.iters, options.patience)
    arrays = state.arrays()
    for numbers, what in ((weights, "the adapter"), (arrays, "the optimizer's state")):
        if not is_finite(numbers).item():
            raise NonFinite(run.iteration, what)
    _save(job, weights, run.iteration)
    save_checkpoint(job.folder, run, arrays, job.run_digest, scheduled)


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
    # With the weights, so that it never describes others.
    run = _resolved(job) if checkpoint is None else None
    adapters.save_adapter(folder, weights, config.lora, config.student.model, settings, run)


def write_run(job: Job) -> None:
    """The resolved config beside the adapter, itself a valid `--config`."""
    write_json(job.folder / adapters.RUN, _resolved(job))


def _resolved(job: Job) -> dict[str, Any]:
    return {**job.config.model_dump(mode="json"), "domains": [job.domain], "fresh": False}
