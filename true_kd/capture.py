"""The teacher answers every prompt once; its distribution at each response token goes to the cache.

Where a prompt brings a completion, the teacher scores that; elsewhere it writes the reply itself, in batches, and the
distribution is taken from the very logits of the decoding steps (hidden states, and distributions for a student of
another tokenizer: from a second pass over the finished reply). What the cache holds already is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

import mlx.core as mx
import numpy as np

from true_kd.alignment import Aligner, Alignment
from true_kd.cache import CacheIdentity, TargetCache, reply_key
from true_kd.errors import ModelError
from true_kd.examples import Rendered, render
from true_kd.models import (
    Branches,
    LanguageModel,
    ModelTokenizer,
    SamplingOptions,
    Split,
    generate_replies,
    save_head,
    seed_of,
    split_head,
    uniforms_of,
)
from true_kd.options import PositiveInt
from true_kd.prompts import Prompt
from true_kd.shards import CachedReply
from true_kd.suggest import quote
from true_kd.targets import HiddenTargets, SparseTargets, TargetSettings, TeacherHead, encode, join


class CaptureOptions(SamplingOptions):
    """How the teacher writes its replies."""

    seed: int = 0
    """Seed of the teacher's sampling; apart from the run's own seed, so that other seeds reuse the cache."""
    shard_prompts: PositiveInt = 128
    """Prompts that are answered together and written to the cache as one file: what a kill can lose."""


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
    text: str | None = None
    """The whole text, where the data is plain text."""


def teacher_identity(
    teacher: ModelTokenizer, settings: TargetSettings, alignment: Alignment | None = None
) -> CacheIdentity:
    """What the targets of given tokens depend on; `alignment` where they are in another vocabulary than the
    teacher's."""
    is_folder = teacher.name.startswith(("/", "~", "."))
    name = PurePath(teacher.name).name if is_folder else teacher.name
    aligned = {} if alignment is None else {"alignment": alignment.facts}
    return CacheIdentity({"teacher": teacher.digest, "targets": asdict(settings), **aligned}, {"teacher": name})


def render_for(teacher: ModelTokenizer, prompts: Sequence[Prompt], options: CaptureOptions) -> list[TeacherPrompt]:
    """The prompts as the teacher's tokens, in order."""
    sampling = sampling_facts(teacher, options)
    rendered = [render(prompt, teacher.tokenizer, teacher.stop_ids, teacher.name) for prompt in prompts]
    return [
        TeacherPrompt(item, reply_key(item.prompt, item.response, sampling), prompt.text)
        for item, prompt in zip(rendered, prompts, strict=True)
    ]


def sampling_facts(teacher: ModelTokenizer, options: CaptureOptions) -> dict[str, Any]:
    """What decides the tokens that the teacher writes, given a prompt."""
    drawn = {"sampling_temperature", "top_p", "seed"} if options.sampling_temperature > 0 else set()
    return {"stop_ids": teacher.stop_ids, **options.model_dump(include={"max_tokens", *drawn})}


def capture(
    teacher: LanguageModel,
    prompts: Sequence[TeacherPrompt],
    cache: TargetCache,
    options: CaptureOptions,
    settings: TargetSettings,
    lengths: Mapping[str, int] | None = None,
    aligner: Aligner | None = None,
) -> Iterator[CaptureProgress]:
    """Fill the cache with the replies it lacks, a shard at a time; yields after every decoding step.

    Which prompts are answered together does not depend on what the cache holds, but for the prompts of one shard: the
    logits of a reply differ in their last bits with its neighbours, and a capture that was killed has to go on as if
    it had not been.

    `lengths` says, by key, where replies are cut; None stands for `options.max_tokens`. With an `aligner` the cache
    gets the student's tokens of each reply, and targets in the student's vocabulary.

    Raises
    ------
    ModelError
        when hidden states are wanted of a teacher whose output head is more than one linear map, or when the teacher
        cannot be taken apart.
    """
    asked = {prompt.key: prompt for prompt in prompts}
    missing = {key for key in asked if key not in cache}
    done, tokens, start = len(asked) - len(missing), 0, time.perf_counter()
    scorer = _Scorer(teacher, settings) if aligner is None else _AlignedScorer(teacher, settings, aligner)
    if settings.kind == "hidden":
        cache.add_head(lambda path: save_head(teacher.module, path))
    yield CaptureProgress(done, len(asked), 0, 0.0)
    for first in range(0, len(asked), options.shard_prompts):
        together = list(asked.values())[first : first + options.shard_prompts]
        shard: dict[str, CachedReply] = {}
        wanted = [prompt for prompt in together if prompt.key in missing]
        for reply in _all_replies(teacher, wanted, scorer, options, settings, lengths):
            if isinstance(reply, int):
                tokens += reply
            else:
                shard[reply[0]] = reply[1]
                done += 1
                if len(shard) == len(wanted):
                    cache.add(shard)
            yield CaptureProgress(done, len(asked), tokens, time.perf_counter() - start)


