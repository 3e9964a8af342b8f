"""The teacher answers every prompt once; its distribution at each response token goes to the cache.

Where a prompt brings a completion, the teacher scores that; elsewhere it writes the reply itself, in batches, and the
distribution is taken from the very logits of the decoding step. What the cache holds already is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from true_kd.cache import CachedReply, CacheIdentity, TargetCache, reply_key
from true_kd.examples import Rendered, render
from true_kd.models import (
    LanguageModel,
    ModelTokenizer,
    SamplingOptions,
    Split,
    generate_replies,
    seed_of,
    split_head,
    uniforms_of,
)
from true_kd.options import PositiveInt
from true_kd.prompts import Prompt
from true_kd.targets import TargetOptions, TeacherTargets, encode, join


class CaptureOptions(SamplingOptions):
    """How the teacher writes its replies."""

    seed: int = 0
    """Seed of the teacher's sampling; apart from the run's own seed, so that other seeds reuse the cache."""
    shard_prompts: PositiveInt = 64
    """Replies written to the cache at a time: what a kill can lose."""


@dataclass(frozen=True)
class CaptureProgress:
    """How far a capture is."""

    done: int
    """Replies finished, those found in the cache included."""
    total: int
    tokens: int
    """Response tokens captured by this run."""
    seconds: float


@dataclass(frozen=True)
class TeacherPrompt:
    """A prompt rendered for the teacher, and its key in the cache."""

    rendered: Rendered
    key: str


def teacher_identity(teacher: ModelTokenizer, capture: CaptureOptions, targets: TargetOptions) -> CacheIdentity:
    """What the targets depend on, besides the tokens that the teacher is given."""
    return CacheIdentity(
        {
            "teacher": teacher.digest,
            "stop_ids": teacher.stop_ids,
            "sampling": capture.model_dump(include={"sampling_temperature", "top_p", "max_tokens", "seed"}),
            "targets": targets.model_dump(),
        }
    )


def render_for(teacher: ModelTokenizer, prompts: Sequence[Prompt]) -> list[TeacherPrompt]:
    """The prompts as the teacher's tokens, in order."""
    rendered = [render(prompt, teacher.tokenizer, teacher.stop_ids, teacher.name) for prompt in prompts]
    return [TeacherPrompt(item, reply_key(item.prompt, item.response)) for item in rendered]


def capture(
    teacher: LanguageModel,
    prompts: Sequence[TeacherPrompt],
    cache: TargetCache,
    options: CaptureOptions,
    targets: TargetOptions,
) -> Iterator[CaptureProgress]:
    """Fill the cache with the replies it lacks, a shard at a time; yields after every decoding step."""
    missing = {prompt.key: prompt for prompt in prompts if prompt.key not in cache}
    total = len({prompt.key for prompt in prompts})
    done, tokens, start = total - len(missing), 0, time.perf_counter()
    todo = list(missing.values())
    split = split_head(teacher.module)
    yield CaptureProgress(done, total, 0, 0.0)
    for at in range(0, len(todo), options.shard_prompts):
        shard = todo[at : at + options.shard_prompts]
        replies: dict[str, CachedReply] = {}
        for item in shard:
            if item.rendered.response is not None:
                replies[item.key] = _score(split, item, targets)
                tokens += len(item.rendered.response)
                yield CaptureProgress(done + len(replies), total, tokens, time.perf_counter() - start)
        to_write = [item for item in shard if item.rendered.response is None]
        recorder = _Recorder([item.key for item in to_write], targets)
        seeds = [seed_of(f"{options.seed} {item.key}") for item in to_write]
        if to_write:
            written = generate_replies(teacher, [item.rendered.prompt for item in to_write], options, seeds)
            for step, drafts in written:
                recorder.add(step.index, step.tokens, step.logits)
                tokens += len(step.tokens)
                finished = sum(1 for draft in drafts if draft.finished)
                yield CaptureProgress(done + len(replies) + finished, total, tokens, time.perf_counter() - start)
            ends = [draft.finished for draft in drafts]
            replies |= recorder.replies(ends)
        cache.add(replies)
        done += len(shard)
        yield CaptureProgress(done, total, tokens, time.perf_counter() - start)


class _Recorder:
    """Collects the targets of replies that are written side by side."""

    def __init__(self, keys: list[str], options: TargetOptions) -> None:
        self._keys = keys
        self._options = options
        self._uniforms = [np.zeros(0, dtype=np.float32) for _ in keys]
        self._tokens: list[list[int]] = [[] for _ in keys]
        self._rows: list[list[int]] = [[] for _ in keys]
        self._steps: list[TeacherTargets] = []
        self._count = 0

    def add(self, index: list[int], tokens: list[int], logits: list[mx.array]) -> None:
        uniforms = np.array([self._uniform(reply) for reply in index], dtype=np.float32)
        self._steps.append(encode(mx.stack(logits), mx.array(tokens), uniforms, self._options))
        for reply, token in zip(index, tokens, strict=True):
            self._tokens[reply].append(token)
            self._rows[reply].append(self._count)
            self._count += 1

    def replies(self, ends: list[str]) -> dict[str, CachedReply]:
        everything = join(self._steps)
        return {
            key: CachedReply(np.array(tokens, dtype=np.int32), end, everything.take(np.array(rows)))
            for key, tokens, rows, end in zip(self._keys, self._tokens, self._rows, ends, strict=True)
        }

    def _uniform(self, reply: int) -> float:
        position = len(self._tokens[reply])
        if position >= len(self._uniforms[reply]):
            self._uniforms[reply] = uniforms_of(self._keys[reply], 2 * position + 32)
        return float(self._uniforms[reply][position])


def _score(split: Split, item: TeacherPrompt, options: TargetOptions, chunk: int = 256) -> CachedReply:
    """The teacher's distribution along a reply that the data gives."""
    response = item.rendered.response or []
    sequence = mx.array([item.rendered.prompt + response])
    first = len(item.rendered.prompt) - 1
    states = split.body(sequence)[0, first : first + len(response)]
    uniforms = uniforms_of(item.key, len(response))
    labels = mx.array(response)
    parts = []
    for at in range(0, len(response), chunk):
        rows = slice(at, at + chunk)
        parts.append(encode(split.head(states[rows]), labels[rows], uniforms[rows], options))
    return CachedReply(np.array(response, dtype=np.int32), "given", join(parts))
