"""What this machine computes with: the text to paste into an issue."""

from __future__ import annotations

import platform
import sys

import mlx.core as mx

from true_kd import blas
from true_kd.backend import device_name, versions
from true_kd.cache import default_root


def describe_machine() -> dict[str, str]:
    """Versions, device, BLAS and folders, by name."""
    device = device_name()
    wheel = "the platform's own" if sys.platform != "linux" else "the wheel's own, slow"
    return {
        **versions(),
        "device": f"{device} ({mx.device_info().get('device_name', platform.machine())})",
        "blas": f"{blas.IN_USE.library or wheel} ({blas.IN_USE.reason})" if device == "cpu" else "not used on a GPU",
        "target cache": str(default_root()),
    }
