"""How near a model is to the teacher on held-out prompts, how many tasks it gets right, and how sure that is."""

from true_kd.evaluation.answers import exact_match, extract_answer, gives_answer, right_answers
from true_kd.evaluation.intervals import CONFIDENCE, FEWEST, Estimate, Resampled, share_estimate
from true_kd.evaluation.options import EvaluationOptions
from true_kd.evaluation.scores import EvalMetrics, TokenScores, evaluate, measure

__all__ = [
    "CONFIDENCE",
    "FEWEST",
    "Estimate",
    "EvalMetrics",
    "EvaluationOptions",
    "Resampled",
    "TokenScores",
    "evaluate",
    "exact_match",
    "extract_answer",
    "gives_answer",
    "measure",
    "right_answers",
    "share_estimate",
]
