"""What the examination of a domain finds, as records for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from true_kd.errors import Problems, TrueKDError
from true_kd.options import record
from true_kd.suggest import redact

Kind = Literal[
    "config", "prompts", "model", "vocabulary", "template", "length", "leak", "duplicate", "reply", "answer", "reward"
]


@record
class Finding:
    """One thing that is wrong, or worth a look."""

    severity: Literal["problem", "warning"]
    """A problem stops a run, or costs it what the user gave; a warning does neither."""
    kind: Kind
    """What was examined."""
    message: str
    """Where, what was found, what was expected, what to do; on one line."""


@record
class ShownToken:
    """A token as the student meets it."""

    id: int
    """In the student's vocabulary."""
    text: str
    """What it adds to the text; "" where a later token completes the character."""
    trained: bool
    """Whether the student learns to predict it: `Example.loss_mask`."""


@record
class ShownExample:
    """A training prompt as the student will see it."""

    where: str
    """The line it comes from."""
    reply: Literal["data", "cache", "teacher"]
    """Whose the reply is: the data's own, the teacher's as the cache has it, or not there yet."""
    prompt_tokens: int
    """Tokens before the reply."""
    trained_tokens: int
    """Tokens that count in the loss."""
    cut_tokens: int
    """Tokens at the end of the reply that `training.max_seq_length` cuts off."""
    tokens: tuple[ShownToken, ...]
    """All of them, in order; the reply's only where it is there."""
    note: str
    """What else there is to know, or ""."""


@record
class Counts:
    """How much a domain holds, as far as it could be counted."""

    train_prompts: int
    """Prompts to train on."""
    valid_prompts: int
    """Prompts held out."""
    given: int
    """Prompts whose reply the data brings."""
    cached: int
    """Prompts that the teacher has answered or scored already."""
    prompt_tokens: int
    """Of all prompts, in the student's tokens; 0 where its tokenizer is not here."""
    trained_tokens: int
    """Of the training replies that are there."""
    truncated: int
    """Replies of which the end finds no room."""


@record
class DomainReport:
    """What was found of one domain."""

    domain: str
    """Its name."""
    findings: tuple[Finding, ...]
    """In the order of what was examined."""
    unchecked: tuple[str, ...]
    """What could not be examined, and why."""
    counts: Counts | None
    """None where the prompts cannot be read."""
    examples: tuple[ShownExample, ...]
    """The first training prompts."""


@record
class Report:
    """What `true-kd validate --json` prints."""

    problems: int
    """How many; what several domains share counts once."""
    warnings: int
    """How many, likewise."""
    findings: tuple[Finding, ...]
    """Those of no single domain."""
    domains: tuple[DomainReport, ...]
    """One for each domain that was looked at."""


def sum_up(findings: Sequence[Finding], domains: Sequence[DomainReport]) -> Report:
    """The report on some domains, and on what is of no single one."""
    found = {finding for report in domains for finding in report.findings} | set(findings)
    problems = sum(finding.severity == "problem" for finding in found)
    return Report(problems, len(found) - problems, tuple(findings), tuple(domains))


@dataclass
class Sheet:
    """Collects what is found of a domain."""

    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def problem(self, kind: Kind, message: str) -> None:
        """Note a problem, unless it is noted."""
        self._note(Finding("problem", kind, redact(message)))

    def warning(self, kind: Kind, message: str) -> None:
        """Note a warning, unless it is noted."""
        self._note(Finding("warning", kind, redact(message)))

    def refused(self, kind: Kind, error: TrueKDError) -> None:
        """Note every problem that an error tells of."""
        for line in error.lines if isinstance(error, Problems) else (str(error),):
            self.problem(kind, line)

    def not_checked(self, what: str) -> None:
        """Note that something could not be examined."""
        if redact(what) not in self.unchecked:
            self.unchecked.append(redact(what))

    def _note(self, finding: Finding) -> None:
        if finding.message not in {known.message for known in self.findings}:
            self.findings.append(finding)
