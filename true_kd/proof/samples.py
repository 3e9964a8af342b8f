"""The replies that gained most and that have most left, token by token, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from true_kd.evaluation import TokenScores
from true_kd.examples import Example
from true_kd.models import token_pieces
from true_kd.proof.records import Sample

_SHOWN = 3
"""Best and worst replies each."""
_SHOWN_TOKENS = 200
_SHOWN_PROMPT = 600


def pick_samples(
    examples: Sequence[Example], student: TokenScores, adapted: TokenScores, tokenizer: Any
) -> tuple[Sample, ...]:
    """At most three replies of each kind; `tokenizer` is the student's."""
    counts = student.sums(np.ones(len(student.kl)))
    left = adapted.sums(adapted.kl) / counts
    gained = student.sums(student.kl) / counts - left
    best = [at for at in np.argsort(-gained, kind="stable")[:_SHOWN] if gained[at] > 0]
    worst = [at for at in np.argsort(-left, kind="stable") if at not in best][:_SHOWN]
    return tuple(
        _sample(kind, int(at), examples[at], student, adapted, tokenizer)
        for kind, chosen in (("best", best), ("worst", worst))
        for at in chosen
    )


def _sample(
    kind: Literal["best", "worst"],
    at: int,
    example: Example,
    student: TokenScores,
    adapted: TokenScores,
    tokenizer: Any,
) -> Sample:
    shown = [int(token) for token in example.response[:_SHOWN_TOKENS]]

    def at_tokens(scores: TokenScores) -> tuple[float | None, ...]:
        own = scores.example == at
        known = dict(zip(scores.position[own].tolist(), scores.kl[own].tolist(), strict=True))
        return tuple(round(known[place], 4) if place in known else None for place in range(len(shown)))

    prompt = tokenizer.decode([int(token) for token in example.prompt])
    return Sample(
        kind=kind,
        where=example.where,
        prompt=prompt[-_SHOWN_PROMPT:],
        pieces=tuple(token_pieces(tokenizer, shown)),
        student=at_tokens(student),
        adapted=at_tokens(adapted),
    )
