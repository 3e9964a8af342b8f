"""Says what is missing when MLX cannot be imported, and what device it runs on.

On Linux the bare `mlx` package installs without a backend: the import fails until one of the extras is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from true_kd import __version__, metal
from true_kd.errors import EnvironmentProblem


class PlatformRefused(EnvironmentProblem):
    """MLX does not run on this kind of machine."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"this machine: {found}, expected a Mac with Apple silicon, or Linux. {remedy}")


def require_platform() -> None:
    """Refuse the systems that MLX has no build for, before anything is imported that they lack.

    Raises
    ------
    PlatformRefused
        on Windows, and on a Mac with an Intel processor or an Intel Python.
    """
    if sys.platform in ("win32", "cygwin", "msys"):
        raise PlatformRefused("Windows", "Install true-kd in WSL, which is Linux: learn.microsoft.com/windows/wsl.")
    if sys.platform == "darwin" and platform.machine() != "arm64":
        raise PlatformRefused(
            f"a Mac with an Intel processor, or an Intel Python ({platform.machine()})",
            "On Apple silicon install a Python for arm64; an Intel Mac can run it in a Linux container or over ssh.",
        )


class BackendMissing(EnvironmentProblem):
    """MLX is not installed, or installed without the library that does the work."""

    def __init__(self, cause: ImportError) -> None:
        system = platform.system()
        if system == "Linux":
            remedy = (
                "Run pip install 'true-kd[cpu]', or 'true-kd[cuda12]' / 'true-kd[cuda13]' on a machine with an "
                "NVIDIA driver ('.[cpu]' in a checkout)."
            )
        elif system == "Darwin" and platform.machine() == "arm64":
            remedy = "Run pip install --force-reinstall mlx mlx-lm (macOS 14 or later)."
        else:
            remedy = "MLX has no build for this machine: use an Apple Silicon Mac or Linux."
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        super().__init__(f"mlx cannot be imported ({reason}). {remedy}")


def require_mlx() -> None:
    """Import MLX, with what macOS has to know before.

    Raises
    ------
    PlatformRefused
        on a machine that MLX has no build for.
    BackendMissing
        with the extra to install, when MLX or its backend is not there.
    """
    require_platform()
    metal.relax_watchdog()
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        raise BackendMissing(error) from error
    # Importing mlx_lm costs nearly a second; that it is installed is enough here.
    if importlib.util.find_spec("mlx_lm") is None:
        raise BackendMissing(ImportError("No module named 'mlx_lm'"))


def device_name() -> str:
    """`metal`, `cuda` or `cpu`: where MLX computes by default."""
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.gpu):
        return "cpu"
    return "metal" if sys.platform == "darwin" else "cuda"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"true-kd": __version__, "python": platform.python_version(), "platform": platform.platform(terse=True)}
    for package in ("mlx", "mlx-lm", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
