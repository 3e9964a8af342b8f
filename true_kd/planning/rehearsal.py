"""What a run takes, of time and memory, found by going through its motions with models cut to a few layers.

The code is that of the run: opening, capture, measuring, certificate, training steps. The models have the shapes of the
real ones and no weights (see `models.shallow`), at two depths, and all that is measured is linear in the layers: so
what the real one takes follows, whatever the family, the quantisation and the device. A small model is rehearsed as
deep as it is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from true_kd.cache import CacheIdentity, TargetCache
from true_kd.capture import CaptureOptions, TeacherPrompt, capture
from true_kd.config import RunConfig
from true_kd.evaluation import measure
from true_kd.examples import Example
from true_kd.fidelity import certify
from true_kd.memory import set_guards
from true_kd.models import (
    LanguageModel,
    LoraOptions,
    ModelOptions,
    add_lora,
    count_layers,
    decoding_speed,
    generate_replies,
    open_model,
    release_memory,
    write_shallow,
)
from true_kd.targets import TargetSettings
from true_kd.training import Plan, Room, TrainingState, train

SHALLOW = 6
"""A model of so few layers is rehearsed whole."""
DEPTHS = (2, 4)
"""The layers of the two models that stand for a deeper one."""
STEPS = 4
"""Training steps of a rehearsal, besides the largest."""
ROUNDS = 4
"""Times a batch is filled in a rehearsal of decoding: as replies end new ones come in, which takes most memory."""
_SECONDS = 20.0
"""A rehearsal of decoding ends after so many, whatever is left to write."""
_EVALUATED = 64
"""Held-out examples of a rehearsal."""

Costs = Mapping[str, float]
"""What was measured, by name: seconds, and bytes."""


@dataclass(frozen=True)
class Depth:
    """A model's layers, and how many of them, the last, bear an adapter."""

    layers: int
    adapted: int = 0

    @property
    def features(self) -> tuple[float, float, float]:
        """What costs are linear in."""
        return 1.0, float(self.adapted), float(self.layers - self.adapted)


class _Endless(LanguageModel):
    """A model whose replies are as long as they are asked to be."""

    @property
    def stop_ids(self) -> list[int]:
        """None: zeros for weights make any token the likeliest."""
        return []

    @classmethod
    def of(cls, model: LanguageModel) -> _Endless:
        """The same model, whatever its stop tokens."""
        return cls(**{field.name: getattr(model, field.name) for field in fields(model)})


def rehearse(options: ModelOptions, seam: str, adapted: int, perform: Callable[[ModelOptions, int], Costs]) -> Costs:
    """What a model takes, from performances by shallow ones.

    Parameters
    ----------
    adapted
        layers that bear an adapter, the last ones; -1 for all.
    perform
        takes a model and how many of its layers bear an adapter.

    Raises
    ------
    UnknownDepth
        when nobody can tell what the model's layers are.
    ModelError
        when mlx-lm cannot open a shallow one.
    """
    layers = count_layers(options, seam)
    whole = Depth(layers, layers if adapted < 0 else min(adapted, layers))
    depths = [whole] if layers <= SHALLOW else _depths(whole)
    found: list[Costs] = []
    for depth in depths:
        with tempfile.TemporaryDirectory(prefix="true-kd-") as folder:
            write_shallow(options, seam, depth.layers, Path(folder))
            shallow = options.model_copy(update={"model": folder, "revision": None, "adapter": None})
            found.append(perform(shallow, depth.adapted))
        release_memory()
    return extrapolate(depths, found, whole)


def _depths(whole: Depth) -> list[Depth]:
    few, more = DEPTHS
    ends = [Depth(few, min(few, whole.adapted)), Depth(more, min(more, whole.adapted))]
    # What a layer without an adapter takes shows only beside one that has it.
    return ends if whole.adapted in (0, whole.layers) else [*ends, Depth(more, min(few, whole.adapted))]


