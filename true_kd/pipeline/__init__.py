"""What a run does, as generators of events (see `true_kd.events`): they print nothing, and whoever runs them shows what
it wants.

`distill` in `distilling` is the one function to read first. The teacher answers for all domains and is freed before the
first student is trained; where a probe comes before, it is opened, freed and opened again. The two are never in memory
together, so a run's peak memory is that of its larger phase, not the sum.
"""

from true_kd.pipeline.distilling import capture, distill
from true_kd.pipeline.measuring import analyze, evaluate

__all__ = ["analyze", "capture", "distill", "evaluate"]
