"""From what the models gave on the held-out prompts to a proof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from true_kd.evaluation import Estimate, Resampled, TokenScores, share_estimate
from true_kd.examples import Example
from true_kd.gate import SAME_KL, Headroom, stretches, teacher_nll
from true_kd.proof.records import (
    AgainstControl,
    Footprint,
    GapClosed,
    Lead,
    ModelScores,
    PositionScores,
    PromptScores,
    Proof,
    Retention,
)
from true_kd.proof.samples import pick_samples
from true_kd.proof.verdict import judge
from true_kd.sizes import ModelSize


@dataclass(frozen=True)
class Measured:
    """What one model gave on the held-out prompts."""

    scores: TokenScores
    right: np.ndarray | None
    """bool [tasks], which checkable tasks it answers right; None where there are none."""
    size: ModelSize


def prove(
    domain: str,
    examples: Sequence[Example],
    student: Measured,
    adapted: Measured,
    control: Measured | None,
    teacher_right: np.ndarray | None,
    teacher: ModelSize,
    headroom: Headroom,
    tokenizer: Any,
) -> Proof:
    """Compare the models on held-out examples; `tokenizer` is the student's."""
    models = {"student": student, "adapted": adapted, **({"control": control} if control else {})}
    columns = _columns(models, teacher_nll(examples))
    prompts = Resampled(columns)
    right = {name: model.right for name, model in models.items() if model.right is not None}
    if teacher_right is not None and right:
        right["teacher"] = teacher_right
    tasks = Resampled({name: found.astype(np.float64) for name, found in right.items()}) if right else None
    standings = {name: _standing(name, prompts, model.right, model.size) for name, model in models.items()}
    standings["teacher"] = _standing("teacher", prompts, right.get("teacher"), teacher)
    closed = {name: _gap_closed(name, prompts, tasks, right) for name in models if name != "student"}
    ahead = _against_control(prompts, tasks) if control else None
    return Proof(
        examples=len(examples),
        tokens=len(student.scores.kl),
        tasks=0 if student.right is None else len(student.right),
        student=standings["student"],
        adapted=standings["adapted"],
        control=standings.get("control"),
        teacher=standings["teacher"],
        gap_closed=closed["adapted"],
        control_gap_closed=closed.get("control"),
        against_control=ahead,
        retention=_retention(prompts, tasks, right),
        footprint=_footprint(student.size, adapted.size, teacher),
        headroom=headroom,
        by_position=_by_position(models),
        samples=pick_samples(examples, student.scores, adapted.scores, tokenizer),
        prompts=_by_prompt(examples, columns, right),
        verdict=judge(domain, standings, closed, ahead, tasks),
    )


def _columns(models: Mapping[str, Measured], likelihoods: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over each prompt's tokens, of every measure of every model."""
    some = next(iter(models.values())).scores
    columns = {"tokens": some.sums(np.ones(len(likelihoods))), "teacher nll": some.sums(likelihoods)}
    for name, model in models.items():
        scores = model.scores
        columns |= {
            f"{name} kl": scores.sums(scores.kl),
            f"{name} nll": scores.sums(scores.nll),
            f"{name} top1": scores.sums(scores.rank < 1),
            f"{name} top5": scores.sums(scores.rank < 5),
        }
    # The teacher is where it is, and agrees with itself.
    zero = np.zeros(len(columns["tokens"]))
    return columns | {"teacher kl": zero, "teacher top1": columns["tokens"], "teacher top5": columns["tokens"]}


def _by_prompt(
    examples: Sequence[Example], columns: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]
) -> PromptScores:
    def of(measure: str, kind: type) -> dict[str, tuple[Any, ...]]:
        names = [name.removesuffix(f" {measure}") for name in columns if name.endswith(f" {measure}")]
        return {name: tuple(kind(value) for value in columns[f"{name} {measure}"]) for name in names}

    return PromptScores(
        where=tuple(example.where for example in examples),
        tokens=tuple(int(count) for count in columns["tokens"]),
        kl={name: found for name, found in of("kl", float).items() if name != "teacher"},
        nll=of("nll", float),
        agreed={name: found for name, found in of("top1", int).items() if name != "teacher"},
        right={name: tuple(bool(value) for value in found) for name, found in right.items()},
    )


