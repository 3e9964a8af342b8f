"""What a check says."""

from __future__ import annotations

from typing import Literal

from true_kd.options import record

Verdict = Literal["ok", "warning", "problem"]
"""`problem`: runs fail, or are not to be trusted; `warning`: they are slower, or may stop; `ok`: neither."""


@record
class Check:
    """One thing that was looked at."""

    name: str
    """What it is."""
    verdict: Verdict
    """See `Verdict`."""
    found: str
    """What was found."""
    advice: str = ""
    """What to do, where there is something."""


@record
class Diagnosis:
    """What `true-kd doctor --json` prints."""

    verdict: Verdict
    """The worst of all checks."""
    checks: tuple[Check, ...]
    """In the order in which they were made."""