def _all_replies(
    teacher: LanguageModel,
    prompts: Sequence[TeacherPrompt],
    scorer: _Scorer | _AlignedScorer,
    options: CaptureOptions,
    settings: TargetSettings,
    lengths: Mapping[str, int] | None,
) -> Iterator[int | tuple[str, CachedReply]]:
    """Keys and replies as they are finished; between them, how many tokens have come since the last."""
    for item in prompts:
        if item.rendered.response is not None:
            yield len(item.rendered.response)
            yield item.key, scorer.score(item, item.rendered.response, "given")
    to_write = [item for item in prompts if item.rendered.response is None]
    if not to_write:
        return
    at_once = isinstance(scorer, _Scorer) and settings.kind == "sparse"
    recorder = _Recorder([item.key for item in to_write], settings) if at_once else None
    seeds = [seed_of(f"{options.seed} {item.key}") for item in to_write]
    openings = [item.rendered.prompt for item in to_write]
    ends = None if lengths is None else [lengths[item.key] for item in to_write]
    for step, drafts in generate_replies(teacher, openings, options, seeds, ends):
        yield len(step.tokens)
        if recorder:
            recorder.add(step.index, step.tokens, step.logits, [drafts[index].finished for index in step.index])
            yield from recorder.take_finished()
            continue
        for index in step.index:
            draft, item = drafts[index], to_write[index]
            if draft.finished:
                yield item.key, scorer.score(item, draft.tokens, draft.finished)
    if recorder:
        recorder.encode_rest()
        yield from recorder.take_finished()


ROWS_HELD = 256
"""Decoded tokens whose logits are held back, to be made targets together."""
FLOATS_HELD = 2**25
"""Logits held back at most: 128 MiB."""


