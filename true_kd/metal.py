"""What macOS has to know before Metal starts; imports no mlx. Untested on a Mac, like all Metal parts."""

from __future__ import annotations

import os

VARIABLE = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
"""Read by the GPU driver when a process first uses the GPU."""

DISPLAY_ADVICE = (
    "Let the display sleep while training: macOS stops GPU work that holds up a lit display, and may restart the Mac.",
    "Keep the Mac itself awake with `caffeinate -is`; `caffeinate -dis` keeps the display lit and brings that on.",
    "Take smaller steps: a smaller training.batch_size, shorter sequences, or less memory for a micro-batch.",
)
"""For a Mac with a display, one line each; reports are in https://github.com/ml-explore/mlx/issues/3267."""


_MEMORY = (
    "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    "Insufficient Memory",
    "[METAL] Command buffer execution failed: Out",
)
_WATCHDOG = ("kIOGPUCommandBufferCallbackErrorImpactingInteractivity", "kIOGPUCommandBufferCallbackErrorTimeout")


def ran_out_of_memory(words: str) -> bool:
    """Whether a process that Metal aborted said on stderr that memory ran out."""
    return any(sign in words for sign in _MEMORY)


def is_watchdog(words: str) -> bool:
    """Whether a process that Metal aborted said on stderr that its work held up the display; see mlx#3267."""
    return any(sign in words for sign in _WATCHDOG)


def relax_watchdog() -> None:
    """Ask the driver for patience with long GPU work, unless the user has said otherwise; before mlx is imported.

    A maintainer's suggestion in mlx#3267 against `kIOGPUCommandBufferCallbackErrorImpactingInteractivity`, not always
    enough: see `DISPLAY_ADVICE`. Other systems do not read the variable.
    """
    os.environ.setdefault(VARIABLE, "1")
