"""true-kd distils a large language model into small LoRA adapters on the machine in front of you.

The command line is `true-kd`; the Python API is the names below. Importing this package loads a fast BLAS where one
is wanted (see `true_kd.blas`), so import it before `mlx`; everything heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from true_kd import blas as blas  # first of all imports: see the module

__version__ = "0.1.0"

_PUBLIC = {
    "TrueKnowledgeDistiller": "true_kd.distiller",
    "KDConfig": "true_kd.config",
    "KDResult": "true_kd.reporting",
    "compute_kd_loss": "true_kd.losses",
    "compute_ce_loss": "true_kd.losses",
    "align_vocab_sizes": "true_kd.vocabulary",
}
__all__ = ["KDConfig", "KDResult", "TrueKnowledgeDistiller", "align_vocab_sizes", "compute_ce_loss", "compute_kd_loss"]

if TYPE_CHECKING:
    from true_kd.config import KDConfig
    from true_kd.distiller import TrueKnowledgeDistiller
    from true_kd.losses import compute_ce_loss, compute_kd_loss
    from true_kd.reporting import KDResult
    from true_kd.vocabulary import align_vocab_sizes


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'true_kd' has no attribute {name!r}")
    from true_kd.backend import require_mlx

    require_mlx()
    return getattr(importlib.import_module(_PUBLIC[name]), name)
