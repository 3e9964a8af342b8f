"""What matters on a Mac: its system, power, sleep, the display, and how much memory the GPU may keep.

Untested on a Mac: what reads the output of `pmset` and `sysctl` is tested on text that others have published.
"""

from __future__ import annotations

import contextlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping

from true_kd.doctor.verdicts import Check
from true_kd.memory import METAL_SHARE, host_memory
from true_kd.metal import DISPLAY_ADVICE
from true_kd.suggest import in_bytes

OLDEST = 14
"""The macOS that MLX's wheels need."""


def check_mac() -> Iterator[Check]:
    """All of it; nothing elsewhere."""
    if sys.platform != "darwin":
        return
    yield judge_system(platform.mac_ver()[0])
    yield from judge_power(_run("pmset", "-g", "batt"), read_settings(_run("pmset", "-g")))
    yield judge_wired(_run("sysctl", "-n", "iogpu.wired_limit_mb"), host_memory())
    yield Check("display", "ok", "a lit display competes for the GPU", " ".join(DISPLAY_ADVICE))


def _run(*command: str) -> str:
    """What a command prints, within two seconds; "" where it does not."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=2, check=False).stdout
    return ""


def judge_system(version: str) -> Check:
    """What a version of macOS means."""
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < OLDEST:
        return Check("macos", "problem", version, f"MLX needs macOS {OLDEST} or later. Update the system.")
    return Check("macos", "ok", version or "unknown")


def read_power(text: str) -> str | None:
    """Where power comes from, by `pmset -g batt`: "AC Power" or "Battery Power"; None where it does not say."""
    found = re.search(r"Now drawing from '([^']*)'", text)
    return found[1] if found else None


def read_settings(text: str) -> dict[str, str]:
    """The settings in use by `pmset -g`, by name; what prevents a sleep stands under "sleep prevented by"."""
    found = {}
    for line in text.partition("Currently in use:")[2].splitlines():
        if setting := re.fullmatch(r"\s*(\S.*?)\s+(\S+)(?:\s+\((sleep prevented by) (.*)\))?\s*", line):
            found[setting[1]] = setting[2]
            if setting[3] and setting[1] == "sleep":
                found[setting[3]] = setting[4]
    return found


def judge_power(battery: str, settings: Mapping[str, str]) -> Iterator[Check]:
    """What power source and sleep mean for hours of training."""
    source = read_power(battery)
    if source is None:
        yield Check("power", "ok", "unknown: pmset does not say")
    elif source.startswith("Battery"):
        yield Check("power", "warning", source, "Plug the Mac in: hours of training empty a battery.")
    else:
        yield Check("power", "ok", source)
    if settings.get("lowpowermode") == "1":
        yield Check("low power mode", "warning", "on", "Turn it off in System Settings, Battery: it slows the Mac.")
    sleep = settings.get("sleep", "")
    if sleep.isdigit() and int(sleep) > 0 and "sleep prevented by" not in settings:
        yield Check(
            "sleep",
            "warning",
            f"after {int(sleep)} idle minutes",
            "Run caffeinate -is true-kd distill ..., and leave the lid open: nothing keeps a closed Mac awake.",
        )
    elif sleep:
        by = settings.get("sleep prevented by")
        yield Check("sleep", "ok", f"prevented by {by}" if by else "never by itself" if sleep == "0" else sleep)


def judge_wired(text: str, memory: int) -> Check:
    """What the limit on memory that the GPU keeps means, by `sysctl -n iogpu.wired_limit_mb`; 0 is the system's own."""
    if not text.strip().isdigit():
        return Check("gpu memory", "ok", "the limit on wired memory is unknown: sysctl does not say")
    limit = int(text) * 2**20
    if limit > METAL_SHARE * memory:
        # https://github.com/ml-explore/mlx/issues/3186
        return Check(
            "gpu memory",
            "warning",
            f"{in_bytes(limit)} of {in_bytes(memory)} may be wired",
            "Kernel panics came with nearly all of it wired: run sudo sysctl iogpu.wired_limit_mb=0 for the default.",
        )
    return Check("gpu memory", "ok", f"{in_bytes(limit)} may be wired" if limit else "the system's own limit")
