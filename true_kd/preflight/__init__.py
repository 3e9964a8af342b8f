"""What is wrong with configs and prompts, and what the student will be trained on: found before a run, all of it.

Nothing is written, downloaded or trained, and no weights are opened. What a run would make of a prompt is asked of the
functions that the run calls; here is only what to say of it.
"""

from true_kd.preflight.domains import examine, find_stray_configs
from true_kd.preflight.findings import (
    Counts,
    DomainReport,
    Finding,
    Report,
    Sheet,
    ShownExample,
    ShownToken,
    sum_up,
)

__all__ = [
    "Counts",
    "DomainReport",
    "Finding",
    "Report",
    "Sheet",
    "ShownExample",
    "ShownToken",
    "examine",
    "find_stray_configs",
    "sum_up",
]
