"""The adapter as mlx-lm reads it, in a folder of its own.

The weights are the same bytes. The config gets `lora_parameters.alpha`, which mlx-lm passes over: Ollama, where it
still reads adapters of mlx-lm, takes it for scale times rank, and without it applies the update once.
"""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from true_kd import adapters
from true_kd.exporting.checking import Measured, Original, open_in_float32
from true_kd.exporting.exporter import Exporter, Request
from true_kd.exporting.reading import Adapter


def check(adapter: Adapter, request: Request) -> None:
    """There is nothing that mlx-lm does not take from itself."""


def write(adapter: Adapter, folder: Path, request: Request, base: str | None) -> tuple[str, ...]:
    """Write both files."""
    adapters.copy_adapter(adapter.folder, folder, adapter.alpha)
    return ()


def measure(adapter: Adapter, folder: Path, original: Original, plain: nn.Module | None) -> Measured:
    """Put the copy on the student; its logits must be the original's to the last bit."""
    model = open_in_float32(adapter.student)
    adapters.load_adapter(model.module, folder)
    return original.compare_logits(original.read(model.module), 0.0)


EXPORTER = Exporter(check, write, measure)
