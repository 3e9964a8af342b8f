"""What this machine computes with: the text to paste into an issue."""

from __future__ import annotations

import platform
import sys

import mlx.core as mx

from true_kd import blas
from true_kd.backend import device_name, versions
from true_kd.cache import default_root
from true_kd.memory import budget_bytes
from true_kd.metal import DISPLAY_ADVICE


def describe_machine() -> dict[str, str]:
    """Versions, device, BLAS and folders, by name."""
    device = device_name()
    wheel = "the platform's own" if sys.platform != "linux" else "the wheel's own, slow"
    return {
        **versions(),
        "device": f"{device} ({mx.device_info().get('device_name', platform.machine())})",
        "blas": f"{blas.IN_USE.library or wheel} ({blas.IN_USE.reason})" if device == "cpu" else "not used on a GPU",
        "memory": f"{budget_bytes(None) / 1e9:.1f} GB that a run takes at most (--memory-gb)",
        "target cache": str(default_root()),
        **({"display": " ".join(DISPLAY_ADVICE)} if device == "metal" else {}),
    }
