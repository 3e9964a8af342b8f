"""The teacher's phase of one domain: render, look into the cache, and capture what it lacks."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import mlx.core as mx

from true_kd import events
from true_kd.cache import CachedReply, TargetCache
from true_kd.capture import capture, render_for, teacher_identity
from true_kd.evaluation import EvaluationOptions, score_answers
from true_kd.jobs import CapturedTargets, Job
from true_kd.models import LanguageModel, ModelOptions, ModelTokenizer, open_model, open_tokenizer, release_memory
from true_kd.prompts import Prompt


class Teacher:
    """The teacher's tokenizer, and its weights from the moment they are needed: never, where all is in the cache."""

    def __init__(self, options: ModelOptions) -> None:
        self.options = options
        self.text = open_tokenizer(options, "teacher")
        self._model: LanguageModel | None = None

    @property
    def is_open(self) -> bool:
        """Whether the weights are in memory."""
        return self._model is not None

    def open(self) -> LanguageModel:
        """The model, opened at the first call."""
        if self._model is None:
            self._model = open_model(self.options, "teacher")
        return self._model

    def close(self) -> bool:
        """Free the weights; returns whether they had been opened."""
        opened, self._model = self.is_open, None
        release_memory()
        return opened


def capture_domain(job: Job, teacher: Teacher) -> Generator[events.Event, None, CapturedTargets]:
    """Fill the cache with what it lacks of the teacher's replies to a domain's prompts; returns where they lie."""
    started = time.perf_counter()
    config = job.config
    cache = TargetCache(config.cache_folder, teacher_identity(teacher.text, config.capture, config.targets))
    train = render_for(teacher.text, job.train_prompts)
    valid = render_for(teacher.text, job.valid_prompts)
    needed = any(prompt.key not in cache for prompt in (*train, *valid))
    if needed:
        if not teacher.is_open:
            yield events.TeacherOpening(config.teacher.model)
        for progress in capture(teacher.open(), [*train, *valid], cache, config.capture, config.targets):
            yield events.Captured(job.domain, progress)
    else:
        yield events.CaptureReused(job.domain, len({prompt.key for prompt in (*train, *valid)}))
    replies = cache.read(dict.fromkeys(prompt.key for prompt in valid))
    answered = [
        (prompt, replies[asked.key])
        for prompt, asked in zip(job.valid_prompts, valid, strict=True)
        if prompt.answer is not None
    ]
    return CapturedTargets(
        cache=cache,
        train=train,
        valid=valid,
        seconds=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory() if needed else 0,
        exact_match=_score(answered, teacher.text, config.evaluation),
    )


def _score(
    answered: Sequence[tuple[Prompt, CachedReply]], teacher: ModelTokenizer, evaluation: EvaluationOptions
) -> float | None:
    """Share of answers the teacher got right; None where there are none, or the data wrote some of them itself."""
    if not answered or any(reply.finished == "given" for _, reply in answered):
        return None
    prompts, replies = zip(*answered, strict=True)
    return score_answers(prompts, [reply.tokens for reply in replies], teacher, evaluation)
