"""Training: which micro-batches a step has, their gradient, and the loop over steps."""

from true_kd.training.gradients import Gradients, sum_gradients
from true_kd.training.loop import NonFinite, StepMetrics, TrainingState, train
from true_kd.training.options import TrainingOptions, learning_rate_at
from true_kd.training.plan import Plan, Room

__all__ = [
    "Gradients",
    "NonFinite",
    "Plan",
    "Room",
    "StepMetrics",
    "TrainingOptions",
    "TrainingState",
    "learning_rate_at",
    "sum_gradients",
    "train",
]
