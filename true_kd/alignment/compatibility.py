"""How well two tokenizers go together: what they share, and what became of a teacher's probability between them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from true_kd.alignment.aligner import Account, Way
from true_kd.alignment.spelling import Spelling
from true_kd.options import record
from true_kd.shards import CachedReply


@record
class Compatibility:
    """The tokens of teacher and student side by side, those that spell something."""

    teacher_tokens: int
    """Of the teacher."""
    student_tokens: int
    """Of the student."""
    shared: int
    """Spellings that both have as one token."""


@record
class MappedTargets:
    """What became of the teacher's probability on its way into the student's vocabulary. The last six add up to 1:
    shares, means over the student's tokens that have targets."""

    way: Way
    """The strategy."""
    positions: float
    """Share of the response tokens, in the student's cut, that have targets: the others stand where the two spell the
    text otherwise."""
    matched: float
    """To a token of the student's that spells the same."""
    split: float
    """To the first of several of the student's tokens."""
    chained: float
    """To a token of the student's that holds several of the teacher's."""
    drawn: float
    """To tokens that unlikely beginnings become, some of which were drawn for all."""
    merged: float
    """To nothing: after the student's token before, its tokenizer never writes this."""
    nowhere: float
    """To nothing: tokens that the student has no counterpart of."""


def compare_spellings(teacher: Spelling, student: Spelling) -> Compatibility:
    """Count the spellings that both have."""
    theirs, ours = ({piece for piece in spelling.pieces if piece} for spelling in (teacher, student))
    return Compatibility(len(theirs), len(ours), len(theirs & ours))


def sum_up(replies: Iterable[CachedReply], way: Way) -> MappedTargets:
    """What the accounts of some replies come to."""
    tokens, places, total = 0, 0.0, np.zeros(len(vars(Account())))
    for reply in replies:
        if reply.account is not None:
            own = float(reply.account[0]) * len(reply.tokens)
            tokens, places, total = tokens + len(reply.tokens), places + own, total + own * reply.account[1:]
    shares = [float(share) for share in total / max(places, 1e-9)]
    return MappedTargets(way, places / max(tokens, 1), *shares)
