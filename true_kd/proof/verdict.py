"""What the measures of a domain come to, in a word and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping

from true_kd.evaluation import Estimate, Resampled
from true_kd.gate import SAME_KL
from true_kd.proof.records import AgainstControl, GapClosed, ModelScores, Place, Verdict
from true_kd.suggest import percent


def judge(
    domain: str,
    standings: Mapping[str, ModelScores],
    closed: Mapping[str, GapClosed],
    ahead: AgainstControl | None,
    tasks: Resampled | None,
) -> Verdict:
    """The verdict on the measures of each model: student, adapted, control if there is one, and teacher."""
    student = standings["student"]
    gap = closed["adapted"].kl
    if student.kl.value < SAME_KL or gap is None:
        sentence = (
            f"{domain}: distillation cannot help here: the student already says what the teacher says "
            f"(KL {student.kl.value:.4f} nats per token)."
        )
        return Verdict("nothing to learn", None, sentence)
    if student.kl.low is None:
        outcome, opening = "unclear", "too few held-out prompts to be sure: the adapter closes"
    elif gap.low is None:
        outcome, opening = "unclear", "the student was too near to its teacher to be sure: the adapter closes"
    elif gap.low > 0:
        outcome, opening = "helped", "distillation helped: the adapter closes"
    elif gap.high < 0:
        outcome, opening = "hurt", "distillation hurt: the adapter closes"
    else:
        outcome, opening = "unclear", "no effect can be told from chance: the adapter closes"
    if outcome == "helped" and tasks is not None and _fewer_right(tasks):
        outcome, opening = "mixed", "nearer to the teacher, but fewer tasks right: the adapter closes"
    words = f"{domain}: {opening} {_percent(gap)} of the KL to the teacher{_answers(standings)}."
    if ahead is None:
        return Verdict(outcome, None, words)
    place, against = _compare(ahead, closed["control"])
    return Verdict(outcome, place, f"{words} {against}")


def _fewer_right(tasks: Resampled) -> bool:
    gained = tasks.estimate(lambda sums: (sums["adapted"] - sums["student"]) / tasks.count)
    return gained is not None and gained.high is not None and gained.high < 0


def _answers(standings: Mapping[str, ModelScores]) -> str:
    found = {name: standing.exact_match for name, standing in standings.items()}
    if found["student"] is None or found["adapted"] is None:
        return ""
    teacher = f" (the teacher {found['teacher'].value:.0%})" if found["teacher"] is not None else ""
    return f" and answers {found['adapted'].value:.0%} of the tasks right, before {found['student'].value:.0%}{teacher}"


def _compare(ahead: AgainstControl, control: GapClosed) -> tuple[Place, str]:
    by = ahead.kl.by
    low, high = (by.value if end is None else end for end in (by.low, by.high))
    covers = f"Plain fine-tuning on the same text closes {_percent(control.kl)}" if control.kl else "Plain fine-tuning"
    if by.low is not None and low > 0:
        return "ahead", f"{covers}: distillation is ahead by {_nats(by.value, low, high)}."
    if by.high is not None and high < 0:
        return "behind", f"{covers}: distillation is behind by {_nats(-by.value, -high, -low)}."
    return "level", f"{covers}: no difference can be told from chance."


def _nats(value: float, low: float, high: float) -> str:
    """A difference above 0 with its interval, to as many places as keep its lower end from reading as 0."""
    places = 3 if low >= 0.0005 else 4 if low >= 0.00005 else 6
    return f"{value:.{places}f} nats per token ({low:.{places}f} to {high:.{places}f})"


def _percent(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return percent(estimate.value)
    return f"{percent(estimate.value)} ({percent(estimate.low)} to {percent(estimate.high)})"
