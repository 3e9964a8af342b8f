"""The adapter as mlx-lm reads it, in a folder of its own.

The weights are the same bytes. The config gets `lora_parameters.alpha`, which mlx-lm passes over: Ollama, where it
still reads adapters of mlx-lm, takes it for scale times rank, and without it applies the update once.
"""

from __future__ import annotations

from pathlib import Path

from true_kd import adapters
from true_kd.exporting.checking import Measured, Original, open_in_float32
from true_kd.exporting.reading import Adapter


def write(adapter: Adapter, folder: Path) -> None:
    """Write both files."""
    adapters.copy_adapter(adapter.folder, folder, adapter.alpha)


def measure(adapter: Adapter, folder: Path, original: Original) -> Measured:
    """Put the copy on the student; its logits must be the original's to the last bit."""
    model = open_in_float32(adapter.student)
    adapters.load_adapter(model.module, folder)
    return original.compare_logits(original.read(model.module), 0.0)
