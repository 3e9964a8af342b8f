"""What training minimises: `alpha * T^2 * divergence(teacher, student) + (1 - alpha) * CE`, over response tokens.

`compute_kd_loss` and `compute_ce_loss` give it on whole logits; `head_losses` is the fast path: hidden states of
response tokens go through the output head in chunks, and the teacher is sparse.
"""

from true_kd.losses.dense import compute_ce_loss, compute_kd_loss
from true_kd.losses.distributions import BatchTargets, HeadTargets, RankedTargets, Softened, TokenTargets
from true_kd.losses.divergences import DIVERGENCES, Divergence, ForwardKL
from true_kd.losses.head import LossSums, chunks, head_losses, token_losses
from true_kd.losses.options import LossOptions, Objective, WeighBy, chunk_rows

__all__ = [
    "DIVERGENCES",
    "BatchTargets",
    "Divergence",
    "ForwardKL",
    "HeadTargets",
    "LossOptions",
    "LossSums",
    "Objective",
    "RankedTargets",
    "Softened",
    "TokenTargets",
    "WeighBy",
    "chunk_rows",
    "chunks",
    "compute_ce_loss",
    "compute_kd_loss",
    "head_losses",
    "token_losses",
]
