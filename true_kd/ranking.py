"""Which of several settings is nearest to the teacher on the same held-out prompts, and which are as good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from true_kd.errors import TrueKDError
from true_kd.evaluation import Estimate, Resampled, share_estimate
from true_kd.options import record
from true_kd.proof import PromptScores


@dataclass(frozen=True)
class Run:
    """One trained adapter; runs of one setting are repetitions with other seeds."""

    setting: str
    is_control: bool
    """Whether it was trained by cross-entropy alone."""
    scores: PromptScores


@record
class Row:
    """One setting of a sweep on one domain."""

    setting: str
    seeds: int
    """Repetitions, which the measures are means of."""
    kl: Estimate
    """KL to the teacher, nats per token."""
    top1_agreement: Estimate
    exact_match: Estimate | None
    behind: Estimate
    """How much further from the teacher than the best, nats per token, on the same prompts."""
    as_good: bool
    """Whether that difference cannot be told from chance."""
    is_control: bool


@record
class Recommendation:
    """What a sweep came to on one domain."""

    domain: str
    best: str
    """The setting that is nearest to the teacher, of those that distil."""
    rows: tuple[Row, ...]
    """The nearest first."""
    sentence: str


def recommend(domain: str, runs: Sequence[Run]) -> Recommendation:
    """Compare the settings of one domain on the same prompts; repetitions are averaged, prompt by prompt.

    Raises
    ------
    TrueKDError
        when the runs were not measured on the same prompts.
    """
    scores: dict[str, list[PromptScores]] = {}
    controls = {run.setting for run in runs if run.is_control}
    for run in runs:
        scores.setdefault(run.setting, []).append(run.scores)
    some = next(iter(scores.values()))[0]
    if any(each.where != some.where or each.tokens != some.tokens for many in scores.values() for each in many):
        raise TrueKDError(f"{domain}: its points were measured on different prompts. Run the sweep again with --fresh.")
    columns = {"tokens": np.array(some.tokens, dtype=np.float64)}
    for setting, many in scores.items():
        columns[f"{setting} kl"] = np.mean([each.kl["adapted"] for each in many], axis=0)
        columns[f"{setting} agreed"] = np.mean([each.agreed["adapted"] for each in many], axis=0)
    prompts = Resampled(columns)
    order = sorted(scores, key=lambda setting: columns[f"{setting} kl"].sum())
    best = next((setting for setting in order if setting not in controls), order[0])
    rows = tuple(_row(setting, best, scores[setting], prompts, setting in controls) for setting in order)
    return Recommendation(domain, best, rows, _say(domain, best, rows))


def _row(setting: str, best: str, many: Sequence[PromptScores], prompts: Resampled, is_control: bool) -> Row:
    def mean(measure: str) -> Estimate:
        return prompts.estimate(lambda sums: sums[f"{setting} {measure}"] / sums["tokens"]) or Estimate(0.0)

    behind = prompts.estimate(lambda sums: (sums[f"{setting} kl"] - sums[f"{best} kl"]) / sums["tokens"])
    behind = behind or Estimate(0.0)
    answers = [each.right["adapted"] for each in many if "adapted" in each.right]
    return Row(
        setting=setting,
        seeds=len(many),
        kl=mean("kl"),
        top1_agreement=mean("agreed"),
        exact_match=_mean_share(answers),
        behind=behind,
        as_good=setting == best or not _differs(behind),
        is_control=is_control,
    )


def _differs(behind: Estimate) -> bool:
    """Whether a difference from the best is more than chance: never so where there are too few prompts to tell."""
    return behind.low is not None and behind.high is not None and not behind.low <= 0 <= behind.high


def _mean_share(answers: Sequence[Sequence[bool]]) -> Estimate | None:
    """Of one repetition Wilson's interval; of several the bootstrap's over the tasks."""
    if not answers:
        return None
    if len(answers) == 1:
        return share_estimate(np.array(answers[0]))
    shares = np.mean(np.array(answers, dtype=np.float64), axis=0)
    return Resampled({"right": shares, "tasks": np.ones(len(shares))}).estimate(
        lambda sums: sums["right"] / sums["tasks"]
    )


def _say(domain: str, best: str, rows: Sequence[Row]) -> str:
    by_name: Mapping[str, Row] = {row.setting: row for row in rows}
    words = f"{domain}: take {best} (KL {by_name[best].kl.value:.3f} nats per token)"
    equals = [row.setting for row in rows if row.as_good and row.setting != best and not row.is_control]
    if equals:
        words += f"; as good within chance: {', '.join(equals)}"
    if len({row.seeds for row in rows}) > 1:
        words += "; not all settings have as many seeds, some have failed"
    control = next((row for row in rows if row.is_control), None)
    if control is None:
        return f"{words}."
    if not _differs(control.behind):
        return f"{words}. Plain fine-tuning is as good within chance."
    if control.behind.value > 0:
        return f"{words}. Plain fine-tuning is behind by {control.behind.value:.3f} nats per token."
    return f"{words}. Plain fine-tuning is nearer to the teacher by {-control.behind.value:.3f} nats per token."
