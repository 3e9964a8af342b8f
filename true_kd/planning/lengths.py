"""The tokens that a run will meet: those of replies that are known, and for the others as good a guess as there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from true_kd.cache import TargetCache
from true_kd.capture import TeacherPrompt
from true_kd.datasets import Split, build_split, read_replies
from true_kd.jobs import Job
from true_kd.models import ModelTokenizer
from true_kd.shards import CachedReply
from true_kd.targets import TAIL_TEMPERATURES, SparseTargets, TargetSettings, TeacherTargets

Basis = Literal["known", "sample", "bound"]
"""How the lengths of replies that are still to be written are known: there are none (`known`), as long as those in the
cache of this domain (`sample`), or by no more than capture.max_tokens (`bound`)."""

ENTRIES = 8
"""Entries of a token in targets that are made up: what a sure teacher's have, by docs/cache.md."""


@dataclass(frozen=True)
class Lengths:
    """A domain's data as the run will have it, as far as can be said."""

    train: Split
    valid: Split
    response_tokens: int
    """Of the teacher's replies to all its prompts, before the student's limit cuts them."""
    cached: int
    """Replies in the cache."""
    given: int
    """Replies that the data brings and the cache lacks."""
    to_write: int
    """Replies that the teacher will write."""
    basis: Basis
    reply_tokens: int
    """What a reply that is to be written is taken to have."""
    lengths: dict[str, int]
    """Response tokens of each reply, by key."""


def find_lengths(
    job: Job,
    cache: TargetCache,
    train: Sequence[TeacherPrompt],
    valid: Sequence[TeacherPrompt],
    student: ModelTokenizer,
    settings: TargetSettings,
    make_up: Callable[[int], TeacherTargets] | None = None,
) -> Lengths:
    """What a job will train on; `make_up` gives targets of so many tokens that stand for those still to come."""
    asked = {prompt.key: prompt for prompt in (*train, *valid)}
    known = read_replies(cache, [key for key in asked if key in cache])
    given = {
        key: len(prompt.rendered.response)
        for key, prompt in asked.items()
        if key not in known and prompt.rendered.response is not None
    }
    written = [len(reply.tokens) for key, reply in known.items() if asked[key].rendered.response is None]
    unknown = [key for key in asked if key not in known and key not in given]
    if not unknown:
        basis: Basis = "known"
    else:
        basis = "sample" if written else "bound"
    most = job.config.capture.max_tokens
    # As those that are known vary: how a batch fills up and empties depends on it.
    guesses = [min(most, tokens) for tokens in written] or [most]
    guessed = {key: guesses[at % len(guesses)] for at, key in enumerate(unknown)}
    lengths = {key: len(reply.tokens) for key, reply in known.items()} | given | guessed
    token = int(np.argmax(job.vocabulary.ids >= 0))
    make_up = make_up or (lambda count: _made_up(count, token, len(job.vocabulary.ids), settings))
    replies = dict(known)
    for key in (*given, *unknown):
        count = lengths[key]
        kept = np.arange(max(1, round(settings.share * count)), dtype=np.int32)
        replies[key] = CachedReply(np.full(count, token, np.int32), "length", make_up(len(kept)), kept)
    return Lengths(
        train=build_split(job, job.train_prompts, train, replies, student),
        valid=build_split(job, job.valid_prompts, valid, replies, student),
        response_tokens=sum(lengths.values()),
        cached=len(known),
        given=len(given),
        to_write=len(unknown),
        basis=basis,
        reply_tokens=round(float(np.mean(guesses))),
        lengths=lengths,
    )


def _made_up(count: int, token: int, vocab_size: int, settings: TargetSettings) -> SparseTargets:
    """Targets of so many tokens that say nothing, of the size that real ones have."""
    entries = count * ENTRIES
    return SparseTargets(
        offsets=np.arange(0, entries + 1, ENTRIES, dtype=np.int32),
        ids=np.full(entries, token, dtype=np.int32),
        logprob_codes=np.full(entries, 8, dtype=np.uint8),
        exact=np.ones(entries, dtype=bool),
        tail_codes=np.full((count, len(TAIL_TEMPERATURES)), 1, dtype=np.uint16),
        draw_temperature=settings.draw_temperature,
        threshold=settings.threshold or 0.02,
        vocab_size=vocab_size,
    )
