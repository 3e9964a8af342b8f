"""What is measured on the validation prompts."""

from __future__ import annotations

from pydantic import Field

from true_kd.options import Options


class EvaluationOptions(Options):
    """What is measured on the validation prompts."""

    exact_match: bool = True
    """Where validation prompts carry an `answer`, let the student write and compare."""
    answer_marker: str = Field(default="answer:", min_length=1)
    """The answer is what follows the last occurrence of this in a reply, or the whole reply where it does not occur."""
    speed_tokens: int = Field(default=32, ge=0)
    """Tokens that teacher and student write to each of three prompts to measure their speed; 0 to leave it out."""
