"""Finds a fast BLAS on Linux and puts it in front of the slow one that the MLX CPU wheel ships.

`libmlx.so` resolves `cblas_sgemm` when it is loaded, so a library loaded globally before it wins; loaded after it, it
does nothing. That is why `true_kd/__init__.py` calls `load()` before anything imports `mlx`. Measured on two Zen 5
cores: 7 GFLOP/s with the wheel's reference BLAS, over 200 with OpenBLAS. macOS (Accelerate, Metal) needs none of it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "TRUE_KD_BLAS"
"""Environment variable: a library's path or soname to load instead of searching, or `off`."""

# All three export plain `cblas_sgemm` and LAPACK; ordered by what measured fastest. MKL's TBB layer aborts in a venv.
_CANDIDATES = (
    "libopenblas.so.0",
    "libopenblas.so",
    str(Path(sys.prefix) / "lib" / "libopenblas.so"),
    "libmkl_rt.so.3",
    "libmkl_rt.so.2",
    str(Path(sys.prefix) / "lib" / "libmkl_rt.so.3"),
    str(Path(sys.prefix) / "lib" / "libmkl_rt.so.2"),
)


@dataclass(frozen=True)
class Blas:
    """Which BLAS this process runs on. `library` is None where the wheel's own is used; `reason` says why."""

    library: str | None
    reason: str


def _load() -> Blas:
    if sys.platform != "linux":
        return Blas(None, "not needed on this platform")
    choice = os.environ.get(VARIABLE, "")
    if choice.lower() == "off":
        return Blas(None, f"{VARIABLE}={choice}")
    if "mlx.core" in sys.modules:
        return Blas(None, "mlx was imported before true_kd, too late to load one")
    os.environ.setdefault("MKL_THREADING_LAYER", "GNU")
    for name in (choice,) if choice else _CANDIDATES:
        try:
            # Looked at before it is made global: a library that is no BLAS must not put its symbols before others'.
            ctypes.CDLL(name).cblas_sgemm  # noqa: B018
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except (OSError, AttributeError):
            continue
        return Blas(name, "found and loaded")
    if choice:
        return Blas(None, f"{VARIABLE}={choice} is not a BLAS that can be loaded")
    return Blas(None, "none installed; `apt install libopenblas0-pthread` makes CPU runs about 30 times faster")


IN_USE = _load()
"""What was loaded when true_kd was imported."""