def extrapolate(depths: Sequence[Depth], found: Sequence[Costs], whole: Depth) -> Costs:
    """Costs of a whole model, each taken to be linear in its layers with and without adapter."""
    known = np.array([depth.features for depth in depths])
    names = list(found[0])
    values = np.array([[costs[name] for name in names] for costs in found])
    # Of the smallest norm where a kind of layer does not occur: it counts for nothing.
    slopes = np.linalg.lstsq(known, values, rcond=None)[0]
    # Noise may make a deeper model the quicker one; nothing takes less than the shallow one did.
    estimates = np.maximum(np.array(whole.features) @ slopes, values.min(axis=0))
    return dict(zip(names, estimates.tolist(), strict=True))


def rehearse_teacher(
    options: ModelOptions,
    asked: Sequence[TeacherPrompt],
    lengths: Mapping[str, int],
    capturing: CaptureOptions,
    settings: TargetSettings,
    budget: int,
) -> Costs:
    """What the teacher's phase takes.

    Parameters
    ----------
    asked
        the prompts that take most of those that are answered or scored together.
    lengths
        tokens of each reply, by key.

    Returns
    -------
    opening, prompt_token, step, scored_token
        seconds: to open it, for a token of a prompt it reads, for a decoding step of a full batch, for a token of a
        reply it only reads.
    peak
        bytes.
    """
    written = [prompt for prompt in asked if prompt.rendered.response is None]
    given = [prompt for prompt in asked if prompt.rendered.response is not None]
    capturing = capturing.model_copy(update={"shard_prompts": len(asked)})

    def perform(shallow: ModelOptions, _: int) -> Costs:
        set_guards(budget)
        mx.reset_peak_memory()
        began = time.perf_counter()
        teacher = _Endless.of(open_model(shallow, "teacher"))
        costs = {"opening": time.perf_counter() - began, "prompt_token": 0.0, "step": 0.0, "scored_token": 0.0}
        # Once each to warm up: the first pass of a shape reserves its memory.
        if given:
            _capture_all(teacher, given, lengths, capturing, settings)
            seconds = sum(_capture_all(teacher, given, lengths, capturing, settings))
            costs["scored_token"] = seconds / sum(
                len(prompt.rendered.prompt) + len(prompt.rendered.response or ()) for prompt in given
            )
        if written:
            seconds = _capture_all(teacher, written, lengths, capturing, settings)
            costs["step"], costs["prompt_token"] = _split(seconds, [prompt.rendered.prompt for prompt in written])
        return {**costs, "peak": float(mx.get_peak_memory())}

    return rehearse(options, "teacher", 0, perform)


