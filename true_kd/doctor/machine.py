"""Device, BLAS, memory, disk and open files."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx

from true_kd import blas
from true_kd.backend import device_name
from true_kd.doctor.verdicts import Check
from true_kd.memory import default_budget, host_memory
from true_kd.suggest import in_bytes

LEAST_MEMORY = 5_000_000_000
"""Bytes that a run should be able to take: the weights of a 7B teacher in 4 bits, with their scales, are 4.3 GB."""

LITTLE_DISK, LEAST_DISK = 5_000_000_000, 200_000_000
"""Free bytes below which a warning, and a problem: the default models alone are 6 GB, an adapter and its checkpoints
some 100 MB each."""

MLX_LM_FILES = 4096
"""The limit on open files that `import mlx_lm` sets, and fails to where the hard limit is smaller."""
LEAST_FILES = 256
"""Open files that macOS allows by default, and enough for a run."""


def check_device(nvidia: Path = Path("/proc/driver/nvidia/version")) -> Check:
    """Where MLX computes. `nvidia` is a file that the NVIDIA driver makes."""
    device = device_name()
    found = f"{device} ({mx.device_info().get('device_name', platform.machine())})"
    if device == "cpu" and nvidia.exists():
        return Check(
            "device",
            "warning",
            f"{found}, though the driver of an NVIDIA GPU is here",
            "Run pip uninstall mlx-cpu, then pip install 'true-kd[cuda13]' (or [cuda12] for an older driver).",
        )
    if device == "cpu" and sys.platform == "darwin":
        return Check("device", "warning", found, "MLX found no Metal. Run it on an Apple Silicon Mac, outside a VM.")
    return Check("device", "ok", found)


def check_blas(used: blas.Blas = blas.IN_USE) -> Check:
    """What multiplies matrices where a CPU does."""
    if device_name() != "cpu":
        return Check("blas", "ok", "not used on a GPU")
    if sys.platform != "linux":
        return Check("blas", "ok", "the platform's own")
    if used.library is not None:
        return Check("blas", "ok", f"{used.library} ({used.reason})")
    reason = used.reason.partition(";")[0]
    if reason.startswith(blas.VARIABLE):
        advice = f"Unset {blas.VARIABLE}, or name the library of a fast BLAS in it."
    elif used.reason.startswith("mlx was imported"):
        advice = "Import true_kd before mlx."
    else:
        advice = (
            "Run apt install libopenblas0-pthread, or install your distribution's OpenBLAS: matrices are multiplied "
            f"some 30 times faster. {blas.VARIABLE}=PATH names one that is not found."
        )
    return Check("blas", "warning", f"the wheel's own, slow ({reason})", advice)


def check_memory(total: int | None = None, budget: int | None = None) -> Check:
    """What the machine has, and what a run takes of it."""
    total, budget = total or host_memory(), budget or default_budget()
    found = f"{in_bytes(total)}, of which a run takes {in_bytes(budget)} at most (--memory-gb changes it)"
    if budget < LEAST_MEMORY:
        return Check(
            "memory",
            "warning",
            found,
            "Less than a 7B teacher in 4 bits needs: choose a smaller one (--teacher), or capture on another machine "
            "and bring its cache here (true-kd cache export, import).",
        )
    return Check("memory", "ok", found)


def check_disks(folders: Mapping[str, Path]) -> Iterator[Check]:
    """Room where each folder is or would be, and whether it can be written."""
    for name, folder in folders.items():
        place = next((place for place in (folder, *folder.absolute().parents) if place.exists()), Path("/"))
        try:
            free = shutil.disk_usage(place).free
        except OSError as error:
            yield Check(name, "problem", f"{folder}: {error.strerror}", "Check the disk, or choose another folder.")
            continue
        yield judge_disk(name, folder, free, os.access(place, os.W_OK) and place.is_dir())


def judge_disk(name: str, folder: Path, free: int, writable: bool) -> Check:
    """What so many free bytes mean for a folder."""
    found = f"{folder}, {in_bytes(free)} free"
    if not writable:
        return Check(name, "problem", f"{found}, cannot be written", "Check its permissions, or choose another folder.")
    if free < LITTLE_DISK:
        verdict = "problem" if free < LEAST_DISK else "warning"
        return Check(name, verdict, found, f"Free space: {in_bytes(LITTLE_DISK)} or more is safe.")
    return Check(name, "ok", found)


def check_files(limits: tuple[int, int] | None = None) -> Check:
    """How many files a process may have open."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    shown = [("unlimited" if limit == unlimited else f"{limit:,}") for limit in (soft, hard)]
    found = f"{shown[0]} at once, {shown[1]} at most"
    if soft != unlimited and soft < LEAST_FILES:
        return Check("open files", "warning", found, f"Run ulimit -n {MLX_LM_FILES} before true-kd.")
    if hard != unlimited and hard < MLX_LM_FILES:
        return Check(
            "open files",
            "warning",
            found,
            f"true-kd works, but mlx_lm.generate and others stop at their import: raise the hard limit to "
            f"{MLX_LM_FILES} (ulimit -Hn, or the container's settings).",
        )
    return Check("open files", "ok", found)