def _standing(name: str, prompts: Resampled, right: np.ndarray | None, size: ModelSize) -> ModelScores:
    def mean(measure: str) -> Estimate:
        found = prompts.estimate(lambda sums: sums[f"{name} {measure}"] / sums["tokens"])
        assert found is not None, "losses of the held-out prompts are finite"
        return found

    return ModelScores(
        kl=mean("kl"),
        nll=mean("nll"),
        perplexity=prompts.estimate(lambda sums: np.exp(sums[f"{name} nll"] / sums["tokens"])),
        top1_agreement=mean("top1"),
        top5_agreement=mean("top5"),
        exact_match=None if right is None else share_estimate(right),
        parameters=size.parameters,
        bytes=size.bytes,
        tokens_per_second=size.tokens_per_second,
    )


def _gap_closed(name: str, prompts: Resampled, tasks: Resampled | None, right: Mapping[str, np.ndarray]) -> GapClosed:
    def covered(measure: str) -> Estimate | None:
        if prompts.total("student kl") < SAME_KL * prompts.total("tokens"):
            # No distance, but the rounding of the targets.
            return None
        return prompts.estimate(
            lambda sums: (
                (sums[f"student {measure}"] - sums[f"{name} {measure}"])
                / _distance(sums[f"student {measure}"] - sums[f"teacher {measure}"])
            )
        )

    answers = None
    if tasks is not None and {name, "student", "teacher"} <= right.keys():
        answers = tasks.estimate(
            lambda sums: (sums[name] - sums["student"]) / _distance(sums["teacher"] - sums["student"])
        )
    return GapClosed(covered("kl"), covered("nll"), answers)


def _distance(values: np.ndarray) -> np.ndarray:
    """A distance to divide by: where the student is no worse than the teacher there is none."""
    return np.where(values > 0, values, np.nan)


def _against_control(prompts: Resampled, tasks: Resampled | None) -> AgainstControl:
    def lead(measure: str, sign: float) -> Lead:
        def by(sums: Mapping[str, np.ndarray]) -> np.ndarray:
            return sign * (sums[f"adapted {measure}"] - sums[f"control {measure}"]) / sums["tokens"]

        return Lead(prompts.estimate(by) or Estimate(0.0), prompts.sureness(by))

    def more_right(sums: Mapping[str, np.ndarray]) -> np.ndarray:
        return (sums["adapted"] - sums["control"]) / tasks.count

    answers = None
    if tasks is not None:
        answers = Lead(tasks.estimate(more_right) or Estimate(0.0), tasks.sureness(more_right))
    return AgainstControl(lead("kl", -1.0), lead("nll", -1.0), lead("top1", 1.0), answers)


def _retention(prompts: Resampled, tasks: Resampled | None, right: Mapping[str, np.ndarray]) -> Retention:
    likelihood = prompts.estimate(lambda sums: np.exp((sums["teacher nll"] - sums["adapted nll"]) / sums["tokens"]))
    answers = None
    if tasks is not None and "teacher" in right:
        answers = tasks.estimate(lambda sums: sums["adapted"] / sums["teacher"])
    return Retention(likelihood, answers)


def _footprint(student: ModelSize, adapted: ModelSize, teacher: ModelSize) -> Footprint:
    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one is not None and other else None

    return Footprint(
        adapter_parameters=(adapted.parameters or 0) - (student.parameters or 0),
        adapter_bytes=(adapted.bytes or 0) - (student.bytes or 0),
        parameter_ratio=ratio(teacher.parameters, adapted.parameters),
        byte_ratio=ratio(teacher.bytes, adapted.bytes),
        speed_up=ratio(adapted.tokens_per_second, teacher.tokens_per_second),
    )


def _by_position(models: Mapping[str, Measured]) -> tuple[PositionScores, ...]:
    kls = {name: model.scores.kl for name, model in models.items()}
    found = []
    for start, stop, inside in stretches(models["student"].scores.position):
        means = {name: float(kl[inside].mean()) for name, kl in kls.items()}
        found.append(
            PositionScores(start, stop, int(inside.sum()), means["student"], means["adapted"], means.get("control"))
        )
    return tuple(found)