def _split(seconds: Sequence[float], prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Of the times between decoding steps: seconds of a step that reads no prompt, and of a token of a prompt."""
    # Prompts are read between steps, some at a time: most of the quicker steps have none to read.
    step = median(sorted(seconds)[: max(1, len(seconds) * 3 // 4)])
    return step, max(0.0, sum(seconds) - len(seconds) * step) / sum(map(len, prompts))


def _capture_all(
    teacher: LanguageModel,
    asked: Sequence[TeacherPrompt],
    lengths: Mapping[str, int],
    options: CaptureOptions,
    settings: TargetSettings,
) -> list[float]:
    """Seconds of each decoding step, or of each reply that is only read."""
    with tempfile.TemporaryDirectory(prefix="true-kd-") as folder:
        cache = TargetCache(Path(folder), CacheIdentity({"rehearsal": True}, {}))
        with closing(capture(teacher, asked, cache, options, settings, lengths)) as capturing:
            return _time_steps(progress.tokens for progress in capturing)


def _time_steps(counts: Iterable[int]) -> list[float]:
    """Seconds between the increases of a count, from 0 on; it is given up where it takes too long."""
    seconds: list[float] = []
    began = last = time.perf_counter()
    reached = 0
    for count in counts:
        now = time.perf_counter()
        if count > reached:
            seconds.append(now - last)
            last, reached = now, count
        if now - began > _SECONDS:
            break
    return seconds


@dataclass(frozen=True)
class StudentWork:
    """What a student is rehearsed on."""

    config: RunConfig
    train: Sequence[Example]
    valid: Sequence[Example]
    checkable: Sequence[Sequence[int]]
    """Prompts, token ids, to which replies are written to compare their answers."""
    replies: Sequence[int]
    """Tokens that each of them is taken to have."""
    room: Room
    """As the whole student will find it."""
    budget: int
    """Bytes."""

    @cached_property
    def steps(self) -> list[list[list[Example]]]:
        """The micro-batches of each training step."""
        training = self.config.training
        plan = Plan(self.train, training, self.config.losses, self.config.seed, self.room)
        return [plan.parts(iteration) for iteration in range(1, training.iters + 1)]


def rehearse_student(work: StudentWork) -> Costs:
    """What the student's phase takes.

    Returns
    -------
    opening, valid_token, prompt_token, step, speed, certified_token, trained_token
        seconds: to open it, for a token of held-out examples measured, for a token of a prompt it reads, for a decoding
        step of a full batch, for measuring its speed, for a held-out token of the certificate, for a padded token of
        training.
    measuring, answering, certifying, training
        peak bytes.
    """

    def perform(shallow: ModelOptions, adapted: int) -> Costs:
        set_guards(work.budget)
        return _perform_student(work, shallow, work.config.lora.model_copy(update={"num_layers": adapted}))

    return rehearse(work.config.student, "student", work.config.lora.num_layers, perform)


def _perform_student(work: StudentWork, shallow: ModelOptions, lora: LoraOptions) -> Costs:
    config, options = work.config, work.config.training
    final = config.losses.final
    valid = sorted(work.valid, key=len, reverse=True)
    # The longest together, as they will be, and some of every length.
    valid = [*valid[: options.batch_size], *valid[options.batch_size :: max(1, len(valid) // _EVALUATED)]]
    mx.reset_peak_memory()
    began = time.perf_counter()
    student = open_model(shallow, "student")
    costs = {"opening": time.perf_counter() - began, "prompt_token": 0.0, "step": 0.0, "speed": 0.0}
    measure(student.module, valid[: options.batch_size], final, options.batch_size)
    costs["valid_token"] = _timed(lambda: measure(student.module, valid, final, options.batch_size)) / _tokens(valid)
    costs["measuring"] = _peak()
    if work.checkable:
        costs.update(_perform_answers(student, work))
    costs["answering"] = _peak()
    if config.evaluation.speed_tokens:
        prompts = [example.prompt.tolist() for example in valid]
        costs["speed"] = _timed(lambda: decoding_speed(student.module, prompts[:3], config.evaluation.speed_tokens))
    add_lora(student.module, lora)
    held = work.valid[: max(1, options.batch_size)]
    objective = replace(final, temperature=config.losses.hottest)
    _peak()
    seconds = _timed(
        lambda: certify(student.module, held, objective, options.batch_size, config.fidelity, 1, 1, room=None)
    )
    costs["certified_token"] = seconds / _tokens(held)
    costs["certifying"] = _peak()
    costs["trained_token"] = _perform_steps(work, student)
    costs["training"] = _peak()
    return costs


def _perform_answers(student: LanguageModel, work: StudentWork) -> dict[str, float]:
    """Seconds of a decoding step of a full batch, and of a token read."""
    options = work.config.capture.model_copy(update={"sampling_temperature": 0.0})
    endless = _Endless.of(student)
    prompts, ends = work.checkable[: ROUNDS * options.batch_size], work.replies[: ROUNDS * options.batch_size]
    with closing(generate_replies(endless, prompts, options, [0] * len(prompts), ends)) as writing:
        seconds = _time_steps(number for number, _ in enumerate(writing, 1))
    step, prompt_token = _split(seconds, prompts)
    return {"step": step, "prompt_token": prompt_token}


def _perform_steps(work: StudentWork, student: LanguageModel) -> float:
    """Train on the largest micro-batch, for its memory, and some steps as they will come; seconds for a padded token of
    these."""
    config = work.config
    largest = max((part for parts in work.steps for part in parts), key=work.room.need_together)
    alone = config.training.model_copy(update={"iters": 1, "batch_size": len(largest), "accumulate": 1})
    some = config.training.model_copy(update={"iters": min(STEPS, config.training.iters)})
    for examples, options, room in ((largest, alone, None), (work.train, some, work.room)):
        state = TrainingState(student.module, options)
        steps = list(train(student.module, examples, options, config.losses, config.seed, state, room))
    return sum(step.seconds for step in steps) / sum(step.padded_tokens for step in steps)


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example) for example in examples)


def _peak() -> float:
    """Bytes, the most since this was last asked."""
    peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    return float(peak)
