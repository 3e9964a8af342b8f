"""What there is to learn from a teacher in a domain, and whether anything says that it is the better model.

A student can be near to its teacher or far from it, but distance alone does not say who is right. Two things do:
answers that a program checks, and replies that the data brings, which both models score. On text that the teacher
wrote itself its likelihood is always the higher one and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field

from true_kd.errors import InputError, ModelError
from true_kd.evaluation import FEWEST, Estimate, Resampled, TokenScores, share_estimate
from true_kd.examples import Example
from true_kd.models import token_pieces
from true_kd.options import Options, record


class GateOptions(Options):
    """The check, before the teacher's hours of work, that it has something to teach."""

    prompts: int = Field(default=16, ge=0)
    """Validation prompts that teacher and student are compared on before all others are captured; 0 to compare them
    only once all are. Where little is to be captured the probe is left out."""
    when_no_better: Literal["warn", "refuse"] = "warn"
    """What to do where the student is as good as the teacher, or the same: warn, or refuse the domain."""

    def refuses(self, headroom: Headroom) -> bool:
        """Whether a domain must not go on."""
        return self.when_no_better == "refuse" and headroom.standing in ("same", "no better")


Standing = Literal["better", "no better", "same", "unknown"]
"""What the comparison says of the teacher. `same`: the student says what it says. `unknown`: nothing tells who is
right, as there are neither answers nor replies of the data's own."""

SAME_KL = 0.005
"""Nats per token below which student and teacher are taken for the same: two bytes keep no finer difference. A teacher
measured against its own cached targets came to 0.0003 to 0.003 in `tests/test_evaluation.py`."""


@record
class Stretch:
    """Response tokens of some places in their replies, counted from 0."""

    start: int
    """The first place."""
    stop: int
    """Not one of them."""
    tokens: int
    """How many there are."""
    kl: float
    """Mean KL(teacher || student), nats."""


@record
class Missed:
    """A token of the teacher that the student fails to expect."""

    text: str
    """What the token adds to the text."""
    share: float
    """Of all KL on the sample, at tokens where this is the text."""
    count: int
    """How often it comes."""


@record
class Headroom:
    """How far a student is from its teacher in a domain, and where. Means over response tokens."""

    prompts: int
    """Held-out prompts that were looked at."""
    tokens: int
    """Their response tokens that count."""
    kl: Estimate
    """KL(teacher || student), nats per token: what there is to gain."""
    entropy: float
    """The teacher's own, nats per token: how much it leaves open."""
    teacher_nll: float
    """Of the text, nats per token."""
    student_nll: float
    """The student's, nats per token."""
    top1_agreement: Estimate
    """Share of tokens at which both find the same token most likely."""
    first_miss: float | None
    """Median over the replies that have one: the share of a reply that lies before the first token at which the two
    prefer different tokens; None where there is no such token."""
    by_position: tuple[Stretch, ...]
    """Where in the replies, in stretches that double."""
    missed: tuple[Missed, ...]
    """Those that cost most, at most five."""
    teacher_right: Estimate | None
    """Share of checkable tasks answered right, where there are any."""
    student_right: Estimate | None
    """The same of the student."""
    standing: Standing
    """Whether anything says that the teacher is the better model."""
    why: str
    """The standing in words."""


@record
class ParentComparison:
    """A quantised teacher against the model it was made from. Means over response tokens, nats."""

    replies: int
    """Of the teacher, that both have scored."""
    tokens: int
    """Their tokens."""
    kl: Estimate
    """KL(parent || teacher) at temperature 1: what quantisation has cost."""
    top1_agreement: Estimate
    """Share of tokens at which both find the same token most likely."""
    parent_nll: float
    """Of the teacher's own replies."""
    teacher_nll: float
    """The same by the teacher itself."""


class NothingToTeach(InputError):
    """The teacher is no better than the student, and the options say not to go on."""

    def __init__(self, headroom: Headroom) -> None:
        super().__init__(
            f"gate: {headroom.why}, expected a teacher that is better than its student. Choose another teacher, or "
            "set gate.when_no_better=warn."
        )


