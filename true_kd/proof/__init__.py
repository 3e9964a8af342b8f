"""Whether distillation helped, and how sure that is: the student before and after, a control, and the teacher.

All models are measured on the same held-out prompts, so each comparison is paired; the definitions, with their papers,
stand in docs/proof.md. Nothing here runs a model.
"""

from true_kd.proof.measures import Measured, prove
from true_kd.proof.records import (
    AgainstControl,
    Footprint,
    GapClosed,
    Lead,
    ModelScores,
    PositionScores,
    PromptScores,
    Proof,
    ProofSummary,
    Retention,
    Sample,
    Verdict,
)

__all__ = [
    "AgainstControl",
    "Footprint",
    "GapClosed",
    "Lead",
    "Measured",
    "ModelScores",
    "PositionScores",
    "PromptScores",
    "Proof",
    "ProofSummary",
    "Retention",
    "Sample",
    "Verdict",
    "prove",
]
