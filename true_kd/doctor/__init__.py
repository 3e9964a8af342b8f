"""What may go wrong with a run on this machine, and what to do: `true-kd doctor`, and the text to paste into an issue.

Nothing is written, and no secret is ever part of what is found.
"""

from true_kd.doctor.checks import examine_machine, verdict_of
from true_kd.doctor.verdicts import Check, Diagnosis

__all__ = ["Check", "Diagnosis", "examine_machine", "verdict_of"]