def weigh_up(
    examples: Sequence[Example],
    scores: TokenScores,
    tokenizer: Any,
    given: bool,
    teacher_right: np.ndarray | None,
    student_right: np.ndarray | None,
) -> Headroom:
    """What the student's scores on some examples say of the teacher.

    Parameters
    ----------
    given
        whether the replies are the data's own, not written by the teacher.
    teacher_right, student_right
        bool [tasks], of the same checkable tasks; None where there are none.
    """
    teacher = teacher_nll(examples)
    prompts = Resampled(
        {
            "tokens": scores.sums(np.ones(len(scores.kl))),
            "kl": scores.sums(scores.kl),
            "top1": scores.sums(scores.rank < 1),
            "better by": scores.sums(scores.nll - teacher),
        }
    )
    kl = prompts.estimate(lambda sums: sums["kl"] / sums["tokens"]) or Estimate(0.0)
    lead = prompts.estimate(lambda sums: sums["better by"] / sums["tokens"]) if given else None
    right = [share_estimate(found) if found is not None else None for found in (teacher_right, student_right)]
    enough = teacher_right is None or len(teacher_right) >= FEWEST
    standing, why = _judge(kl, lead, *(right if enough else (None, None)))
    return Headroom(
        prompts=len(examples),
        tokens=len(scores.kl),
        kl=kl,
        entropy=float(np.mean(np.concatenate([example.targets.entropies for example in examples]))),
        teacher_nll=float(np.mean(teacher)),
        student_nll=float(np.mean(scores.nll)),
        top1_agreement=prompts.estimate(lambda sums: sums["top1"] / sums["tokens"]) or Estimate(0.0),
        first_miss=_first_miss(examples, scores),
        by_position=tuple(
            Stretch(start, stop, int(inside.sum()), float(scores.kl[inside].mean()))
            for start, stop, inside in stretches(scores.position)
        ),
        missed=_most_missed(examples, scores, tokenizer),
        teacher_right=right[0],
        student_right=right[1],
        standing=standing,
        why=why,
    )


def check_sound(scores: TokenScores, model: str, remedy: str = "Choose another model.") -> None:
    """Raise ModelError when the losses of a model as it came are not finite numbers; `model` names it."""
    if not (np.isfinite(scores.kd).all() and np.isfinite(scores.nll).all() and np.isfinite(scores.kl).all()):
        raise ModelError(
            f"{model}: its loss on the validation prompts is not a finite number, expected sound weights. {remedy}"
        )


def compare_with_parent(examples: Sequence[Example], scores: TokenScores) -> ParentComparison:
    """What a teacher's scores on examples say whose targets are its parent's."""
    replies = Resampled(
        {
            "tokens": scores.sums(np.ones(len(scores.kl))),
            "kl": scores.sums(scores.kl),
            "top1": scores.sums(scores.rank < 1),
        }
    )
    return ParentComparison(
        replies=len(examples),
        tokens=len(scores.kl),
        kl=replies.estimate(lambda sums: sums["kl"] / sums["tokens"]) or Estimate(0.0),
        top1_agreement=replies.estimate(lambda sums: sums["top1"] / sums["tokens"]) or Estimate(0.0),
        parent_nll=float(np.mean(teacher_nll(examples))),
        teacher_nll=float(np.mean(scores.nll)),
    )


def teacher_nll(examples: Sequence[Example]) -> np.ndarray:
    """-log of the probability that the teacher gives to each counted token of the text, nats; float64 [tokens]."""
    return -np.concatenate([example.targets.label_logprobs(example.labels) for example in examples])


def stretches(positions: np.ndarray) -> list[tuple[int, int, np.ndarray]]:
    """Places in replies in stretches that double, with the mask of the tokens in each; empty ones are left out."""
    found, start, stop = [], 0, 1
    while start <= positions.max(initial=-1):
        inside = (positions >= start) & (positions < stop)
        if inside.any():
            found.append((start, stop, inside))
        start, stop = stop, 2 * stop
    return found


def _judge(
    kl: Estimate, lead: Estimate | None, teacher_right: Estimate | None, student_right: Estimate | None
) -> tuple[Standing, str]:
    if kl.value < SAME_KL:
        return "same", f"the student already says what the teacher says (KL {kl.value:.4f} nats per token)"
    if teacher_right is not None and student_right is not None and teacher_right.value + student_right.value > 0:
        shares = f"{teacher_right.value:.0%} of the checkable tasks right, the student {student_right.value:.0%}"
        if teacher_right.value > student_right.value:
            return "better", f"the teacher answers {shares}"
        return "no better", f"the teacher answers no more than {shares}"
    if lead is not None:
        words = f"the replies of the data by {abs(lead.value):.3f} nats per token"
        return (
            ("better", f"the teacher expects {words}")
            if lead.value > 0
            else ("no better", f"the student already expects {words} better than the teacher")
        )
    return "unknown", (
        f"the student is {kl.value:.3f} nats per token from the teacher; nothing in the data tells which is right"
    )


def _first_miss(examples: Sequence[Example], scores: TokenScores) -> float | None:
    missed = scores.rank > 0
    places = [
        float(scores.position[own][missed[own]][0]) / len(example.response)
        for at, example in enumerate(examples)
        for own in [scores.example == at]
        if missed[own].any()
    ]
    return float(np.median(places)) if places else None


def _most_missed(examples: Sequence[Example], scores: TokenScores, tokenizer: Any) -> tuple[Missed, ...]:
    labels = np.concatenate([example.labels for example in examples])
    total = float(scores.kl.sum())
    if total <= 0:
        return ()
    ids, of = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(of, scores.kl), np.bincount(of)
    worst = [at for at in np.argsort(-sums, kind="stable")[:5] if sums[at] > 0]
    return tuple(
        Missed("".join(token_pieces(tokenizer, [int(ids[at])])), float(sums[at]) / total, int(counts[at]))
        for at in worst
    )