class _Recorder:
    """Collects the targets of replies that are written side by side.

    Logits of several decoding steps are encoded at once: each encoding waits for the device, and the wait is shared.
    """

    def __init__(self, keys: Sequence[str], settings: TargetSettings) -> None:
        self._keys = keys
        self._settings = settings
        self._pieces: dict[int, list[SparseTargets]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._uniforms: dict[int, np.ndarray] = {}
        self._waiting: list[tuple[int, int, float, mx.array]] = []
        self._ended: dict[int, str] = {}

    def add(self, index: Sequence[int], tokens: Sequence[int], logits: Sequence[mx.array], ends: Sequence[str]) -> None:
        """Take a decoding step; `ends` says how each reply has finished, if it has."""
        for reply, token, row, ended in zip(index, tokens, logits, ends, strict=True):
            written = self._tokens.setdefault(reply, [])
            self._waiting.append((reply, token, self._uniform(reply, len(written)), row))
            written.append(token)
            if ended:
                self._ended[reply] = ended
        if len(self._waiting) >= min(ROWS_HELD, FLOATS_HELD // logits[0].size):
            self.encode_rest()

    def take_finished(self) -> Iterator[tuple[str, CachedReply]]:
        """Keys and replies that are finished and encoded; they are then forgotten."""
        waiting = {reply for reply, *_ in self._waiting}
        for reply in [reply for reply in self._ended if reply not in waiting]:
            targets = join(self._pieces.pop(reply))
            tokens = np.array(self._tokens.pop(reply), dtype=np.int32)
            del self._uniforms[reply]
            found = CachedReply(tokens, self._ended.pop(reply), targets, _all_of(tokens))
            yield self._keys[reply], _select_sparse(found, self._settings)

    def encode_rest(self) -> None:
        """Encode the logits that are still waiting."""
        if not self._waiting:
            return
        replies, tokens, uniforms, logits = zip(*self._waiting, strict=True)
        self._waiting = []
        targets = encode(mx.stack(logits), mx.array(tokens), np.array(uniforms, dtype=np.float32), self._settings)
        of = np.array(replies)
        for reply in dict.fromkeys(replies):
            self._pieces.setdefault(reply, []).append(targets.take(np.flatnonzero(of == reply)))

    def _uniform(self, reply: int, position: int) -> float:
        known = self._uniforms.get(reply)
        if known is None or position >= len(known):
            known = self._uniforms[reply] = uniforms_of(self._keys[reply], 2 * position + 32)
        return float(known[position])


class _Scorer:
    """The teacher's distribution along replies that are there already, read in one pass over each."""

    _CHUNK = 256

    def __init__(self, teacher: LanguageModel, settings: TargetSettings) -> None:
        self._split: Split = split_head(teacher.module)
        self._settings = settings
        self._head = TeacherHead(self._split.head)
        if settings.kind == "hidden" and not self._split.plain:
            raise ModelError(
                f"teacher {quote(teacher.name)}: its output head is more than the linear map of {self._split.layer} "
                "(soft-capping or scaling), expected no more for targets.preset exact. Choose another preset."
            )

    def score(self, item: TeacherPrompt, response: Sequence[int], finished: str) -> CachedReply:
        states = response_states(self._split, item, response)
        tokens = np.array(response, dtype=np.int32)
        chunks = [states[at : at + self._CHUNK] for at in range(0, len(response), self._CHUNK)]
        if self._settings.kind == "hidden":
            if not mx.all(mx.isfinite(states)).item():
                raise ModelError("teacher: its hidden states are not finite numbers. Choose another model.")
            stored = np.array(states.astype(mx.float16))
            if not np.isfinite(stored).all():
                raise ModelError("teacher: a hidden state overflows 16 bits, expected less than 65504. Use preset hot.")
            reply = CachedReply(tokens, finished, HiddenTargets(stored, self._head), _all_of(tokens))
            if self._settings.share == 1.0:
                return reply
            entropies = np.concatenate([np.array(_logit_entropies(self._split.head(chunk))) for chunk in chunks])
            return _select(reply, entropies, self._settings)
        uniforms = uniforms_of(item.key, len(response))
        parts = []
        for number, chunk in enumerate(chunks):
            rows = slice(number * self._CHUNK, number * self._CHUNK + len(chunk))
            parts.append(encode(self._split.head(chunk), mx.array(tokens[rows]), uniforms[rows], self._settings))
        targets = join(parts)
        return _select_sparse(CachedReply(tokens, finished, targets, _all_of(tokens)), self._settings)


class _AlignedScorer:
    """The teacher's distribution along finished replies, in the vocabulary of a student of another tokenizer."""

    def __init__(self, teacher: LanguageModel, settings: TargetSettings, aligner: Aligner) -> None:
        self._module = teacher.module
        self._split = split_head(teacher.module)
        self._settings = settings
        self._aligner = aligner

    def score(self, item: TeacherPrompt, response: Sequence[int], finished: str) -> CachedReply:
        opening = item.rendered.prompt
        branches = Branches(self._module, self._split, [*opening, *response])
        found = self._aligner.score(branches, opening, (response, finished), item.key, self._settings, item.text)
        return _select_sparse(found, self._settings)


def response_states(split: Split, item: TeacherPrompt, response: Sequence[int]) -> mx.array:
    """What enters the teacher's head where it predicts each token of a response to a prompt; [tokens, width]."""
    first = len(item.rendered.prompt) - 1
    sequence = mx.array([[*item.rendered.prompt, *response]])
    return split.states_at(sequence, mx.arange(first, first + len(response)))


def _all_of(tokens: np.ndarray) -> np.ndarray:
    return np.arange(len(tokens), dtype=np.int32)


def _select(reply: CachedReply, entropies: np.ndarray, settings: TargetSettings) -> CachedReply:
    """The reply with the targets of its most uncertain tokens only: a share of them, one at least."""
    count = max(1, round(settings.share * len(reply.kept)))
    chosen = np.sort(np.argsort(-entropies, kind="stable")[:count])
    return replace(reply, targets=reply.targets.take(chosen), kept=reply.kept[chosen])


def _select_sparse(reply: CachedReply, settings: TargetSettings) -> CachedReply:
    return reply if settings.share == 1.0 else _select(reply, _entropies(reply.targets), settings)


def _entropies(targets: SparseTargets) -> np.ndarray:
    """The teacher's entropy at each token at temperature 1, nats, as the targets estimate it."""
    weights, logprobs = targets.at_temperature(1.0)
    return np.bincount(targets.rows, -weights * logprobs, minlength=len(targets))


def _logit_entropies(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return -mx.sum(mx.exp(logprobs) * logprobs, axis=-1)
