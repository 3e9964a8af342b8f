"""What a proof holds: every measure of a domain, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Literal

from true_kd.evaluation import Estimate
from true_kd.gate import Headroom
from true_kd.options import record


@record
class ModelScores:
    """One model on the held-out prompts; means over their response tokens, with intervals over the prompts."""

    kl: Estimate
    """KL(teacher || model) at temperature 1, nats per token; 0 for the teacher."""
    nll: Estimate
    """-log of the probability of the teacher's text, nats per token."""
    perplexity: Estimate | None
    """On the teacher's text: exp of `nll`; null where that is more than a number can hold."""
    top1_agreement: Estimate
    """Share of tokens at which the model's most likely token is the teacher's."""
    top5_agreement: Estimate
    """Share of tokens at which the teacher's most likely token is among the model's five most likely."""
    exact_match: Estimate | None
    """Share of checkable tasks answered right; None where there are none."""
    parameters: int | None
    """Quantised weights counted unpacked, the adapter's included."""
    bytes: int | None
    """Of its weights on disk, the adapter's included."""
    tokens_per_second: float | None
    """That it writes to one prompt at a time on this machine; None where it was not measured here."""


@record
class GapClosed:
    """Share of the distance between student and teacher that the adapter covers: 1 all of it, 0 nothing, below 0 it
    leads away. None where there is no distance, or nothing to measure it by."""

    kl: Estimate | None
    """1 - KL after / KL before."""
    nll: Estimate | None
    """(before - after) / (before - teacher), on the teacher's text."""
    exact_match: Estimate | None
    """(after - before) / (teacher - before)."""


@record
class Lead:
    """A difference between two models on the same prompts, positive where the first is better."""

    by: Estimate
    """The difference."""
    sureness: float | None
    """Share of the bootstrap's draws of the prompts in which the first is ahead; null for fewer than five prompts."""


@record
class AgainstControl:
    """The adapter against the control: the same student trained as long on the same text by cross-entropy alone."""

    kl: Lead
    """Nats per token by which the adapter is nearer to the teacher."""
    nll: Lead
    """The same by the likelihood of the teacher's text, nats per token."""
    top1_agreement: Lead
    """By how much the share of tokens is larger at which it prefers what the teacher does."""
    exact_match: Lead | None
    """By how much the share of right answers is larger; null without tasks."""


@record
class Retention:
    """What of the teacher the student with its adapter keeps: 1 is all of it."""

    likelihood: Estimate | None
    """Perplexity of the teacher over that of the adapted student, on the teacher's text."""
    exact_match: Estimate | None
    """Tasks answered right, as a share of the teacher's."""


@record
class Footprint:
    """What the student with its adapter takes, beside the teacher. None where the teacher's part is not known."""

    adapter_parameters: int
    """Numbers in the adapter."""
    adapter_bytes: int
    """Of the adapter on disk."""
    parameter_ratio: float | None
    """Parameters of the teacher over those of student and adapter."""
    byte_ratio: float | None
    """Bytes on disk of the teacher over those of student and adapter."""
    speed_up: float | None
    """Tokens per second of student and adapter over those of the teacher."""


@record
class PositionScores:
    """Mean KL to the teacher at response tokens of some places in their replies, counted from 0; nats."""

    start: int
    """The first place."""
    stop: int
    """Not one of them."""
    tokens: int
    """How many there are."""
    student: float
    """Of the student as it came."""
    adapted: float
    """With its adapter."""
    control: float | None
    """Of the control; null where there is none."""


@record
class Sample:
    """One held-out reply, token by token."""

    kind: Literal["best", "worst"]
    """The most gained, or the most left."""
    where: str
    """The line of the prompt."""
    prompt: str
    """Its last part, as the student reads it."""
    pieces: tuple[str, ...]
    """What each token of the reply adds to its text."""
    student: tuple[float | None, ...]
    """KL to the teacher at each token, nats; None where the cache keeps no target."""
    adapted: tuple[float | None, ...]


@record
class PromptScores:
    """The measures prompt by prompt, so that runs on the same prompts can be compared in pairs; one number a prompt."""

    where: tuple[str, ...]
    """The lines of the prompts."""
    tokens: tuple[int, ...]
    """Response tokens that count."""
    kl: Mapping[str, tuple[float, ...]]
    """Sums of the KL over these, nats, by model: student, adapted, control."""
    nll: Mapping[str, tuple[float, ...]]
    """Sums of -log p of the text, nats, by model, the teacher among them."""
    agreed: Mapping[str, tuple[int, ...]]
    """Tokens at which the most likely token is the teacher's, by model."""
    right: Mapping[str, tuple[bool, ...]]
    """Whether each checkable task, in the order of the prompts, is answered right, by model."""


Outcome = Literal["helped", "unclear", "mixed", "hurt", "nothing to learn"]
"""`helped`: the interval of the gap that was closed lies above 0. `unclear`: it holds 0, or there is none, with too few
prompts or a student too near to its teacher. `hurt`: it lies below 0. `mixed`: nearer to the teacher, but surely fewer
tasks answered right. `nothing to learn`: student and teacher were the same to begin with."""

Place = Literal["ahead", "level", "behind"]
"""Where the adapter is against the control by KL; `level` where the interval of the difference holds 0."""


@record
class Verdict:
    """What the measures come to."""

    outcome: Outcome
    """In a word."""
    against_control: Place | None
    """None without a control, and where there was nothing to learn."""
    sentence: str
    """In a sentence."""


@record
class ProofSummary:
    """The measures of one domain; intervals are 95 % over its held-out prompts."""

    examples: int
    """Held-out prompts."""
    tokens: int
    """Their response tokens that count."""
    tasks: int
    """Those of the prompts that a program checks."""
    student: ModelScores
    """As it came."""
    adapted: ModelScores
    """With its adapter."""
    control: ModelScores | None
    """With an adapter trained by cross-entropy alone; None where none was asked for."""
    teacher: ModelScores
    """Its own scores; by its replies at capture for exact match."""
    gap_closed: GapClosed
    """By the adapter."""
    control_gap_closed: GapClosed | None
    """The same of the control."""
    against_control: AgainstControl | None
    """Null without a control."""
    retention: Retention
    """By the student with its adapter."""
    footprint: Footprint
    """Of the student with its adapter."""
    headroom: Headroom
    """What there was to learn."""
    by_position: tuple[PositionScores, ...]
    """Where in the replies the distance lies."""
    verdict: Verdict
    """What all this comes to."""


@record
class Proof(ProofSummary):
    """The measures of one domain, and what they were made from."""

    samples: tuple[Sample, ...]
    prompts: PromptScores

    @property
    def summary(self) -> ProofSummary:
        """The measures alone."""
        return ProofSummary(**{item.name: getattr(self, item.name) for item in fields(ProofSummary)})
